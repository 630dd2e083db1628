"""Finds, before anything is served, what makes acceptance silently collapse.

An engine with a broken draft still gives correct text, only no speed-up: it loads what it finds, ignores tensors whose
names it does not know, and keeps random values where some are missing (SGLang `mimo_mtp.py` `load_weights`). Every
check here is a failure that users of the engines have met.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.config_file import TOKEN_MAPS_KEY, WrongTypeError
from ..checkpoint.headers import TOWER
from ..checkpoint.quantization import read_quantization
from ..checkpoint.refusals import refusals
from ..checkpoint.weight_files import INDEX_FILE
from ..errors import FastMTPError
from ..families.family import ENGINE_NAMES, Family, config_value
from ..files.known_files import read_object
from ..method.comparison import why_withheld
from ..method.map_files import check_map_list, check_tokenizer
from ..vocab.languages import check_names
from .finding import Finding

_NOT_LOADED = {
    "error": "engines check the index before they load anything",
    "warning": "the engine loads another set of files than SGLang, from which everything here was read",
}


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
    # Tensors from here on: what could be found without them is, before torch and the models' classes are imported.
    from .doctor_origin import check_origin
    from .doctor_tensors import check_backbone, check_layer

    findings += _files(checkpoint, family)
    if fault := checkpoint.vocab_size_fault:
        why = "engines stop, or read and draft ids that no row is for"
        findings.append(Finding("error", f"config.json: {fault}", why, "take config.json from the base model"))
    try:
        findings += check_layer(checkpoint, family)
    except FastMTPError as error:
        why = "engines build the draft from config.json, and stop, or build another model"
        return [*findings, Finding("error", str(error), why, "take config.json from the base model")]
    findings += check_backbone(checkpoint, family)
    findings += check_origin(checkpoint, family, model)
    trained_for = checkpoint.trained_for
    target_config = config
    if not checkpoint.has_backbone():
        target_config = read_object(
            Path(model or checkpoint.settings.get("base_model") or "/nonexistent") / "config.json"
        )
    if trained_for and (mismatch := family.mismatch(trained_for, engine, target_config)):
        how = f"train it with fastmtp_engine {engine}, or serve it with the engine that it was trained for"
        findings.append(Finding("warning", f"the head meets another graph in {ENGINE_NAMES[engine]}", mismatch, how))
    if worse := why_withheld(checkpoint.settings.get("compared")):
        how = "serve the head that the run began with; its folder is `best` in the run's folder"
        findings.append(Finding("warning", "the run that trained this head found it worse", worse, how))
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
    from ..method.token_map import read_token_map  # torch, which takes seconds

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
