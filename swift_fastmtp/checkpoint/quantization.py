"""Which modules of a quantized checkpoint its own config.json leaves plain: each method by its own rule.

Every quantization method has another key for "not this module", and every reader another way to match it: regular
expressions, globs, substrings, whole names. An MTP layer that is stored plain but not left out by the rule is built
quantized by the engine, which then skips its tensors and accepts no draft; so the doctor asks here. The rules are read
off SGLang 0.5.23 (`sglang/srt/layers/quantization/`), vLLM 0.32 (`vllm/model_executor/layers/quantization/`) and, for
what the tool meant that wrote the file, transformers 5.19 (`quantizers/quantizers_utils.py` `should_convert_module`).

Modules are named as the checkpoint names them. SGLang builds some MTP layers under other names (`model.decoder` for
`model.layers.46`); `fastmtp serve-args` gives the flag that makes this no matter.
"""

import math
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import lru_cache
from pathlib import Path
from typing import Any

from ..errors import FastMTPError, detail
from ..families.family import Family, config_value
from ..files.known_files import read_object

SGLANG, VLLM = "SGLang", "vLLM"
# What engines build as one matrix; a checkpoint stores the parts (`packed_modules_mapping` of the engines' models).
_FUSED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "fused_qkv_a_proj_with_mqa": ("q_a_proj", "kv_a_proj_with_mqa"),
}
# Small matrices that both engines build plain whatever config.json says: routers, gates, weights of an indexer.
_ALWAYS_PLAIN = ("gate", "shared_expert_gate", "classifier", "weights_proj")
_EXPERTS = ".experts"

Rule = Callable[[str], bool]
"""Whether a module of this name is left plain."""


@dataclass(frozen=True)
class Part:
    """What an engine quantizes, or not, as one: a linear, linears that it fuses, or the experts of a layer."""

    name: str
    """As engines name it: `mtp.layers.0.self_attn.qkv_proj`, `mtp.layers.0.mlp.experts`."""
    modules: tuple[str, ...]
    """As the checkpoint names them: `mtp.layers.0.self_attn.q_proj`, ..."""
    engines: tuple[str, ...] = (SGLANG, VLLM)
    """Those that quantize it where config.json says so; in others it is plain in any case."""

    @property
    def experts(self) -> bool:
        return self.name.endswith(_EXPERTS)


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


@dataclass(frozen=True)
class Reader:
    """How one program reads the key of a method."""

    name: str
    rule: Callable[[dict[str, Any]], Rule]
    """Settings → whether a module is left plain."""
    splits_fused: bool = True
    """Tries q_proj, k_proj, v_proj where its own module is qkv_proj."""
    one_expert: Callable[[dict[str, Any], str], bool] | None = None
    """Settings, name of the experts → whether an entry for a single expert leaves out all of them."""

    def leaves_out(self, settings: dict[str, Any], part: Part) -> bool:
        plain = self.rule(settings)
        if plain(part.name):
            return True
        if part.experts and self.one_expert and self.one_expert(settings, part.name):
            return True
        return (self.splits_fused or part.experts or len(part.modules) == 1) and all(plain(m) for m in part.modules)


@dataclass(frozen=True)
class Method:
    """A quantization method: the keys that leave modules out, an entry that leaves out a path, and its readers."""

    keys: tuple[str, ...]
    entry: Callable[[str], str]
    readers: tuple[Reader, ...]
    tool: tuple[str, ...] = ()
    """Readers that are no engine: what they leave out was meant so."""
    names: tuple[str, ...] = field(default=())
    """Further values of `quant_method`."""
    hints: tuple[str, ...] = field(default=())
    """Keys that tell the method where `quant_method` is missing."""


# --- what a checkpoint declares -------------------------------------------------------------------------------------


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


def _method(settings: dict[str, Any]) -> str:
    named = str(settings.get("quant_method") or "").lower()
    if named:
        return next((m for m, row in METHODS.items() if named == m or named in row.names), named)
    producer = settings.get("producer")
    if isinstance(producer, dict) and str(producer.get("name", "")).startswith("modelopt"):
        return "modelopt"
    return next((m for m, row in METHODS.items() if set(settings) & set(row.hints)), "without quant_method")


# --- the MTP layer as engines build it ------------------------------------------------------------------------------


def parts_of(family: Family, expected: dict[str, tuple[int, ...]]) -> list[Part]:
    """Everything of the MTP layer that an engine may quantize.

    Args:
        expected: name → shape of every tensor of the layer (`modeling.head_shapes`).
    """
    engines = (SGLANG, VLLM) if family.engines.vllm else (SGLANG,)
    projection = f"{family.names.prefix}.{family.names.proj}"
    grouped: dict[str, list[str]] = {}
    for name, shape in expected.items():
        module = name.removesuffix(".weight")
        is_linear = name.endswith(".weight") and len(shape) == 2
        is_joined_experts = f"{_EXPERTS}." in name and len(shape) == 3
        if (is_linear or is_joined_experts) and module.rpartition(".")[2] not in _ALWAYS_PLAIN:
            grouped.setdefault(_engine_name(module), []).append(module)
    parts = []
    for name, modules in grouped.items():
        built_by = tuple(e for e in engines if name != projection or e in family.engines.quantized_proj)
        parts.append(Part(name, tuple(modules), built_by))
    return parts


def _engine_name(module: str) -> str:
    """The module that an engine builds for this one of a checkpoint."""
    before, experts, _ = module.partition(f"{_EXPERTS}.")
    if experts:
        return before + _EXPERTS
    parent, _, leaf = module.rpartition(".")
    for fused, leaves in _FUSED.items():
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


def listed(names: Iterable[str]) -> str:
    """Names for a message: six of them, and how many more."""
    every = sorted(names)
    return ", ".join(every[:6]) + (f" and {len(every) - 6} more" if len(every) > 6 else "")


# --- the rules ------------------------------------------------------------------------------------------------------


def _names(settings: dict[str, Any], *keys: str) -> list[str]:
    """The entries of the first key that has some, lists in lists made flat."""
    for key in keys:
        value = settings.get(key)
        if not value:
            continue
        if isinstance(value, str):
            return value.split(",")
        if not isinstance(value, list):
            raise FastMTPError(f"quantization_config: {key} is {value!r}; it must be a list of module names")
        flat: list[str] = []
        for entry in value:
            flat += _names({key: entry}, key) if isinstance(entry, list | str) else [str(entry)]
        return flat
    return []


def _shards(name: str) -> list[str]:
    """What a checkpoint stores for a fused module of an engine; of another module, itself."""
    parent, _, leaf = name.rpartition(".")
    return [f"{parent}.{shard}" for shard in _FUSED.get(leaf, (leaf,))]


def _object(settings: dict[str, Any], key: str) -> dict[str, Any]:
    value = settings.get(key) or {}
    if not isinstance(value, dict):
        raise FastMTPError(f"quantization_config: {key} is {value!r}; it must be an object")
    return value


class _Expression:
    """A regular expression of a config.json, which is anybody's: one that would take for ever is given up.

    Python's own engine cannot be stopped; `regex` can. That one is slow to compile, and most entries are plain names,
    of which there may be thousands: those without a repetition or an alternative go to Python's.

    Raises `ValueError` for what is no expression, or too large a one.
    """

    def __init__(self, pattern: str) -> None:
        self._text = pattern
        self._limit: dict[str, float] = {}
        if len(pattern) > _LONGEST or _nesting(pattern) > _DEEPEST or _repetitions(pattern) > _MOST_REPETITIONS:
            raise ValueError("it is too large")
        try:
            if not set("*+?{|") & set(pattern):
                self._pattern: Any = re.compile(pattern)
                return
            import regex  # of transformers

            self._pattern, self._limit = regex.compile(pattern), {"timeout": _SECONDS_OF_A_MATCH}
        except Exception as error:  # noqa: BLE001 (each engine has its own, and others for odd expressions)
            raise ValueError(detail(error)) from None

    def match(self, name: str, how: str = "match") -> bool:
        """Whether it matches (`match`, `fullmatch`, `search`). Raises `FastMTPError` if that takes too long."""
        try:
            return getattr(self._pattern, how)(name, **self._limit) is not None
        except TimeoutError:
            raise FastMTPError(
                f"quantization_config: {self._text[:80]!r} takes over {_SECONDS_OF_A_MATCH} s to match {name}; "
                "write it without repetitions in repetitions"
            ) from None


# `regex` writes repetitions out when it compiles, each as often as the ones around it say.
_LONGEST, _DEEPEST, _MOST_REPETITIONS = 500, 5, 200
_SECONDS_OF_A_MATCH = 0.2


def _nesting(pattern: str) -> int:
    """How many groups are in each other, at most; an escaped parenthesis counts, which does no harm."""
    depth = deepest = 0
    for character in pattern:
        depth += (character == "(") - (character == ")")
        deepest = max(deepest, depth)
    return deepest


def _repetitions(pattern: str) -> int:
    """The product of all counts, `{3}` or `{1,5}`."""
    counts = [int(most or least or 1) for least, most in re.findall(r"\{(\d*)(?:,(\d*))?\}", pattern)]
    return math.prod(max(count, 1) for count in counts)


@lru_cache(maxsize=2**16)
def _compiled(pattern: str) -> "_Expression | str":
    """The expression, or why it is none: kept, too, because every part of a layer asks for it."""
    try:
        return _Expression(pattern)
    except ValueError as error:
        return str(error)


def _expression(pattern: str) -> _Expression | None:
    """None: it is no expression."""
    compiled = _compiled(pattern)
    return None if isinstance(compiled, str) else compiled


def _matches_whole(expression: _Expression, parts: Iterable[str]) -> bool:
    return any(expression.match(part, "fullmatch") for part in parts)


def _regex(pattern: str, key: str) -> _Expression:
    compiled = _compiled(pattern)
    if isinstance(compiled, str):
        raise FastMTPError(
            f"quantization_config: {key} has {pattern[:80]!r}, which is no regular expression ({compiled})"
        )
    return compiled


def _exact_or_regex(entries: list[str], key: str, suffix: bool = False) -> Rule:
    """`re:` entries match from the start, others the whole name; with `suffix` also the name's last modules."""
    patterns = [_regex(e[3:], key) for e in entries if e.startswith("re:")]
    whole = [e for e in entries if not e.startswith("re:")]

    def plain(name: str) -> bool:
        if any(p.match(name) for p in patterns) or name in whole:
            return True
        return suffix and any(name.endswith(f".{entry}") for entry in whole)

    return plain


def _path_match(entry: str, name: str) -> bool:
    """Whole modules: `mtp` matches `mtp.fc`, `mlp.gate` does not match `mlp.gate_up_proj`."""
    return f".{entry.strip('.')}." in f".{name}."


def _transformers(*keys: str) -> Callable[[dict[str, Any]], Rule]:
    """transformers `should_convert_module`: a regular expression at the start, or the end of the name."""

    def rule(settings: dict[str, Any]) -> Rule:
        entries = _names(settings, *keys)

        def plain(name: str) -> bool:
            for entry in entries:
                if name.endswith(entry):
                    return True
                expression = _expression(entry)  # None: engines take it literally
                if expression is not None and expression.match(name):
                    return True
            return False

        return plain

    return rule


# FP8 of DeepSeek and Qwen. SGLang `fp8.py` + `utils.py` `is_layer_skipped`; vLLM `fp8.py` + `utils/quant_utils.py`.
_FP8_KEYS = ("ignored_layers", "modules_to_not_convert")


def _fp8_sglang(settings: dict[str, Any]) -> Rule:
    entries = [e.removeprefix("model.") for e in _names(settings, *_FP8_KEYS)]
    return lambda name: any(_path_match(entry, name) for entry in entries)


def _fp8_vllm(settings: dict[str, Any]) -> Rule:
    entries = set(_names(settings, *_FP8_KEYS))
    return lambda name: name in entries


def _fp8_expert(settings: dict[str, Any], experts: str) -> bool:
    return any(experts in entry for entry in _names(settings, *_FP8_KEYS) if "experts" in entry)


# AWQ. SGLang `awq/awq.py` `is_layer_skipped_awq`; vLLM `auto_awq.py`, match_mode "substring".
def _awq(settings: dict[str, Any]) -> Rule:
    entries = _names(settings, "modules_to_not_convert")
    return lambda name: any(entry in name for entry in entries)


# GPTQ. `get_dynamic_override` of both engines: the first pattern that matches decides, "-:" leaves out.
def _gptq(settings: dict[str, Any]) -> Rule:
    patterns = []
    for entry in _object(settings, "dynamic"):
        excludes = entry.startswith("-:")
        patterns.append((_regex(entry.removeprefix("-:").removeprefix("+:"), "dynamic"), excludes))

    def plain(name: str) -> bool:
        return next((excludes for pattern, excludes in patterns if pattern.match(name)), False)

    return plain


def _gptq_vllm(settings: dict[str, Any]) -> Rule:
    """vLLM `utils/gptq_utils.py` `is_layer_gptq_quantized`: also what `modules_in_block_to_quantize` does not name."""
    by_dynamic, quantized = _gptq(settings), _names(settings, "modules_in_block_to_quantize")

    def plain(name: str) -> bool:
        if by_dynamic(name):
            return True
        named = any(entry in module for entry in quantized for module in _shards(name))
        return bool(quantized) and not named

    return plain


# AutoRound. SGLang `auto_round.py` `get_layer_config` (the whole name must match); vLLM `inc/config_parser.py` (any
# part of it, and names may lack their start).
def _auto_round(settings: dict[str, Any], in_vllm: bool) -> Rule:
    blocks = _names(settings, "block_name_to_quantize", "to_quant_block_names")
    extra = _object(settings, "extra_config")
    default = settings.get("bits")
    special = set("*+?^$()[]{}|\\")

    def bits(entry: Any, quantized: bool) -> Any:
        declared = entry.get("bits") if isinstance(entry, dict) else None
        return declared if declared is not None else default if quantized else 16

    def plain(name: str) -> bool:
        quantized = not blocks or any(name.startswith(block) for block in blocks)
        if name in extra:
            return _is_plain(bits(extra[name], True))
        for pattern, entry in extra.items():
            if in_vllm and name.endswith(f".{pattern}"):
                return _is_plain(bits(entry, True))
            if special & set(pattern):
                expression = _expression(pattern)  # None: both engines pass over it
                if expression is not None and expression.match(name, "search" if in_vllm else "fullmatch"):
                    return _is_plain(bits(entry, quantized))
        return not quantized

    return plain


def _is_plain(bits: Any) -> bool:
    return isinstance(bits, int) and bits >= 16


# compressed-tensors. SGLang and vLLM `compressed_tensors/utils.py`: `ignore` first, then a target of a group.
def _compressed_tensors(settings: dict[str, Any], in_sglang: bool) -> Rule:
    ignored = _exact_or_regex(_names(settings, "ignore"), "ignore", suffix=in_sglang)
    groups = _object(settings, "config_groups")
    targets: list[str] = []
    for group in groups.values():
        targets += _names(group, "targets") if isinstance(group, dict) else []
    by_class = any(t.lower() == "linear" for t in targets)
    targeted = _exact_or_regex(targets, "config_groups.*.targets")

    def plain(name: str) -> bool:
        if ignored(name):
            return True
        if not groups or by_class or targeted(name):
            # Without groups there is nothing to say which modules are quantized; the list then says all.
            return False
        return not in_sglang  # SGLang stops at a linear that no target names (`find_matched_target`)

    return plain


# Quark. SGLang and vLLM `quark/utils.py` `should_ignore_layer`: whole names or `re:`; Quark itself also takes globs.
def _quark(settings: dict[str, Any]) -> Rule:
    return _exact_or_regex(_names(settings, "exclude"), "exclude")


def _quark_tool(settings: dict[str, Any]) -> Rule:
    engines, entries = _quark(settings), _names(settings, "exclude")
    return lambda name: engines(name) or any(fnmatchcase(name, entry) for entry in entries)


def _quark_expert(settings: dict[str, Any], experts: str) -> bool:
    return any(entry.startswith(f"{experts}.") for entry in _names(settings, "exclude"))


# ModelOpt. SGLang and vLLM `modelopt.py`/`modelopt_quant.py` `is_layer_excluded`.
_MODELOPT_KEYS = ("exclude_modules", "ignore", "modules_to_not_convert")


def _mixed(settings: dict[str, Any], excluded: Rule) -> Rule:
    """With quant_algo MIXED_PRECISION only what `quantized_layers` names is quantized (`_resolve_quant_algo`)."""
    if str(settings.get("quant_algo", "")).upper() != "MIXED_PRECISION":
        return excluded
    named = _object(settings, "quantized_layers")

    def plain(name: str) -> bool:
        if excluded(name):
            return True
        if name in named or any(shard in named for shard in _shards(name)):
            return False
        return not any(layer.startswith(f"{name}.") for layer in named)

    return plain


def _modelopt_sglang(settings: dict[str, Any]) -> Rule:
    entries = _names(settings, *_MODELOPT_KEYS)
    patterns = [_regex(e.replace(".", r"\.").replace("*", ".*"), _MODELOPT_KEYS[0]) for e in entries]

    def excluded(name: str) -> bool:
        if any(_path_match(entry, name) for entry in entries):
            return True
        parts = (name, *name.split("."))
        return any(_matches_whole(pattern, parts) for pattern in patterns)

    return _mixed(settings, excluded)


def _modelopt_vllm(settings: dict[str, Any]) -> Rule:
    entries = _names(settings, *_MODELOPT_KEYS)
    return _mixed(settings, lambda name: any(entry in name or fnmatchcase(name, entry) for entry in entries))


# bitsandbytes. SGLang `bitsandbytes.py` `is_layer_skipped_bnb`: a module's name, or a path from the start. vLLM 0.32
# has no bitsandbytes.
def _bitsandbytes(settings: dict[str, Any]) -> Rule:
    entries = _names(settings, "llm_int8_skip_modules")

    def plain(name: str) -> bool:
        modules = name.split(".")
        paths = {".".join(modules[: i + 1]) for i in range(len(modules))}
        return any(entry in modules or entry in paths for entry in entries)

    return plain


def _both(rule: Callable[[dict[str, Any]], Rule], **options: Any) -> tuple[Reader, Reader]:
    return Reader(SGLANG, rule, **options), Reader(VLLM, rule, **options)


METHODS: dict[str, Method] = {
    "modelopt": Method(
        keys=_MODELOPT_KEYS,
        entry=lambda root: f'"{root}.*"',
        readers=(Reader(SGLANG, _modelopt_sglang), Reader(VLLM, _modelopt_vllm)),
        names=("modelopt_fp4", "modelopt_fp8", "modelopt_mixed", "modelopt_mxfp8", "nvfp4"),
        hints=("exclude_modules", "quant_algo"),
    ),
    "fp8": Method(
        keys=("modules_to_not_convert", "ignored_layers"),
        entry=lambda root: f'"{root}"',
        readers=(
            Reader(SGLANG, _fp8_sglang, one_expert=_fp8_expert),
            Reader(VLLM, _fp8_vllm, one_expert=_fp8_expert),
            Reader("transformers", _transformers(*_FP8_KEYS)),
        ),
        tool=("transformers",),
        hints=("ignored_layers", "weight_block_size", "activation_scheme"),
    ),
    "compressed-tensors": Method(
        keys=("ignore",),
        entry=lambda root: f'"re:^{_escaped(root)}[.].*"',
        readers=(
            Reader(SGLANG, lambda settings: _compressed_tensors(settings, True)),
            Reader(VLLM, lambda settings: _compressed_tensors(settings, False)),
        ),
        hints=("ignore", "config_groups"),
    ),
    "bitsandbytes": Method(
        keys=("llm_int8_skip_modules",),
        entry=lambda root: f'"{root}"',
        readers=(
            Reader(SGLANG, _bitsandbytes, splits_fused=False),
            Reader("transformers", _transformers("llm_int8_skip_modules")),
        ),
        tool=("transformers",),
        hints=("llm_int8_skip_modules", "load_in_4bit", "load_in_8bit"),
    ),
    "auto-round": Method(
        keys=("extra_config",),
        entry=lambda root: f'"^{_escaped(root)}[.].*": {{"bits": 16}}',
        readers=(
            Reader(SGLANG, lambda settings: _auto_round(settings, False)),
            Reader(VLLM, lambda settings: _auto_round(settings, True)),
        ),
        names=("intel/auto-round", "auto_round", "inc"),
        hints=("block_name_to_quantize", "to_quant_block_names", "extra_config"),
    ),
    "gptq": Method(
        keys=("dynamic",),
        entry=lambda root: f'"-:^{_escaped(root)}[.].*": {{}}',
        readers=(
            Reader(SGLANG, _gptq, splits_fused=False),
            Reader(VLLM, _gptq_vllm, splits_fused=False),
            Reader("GPTQModel", _gptq_vllm),
        ),
        tool=("GPTQModel",),
        names=("gptq_marlin", "auto_gptq"),
        hints=("dynamic", "modules_in_block_to_quantize"),
    ),
    "awq": Method(
        keys=("modules_to_not_convert",),
        entry=lambda root: f'"{root}."',
        readers=(
            Reader(SGLANG, _awq, splits_fused=False),
            Reader(VLLM, _awq),
            Reader("transformers", _transformers("modules_to_not_convert")),
        ),
        tool=("transformers",),
        names=("awq_marlin", "auto_awq"),
        hints=("modules_to_not_convert",),
    ),
    "quark": Method(
        keys=("exclude",),
        entry=lambda root: f'"re:^{_escaped(root)}[.].*"',
        readers=(*_both(_quark, one_expert=_quark_expert), Reader("Quark", _quark_tool)),
        tool=("Quark",),
        hints=("exclude", "global_quant_config"),
    ),
}
"""`quant_method` → its rule."""


def _escaped(path: str) -> str:
    """A path as a regular expression that needs no backslash, which JSON would want doubled."""
    return path.replace(".", "[.]")


def left_out_in_words(
    folder: Path, config: dict[str, Any], family: Family | None, shapes: Callable[[], dict[str, tuple[int, ...]]]
) -> str | None:
    """ "left out", "partly left out" or "not left out"; None where nothing is quantized, or it cannot be told.

    Args:
        shapes: `modeling.head_shapes`, which is asked only where it is needed.
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
