"""What only tensors tell the doctor: names and shapes against a layer that is built, and values that are numbers."""

from collections.abc import Iterator

import torch

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.fingerprint import WHOLE_BELOW
from ..checkpoint.finite import is_finite
from ..checkpoint.fp8 import DTYPE as FP8
from ..checkpoint.fp8_config import SCALE
from ..checkpoint.mtp_tensors import read_plain
from ..checkpoint.quantization import parts_of
from ..checkpoint.quantization_methods import SGLANG
from ..errors import FastMTPError
from ..families.family import Family
from ..model.loading import head_shapes, keeps_float32
from .doctor_quantization import check_dtypes, check_quantization, is_packed, stored_tensors
from .finding import Finding
from .inspection import MTP_WORD

_FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
_SMALL = 2**20  # bytes


def check_layer(checkpoint: Checkpoint, family: Family) -> Iterator[Finding]:
    """Whether the MTP layer is there, all of it and nothing else, and holds numbers.

    Raises `FastMTPError` if config.json has no layer that can be built.
    """
    expected = head_shapes(checkpoint)
    parts = parts_of(family, expected)
    stored = stored_tensors(checkpoint, family, parts)
    present = {n for n in checkpoint.file_of if family.owns(n) and not family.is_copy(n)}
    present = {n for n in present if n.removesuffix(SCALE) not in expected or n in expected}
    # A matrix in another quantized form than FP8 blocks: its tensors have other names, shapes or meanings.
    packed = {m for m, names in stored.items() if is_packed(m, names)}
    present -= {n for m in packed for n in stored[m]}
    expected = {n: shape for n, shape in expected.items() if n.removesuffix(".weight") not in packed}
    # What is missing, what is too much, and what lies under another name.
    missing = set(expected) - present
    elsewhere = checkpoint.elsewhere(family) if missing else None
    if elsewhere:
        why = "engines keep the random values of a parameter that no tensor fills, and draft garbage"
        yield Finding("error", elsewhere.text, why, "set index and names right; no graft is needed")
        missing -= elsewhere.names
    for name in sorted(missing):
        yield Finding(
            "error",
            f"{name} is missing",
            "engines keep the random values of a parameter that no tensor fills, and draft garbage",
            "export again; plain transformers drops MTP tensors when it saves",
        )
    for name in sorted(present - set(expected)):
        yield Finding(
            "error",
            f"{name} is not a tensor of the one MTP layer",
            "SGLang has the parameters of one layer: another's are loaded over them, or stop the start",
            f"keep exactly the {len(expected)} tensors under {' and '.join(family.layer_paths)}",
        )
    for name in sorted(n for n in checkpoint.file_of if MTP_WORD.search(n) and not family.owns(n)):
        yield Finding(
            "error",
            f"{name} looks like an MTP tensor under another name",
            f"engines read {family.root}.* and ignore the rest",
            f"rename it to {family.root}.…",
        )
    # What is there: its values, and the form it is stored in.
    for name in sorted(present & set(expected)):
        yield from _values(name, checkpoint, expected[name], family)
    projection = f"{family.names.prefix}.{family.names.proj}.weight"
    if projection + SCALE in checkpoint.file_of and SGLANG not in family.engines.quantized_proj:
        yield Finding(
            "error",
            f"{projection} is FP8 in blocks",
            "SGLang has a plain matrix there, whatever config.json says, and loads these numbers without their scales",
            "start from a checkpoint that leaves it out of the quantization",
        )
    named = sorted(n for n in present & set(expected) if not keeps_float32(family, n))
    yield from check_dtypes(checkpoint, named, packed)
    yield from check_quantization(checkpoint, family, parts, stored)


def _values(name: str, checkpoint: Checkpoint, shape: tuple[int, ...], family: Family) -> Iterator[Finding]:
    if checkpoint.shape(name) != shape:
        what = f"{name} has shape {list(checkpoint.shape(name))}, config.json says {list(shape)}"
        yield Finding("error", what, "the engine fails, or loads a part of it", "export again for this config")
        return
    tensor = checkpoint.read(name)
    if tensor.dtype == FP8 or name + SCALE in checkpoint.file_of:
        try:
            tensor = read_plain(checkpoint, name)
        except FastMTPError as error:
            why = "engines multiply the stored numbers by their scales, by what config.json says of them"
            yield Finding("error", str(error), why, "export again, from the base model's own config.json")
            return
    if tensor.is_floating_point() and not bool(torch.isfinite(tensor.float()).all()):
        yield Finding(
            "error", f"{name} holds NaN or infinity", "every draft becomes token 0", "train again from the base"
        )
    elif not bool(tensor.any()) and not name.endswith("bias"):
        sound_norm = family.fusion.zero_centered_norms and len(shape) == 1
        if not sound_norm:
            yield Finding("error", f"{name} is all zeros", "the layer cannot carry information", "export again")


def check_backbone(checkpoint: Checkpoint, family: Family) -> Iterator[Finding]:
    """Whether the backbone's numbers are some. Of one larger than `WHOLE_BELOW` only the small tensors are read."""
    sizes = {name: entry.size for name, entry in checkpoint.entries.items() if entry.dtype in _FLOATS}
    names = sorted(name for name in sizes if not family.owns(name))
    if sum(sizes[name] for name in names) > WHOLE_BELOW:
        names = [name for name in names if sizes[name] <= _SMALL]
    bad = [name for name in names if not is_finite(checkpoint.read(name))]
    if bad:
        yield Finding(
            "error",
            f"{bad[0]} holds NaN or infinity ({len(bad)} such tensors of the backbone)",
            "hidden states become NaN: the model answers token 0 for ever, and every draft is accepted",
            "download the checkpoint again",
        )
