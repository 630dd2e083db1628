"""Whether engines build the MTP layer in the form in which it is stored: plain, or quantized as config.json says."""

from collections.abc import Iterator
from itertools import chain

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.fp8_config import SCALE
from ..checkpoint.quantization import Quantization, fix, left_out, listed, read_quantization
from ..checkpoint.quantization_methods import SGLANG, VLLM, Part
from ..errors import FastMTPError
from ..families.family import Family
from .finding import Finding

_PLAIN = {"bfloat16", "float16", "float32"}


def check_dtypes(checkpoint: Checkpoint, names: list[str], packed: set[str]) -> Iterator[Finding]:
    dtypes = checkpoint.dtypes()
    blocks = {n for n in names if n + SCALE in checkpoint.file_of}
    kinds = {dtypes[n] for n in names if n not in blocks}
    if kinds - _PLAIN or packed:
        what = ", ".join(sorted(kinds - _PLAIN) + ([f"{len(packed)} matrices with scales"] if packed else []))
        yield Finding(
            "warning",
            f"the MTP layer is quantized ({what})",
            "drafts follow small differences in hidden states; a quantized layer is often never accepted",
            "keep the MTP layer in the source precision",
        )
    if read_quantization(checkpoint.config, checkpoint.folder):
        return
    backbone = checkpoint.value("dtype") or checkpoint.value("torch_dtype")
    if checkpoint.has_backbone() and kinds and backbone and kinds != {backbone}:
        yield Finding(
            "warning",
            f"MTP tensors are {', '.join(sorted(kinds))}, the model is {backbone}",
            "engines convert while loading; a mixture is a sign of a hand-made checkpoint",
            "`fastmtp export` casts to the model's dtype",
        )


def stored_tensors(checkpoint: Checkpoint, family: Family, parts: list[Part]) -> dict[str, list[str]]:
    """Module of the MTP layer that engines may quantize → its tensors: the matrix, its scales, its packed form."""
    stored: dict[str, list[str]] = {}
    for part in parts:
        stored.update((module, []) for module in part.modules)
    for name in checkpoint.file_of:
        if not family.owns(name):
            continue
        # Scales stand under the module (`fc.weight_scale`), bitsandbytes' under the matrix (`fc.weight.absmax`), those
        # of joined experts beside it (`experts.gate_up_proj_scale_inv`).
        path = name
        while path and path not in stored:
            path = path.rpartition(".")[0]
        path = path or next((m for m in stored if name.startswith(f"{m}_")), "")
        if path and not name.endswith(".bias"):
            stored[path].append(name)
    return stored


def is_packed(module: str, names: list[str]) -> bool:
    """Whether a matrix is quantized otherwise than in FP8 blocks."""
    matrix = f"{module}.weight" if f"{module}.weight" in names else module
    return bool(set(names) - {matrix, matrix + SCALE})


def check_quantization(
    checkpoint: Checkpoint, family: Family, parts: list[Part], stored: dict[str, list[str]]
) -> Iterator[Finding]:
    """Whether engines build each part of the layer in the form in which it is stored."""
    try:
        quantization = read_quantization(checkpoint.config, checkpoint.folder)
        if quantization is None:
            return
        readings = {part: left_out(quantization, part) for part in parts if any(stored[m] for m in part.modules)}
    except FastMTPError as error:
        why = "engines read it to build the model"
        yield Finding("error", str(error), why, "export again, from the base model's own config.json")
        return
    # In which form each part is stored.
    dtypes = checkpoint.dtypes()
    is_quantized = {p: [m for m in p.modules if _is_quantized(stored[m], dtypes)] for p in readings}
    plain = [p for p in readings if not is_quantized[p]]
    if not quantization.known:
        if plain:
            yield Finding(
                "warning",
                f"quantization_config is {quantization.method!r}: whether it leaves out the MTP layer was not checked",
                "this package does not know how engines read that method; a plain layer that is built quantized "
                "accepts nothing (accept length 1.0)",
                "look at the accept length that the server logs",
            )
        return
    # Stored plain, built quantized.
    yield from _built_quantized(quantization, family, readings, plain)
    # Stored quantized: in part, or built plain.
    for part, modules in is_quantized.items():
        others = [m for m in part.modules if stored[m] and m not in modules]
        if modules and others:
            yield Finding(
                "error",
                f"{listed(others)}: plain, beside quantized {listed(modules)}",
                f"engines build these as one, {part.name}, in one form",
                "quantize all of them, or none",
            )
            continue
        by_engine = {r: out for r, out in (readings[part] or {}).items() if r in part.engines}
        if modules and by_engine and all(by_engine.values()):
            yield Finding(
                "error",
                f"{listed(modules)}: quantized, but {quantization.file} leaves it out of the quantization",
                "the engine builds a plain matrix, and loads these numbers without their scales",
                f'take it out of "{quantization.key}", or store it plain',
            )


def _is_quantized(names: list[str], dtypes: dict[str, str]) -> bool:
    """By its tensors: several, or one that is no plain number."""
    return len(names) > 1 or any(dtypes[n] not in _PLAIN for n in names)


def _built_quantized(
    quantization: Quantization, family: Family, readings: dict[Part, dict[str, bool] | None], plain: list[Part]
) -> Iterator[Finding]:
    """Parts that are stored plain, but that an engine would build quantized."""
    by_all: list[str] = []
    by_one: dict[str, list[str]] = {}
    one_builds = [p for p in plain if len(p.engines) == 1 and family.engines.vllm]
    for part in [*(p for p in plain if p not in one_builds), *one_builds]:
        reading = readings[part] or {}
        building = [r for r, out in reading.items() if r in part.engines and not out]
        # A tool or another engine that leaves it out, or that has it plain in any case: one engine's gap, and no
        # mistake of the checkpoint. But where nothing is left out, nor is this.
        if any(reading.values()) or (part in one_builds and not by_all):
            for engine in building:
                by_one.setdefault(engine, []).extend(part.modules)
        elif building:
            by_all.extend(part.modules)
    method = f"quantization_config ({quantization.method})"
    how = fix(quantization, family, by_all or list(chain.from_iterable(by_one.values())))
    if by_all:
        what = f"{method} does not leave out the MTP layer, whose tensors are not quantized: {listed(by_all)}"
        if any(any((readings[part] or {}).values()) for part in plain):
            what = f"{method} leaves out a part of the MTP layer only; also plain, but not left out: {listed(by_all)}"
        yield Finding(
            "error",
            what,
            "the engine builds a quantized layer, skips these tensors, and accepts nothing (accept length 1.0)",
            f"{how}; a folder of the MTP layer alone needs no quantization_config",
        )
    for engine, modules in by_one.items():
        flag = {SGLANG: " or serve with `--speculative-draft-model-quantization unquant`", VLLM: ""}[engine]
        yield Finding(
            "warning",
            f"{method}: {engine} does not read it as leaving out {listed(modules)}",
            f"{engine} builds them quantized, skips the plain tensors, and accepts nothing (accept length 1.0)",
            how + flag,
        )
