"""The README.md of an exported folder: what the MTP layer is, what it was measured to do, how to serve it.

Everything in it is read from the folder and from a results file of `fastmtp bench`; what is not known is called
unknown. Paths of the machine that trained do not get into it. What the base model's card says stays there: the card
links to it. Its text is `templates/card.md.j2`.
"""

import hashlib
import json
import math
import re
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import yaml

from .. import __version__
from ..checkpoint.checkpoint import SETTINGS_FILE, Checkpoint
from ..checkpoint.config_file import TOKEN_MAPS_VARIABLE
from ..errors import FastMTPError
from ..families.family import ENGINE_NAMES, ENGINES
from ..files import inputs
from ..files.known_files import read_object
from ..files.staging import staged
from ..files.table import markdown_table
from ..files.templates import render
from ..method.comparison import shown_changes
from ..method.config import FastMTPConfig
from ..serving.flags import Flag, explain
from ..serving.launch import serve_flags
from .answer import answers
from .entries import slices
from .merge import Merged, engine, load_results, notes
from .tables import (
    acceptance_table,
    concurrency_table,
    distribution_table,
    lossless_table,
    main_table,
    map_table,
    speedup_table,
    task_table,
)

CARD = "README.md"
# The last line of a card that we wrote and nobody has edited since.
_MARK = re.compile(r"<!-- fastmtp card, sha256 ([0-9a-f]{64}) -->\n\Z")
_FROM_BASE = ("license", "license_name", "license_link", "language")
_OF_THE_MACHINE = ("hidden_cache", "hidden_cache_gb", "loss_chunk_size", "other_val_dataset", "on_worse")


def write_card(
    folder: str | Path,
    results: str | Path | Sequence[str | Path] | None = None,
    base_model: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Write README.md of an exported folder, full or draft-only. Returns its path.

    Args:
        folder: full checkpoint or draft-only folder of an export
        results: results.json of `fastmtp bench`, one or several
        base_model: OWNER/NAME of the base on the hub; default: what its folder's path tells
        overwrite: replace a README.md that somebody wrote, neither the base model's nor a card of ours

    The base's own README.md, which a full export links into the folder, is replaced, never written through. Raises
    `FastMTPError` for a folder without `fastmtp.json`, invalid results, or a README.md that somebody wrote.
    """
    folder = Path(folder)
    text = make_card(folder, results, base_model)
    path = folder / CARD
    if path.is_symlink() or path.exists():
        info = read_object(folder / SETTINGS_FILE)
        if not (overwrite or _is_ours(path) or _is_the_base_models(path, info)):
            raise FastMTPError(f"{path}: neither written by fastmtp nor the base model's; move it away, or --overwrite")
    digest = hashlib.sha256(text.encode()).hexdigest()
    with staged(path) as file:  # the name only: another link to the old file keeps what it had
        file.write_text(f"{text}<!-- fastmtp card, sha256 {digest} -->\n", encoding="utf-8")
    return path


def _is_ours(path: Path) -> bool:
    try:
        text = inputs.read_text(path)
    except (OSError, FastMTPError):
        return False
    mark = _MARK.search(text)
    return mark is not None and hashlib.sha256(text[: mark.start()].encode()).hexdigest() == mark[1]


def _is_the_base_models(path: Path, info: dict[str, Any]) -> bool:
    original = Path(_base_path(info)) / CARD
    try:
        return original.samefile(path) or inputs.read_bytes(original) == inputs.read_bytes(path)
    except (OSError, FastMTPError):
        return False


def _base_path(info: dict[str, Any]) -> str:
    """Where the base model was, as far as the export recorded it."""
    path = info.get("base_model")
    return path if isinstance(path, str) and "\0" not in path else ""


def make_card(
    folder: str | Path, results: str | Path | Sequence[str | Path] | None = None, base_model: str | None = None
) -> str:
    """The card's text. Arguments and errors as `write_card`."""
    checkpoint = Checkpoint(Path(folder).absolute())
    folder, config, info = checkpoint.folder, checkpoint.config, checkpoint.settings
    if not info:
        raise FastMTPError(
            f"{folder}: no {SETTINGS_FILE}; a card is made of a folder of swift export or fastmtp export"
        )
    if base_model is not None and not re.fullmatch(r"[\w.-]+/[\w.-]+", base_model):
        raise FastMTPError(f"--base_model {base_model!r}: must be OWNER/NAME, the base's name on the hub")
    paths = [results] if isinstance(results, str | Path) else list(results or [])
    measured = load_results(paths) if paths else None
    family = checkpoint.family
    full = checkpoint.has_backbone()

    # Which model this is: by its name on the hub if that is known, else by its folder's name, never by a path.
    base_path = _base_path(info)
    hub_name = base_model or hub_name_of(base_path)
    base = hub_name or Path(base_path).name or "its base model"
    linked = f"[{base}](https://huggingface.co/{base})" if hub_name else f"`{base}`"
    metadata = _metadata(folder, base_path, hub_name, full)

    # What it holds, and how it was trained.
    steps = info.get("num_speculative_steps") or 3
    own_tensors = [name for name in checkpoint.under(*family.roots) if not family.is_copy(name)]
    parameters = sum(math.prod(checkpoint.shape(name)) for name in own_tensors)
    facts = [
        ("base model", linked),
        ("holds", "the whole model" if full else "config, tokenizer and the MTP layer"),
        ("architecture", f"`{(config.get('architectures') or ['unknown'])[0]}`, one MTP layer applied {steps} times"),
        ("parameters of the MTP layer", f"{parameters:,}"),
        ("fingerprint of the base's weights", f"`{str(info.get('base_fingerprint') or 'unknown')[:16]}`"),
        ("trained with", f"swift_fastmtp {info.get('swift_fastmtp', 'unknown')}"),
        *_against_initial(info),
    ]
    names = [f.name for f in fields(FastMTPConfig) if f.name in info and f.name not in _OF_THE_MACHINE]
    knobs = [(f"`{name}`", _knob(info[name])) for name in names]

    # How it is served. The target of a draft-only folder is only a name here.
    sglang = serve_flags(folder, model=None if full else base)
    vllm = serve_flags(folder, "vllm", model=None if full else base) if family.engines.vllm else None

    return render(
        __file__,
        "card.md",
        front_matter=yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True).rstrip(),
        has_license="license" in metadata,
        hub_name=hub_name,
        folder=folder,
        base=base,
        linked=linked,
        full=full,
        steps=steps,
        facts=markdown_table(("", ""), facts, num_text=2, raw=True),
        datasets=_datasets(info),
        knobs=markdown_table(("", ""), knobs, num_text=2, raw=True),
        mismatches=_mismatches(checkpoint),
        sglang=_without_paths(sglang, folder, base),
        vllm=vllm and _without_paths(vllm, folder, base),
        version=__version__,
        **_measurements(measured),
    )


def _mismatches(checkpoint: Checkpoint) -> list[str]:
    """A sentence for each engine that computes something else with this layer than what it was trained for."""
    trained_for = checkpoint.trained_for or "sglang"
    target = checkpoint.config
    if not checkpoint.has_backbone():
        target = read_object(Path(checkpoint.settings.get("base_model") or "/nonexistent") / "config.json")
    sentences = []
    for server in ENGINES:
        if mismatch := checkpoint.family.mismatch(trained_for, server, target):
            sentences.append(f"In {ENGINE_NAMES[server]} it drafts worse: it was {mismatch}.")
    return sentences


def hub_name_of(path: str) -> str | None:
    """OWNER/NAME from a model's path or name: a name itself, or a folder of a hub's download cache."""
    parts = Path(path).parts
    for part in parts:
        if match := re.fullmatch(r"models--([\w.-]+?)--([\w.-]+)", part):
            return f"{match[1]}/{match[2]}"
    if "modelscope" in parts and len(parts) - parts.index("modelscope") > 2:
        return "/".join(parts[-2:]).replace("___", ".")
    if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", path) and not Path(path).exists():
        return path
    return None


def _against_initial(info: dict[str, Any]) -> list[tuple[str, str]]:
    """What the run measured of the head that it began with and of this one, where it did."""
    return [(f"tau, before and after, on the run's {name}", text) for name, text in shown_changes(info).items()]


def _knob(value: Any) -> str:
    if isinstance(value, str) and "/" in value:
        value = Path(value).name
    return f"`{value}`" if value != "" else "–"


def _metadata(folder: Path, base_path: str, hub_name: str | None, full: bool) -> dict[str, Any]:
    """The card's metadata: what holds for the base model holds for this one."""
    theirs: dict[str, Any] = {}
    for card in (Path(base_path) / CARD if base_path else folder / CARD, folder / CARD):
        theirs = theirs or front_matter(card)
    matter: dict[str, Any] = {key: theirs[key] for key in _FROM_BASE if _is_text(theirs.get(key))}
    if hub_name:
        matter |= {"base_model": hub_name, "base_model_relation": "finetune"}
    matter["library_name"] = "transformers" if full else "sglang"
    task = theirs.get("pipeline_tag")
    matter["pipeline_tag"] = task if isinstance(task, str) else "text-generation"
    matter["tags"] = ["fastmtp", "mtp", "multi-token-prediction", "speculative-decoding", "sglang"]
    return matter


def _is_text(value: Any) -> bool:
    return all(isinstance(one, str) for one in value) if isinstance(value, list) else isinstance(value, str)


def front_matter(card: Path) -> dict[str, Any]:
    """The YAML block at the top of a card; {} where there is none, or where it is broken."""
    try:
        match = re.match(r"---\r?\n(.*?)\r?\n---[^\S\n]*(\n|\Z)", inputs.read_text(card), re.S)
        value = inputs.parse_yaml(match[1][: inputs.MAX_YAML_BYTES], card) if match else None
    except (OSError, FastMTPError):
        return {}
    return value if isinstance(value, dict) else {}


def _datasets(info: dict[str, Any]) -> list[str]:
    names = info.get("dataset")
    if isinstance(names, str):
        names = [names]
    return [Path(str(name)).name for name in names] if isinstance(names, list) else []


def _measurements(results: Merged | None) -> dict[str, Any]:
    """What the template's section `Measured` is filled with."""
    if results is None:
        return {"measured": False, "lossless_measured": False}
    temperature, concurrency = slices(results)[0]
    lossless = lossless_table(results)
    tables = [
        main_table(results, temperature, concurrency),
        speedup_table(results, temperature, concurrency),
        map_table(results, temperature, concurrency),
        acceptance_table(results, temperature),
        concurrency_table(results, temperature),
        lossless,
        distribution_table(results),
        task_table(results),
    ]
    sources = []
    for _, content in results.files:
        known = content.provenance
        facts = (known.get("hardware"), engine(known), f"up to {content.settings.max_new_tokens} tokens an answer")
        sources.append(", ".join(str(fact) for fact in facts if fact))
    return {
        "measured": True,
        "lossless_measured": lossless is not None,
        "sources": sources,
        "models": {s.label: Path(s.draft_model or s.model).name for s in results.servers.values() if s.num_steps},
        "answers": answers(results),
        "notes": notes(results),
        "tables": [table for table in tables if table],
    }


def _without_paths(flags: list[Flag], folder: Path, base: str) -> str:
    """A launch command of `serve_args`, with names where it has this machine's paths."""

    def without_path(word: str) -> str:
        if word == str(folder):
            return folder.name
        if word.startswith(f"{TOKEN_MAPS_VARIABLE}="):
            return f"{TOKEN_MAPS_VARIABLE}={Path(word.partition('=')[2]).name}"
        if word.startswith("{"):  # vLLM's speculative config, which names a draft-only folder
            return word.replace(json.dumps(str(folder)), json.dumps(folder.name))
        return Path(word).name if word.startswith(("/", "~", ".")) and word != base else word

    return explain([replace(flag, words=tuple(without_path(word) for word in flag.words)) for flag in flags])
