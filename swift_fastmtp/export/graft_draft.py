"""An MTP layer beside a model instead of in it: `fastmtp graft --draft_only`.

A quantized checkpoint cannot take the layer: its config.json says that everything is quantized, and what it leaves out
each engine reads otherwise. A dense Llama cannot take it either, unless it becomes another model (`dense.py`). But both
engines draft with a folder that holds the layer alone, in its own precision, for a target of any form: embedding and
output matrix are the target's, which nobody has to write or even to be able to read here.
"""

import os
import shutil
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..checkpoint.checkpoint import SETTINGS_FILE, WEIGHTS_FILE, Checkpoint
from ..checkpoint.fp8_config import SCALE
from ..checkpoint.mtp_tensors import head_reader, read_plain
from ..checkpoint.quantization import read_quantization
from ..checkpoint.shards import DTYPES, tensor_hashes, write_tensors
from ..errors import FastMTPError
from ..families.family import Family, config_value
from ..files.staging import new_folder, write_json
from .dense import as_qwen2, is_qwen2s
from .folders import TOKENIZER_FILES, add_maps
from .graft_config import Graft, changes, compare, dtype_name, family_of, remote_code, with_head
from .inspection import size

_QUANTIZATION_KEYS = ("quantization_config", "compression_config")
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


class _Numbers:
    """A checkpoint in FP8 blocks, as the numbers that it stands for (`init_head.Tensors`)."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint

    @property
    def folder(self) -> Path:
        return self._checkpoint.folder

    @property
    def names(self) -> list[str]:
        return [name for name in self._checkpoint.names if not name.endswith(SCALE)]

    def shape(self, name: str) -> tuple[int, ...]:
        return self._checkpoint.shape(name)

    def read(self, name: str) -> torch.Tensor:
        return read_plain(self._checkpoint, name)


def graft_draft(
    target: Checkpoint,
    giver: Checkpoint | None,
    output_dir: str | Path,
    settings: dict[str, Any] | None = None,
    token_maps: str | Path | None = None,
) -> Graft:
    """Write a draft-only folder for `target`, which stays as it is.

    Args:
        target: the model that will be served with it, of any quantization
        giver: a model of the same sizes that has the layer, or a trained head alone; None: a layer made from the
            target's last one
        output_dir: folder to write
        settings: content of `fastmtp.json`; default: the giver's, without what is not true beside this target
        token_maps: JSON list of languages and maps that the server drafts with

    Raises `FastMTPError` naming the file, key or tensor that does not fit.
    """
    dense = as_qwen2(target) if not giver or is_qwen2s(giver.trainable_family) else None
    config = dense.config if dense else target.config
    family = giver.trainable_family if giver else family_of(config, target.config_file)
    with_layer = with_head(config, giver.config if giver else None, family, target.folder)
    notes = changes(target.config, with_layer)
    new_config = _plain(with_layer)
    if giver:
        notes += compare(target, giver)
    backbone = dense or target if giver else _numbers(target) or dense or target
    dtype = _dtype(target, giver, family)
    with new_folder(output_dir) as out:
        write_json(new_config, out / "config.json")
        notes += remote_code(new_config, target.folder, giver.folder if giver else None, out)
        for source in sorted(target.folder.iterdir()):
            if source.name in TOKENIZER_FILES or (source.suffix == ".py" and new_config.get("auto_map")):
                shutil.copyfile(source, out / source.name)
        from ..model.config import load_config  # transformers, and the head on the meta device
        from ..model.loading import head_shapes, keeps_float32
        from .init_head import initial_head

        result = Checkpoint(out)  # of its files, only config.json is there yet
        expected = head_shapes(result, giver or target)
        dtypes = {n: torch.float32 if keeps_float32(family, n) else dtype for n in expected}
        if giver:
            read = head_reader(giver, family, expected)
        else:
            read = initial_head(backbone, load_config(result), family, expected)
        hashes = write_tensors(out / WEIGHTS_FILE, {n: (dtypes[n], s) for n, s in expected.items()}, read)
        write_json(_settings(target, giver) if settings is None else settings, out / SETTINGS_FILE)
        if token_maps:
            add_maps(out, token_maps)
        _verify(out, expected, hashes, dtypes)
    nbytes = sum(torch.Size(s).numel() * dtypes[n].itemsize for n, s in expected.items())
    come_from = f"from {giver}" if giver else "made from the last decoder layer"
    first = f"{len(expected)} MTP tensors, {size(nbytes)} of {dtype_name(dtype)}, {come_from}; nothing else is written"
    if any(family.owns(n) for n in target.entries):
        notes.append(f"{target} has MTP tensors of its own; engines that are given this folder do not use them")
    return Graft(family.name, len(expected), nbytes, [first, *notes])


def _numbers(target: Checkpoint) -> _Numbers | None:
    """The tensors of a quantized model as numbers; None for one that is not quantized.

    Raises `FastMTPError` for a quantization other than FP8 in blocks, which is not read here.
    """
    quantization = read_quantization(target.config, target.folder)
    if not quantization:
        return None
    try:
        if target.blocks:
            return _Numbers(target)
    except FastMTPError:
        pass  # which says how to train it
    raise FastMTPError(
        f"{target}: is quantized ({quantization.method}), so no layer can be made from its last one; pass --donor with "
        "a model of these sizes that has the layer"
    )


def _plain(config: dict[str, Any]) -> dict[str, Any]:
    """config.json of the layer alone, which is not quantized."""
    config = {key: value for key, value in config.items() if key not in _QUANTIZATION_KEYS}
    if isinstance(text := config.get("text_config"), dict):
        config["text_config"] = {key: value for key, value in text.items() if key not in _QUANTIZATION_KEYS}
    return config


def _dtype(target: Checkpoint, giver: Checkpoint | None, family: Family) -> torch.dtype:
    """What the target computes in, by its config.json; engines load a draft in that type.

    Where that does not say, the donor's.
    """
    for checkpoint in (target, giver):
        stated = None
        if checkpoint is not None:
            stated = config_value(checkpoint.config, "dtype") or config_value(checkpoint.config, "torch_dtype")
        if str(stated) in _DTYPES:
            return _DTYPES[str(stated)]
    if giver:
        stored = {giver.dtypes()[name] for name in giver.names if family.owns(name)}
        if len(known := stored & set(_DTYPES)) == 1:
            return _DTYPES[known.pop()]
    return torch.bfloat16


def _settings(target: Checkpoint, giver: Checkpoint | None) -> dict[str, Any]:
    """`fastmtp.json`: whose draft it is, and how the donor's layer was trained, if it was."""
    trained = dict(giver.settings) if giver else {}
    trained.pop("base_fingerprint", None)  # of the model that it was trained for, which is not this one
    trained.pop("token_map", None)  # a path in the donor's folder
    return {**trained, "swift_fastmtp": __version__, "base_model": os.path.abspath(target.folder)}


def _verify(
    out: Path, expected: dict[str, tuple[int, ...]], hashes: dict[str, str], dtypes: dict[str, torch.dtype]
) -> None:
    """Read the result back: exactly these tensors with these bytes."""
    got = {n: (e.dtype, e.shape) for n, e in Checkpoint(out).entries.items()}
    want = {n: (DTYPES[dtypes[n]], shape) for n, shape in expected.items()}
    if got != want or tensor_hashes(out / WEIGHTS_FILE) != hashes:
        raise FastMTPError(f"{out / WEIGHTS_FILE}: reads back with other values; the disk may be faulty")
