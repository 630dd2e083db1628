"""MTP layers kept where a save loses them.

transformers loads no MTP layer, so what a trainer or a merge saves has none. The base model's files still hold it: its
tensors are put beside the saved ones, byte for byte, in a shard of their own, and config.json says again what engines
look for. `graft` makes a new folder and casts the layer to the model's dtype; here a folder that was just saved is
completed, and nothing is cast. MTP tensors in files that the base's index does not list are read too. Layers that
remote code saved with the model stay as they were saved.

All is written in a hidden folder first. The files move into place one by one, the index last, which lists them.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.headers import Entry, whole_entries
from ..checkpoint.quantization import read_quantization
from ..checkpoint.shards import copy_tensors, tensor_hashes
from ..checkpoint.weight_files import INDEX_FILE
from ..errors import FastMTPError
from ..families.family import Family, config_value
from ..families.refused import Layout, known_layout
from ..families.table import FAMILIES, match_family
from ..files.copies import link_or_copy
from ..files.staging import new_files, write_json
from .folders import write_index
from .graft import HEAD_FILE, RENAMED, SINGLE
from .graft_config import changes, remote_code, with_head
from .inspection import MTP_WORD, mtp_names, odd_names, size

_PLAIN = ("BF16", "F16", "F32", "F64")


def is_adapter(folder: Path) -> bool:
    """Whether a checkpoint holds an adapter only, which stays as it is: the merged model keeps the MTP layer."""
    return (folder / "adapter_config.json").exists()


@dataclass(frozen=True)
class Layers:
    """The MTP layers of a base model, as its files hold them."""

    base: Checkpoint
    family: Family | None
    """Its row; None: a layout that is not trained here, which is kept all the same."""
    entries: dict[str, Entry]
    """Name → where each tensor is."""

    @property
    def summary(self) -> str:
        """Their number, size and origin."""
        return f"{len(self.entries)} MTP tensors ({size(sum(e.size for e in self.entries.values()))}) of {self.base}"


def find_layers(base_model: str | Path) -> Layers | None:
    """The MTP layers of a base model; None if it has none.

    Args:
        base_model: folder of the model that training starts from.

    Raises `FastMTPError` if it has one that cannot be kept: in part in no file, under names that no engine looks for,
    or quantized, where what is saved is not.
    """
    base = Checkpoint(base_model)
    architectures = [str(a) for a in base.config.get("architectures") or []]
    known = any(set(architectures) & set(family.architectures) for family in FAMILIES)
    family = base.family if known else None
    layout = None if family else known_layout(architectures)
    if family is None and layout is None:
        return None
    entries = _stored(base, family, layout)
    if not entries:
        return None
    quantized = sorted(name for name, entry in entries.items() if entry.dtype not in _PLAIN)
    if quantized and read_quantization(base.config, base.folder):
        name = quantized[0]
        raise FastMTPError(
            f"{base}: its MTP layer is quantized ({name} is {entries[name].dtype}), and a trained or merged model is "
            f"saved unquantized; afterwards `fastmtp graft --donor {base}` puts the layer in as plain numbers"
        )
    return Layers(base, family, entries)


def _stored(base: Checkpoint, family: Family | None, layout: Layout | None) -> dict[str, Entry]:
    """Name → where it is stored, also in files that the index forgot. Raises as `find_layers`."""
    _ = base.entries  # raises where a file is damaged
    names = mtp_names(base.headers, base.config, family, layout, odd_names(base.entries, base.config))
    entries = {name: base.entries[name] for name in names}
    if family is None:
        return entries
    elsewhere = base.elsewhere(family)
    for path, name in elsewhere.places if elsewhere else ():
        if elsewhere and name not in elsewhere.names:
            raise FastMTPError(f"{base}: {elsewhere.text}; so they cannot be kept")
        if name in entries:
            raise FastMTPError(f"{base}: {name} is in {entries[name].file.name} and in {path.name}; remove one")
        entries[name] = whole_entries(path)[name]
    lost = sorted(name for name in base.lost if family.owns(name) and name not in entries)
    if lost:
        raise FastMTPError(
            f"{base}: MTP tensor {lost[0]} is in no file, the index has it in {base.lost[lost[0]]} ({len(lost)} such "
            "tensors); download the model again"
        )
    return entries


def keep_layers(layers: Layers, folder: str | Path) -> str:
    """Complete a folder that was just saved with the base's MTP layers. Returns one line: what was done.

    Args:
        layers: of the base model.
        folder: a full checkpoint, as transformers saves it.

    Raises `FastMTPError` naming what does not fit, or cannot be written; the folder is then as it was.
    """
    saved = Checkpoint(folder)
    stored, single = _saved(saved)
    absent = {name: entry for name, entry in layers.entries.items() if name not in stored}
    if not absent:
        return f"{saved}: {len(layers.entries)} MTP tensors were saved with the model and stay as they are"
    if read_quantization(saved.config, saved.folder):
        raise FastMTPError(
            f"{saved}: was saved quantized, and engines would take the MTP layer for quantized too; "
            f"`fastmtp graft --model {saved} --donor {layers.base} --draft_only` writes it beside the model"
        )
    config = _config(layers, saved)
    weight_map = {name: entry.file.name for name, entry in stored.items()}
    if single:
        weight_map = dict.fromkeys(stored, RENAMED)
    weight_map |= dict.fromkeys(absent, HEAD_FILE)
    total = sum(entry.size for entry in (*stored.values(), *absent.values()))
    with new_files(saved.folder, INDEX_FILE) as new:
        hashes = copy_tensors(absent, new / HEAD_FILE)
        if tensor_hashes(new / HEAD_FILE) != hashes:
            raise FastMTPError(f"{saved.folder / HEAD_FILE}: reads back with other values; the disk may be faulty")
        if single:
            link_or_copy(single, new / RENAMED)
        notes = changes(saved.config, config)
        notes += remote_code(config, saved.folder, layers.base.folder, new)
        write_json(config, new / "config.json")
        write_index(new, weight_map, total)
    if single:
        single.unlink()  # last: until then transformers reads this file, and engines the index, of the same values
    return "; ".join([f"{saved}: {layers.summary} are kept in {HEAD_FILE}, byte for byte", *notes])


def _saved(checkpoint: Checkpoint) -> tuple[dict[str, Entry], Path | None]:
    """The tensors of a folder that transformers has just written into, and the file that it loads without an index.

    A run that goes on from an earlier checkpoint may write into a folder that was completed before: an index and a
    shard of MTP tensors beside `model.safetensors` are then left of that.
    """
    single = checkpoint.folder / SINGLE
    if single.exists():
        return whole_entries(single), single
    if not any(checkpoint.folder.glob("*.safetensors")):
        raise FastMTPError(
            f"{checkpoint}: no *.safetensors file was saved, beside which the MTP layer could be kept; save as "
            "safetensors, gathered (DeepSpeed: stage3_gather_16bit_weights_on_model_save)"
        )
    entries = checkpoint.entries
    return {name: entry for name, entry in entries.items() if entry.file.name != HEAD_FILE}, None


def _config(layers: Layers, saved: Checkpoint) -> dict[str, Any]:
    """config.json of a saved model with what it lost. Raises `FastMTPError` if it is another model than the base."""
    theirs = layers.base.config
    config = _with_mtp_keys(saved.config, theirs)
    family = layers.family
    if family is None:
        for key in ("architectures", "model_type"):
            if config.get(key) != theirs.get(key):
                raise FastMTPError(f"{saved.config_file}: {key} is {config.get(key)}, the base's is {theirs.get(key)}")
        new = config
    else:
        layers_key = family.engines.num_layers_key
        new = with_head(config, theirs, family, saved.folder, config_value(theirs, layers_key) or 1)
        match_family(new, saved.config_file)
    for key in ("num_hidden_layers", "hidden_size"):
        ours, base = config_value(new, key), config_value(theirs, key)
        if ours != base:
            raise FastMTPError(
                f"{saved.config_file}: {key} is {ours}, the base's is {base}; its MTP layer does not fit"
            )
    return new


def _with_mtp_keys(config: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    """config.json with the base's own values of the keys that are about MTP layers."""
    new = {**config, **{key: value for key, value in theirs.items() if MTP_WORD.search(key)}}
    text, base_text = config.get("text_config"), theirs.get("text_config")
    if isinstance(text, dict) and isinstance(base_text, dict):
        new["text_config"] = {**text, **{key: value for key, value in base_text.items() if MTP_WORD.search(key)}}
    return new
