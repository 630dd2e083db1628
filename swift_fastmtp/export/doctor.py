"""Finds, before anything is served, what makes acceptance silently collapse.

An engine with a broken draft still gives correct text, only no speed-up: it loads what it finds, ignores tensors whose
names it does not know, and keeps random values where some are missing (SGLang `mimo_mtp.py` `load_weights`). Every
check here is a failure that users of the engines have met.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.config_file import TOKEN_MAPS_KEY, WrongTypeError
from ..checkpoint.fingerprint import WHOLE_BELOW
from ..checkpoint.finite import is_finite
from ..checkpoint.fp8 import DTYPE as FP8
from ..checkpoint.fp8_config import SCALE
from ..checkpoint.headers import TOWER
from ..checkpoint.mtp_tensors import read_plain
from ..checkpoint.quantization import parts_of, read_quantization
from ..checkpoint.quantization_methods import SGLANG
from ..checkpoint.refusals import refusals
from ..checkpoint.weight_files import INDEX_FILE
from ..errors import FastMTPError
from ..families.family import ENGINE_NAMES, Family, config_value
from ..files.known_files import read_object
from ..method.token_map import check_map_list, check_tokenizer, read_token_map
from ..vocab.languages import check_names
from .doctor_origin import check_origin
from .doctor_quantization import check_dtypes, check_quantization, is_packed, stored_tensors
from .finding import Finding
from .inspection import MTP_WORD

_NOT_LOADED = {
    "error": "engines check the index before they load anything",
    "warning": "the engine loads another set of files than SGLang, from which everything here was read",
}
_PLAIN = {"bfloat16", "float16", "float32"}
_FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
_SMALL = 2**20  # bytes


def examine(
    folder: str | Path,
    model: str | Path | None = None,
    token_map: str | Path | None = None,
    tp_size: int = 1,
    engine: Literal["sglang", "vllm"] = "sglang",
) -> list[Finding]:
    """All findings about a full checkpoint, a draft-only folder or a training checkpoint.

    Args:
        folder: full checkpoint, draft-only folder or training checkpoint
        model: base model to compare with; default: the one the head was trained for
        token_map: file meant for SGLang's --speculative-token-map
        tp_size: planned tensor parallelism
        engine: that will serve it, for what engines compute otherwise with the same layer

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
    findings += check_origin(checkpoint, family, model)
    trained_for = checkpoint.trained_for
    if trained_for and (mismatch := family.mismatch(trained_for, engine)):
        how = f"train it with fastmtp_engine {engine}, or serve it with the engine that it was trained for"
        findings.append(Finding("warning", f"the head meets another graph in {ENGINE_NAMES[engine]}", mismatch, how))
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
    from ..model.loading import needed_tensors

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
    from ..model.loading import head_shapes, keeps_float32  # builds the head on the meta device

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
