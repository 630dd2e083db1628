"""Which modules of a quantized checkpoint its own config.json leaves plain.

An MTP layer that is stored plain but not left out by the rule is built quantized by the engine, which then skips its
tensors and accepts no draft; so the doctor asks here. What each method's key means is in `quantization_methods.py`.

Modules are named as the checkpoint names them. SGLang builds some MTP layers under other names (`model.decoder` for
`model.layers.46`); `fastmtp serve-args` gives the flag that makes this no matter.
"""

import json
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import FastMTPError
from ..families.family import Family, config_value
from ..files.known_files import read_object
from .quantization_methods import EXPERTS, FUSED, METHODS, SGLANG, VLLM, Part

PACKED = ("qweight", "weight_packed", "weight_scale", "weight_scale_2", "weight.absmax", "weight.SCB")
"""What tools write under a module's name in place of its matrix, or beside it: AutoAWQ, GPTQModel and AutoRound;
compressed-tensors; ModelOpt; bitsandbytes. Not FP8 in blocks, which is read here (`fp8.py`)."""

# Small matrices that both engines build plain whatever config.json says: routers, gates, weights of an indexer.
_ALWAYS_PLAIN = ("gate", "shared_expert_gate", "classifier", "weights_proj")


@dataclass(frozen=True)
class Quantization:
    """The quantization that a checkpoint declares."""

    method: str
    """One of `METHODS`, or what `quant_method` says where none of them is meant."""
    settings: dict[str, Any]
    """The object that holds the method's keys."""
    file: str
    """Where it stands: config.json, or ModelOpt's hf_quant_config.json."""

    @property
    def known(self) -> bool:
        """Whether the method's rule is known here."""
        return self.method in METHODS

    @property
    def key(self) -> str:
        """The key that leaves modules out in this method; the one in use where a method has several."""
        keys = METHODS[self.method].keys
        return next((k for k in keys if self.settings.get(k)), keys[0])


def read_quantization(config: dict[str, Any], folder: Path | None = None) -> Quantization | None:
    """The quantization of a checkpoint; None for one that declares none.

    Args:
        config: its config.json; `quantization_config` may stand in its text part, or be called `compression_config`.
        folder: where ModelOpt's older exports have hf_quant_config.json instead (SGLang `weight_utils.py`
            `get_quant_config`, which reads it only where config.json has nothing).

    Raises `FastMTPError` if what is there is no object.
    """
    file = "config.json"
    settings = config_value(config, "quantization_config") or config_value(config, "compression_config")
    if not settings and folder is not None and os.path.lexists(folder / "hf_quant_config.json"):
        file = "hf_quant_config.json"
        settings = read_object(folder / file)
    if not settings:
        return None
    if not isinstance(settings, dict):
        raise FastMTPError(f"{file}: quantization_config is {settings!r}; it must be an object, or be removed")
    method = _method(settings)
    if method == "modelopt" and isinstance(settings.get("quantization"), dict):
        settings = settings["quantization"]
    return Quantization(method, settings, file)


def packed_modules(names: Iterable[str]) -> set[str]:
    """The modules of some tensors whose matrix is stored in another quantized form than FP8 blocks."""
    packed: set[str] = set()
    for name in names:
        packed.update(name.removesuffix(f".{end}") for end in PACKED if name.endswith(f".{end}"))
    return packed


def _method(settings: dict[str, Any]) -> str:
    named = str(settings.get("quant_method") or "").lower()
    if named:
        return next((m for m, row in METHODS.items() if named == m or named in row.names), named)
    producer = settings.get("producer")
    if isinstance(producer, dict) and str(producer.get("name", "")).startswith("modelopt"):
        return "modelopt"
    if isinstance(settings.get("quantization"), dict):  # nvidia/NVIDIA-Nemotron-3-Super-120B-A12B-FP8 names no producer
        return "modelopt"
    return next((m for m, row in METHODS.items() if set(settings) & set(row.hints)), "without quant_method")


def parts_of(family: Family, expected: dict[str, tuple[int, ...]]) -> list[Part]:
    """Everything of the MTP layer that an engine may quantize.

    Args:
        expected: name → shape of every tensor of the layer (`loading.head_shapes`).
    """
    engines = (SGLANG, VLLM) if family.engines.vllm else (SGLANG,)
    projection = f"{family.names.prefix}.{family.names.proj}"
    grouped: dict[str, list[str]] = {}
    for name, shape in expected.items():
        module = name.removesuffix(".weight")
        is_linear = name.endswith(".weight") and len(shape) == 2
        is_joined_experts = f"{EXPERTS}." in name and len(shape) == 3
        if (is_linear or is_joined_experts) and module.rpartition(".")[2] not in _ALWAYS_PLAIN:
            grouped.setdefault(_engine_name(module), []).append(module)
    parts = []
    for name, modules in grouped.items():
        built_by = tuple(e for e in engines if name != projection or e in family.engines.quantized_proj)
        parts.append(Part(name, tuple(modules), built_by))
    return parts


def _engine_name(module: str) -> str:
    """The module that an engine builds for this one of a checkpoint."""
    before, experts, _ = module.partition(f"{EXPERTS}.")
    if experts:
        return before + EXPERTS
    parent, _, leaf = module.rpartition(".")
    for fused, leaves in FUSED.items():
        if leaf in leaves:
            return f"{parent}.{fused}"
    return module


def left_out(quantization: Quantization, part: Part) -> dict[str, bool] | None:
    """Reader → whether it keeps this part plain; None if the method's rule is not known here.

    Readers are SGLang and vLLM, where they quantize this part at all, and the tool that writes the method's files,
    where it matches otherwise than both.

    Raises `FastMTPError` naming the key whose value no reader can take.
    """
    if not quantization.known:
        return None
    method = METHODS[quantization.method]
    nvfp4 = quantization.method == "modelopt" and "FP4" in str(quantization.settings.get("quant_algo"))
    if nvfp4 and part.engines == (VLLM,):
        # NVIDIA's exports do not name the projection; vLLM builds it plain there (`qwen3_5_mtp.py` `fc_quant`).
        return {}
    return {
        reader.name: reader.leaves_out(quantization.settings, part)
        for reader in method.readers
        if reader.name in method.tool or reader.name in part.engines
    }


def fix(quantization: Quantization, family: Family, modules: Iterable[str]) -> str:
    """What to write into which key, so that the MTP layer is left out."""
    method = METHODS[quantization.method]
    if quantization.method == "fp8":  # vLLM compares whole names
        names = sorted(modules)
        rest = f" and {len(names) - 3} more names" if len(names) > 3 else ""
        entries = ", ".join(f'"{m}"' for m in names[:3]) + rest
    else:
        entries = ", ".join(method.entry(root) for root in family.roots)
    return f'add {entries} to "{quantization.key}" of {quantization.file}'


def leaving_out(quantization: Quantization, roots: Iterable[str], modules: Iterable[str]) -> dict[str, Any] | None:
    """`quantization_config` with an MTP layer left out that its target's config.json knows nothing of.

    vLLM builds the layer of a draft-only folder by the target's quantization (0.32.0 `llm_base_proposer.py`
    `_create_draft_vllm_config`), and then stops at its plain tensors or takes them for quantized ones.

    Args:
        roots: of the layer's modules, as the engine names them.
        modules: all of them that it may quantize, as the engine and as the checkpoint names them.

    Returns None if the method's rule is not known here.
    """
    if not quantization.known:
        return None
    method, key = METHODS[quantization.method], quantization.key
    if quantization.method == "fp8":  # vLLM compares whole names
        entries = [json.dumps(module) for module in sorted(modules)]
    else:
        entries = [method.entry(root) for root in roots]
    as_object = entries[0].endswith("}")
    old = quantization.settings.get(key)
    if as_object:
        added: Any = json.loads("{" + ", ".join(entries) + "}") | (old or {})
    else:
        added = [*(old or []), *(json.loads(entry) for entry in entries)]
    settings = {**quantization.settings, key: added}
    if quantization.file != "config.json":  # what engines take from there is the object around it
        settings = {"producer": {"name": "modelopt"}, "quantization": settings}
    return {"quant_method": quantization.method, **settings}


def listed(names: Iterable[str]) -> str:
    """Names for a message: six of them, and how many more."""
    every = sorted(names)
    return ", ".join(every[:6]) + (f" and {len(every) - 6} more" if len(every) > 6 else "")


def left_out_in_words(
    folder: Path, config: dict[str, Any], family: Family | None, shapes: Callable[[], dict[str, tuple[int, ...]]]
) -> str | None:
    """ "left out", "partly left out" or "not left out"; None where nothing is quantized, or it cannot be told.

    Args:
        shapes: `loading.head_shapes`, which is asked only where it is needed.
    """
    try:
        quantization = read_quantization(config, folder)
        if quantization is None or family is None or not quantization.known:
            return None
        readings = [left_out(quantization, part) for part in parts_of(family, shapes()) if part.engines]
    except FastMTPError:  # inspect lists it among its reasons, or it is the doctor's to explain
        return None
    out = [any(reading.values()) for reading in readings if reading]
    if all(out):
        return "left out"
    return "partly left out" if any(out) else "not left out"
