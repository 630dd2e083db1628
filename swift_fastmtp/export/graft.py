"""Give a backbone its MTP layer back: `fastmtp graft`.

Fine-tuning, merging and RL tools save what transformers loaded, and transformers loads no MTP layer. The base model
still has it. Here its tensors are put beside the tuned weights: the tuned files stay byte for byte, the head becomes a
shard of its own, and config.json says again what the engines and our trainer look for. The head was trained for other
hidden states than those it now gets, so a graft is a start, and `swift sft` heals it.

Tensors are read, cast, checked and written one at a time: memory is the largest of them, whatever the model's size.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.headers import Headers
from ..checkpoint.mtp_tensors import head_reader
from ..checkpoint.refusals import find_family
from ..checkpoint.shards import DTYPES, TORCH, copy_without, overwrite_tensors, tensor_hashes, write_tensors
from ..checkpoint.weight_files import INDEX_FILE
from ..errors import FastMTPError
from ..families.family import Family, config_value, is_embedding
from ..families.table import FAMILIES, match_family
from ..files.copies import file_hash, link_or_copy
from ..files.paths import check_link, files_of
from ..files.staging import new_folder, try_output, write_json
from .dense import Dense, as_qwen2, is_qwen2s
from .folders import RUN_FILES, write_index
from .inspection import size

HEAD_FILE = "model-mtp.safetensors"
ADDED_FILE = "model-added.safetensors"
"""What `dense.as_qwen2` adds to the backbone."""
SINGLE = "model.safetensors"
"""What transformers loads without a look at an index."""
RENAMED = "model-00001-of-00002.safetensors"
_SIZES = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim", "hidden_act")


@dataclass(frozen=True)
class Graft:
    """What was done, for people: the family, the head, and everything a reader should know."""

    family: str
    tensors: int
    size: int
    notes: list[str]


def graft(
    model: str | Path,
    output_dir: str | Path,
    donor: str | Path | None = None,
    init_from_last_layer: bool = False,
    fit_on: str | None = None,
    max_rows: int | None = None,
    overwrite: bool = False,
) -> Graft:
    """Write `model` with an MTP layer to `output_dir`.

    Args:
        model: folder of the fine-tuned, merged or RL-trained model, full weights in safetensors files
        output_dir: folder to write; must not exist
        donor: folder of a model of the same sizes that has the layer: the base model, or a head that was trained
        init_from_last_layer: where there is no donor, make a layer from the backbone's last one (`init_head.py`)
        fit_on: conversations with answers, the model's own at best: with --init_from_last_layer, on which the layer's
            projection is fitted (`fit_head.py`; the model is loaded in float32)
        max_rows: of those, from the top; default: all
        overwrite: replace an MTP layer that the model has

    Raises `FastMTPError` naming the file, key or tensor that does not fit.
    """
    try_output(output_dir)
    if (donor is None) != init_from_last_layer:
        raise FastMTPError("graft: pass either --donor BASE or --init_from_last_layer")
    if fit_on and donor:
        raise FastMTPError("--fit_on fits a new layer; the donor's is taken as it is, drop one of the two")
    tuned = Checkpoint(model)
    giver = Checkpoint(donor) if donor else None
    if (tuned.folder / "adapter_config.json").exists():
        raise FastMTPError(
            f"{model}: holds a LoRA adapter, not a model; merge it first (swift export --merge_lora true)"
        )
    headers = _sound(tuned)
    if tuned.blocks:
        raise FastMTPError(f"{model}: is quantized; graft into the unquantized checkpoint and quantize the result")
    theirs = giver.config if giver else None
    # A dense model of a layout that no engine drafts with becomes one of a layout that they do.
    dense = as_qwen2(tuned) if not giver or is_qwen2s(giver.trainable_family) else None
    config = dense.config if dense else tuned.config
    family = giver.trainable_family if giver else _family_of(config, tuned.config_file)
    new_config = with_head(config, theirs, family, tuned.folder)
    notes = changes(tuned.config, new_config) + (dense.notes if dense else [])
    if family.names.prefix != find_family(new_config, tuned.config_file).names.prefix:
        raise FastMTPError(
            f"{tuned.config_file}: num_hidden_layers is {config.get('num_hidden_layers')}, in {donor} it is "
            f"{(theirs or {}).get('num_hidden_layers')}; the MTP layer is numbered after it"
        )
    stale, dropped = _stale(tuned, family, overwrite)
    if giver:
        notes += _compare(tuned, giver)
    dtype = _dtype(tuned)
    with new_folder(output_dir) as out:
        write_json(new_config, out / "config.json")
        notes += remote_code(new_config, tuned.folder, giver.folder if giver else None, out)
        from ..model.loading import head_shapes, keeps_float32  # builds the head on the meta device

        result = Checkpoint(out)  # of its files, only config.json is there yet
        notes += _index_notes(tuned, result)
        expected = head_shapes(result, giver or tuned)
        dtypes = {n: torch.float32 if keeps_float32(family, n) else dtype for n in expected}
        weight_map = _copy_files(tuned.folder, out, headers, stale, dropped)
        read = head_reader(giver, family, expected) if giver else _fresh(dense, tuned, result, family, expected)
        hashes = write_tensors(out / HEAD_FILE, {n: (dtypes[n], s) for n, s in expected.items()}, read)
        weight_map.update(dict.fromkeys(expected, HEAD_FILE))
        added = dense.added if dense else {}
        if dense:
            dtypes |= dict.fromkeys(added, dtype)
            write_tensors(out / ADDED_FILE, {n: (dtype, s) for n, s in added.items()}, dense.read)
            weight_map.update(dict.fromkeys(added, ADDED_FILE))
        write_index(out, weight_map)
        if fit_on:
            from .fit_head import fit_line, fit_projection

            fit = fit_projection(out, fit_on, max_rows)
            name = f"{family.names.prefix}.{family.names.proj}.weight"
            weight = fit.weight.to(dtypes[name])
            hashes |= overwrite_tensors(out / HEAD_FILE, [name], {name: weight}.__getitem__)
            notes.append(fit_line(fit))
        _verify(out, headers, stale, expected, hashes, dtypes, added)
    nbytes = sum(torch.Size(s).numel() * dtypes[n].itemsize for n, s in expected.items())
    come_from = f"from {donor}" if donor else "made from the last decoder layer"
    first = f"{len(expected)} MTP tensors, {size(nbytes)} of {_name(dtype)}, {come_from}"
    return Graft(family.name, len(expected), nbytes, [first, *notes])


def _sound(model: Checkpoint) -> Headers:
    _ = model.entries  # raises where a file is damaged
    headers = model.headers
    if SINGLE not in {f.name for f in headers.files} and (model.folder / SINGLE).exists():
        raise FastMTPError(
            f"{model.folder / SINGLE}: is not in the index, but transformers loads it instead; remove one"
        )
    return headers


def _index_notes(model: Checkpoint, result: Checkpoint) -> list[str]:
    """What the model's index lists and nobody holds. Raises `FastMTPError` if the backbone needs any of it.

    `result` has the config.json by which the backbone is built.
    """
    from ..model.loading import needed_tensors

    lost = [name for name in model.lost if not result.family.owns(name)]
    if needed := needed_tensors(result, lost, model.entries):
        file = model.lost[needed[0]]
        raise FastMTPError(
            f"{model}: {needed[0]} is in no file, the index has it in {file} ({len(needed)} such tensors); download "
            "the checkpoint again"
        )
    if not lost:
        return []
    return [f"{INDEX_FILE}: {len(lost)} tensors that no file holds, as {min(lost)}, are not listed any more"]


def _family_of(config: dict[str, Any], config_file: Path) -> Family:
    """The row of a model without a donor: by its architecture, or by the transformers class that runs the backbone."""
    architectures = config.get("architectures") or []
    rows = [f for f in FAMILIES if f.backbone.split(":")[1] in architectures]
    if len(rows) == 1:
        config = {**config, "architectures": rows[0].architectures}
    return match_family(config, config_file)


def _stale(model: Checkpoint, family: Family, overwrite: bool) -> tuple[set[str], set[Path]]:
    """Tensors of an MTP layer that the model has, wherever they are, and the unlisted files that hold some."""
    elsewhere = model.elsewhere(family)
    if elsewhere and not overwrite:
        raise FastMTPError(f"{model}: {elsewhere.text}; or --overwrite replaces them")
    places = elsewhere.places if elsewhere else ()
    stale = sorted(n for n in model.entries if family.owns(n))
    if stale and not overwrite:
        raise FastMTPError(
            f"{model}: holds {len(stale)} MTP tensors already, as {stale[0]}; --overwrite replaces them, "
            "`fastmtp inspect` tells what they are"
        )
    loaded = set(model.files)
    misnamed = {name for path, name in places if path in loaded}
    return {*stale, *misnamed}, {path for path, _ in places if path not in loaded}


def with_head(
    config: dict[str, Any], theirs: dict[str, Any] | None, family: Family, model: Path, layers: int = 1
) -> dict[str, Any]:
    """config.json with what a save through transformers lost, and the number of MTP layers.

    Raises `FastMTPError` if the model's architecture is not the donor's, nor the one that runs its backbone.
    """
    new = dict(config)
    architectures = config.get("architectures") or []
    kept = any(a in family.architectures for a in architectures)
    plain = family.backbone.split(":")[1]
    if not kept and plain not in architectures:
        raise FastMTPError(
            f"{model / 'config.json'}: architectures {architectures}; a {family.name} head fits {plain} or "
            f"{', '.join(family.architectures)} only"
        )
    if not kept:
        new["architectures"] = (theirs or {}).get("architectures") or [family.architectures[0]]
    lost_code = config.get("model_type") == (theirs or {}).get("model_type") and not config.get("auto_map")
    if theirs and (not kept or lost_code):
        new["model_type"] = theirs.get("model_type")
        new.pop("auto_map", None)
        if theirs.get("auto_map"):
            new["auto_map"] = theirs["auto_map"]
    elif not theirs and family.plain_model_type and any(not (model / n).exists() for n in _code_files(new)):
        new.pop("auto_map")
    if new.get("model_type") == family.model_type and not new.get("auto_map") and family.plain_model_type:
        new["model_type"] = family.plain_model_type  # transformers does not know the other one without remote code
    text = new.get("text_config")
    lost = [k for k in family.engines.needed_keys if config_value(config, k) is None]
    back = {k: value for k in lost if (value := config_value(theirs or {}, k)) is not None}
    if not isinstance(text, dict):
        new.update(back)
        new[family.engines.num_layers_key] = layers
    elif family.engines.num_layers_key in ((theirs or {}).get("text_config") or text):
        new["text_config"] = {**text, **back, family.engines.num_layers_key: layers}
    else:
        new["text_config"] = {**text, **back}
        new[family.engines.num_layers_key] = layers
    return new


def changes(config: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """A note for each key of config.json that changed."""
    changed = [k for k in {**config, **new} if config.get(k) != new.get(k)]
    return [f"config.json: {k} is {new.get(k)}, was {config.get(k)}" for k in changed]


def _text(config: dict[str, Any]) -> dict[str, Any]:
    text = config.get("text_config")
    return {**config, **text} if isinstance(text, dict) else config


def _rope(config: dict[str, Any]) -> dict[str, Any]:
    """RoPE settings, alike for transformers 4 (rope_theta, rope_scaling) and 5 (rope_parameters)."""
    rope = dict(config.get("rope_scaling") or config.get("rope_parameters") or {})
    rope["rope_type"] = rope.pop("type", None) or rope.get("rope_type") or "default"
    rope.setdefault("rope_theta", config.get("rope_theta"))
    return rope


def _compare(model: Checkpoint, donor: Checkpoint) -> list[str]:
    """Raises `FastMTPError` for another size; notes where the graft works, but the head starts from further away."""
    ours, base = _text(model.config), _text(donor.config)
    for key in _SIZES:
        a, b = ours.get(key), base.get(key)
        if a is not None and b is not None and a != b:
            raise FastMTPError(f"{model.config_file}: {key} is {a}, in {donor} it is {b}; the head does not fit")
    notes = []
    if _rope(ours) != _rope(base):
        notes.append(f"warning: RoPE is {_rope(ours)}, the donor's is {_rope(base)}; the head gets the model's")
    if ours.get("rms_norm_eps") != base.get("rms_norm_eps"):
        notes.append(f"warning: rms_norm_eps is {ours.get('rms_norm_eps')}, the donor's is {base.get('rms_norm_eps')}")
    if ours.get("vocab_size") != base.get("vocab_size"):
        notes.append(
            f"vocab_size is {ours.get('vocab_size')}, the donor's is {base.get('vocab_size')}: the head has no row per "
            "token, and shares the model's own matrices"
        )
    return notes + _compare_tokenizers(model.folder / "tokenizer.json", donor.folder / "tokenizer.json")


def _compare_tokenizers(ours: Path, theirs: Path) -> list[str]:
    if not ours.exists() or not theirs.exists() or file_hash(ours) == file_hash(theirs):
        return []
    from tokenizers import Tokenizer

    try:
        a, b = (Tokenizer.from_file(str(path)).get_vocab() for path in (ours, theirs))
    except Exception as error:  # noqa: BLE001 (the tokenizers library raises plain exceptions)
        raise FastMTPError(f"{ours}, {theirs}: cannot be read as tokenizers ({error})") from None
    other = sum(a.get(token) != number for token, number in b.items())
    if not other and len(a) == len(b):
        return []  # written by another version of the library
    return [
        f"warning: tokenizer.json differs from the donor's: {other} of its {len(b)} tokens are gone or renumbered, "
        f"{sum(t not in b for t in a)} are new; the head learnt the donor's"
    ]


def _dtype(model: Checkpoint) -> torch.dtype:
    """The backbone's dtype, by its embedding. Raises `FastMTPError` if that does not have config.json's rows."""
    name = next(filter(is_embedding, model.entries), None)
    if name is None:
        raise FastMTPError(f"{model}: no embedding matrix; graft into a full checkpoint")
    entry, ours = model.entries[name], _text(model.config)
    want = (ours.get("vocab_size"), ours.get("hidden_size"))
    if entry.shape != want:
        raise FastMTPError(f"{model}: {name} has shape {list(entry.shape)}, config.json says {list(want)}")
    if entry.dtype not in TORCH or TORCH[entry.dtype].itemsize < 2:
        raise FastMTPError(f"{model}: {name} is stored as {entry.dtype}; graft into the unquantized checkpoint")
    return TORCH[entry.dtype]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _code_files(config: dict[str, Any]) -> set[str]:
    """Files of the folder itself that auto_map names; a value may also point to another repository (`OWNER/NAME--`)."""
    values = (config.get("auto_map") or {}).values()
    named = [v for value in values for v in (value if isinstance(value, list) else [value])]
    return {f"{v.split('.')[0]}.py" for v in named if isinstance(v, str) and "--" not in v}


def remote_code(config: dict[str, Any], model: Path, donor: Path | None, out: Path) -> list[str]:
    """Copy the .py files that auto_map needs and the model lost. Raises `FastMTPError` if nobody has them."""
    lost = sorted(n for n in _code_files(config) if not (model / n).exists())
    if not lost:
        return []
    for name in lost:
        if donor is None or not (donor / name).exists():
            raise FastMTPError(f"{model / 'config.json'}: auto_map names {name}, which is not there; add the file")
    files = sorted(p for p in donor.glob("*.py") if not (model / p.name).exists()) if donor else []
    for source in files:  # remote code imports its neighbors
        check_link(source, source.parent)
        link_or_copy(source, out / source.name)
    return [f"{', '.join(p.name for p in files)}: from the donor"]


def _copy_files(model: Path, out: Path, headers: Headers, stale: set[str], dropped: set[Path]) -> dict[str, str]:
    """Everything but config and index: weights linked, or copied without the stale tensors, other files copied; not
    the `dropped` files. Returns name → file of the tensors.

    A lone `model.safetensors` gets the name of a shard: transformers would load it and never look at the index.
    """
    names = {path: path.name for path in headers.files}
    if set(names.values()) == {SINGLE}:
        names[headers.files[0]] = RENAMED
    if HEAD_FILE in {names[e.file] for n, e in headers.entries.items() if n not in stale}:
        raise FastMTPError(f"{model / HEAD_FILE}: holds other tensors than MTP ones; give that file another name")
    touched = {headers.entries[n].file for n in stale}
    emptied = touched - {e.file for n, e in headers.entries.items() if n not in stale}
    for source in files_of(model):
        skipped = source.name in (*RUN_FILES, "config.json", INDEX_FILE)
        if skipped or source in emptied | dropped:
            continue
        target = out / names.get(source, source.name)
        if source in touched:
            copy_without(source, target, stale)
        else:
            link_or_copy(source, target)
    return {n: names[e.file] for n, e in headers.entries.items() if n not in stale}


def _fresh(
    dense: Dense | None, model: Checkpoint, result: Checkpoint, family: Family, expected: dict[str, tuple[int, ...]]
) -> Callable[[str], torch.Tensor]:
    from ..model.config import load_config
    from .init_head import initial_head

    return initial_head(dense or model, load_config(result), family, expected)


def _verify(
    out: Path,
    before: Headers,
    stale: set[str],
    expected: dict[str, tuple[int, ...]],
    hashes: dict[str, str],
    dtypes: dict[str, torch.dtype],
    added: dict[str, tuple[int, ...]],
) -> None:
    """Read the result back: the backbone's tensors as they were, what was added to it, and exactly these MTP tensors
    with these bytes."""
    after = Checkpoint(out)
    kept = {n: (e.dtype, e.shape) for n, e in before.entries.items() if n not in stale}
    want = {**kept, **{n: (DTYPES[dtypes[n]], s) for n, s in {**added, **expected}.items()}}
    got = {n: (e.dtype, e.shape) for n, e in after.entries.items()}
    if got != want:
        odd = sorted(n for n in {**got, **want} if got.get(n) != want.get(n))
        raise FastMTPError(f"{out}: {odd[0]} reads back as {got.get(odd[0])}, it should be {want.get(odd[0])}")
    if tensor_hashes(out / HEAD_FILE) != hashes:
        raise FastMTPError(f"{out / HEAD_FILE}: reads back with other values; the disk may be faulty")
