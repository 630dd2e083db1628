"""Checkpoint folders as files: tensors by name, without building or loading a model.

Which files are read is `weight_files.resolve`'s to say. All weights are read with safetensors; nothing here unpickles.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..errors import FastMTPError, cannot_write
from ..families.family import Family, config_value, is_embedding
from ..files import inputs
from ..files.staging import staged
from . import fp8
from .config_file import read_config
from .finite import is_finite
from .fp8_config import read_blocks
from .headers import Entry, entries_of, layer_elsewhere
from .weight_files import resolve

SETTINGS_FILE = "fastmtp.json"


WEIGHTS_FILE = "model.safetensors"


_DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64", "F8_E4M3": "float8_e4m3fn",
           "F8_E5M2": "float8_e5m2", "I8": "int8", "U8": "uint8", "I32": "int32", "I64": "int64"}  # fmt: skip


class Weights:
    """The tensors of a checkpoint folder. Raises `FastMTPError` for missing, unreadable or duplicated ones."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.chosen = resolve(self.folder)
        self.files = list(self.chosen.files)
        self.file_of: dict[str, Path] = {}
        for path in self.files:
            for name in _open(path).keys():  # noqa: SIM118 (safe_open is not a dict)
                if name in self.file_of:
                    raise FastMTPError(f"{path}: {name} is also in {self.file_of[name].name}; remove the stale one")
                self.file_of[name] = path
        self.lost = {n: file for n, file in (self.chosen.index or {}).items() if n not in self.file_of}
        """Name → file of tensors that the index lists and no file holds; what is needed says who needs it."""

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(_open(self.file_of[name]).get_slice(name).get_shape())

    def entries(self) -> dict[str, Entry]:
        """What every tensor is and where it lies, by the files' headers."""
        return {name: entry for path in self.files for name, entry in entries_of(path).items()}

    def dtypes(self) -> dict[str, str]:
        """Type of every tensor, as torch calls it; as safetensors does where torch has none."""
        return {name: _DTYPES.get(entry.dtype, entry.dtype) for name, entry in self.entries().items()}

    def sizes(self) -> dict[str, int]:
        """Bytes of every tensor, by the files' headers."""
        return {name: entry.size for name, entry in self.entries().items()}

    def read(self, name: str) -> torch.Tensor:
        tensor: torch.Tensor = _open(self.file_of[name]).get_tensor(name)
        return tensor

    def has_backbone(self, config: dict[str, Any]) -> bool:
        """Whether the model is here too, not only its MTP layer: what tells is the output matrix, which may be tied.

        By the index too, so that a download that lacks a shard is not taken for a draft.
        """
        tied = bool(config_value(config, "tie_word_embeddings"))
        names = (*self.file_of, *self.lost)
        return any(n == "lm_head.weight" or (tied and is_embedding(n)) for n in names)

    def under(self, *paths: str) -> list[str]:
        """Names below module paths, sorted."""
        return sorted(n for n in self.file_of if n.startswith(tuple(f"{path}." for path in paths)))


def _open(path: Path) -> Any:
    inputs.check_file(path)  # of a pipe, safetensors would wait for the end
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise FastMTPError(f"{path}: not a readable safetensors file ({error}); download it again") from None


def read_head(folder: str | Path, family: Family, expected: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """The head's tensors of a checkpoint, each accounted for by name, shape and finiteness.

    Args and errors as `head_reader`.
    """
    read = head_reader(folder, family, expected)
    return {name: read(name) for name in expected}


def check_head(folder: str | Path, family: Family, expected: dict[str, tuple[int, ...]]) -> None:
    """Raises as `read_head`, without keeping more than one tensor."""
    read = head_reader(folder, family, expected)
    for name in expected:
        read(name)


def head_reader(
    folder: str | Path, family: Family, expected: dict[str, tuple[int, ...]]
) -> Callable[[str], torch.Tensor]:
    """A function that reads one of the head's tensors; for heads that should not be in memory as a whole.

    Args:
        folder: a full or a head-only checkpoint.
        family: its row.
        expected: name → shape of every tensor the head must have (`modeling.head_shapes`).

    FP8 in blocks is read as the float32 values that it stands for. Raises `FastMTPError` naming the first tensor that
    is missing or unknown; the function, if the one it reads is misshapen, quantised otherwise or not finite.
    """
    weights = Weights(folder)
    found = sorted(n for n in weights.file_of if family.owns(n) and not family.is_copy(n))
    missing = [n for n in expected if n not in weights.file_of]
    elsewhere = layer_elsewhere(folder, family) if missing else None
    if elsewhere and (not found or set(missing) <= elsewhere.names):
        raise FastMTPError(f"{folder}: {elsewhere.text}")
    if not found and not any(n in weights.lost for n in missing):
        raise FastMTPError(
            f"{folder}: no tensor under '{family.root}.'; this checkpoint lost its MTP layer (saving through plain "
            "transformers drops it): `fastmtp graft` takes the tensors from the original model"
        )
    projection = f"{family.names.prefix}.{family.names.proj}.weight"
    if projection in weights.file_of and weights.shape(projection)[:1] != expected[projection][:1]:
        raise FastMTPError(
            f"{folder}: the MTP layer has hidden size {weights.shape(projection)[0]}, the model "
            f"{expected[projection][0]}; it belongs to another model"
        )
    for name in missing:
        file, listed = weights.lost.get(name), ""
        if file:
            state = weights.chosen.missing.get(file)
            listed = f" (the index has it in {file}, which {f'is {state}' if state else 'lacks it'})"
        raise FastMTPError(f"{folder}: MTP tensor {name} is missing{listed}; download or export the checkpoint again")
    for name in found:
        if name.removesuffix(fp8.SCALE) not in expected:
            why = "engines would load it over another one"
            if family.is_other_layer(name):
                why = "it is of a second MTP layer, and FastMTP shares one between all steps: keep one"
            raise FastMTPError(f"{folder}: unexpected MTP tensor {name}; {why}")

    def read(name: str) -> torch.Tensor:
        if weights.shape(name) != expected[name]:
            raise FastMTPError(
                f"{folder}: {name} has shape {list(weights.shape(name))}, config.json says {list(expected[name])}"
            )
        tensor = read_plain(weights, name)
        if not is_finite(tensor):
            raise FastMTPError(f"{folder}: {name} holds NaN or infinite values; the checkpoint is broken")
        return tensor

    return read


def read_plain(weights: Weights, name: str) -> torch.Tensor:
    """A tensor as numbers: FP8 in blocks becomes float32, everything else is as stored.

    Raises `FastMTPError` for other quantised forms.
    """
    tensor, scaled = weights.read(name), name + fp8.SCALE in weights.file_of
    if tensor.dtype == fp8.DTYPE and scaled:
        blocks = read_blocks(read_config(weights.folder), weights.folder / "config.json")
        if blocks is None:
            raise FastMTPError(f"{weights.folder}: {name} is FP8 in blocks, of which config.json says nothing")
        try:
            return fp8.dequantise(tensor, weights.read(name + fp8.SCALE), blocks)
        except FastMTPError as error:
            raise FastMTPError(f"{weights.folder}: {name}: {error}") from None
    if not tensor.is_floating_point() or tensor.element_size() < 2 or scaled:
        what = f"{tensor.dtype} {'beside' if scaled else 'without'} {name + fp8.SCALE}"
        raise FastMTPError(
            f"{weights.folder}: {name} is stored as {what}; a quantised MTP layer cannot be trained, unless it is FP8 "
            "in blocks: start from the unquantised checkpoint"
        )
    return tensor


def save_tensors(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Write a safetensors file that appears whole or not at all. Raises `FastMTPError` if it cannot be written."""
    with staged(path) as file:
        try:
            save_file({n: t.detach().cpu().contiguous() for n, t in tensors.items()}, file, metadata={"format": "pt"})
        except SafetensorError as error:
            raise cannot_write(path, error) from None
        file.chmod(0o644)  # safetensors writes 0600
