"""Finds, before anything is served, what makes acceptance silently collapse.

An engine with a broken draft still gives correct text, only no speed-up: it loads what it finds, ignores tensors whose
names it does not know, and keeps random values where some are missing (SGLang `mimo_mtp.py` `load_weights`). Every
check here is a failure that users of the engines have met.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.config_file import TOKEN_MAPS_KEY, WrongTypeError
from ..checkpoint.fingerprint import WHOLE_BELOW
from ..checkpoint.finite import is_finite
from ..checkpoint.fp8 import DTYPE as FP8
from ..checkpoint.fp8_config import SCALE
from ..checkpoint.headers import TOWER
from ..checkpoint.mtp_tensors import read_plain
from ..checkpoint.quantization import (
    SGLANG,
    VLLM,
    Part,
    Quantization,
    fix,
    left_out,
    listed,
    parts_of,
    read_quantization,
)
from ..checkpoint.refusals import refusals
from ..checkpoint.weight_files import INDEX_FILE
from ..errors import FastMTPError
from ..families.family import Family, config_value
from ..files.known_files import read_object
from ..method.token_map import check_map_list, check_tokenizer, read_token_map
from ..vocab.languages import check_names
from .inspection import MTP_WORD

_NOT_LOADED = {
    "error": "engines check the index before they load anything",
    "warning": "the engine loads another set of files than SGLang, from which everything here was read",
}
_PLAIN = {"bfloat16", "float16", "float32"}
_FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
_SMALL = 2**20  # bytes
# A draft that reads these otherwise than its target sees other positions, keys, experts, sizes or tokens. The value is
# what transformers takes for a missing one, where that is the same for all families.
_SHARED_KEYS: dict[str, Any] = {
    "hidden_size": None,
    "num_attention_heads": None,
    "num_key_value_heads": None,
    "head_dim": None,
    "vocab_size": None,
    "rms_norm_eps": None,
    "max_position_embeddings": None,
    "hidden_act": "silu",
    "attention_bias": None,
    "tie_word_embeddings": False,
    "layer_types": None,
    "sliding_window": None,
    "num_experts_per_tok": None,
    "norm_topk_prob": None,
    "routed_scaling_factor": None,
    "n_group": None,
    "topk_group": None,
}
_ROPE_KEYS = ("rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor")


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong: `error` (do not serve this) or `warning` (likely not what you meant)."""

    level: str
    what: str
    why: str
    fix: str

    def __str__(self) -> str:
        return f"{self.level}: {self.what}\n    why: {self.why}\n    fix: {self.fix}"


def examine(
    folder: str | Path, model: str | Path | None = None, token_map: str | Path | None = None, tp_size: int = 1
) -> list[Finding]:
    """All findings about a full checkpoint, a draft-only folder or a training checkpoint.

    Args:
        folder: full checkpoint, draft-only folder or training checkpoint
        model: base model to compare with; default: the one the head was trained for
        token_map: file meant for SGLang's --speculative-token-map
        tp_size: planned tensor parallelism

    Raises `FastMTPError` only if `folder` is no checkpoint of a known family at all.
    """
    checkpoint = Checkpoint(folder)
    try:
        config = checkpoint.config
    except WrongTypeError as error:
        why = "engines build the model and its draft from config.json"
        return [Finding("error", str(error), why, "take the key from the base model's config.json")]
    family = checkpoint.family
    findings = list(_config(config, family))
    try:
        read_quantization(config, checkpoint.folder)
    except FastMTPError as error:
        why = "engines read it to build the model"
        return [*findings, Finding("error", str(error), why, "take it from the base model's own config.json")]
    try:
        _ = checkpoint.entries
    except FastMTPError as error:
        why = "an engine loads every tensor of every listed file; of two with one name, the last one wins"
        return [*findings, Finding("error", str(error), why, "export again, or remove the stale file")]
    findings += _files(checkpoint, family)
    if fault := checkpoint.vocab_size_fault:
        why = "engines stop, or read and draft ids that no row is for"
        findings.append(Finding("error", f"config.json: {fault}", why, "take config.json from the base model"))
    try:
        findings += _tensors(checkpoint, family)
    except FastMTPError as error:
        why = "engines build the draft from config.json, and stop, or build another model"
        return [*findings, Finding("error", str(error), why, "take config.json from the base model")]
    findings += _backbone(checkpoint, family)
    findings += _origin(checkpoint, family, model)
    if token_map:
        findings += [*_map(Path(token_map), checkpoint.folder, config), *_static_map(token_map, config, tp_size)]
    if TOKEN_MAPS_KEY in config:
        findings += _map_list(checkpoint.folder, config)
    return findings


def _config(config: dict[str, Any], family: Family) -> Iterator[Finding]:
    layers = config_value(config, family.engines.num_layers_key, None if family.engines.num_layers_needed else 1)
    if layers != 1:
        yield Finding(
            "error",
            f"config.json: {family.engines.num_layers_key} is {layers}",
            "engines size the draft's KV cache by it; the head is one layer, applied to its own output",
            f'set "{family.engines.num_layers_key}": 1',
        )
    for refusal in refusals(config, family):
        if refusal.about == "draft" and refusal.key != family.engines.num_layers_key:
            why = "engines stop, or build a draft that is not the one in the files"
            yield Finding("error", refusal.text, why, "set it as in the base model's config.json")
    if family.engines.sglang_gap:
        yield Finding(
            "warning",
            f"stock SGLang does not draft with {family.architectures[0]}",
            family.engines.sglang_gap,
            "put the line that docs/families.md gives into that file",
        )
    for key in family.engines.needed_keys:
        if config_value(config, key) is None:
            yield Finding(
                "error",
                f"config.json: {key} is missing",
                "SGLang stops at start-up without it; plain transformers may lose it when it saves",
                "copy it from the base model's config.json",
            )
    known = family.plain_model_type in (None, family.model_type)
    if config.get("model_type") == family.model_type and not config.get("auto_map") and not known:
        yield Finding(
            "error",
            f"config.json: model_type {family.model_type} without auto_map",
            "transformers does not know this model type, so the engine stops at start-up",
            "restore auto_map and its .py file from the base model, or `fastmtp export --no_remote_code`",
        )


def _files(checkpoint: Checkpoint, family: Family) -> Iterator[Finding]:
    """Whether engines load what the index says."""
    for engine, why in checkpoint.chosen.refusals.items():
        if engine == "sglang" or "sglang" not in checkpoint.chosen.refusals:  # one line where it is the same for both
            level = "error" if checkpoint.chosen.missing else "warning"
            yield Finding(
                level, f"{checkpoint}: {why}", _NOT_LOADED[level], "set the index right, as docs/inspect.md shows"
            )
    if not checkpoint.lost:
        return
    from ..model.modeling import needed_tensors

    layer = {n for n in checkpoint.lost if family.owns(n)}  # `_tensors` looks at these
    rest = sorted(set(checkpoint.lost) - layer)
    needed = set(needed_tensors(checkpoint, rest, checkpoint.file_of)) if checkpoint.has_backbone() else set()
    has_tower = any(key in checkpoint.config for key in ("vision_config", "audio_config"))
    needed |= {n for n in rest if has_tower and TOWER.search(n)}
    if needed:
        name = min(needed)
        yield Finding(
            "error",
            f"{INDEX_FILE} lists {name} in {checkpoint.lost[name]}, which no file holds ({len(needed)} such tensors)",
            "engines keep random values where no tensor is, or stop; with this one the model itself is broken",
            "download the checkpoint again",
        )
    stale = sorted(set(checkpoint.lost) - needed - layer)
    if stale:
        yield Finding(
            "warning",
            f"{INDEX_FILE} lists {stale[0]}, which no file holds ({len(stale)} such tensors)",
            "engines use the index to choose files only, and the model has no such tensor; other tools may stop",
            "take its lines out of the index",
        )


def _tensors(checkpoint: Checkpoint, family: Family) -> Iterator[Finding]:
    from ..model.modeling import head_shapes, keeps_float32  # builds the head on the meta device

    expected = head_shapes(checkpoint)
    parts = parts_of(family, expected)
    stored = _stored(checkpoint, family, parts)
    found = {n for n in checkpoint.file_of if family.owns(n) and not family.is_copy(n)}
    found = {n for n in found if n.removesuffix(SCALE) not in expected or n in expected}
    # A matrix in another quantized form than FP8 blocks: its tensors have other names, shapes or meanings.
    packed = {m for m, names in stored.items() if _is_packed(m, names)}
    found -= {n for m in packed for n in stored[m]}
    expected = {n: shape for n, shape in expected.items() if n.removesuffix(".weight") not in packed}
    missing = set(expected) - found
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
    for name in sorted(found - set(expected)):
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
    for name in sorted(found & set(expected)):
        yield from _values(name, checkpoint, expected[name], family)
    projection = f"{family.names.prefix}.{family.names.proj}.weight"
    if projection + SCALE in checkpoint.file_of and SGLANG not in family.engines.quantized_proj:
        yield Finding(
            "error",
            f"{projection} is FP8 in blocks",
            "SGLang has a plain matrix there, whatever config.json says, and loads these numbers without their scales",
            "start from a checkpoint that leaves it out of the quantization",
        )
    named = sorted(n for n in found & set(expected) if not keeps_float32(family, n))
    yield from _dtypes(checkpoint, named, packed)
    yield from _quantization(checkpoint, family, parts, stored)


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


def _backbone(checkpoint: Checkpoint, family: Family) -> Iterator[Finding]:
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


def _dtypes(checkpoint: Checkpoint, names: list[str], packed: set[str]) -> Iterator[Finding]:
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


def _stored(checkpoint: Checkpoint, family: Family, parts: list[Part]) -> dict[str, list[str]]:
    """Module of the MTP layer that engines may quantize → its tensors: the matrix, its scales, its packed form."""
    modules = {m for part in parts for m in part.modules}
    stored: dict[str, list[str]] = {m: [] for m in modules}
    for name in checkpoint.file_of:
        if not family.owns(name):
            continue
        # Scales stand under the module (`fc.weight_scale`), bitsandbytes' under the matrix (`fc.weight.absmax`), those
        # of joined experts beside it (`experts.gate_up_proj_scale_inv`).
        path = name
        while path and path not in modules:
            path = path.rpartition(".")[0]
        path = path or next((m for m in modules if name.startswith(f"{m}_")), "")
        if path and not name.endswith(".bias"):
            stored[path].append(name)
    return stored


def _is_packed(module: str, names: list[str]) -> bool:
    """Whether a matrix is quantized otherwise than in FP8 blocks."""
    matrix = f"{module}.weight" if f"{module}.weight" in names else module
    return bool(set(names) - {matrix, matrix + SCALE})


def _quantization(
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
    yield from _built_quantized(quantization, family, readings, plain)
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
    how = fix(quantization, family, by_all or [m for modules in by_one.values() for m in modules])
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


def _origin(checkpoint: Checkpoint, family: Family, model: str | Path | None) -> Iterator[Finding]:
    folder = checkpoint.folder
    base = Checkpoint(model or checkpoint.settings.get("base_model") or "/nonexistent")
    trained_for = checkpoint.settings.get("base_fingerprint")
    here = checkpoint if checkpoint.has_backbone() else base
    if trained_for and here.config_file.exists() and not here.has_fingerprint(trained_for):
        yield Finding(
            "error",
            f"the head was trained for another backbone than {here}",
            "a head follows the hidden states of the weights it saw; after merging or more training they differ",
            "train the head for this backbone; a few hundred steps heal it",
        )
    if os.path.realpath(base.folder) == os.path.realpath(folder) or not base.config_file.exists():
        return
    here_config, base_config = checkpoint.config, base.config
    for key in _differences(here_config, base_config):
        ours, theirs = config_value(here_config, key), config_value(base_config, key)
        yield Finding(
            "error",
            f"config.json: {key} is {ours}, in {base} it is {theirs}",
            "draft and target must agree; a RoPE scaling set on one only costs acceptance in long contexts",
            "use the base model's value in both",
        )
    names = [n for n in checkpoint.under(*family.roots) if n in base.file_of and not family.is_copy(n)]
    yield from _forms(checkpoint, base, names)
    same = [n for n in names if torch.equal(checkpoint.read(n).float(), base.read(n).float())]
    if names and len(same) == len(names):
        yield Finding(
            "warning",
            f"the MTP layer equals the one of {base}",
            "it is the untrained head: it drafts one token well and then collapses",
            "export the checkpoint of a training run",
        )


def _differences(ours: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    """Keys by which two config.json describe other computations, however they are written."""
    keys = [key for key in _SHARED_KEYS if _meant(ours, key) != _meant(theirs, key)]
    if None in (_meant(ours, "layer_types"), _meant(theirs, "layer_types")) and "layer_types" in keys:
        keys.remove("layer_types")  # transformers makes it of other keys where it is missing
    if _rope(ours) != _rope(theirs):
        keys += [key for key in _ROPE_KEYS if config_value(ours, key) != config_value(theirs, key)]
    return keys


def _meant(config: dict[str, Any], key: str) -> Any:
    """What a key comes to."""
    value = config_value(config, key)
    if key == "sliding_window" and not config_value(config, "use_sliding_window", True):
        return None
    if key == "head_dim" and value is None:
        size, heads = (config_value(config, k) for k in ("hidden_size", "num_attention_heads"))
        return size // heads if isinstance(size, int) and isinstance(heads, int) and heads else None
    if key == "num_key_value_heads" and value is None:
        return config_value(config, "num_attention_heads")
    return _SHARED_KEYS[key] if value is None else value


def _rope(config: dict[str, Any]) -> dict[str, Any]:
    """RoPE in one form: transformers 5 has all of it in `rope_parameters`, before there were `rope_theta`,
    `rope_scaling` and `partial_rotary_factor`, and in that `type` for `rope_type`."""
    rope: dict[str, Any] = {}
    for key in ("rope_scaling", "rope_parameters"):
        value = config_value(config, key)
        if isinstance(value, dict):
            rope |= value
    for key in ("rope_theta", "partial_rotary_factor"):
        rope.setdefault(key, config_value(config, key))
    kind = rope.pop("type", None)
    rope.setdefault("rope_type", kind)
    if rope["rope_type"] in (None, "default", "mrope"):  # sections of axes; for text the plain RoPE
        rope["rope_type"] = "default"
    if rope["partial_rotary_factor"] == 1:
        rope["partial_rotary_factor"] = None
    return {key: value for key, value in rope.items() if value is not None}


def _forms(checkpoint: Checkpoint, base: Checkpoint, names: list[str]) -> Iterator[Finding]:
    """Where config.json says FP8, an engine expects it for the tensors that the base model stores so."""
    if not checkpoint.config.get("quantization_config"):
        return
    for name in (n for n in names if not n.endswith(SCALE)):
        here, there = name + SCALE in checkpoint.file_of, name + SCALE in base.file_of
        if here != there:
            yield Finding(
                "error",
                f"{name} is {'FP8 in blocks' if here else 'not quantized'}, in {base} it is the other way",
                "engines build the layer that config.json describes, and load these numbers as something else",
                "`fastmtp export` writes each tensor as the base model stores it",
            )


def _map_list(folder: Path, config: dict[str, Any]) -> Iterator[Finding]:
    try:
        maps = check_map_list(config[TOKEN_MAPS_KEY], folder / "config.json")
        check_names(maps)
    except FastMTPError as error:
        yield Finding("error", str(error), "a server with this package does not start", f'fix "{TOKEN_MAPS_KEY}"')
        return
    for path in maps.values():
        yield from _map(path, folder, config)


def _map(path: Path, folder: Path, config: dict[str, Any]) -> Iterator[Finding]:
    try:
        ids = set(read_token_map(path, config_value(config, "vocab_size")).tolist())
        check_tokenizer(path, folder)
    except FastMTPError as error:
        why = "SGLang checks nothing: a wrong id reads outside the table, or drafts nonsense"
        yield Finding("error", str(error), why, "make the map from this model's own tokenizer")
        return
    ends = read_object(folder / "generation_config.json").get("eos_token_id")
    ends = ends if ends is not None else config_value(config, "eos_token_id")
    missing = sorted({e for e in (ends if isinstance(ends, list) else [ends]) if e is not None} - ids)
    if missing:
        what = f"{path}: does not hold the end token {', '.join(map(str, missing))}"
        yield Finding("warning", what, "the end of an answer is never drafted", "add it to the map")
    tokenizer = folder / "tokenizer.json"
    if tokenizer.exists():
        from tokenizers import Tokenizer

        size = Tokenizer.from_file(str(tokenizer)).get_vocab_size()
        if max(ids) >= size:
            yield Finding(
                "error",
                f"{path}: holds id {max(ids)}, the tokenizer ends at {size - 1}",
                "the map was made with another tokenizer: its ids mean other tokens here",
                "make the map from this model's own tokenizer",
            )


def _static_map(path: str | Path, config: dict[str, Any], tp_size: int) -> Iterator[Finding]:
    if tp_size > 1:
        yield Finding(
            "error",
            f"{path}: a static token map with tensor parallelism {tp_size}",
            "global ids index a head that is sharded: the server crashes (sglang #4328)",
            "serve with --tp-size 1, or without the map",
        )
    if config_value(config, "tie_word_embeddings"):
        yield Finding(
            "error",
            f"{path}: a token map for a model with tied embeddings",
            "the draft keeps the whole head while the engine maps ids through the short table",
            "serve without the map",
        )
