"""How each quantization method says which modules it leaves plain, and how each reader understands that.

Every method has another key for "not this module", and every reader another way to match it: regular expressions,
globs, substrings, whole names. The rules are read off SGLang 0.5.23 (`sglang/srt/layers/quantization/`), vLLM 0.32
(`vllm/model_executor/layers/quantization/`) and, for what the tool meant that wrote the file, transformers 5.19
(`quantizers/quantizers_utils.py` `should_convert_module`).
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from ..errors import FastMTPError
from .name_patterns import expression, expression_or_none, matches_whole

SGLANG, VLLM = "SGLang", "vLLM"
# What engines build as one matrix; a checkpoint stores the parts (`packed_modules_mapping` of the engines' models).
FUSED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "fused_qkv_a_proj_with_mqa": ("q_a_proj", "kv_a_proj_with_mqa"),
}
EXPERTS = ".experts"

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
        return self.name.endswith(EXPERTS)


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
    return [f"{parent}.{shard}" for shard in FUSED.get(leaf, (leaf,))]


def _object(settings: dict[str, Any], key: str) -> dict[str, Any]:
    value = settings.get(key) or {}
    if not isinstance(value, dict):
        raise FastMTPError(f"quantization_config: {key} is {value!r}; it must be an object")
    return value


def _exact_or_regex(entries: list[str], key: str, suffix: bool = False) -> Rule:
    """`re:` entries match from the start, others the whole name; with `suffix` also the name's last modules."""
    patterns = [expression(e[3:], key) for e in entries if e.startswith("re:")]
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
                expression = expression_or_none(entry)  # None: engines take it literally
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
        patterns.append((expression(entry.removeprefix("-:").removeprefix("+:"), "dynamic"), excludes))

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
                expression = expression_or_none(pattern)  # None: both engines pass over it
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
    patterns = [expression(e.replace(".", r"\.").replace("*", ".*"), _MODELOPT_KEYS[0]) for e in entries]

    def excluded(name: str) -> bool:
        if any(_path_match(entry, name) for entry in entries):
            return True
        parts = (name, *name.split("."))
        return any(matches_whole(pattern, parts) for pattern in patterns)

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
