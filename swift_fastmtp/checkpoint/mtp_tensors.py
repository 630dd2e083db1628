"""The tensors of an MTP layer, each accounted for, and files of tensors that appear whole."""

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from ..errors import FastMTPError, cannot_write
from ..families.family import Family
from ..files.staging import staged
from . import fp8
from .checkpoint import Checkpoint
from .finite import is_finite
from .fp8_config import SCALE


def read_head(checkpoint: Checkpoint, family: Family, expected: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """The head's tensors of a checkpoint, each accounted for by name, shape and finiteness.

    Args and errors as `head_reader`.
    """
    read = head_reader(checkpoint, family, expected)
    return {name: read(name) for name in expected}


def check_head(checkpoint: Checkpoint, family: Family, expected: dict[str, tuple[int, ...]]) -> None:
    """Raises as `read_head`, without keeping more than one tensor."""
    read = head_reader(checkpoint, family, expected)
    for name in expected:
        read(name)


def head_reader(
    checkpoint: Checkpoint, family: Family, expected: dict[str, tuple[int, ...]]
) -> Callable[[str], torch.Tensor]:
    """A function that reads one of the head's tensors; for heads that should not be in memory as a whole.

    Args:
        checkpoint: a full or a head-only one.
        family: the model's row; the config.json of a run's checkpoint may name another architecture.
        expected: name → shape of every tensor the head must have (`loading.head_shapes`).

    FP8 in blocks is read as the float32 values that it stands for. Raises `FastMTPError` naming the first tensor that
    is missing or unknown; the function, if the one it reads is misshapen, quantized otherwise or not finite.
    """
    folder, lost = checkpoint.folder, checkpoint.lost
    names = sorted(n for n in checkpoint.file_of if family.owns(n) and not family.is_copy(n))
    # The layer is lost, whole or in part: where it may be, from the likeliest.
    missing = [n for n in expected if n not in checkpoint.file_of]
    elsewhere = checkpoint.elsewhere(family) if missing else None
    if elsewhere and (not names or set(missing) <= elsewhere.names):
        raise FastMTPError(f"{folder}: {elsewhere.text}")
    if not names and not any(n in lost for n in missing):
        raise FastMTPError(
            f"{folder}: no tensor under '{family.root}.'; this checkpoint lost its MTP layer (saving through plain "
            "transformers drops it): `fastmtp graft` takes the tensors from the original model"
        )
    # It is another model's.
    projection = f"{family.names.prefix}.{family.names.proj}.weight"
    if projection in checkpoint.file_of and checkpoint.shape(projection)[:1] != expected[projection][:1]:
        raise FastMTPError(
            f"{folder}: the MTP layer has hidden size {checkpoint.shape(projection)[0]}, the model "
            f"{expected[projection][0]}; it belongs to another model"
        )
    for name in missing:
        file, listed = lost.get(name), ""
        if file:
            state = checkpoint.chosen.missing.get(file)
            listed = f" (the index has it in {file}, which {f'is {state}' if state else 'lacks it'})"
        raise FastMTPError(f"{folder}: MTP tensor {name} is missing{listed}; download or export the checkpoint again")
    # There is more than the layer has.
    for name in names:
        if name.removesuffix(SCALE) not in expected:
            why = "engines would load it over another one"
            if family.is_other_layer(name):
                why = "it is of a second MTP layer, and FastMTP shares one between all steps: keep one"
            raise FastMTPError(f"{folder}: unexpected MTP tensor {name}; {why}")

    def read(name: str) -> torch.Tensor:
        if checkpoint.shape(name) != expected[name]:
            raise FastMTPError(
                f"{folder}: {name} has shape {list(checkpoint.shape(name))}, config.json says {list(expected[name])}"
            )
        tensor = read_plain(checkpoint, name)
        if not is_finite(tensor):
            raise FastMTPError(f"{folder}: {name} holds NaN or infinite values; the checkpoint is broken")
        return tensor

    return read


def read_plain(checkpoint: Checkpoint, name: str) -> torch.Tensor:
    """A tensor as numbers: FP8 in blocks becomes float32, everything else is as stored.

    Raises `FastMTPError` for other quantized forms.
    """
    tensor, scaled = checkpoint.read(name), name + SCALE in checkpoint.file_of
    if tensor.dtype == fp8.DTYPE and scaled:
        if checkpoint.blocks is None:
            raise FastMTPError(f"{checkpoint.folder}: {name} is FP8 in blocks, of which config.json says nothing")
        try:
            return fp8.dequantize(tensor, checkpoint.read(name + SCALE), checkpoint.blocks)
        except FastMTPError as error:
            raise FastMTPError(f"{checkpoint.folder}: {name}: {error}") from None
    if not tensor.is_floating_point() or tensor.element_size() < 2 or scaled:
        what = f"{tensor.dtype} {'beside' if scaled else 'without'} {name + SCALE}"
        raise FastMTPError(
            f"{checkpoint.folder}: {name} is stored as {what}; a quantized MTP layer cannot be trained, unless it is "
            "FP8 in blocks: start from the unquantized checkpoint"
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
