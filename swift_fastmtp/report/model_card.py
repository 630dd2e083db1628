"""The README.md of an exported folder: what the head is, what it was measured to do, how to serve it.

Everything in it is read from the folder and from a results file of `fastmtp bench`; what is not known is said to be
unknown. Paths of the machine that trained do not get into it. What the base model's card says stays there: the card
links to it.
"""

import hashlib
import math
import re
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from .. import __version__
from ..checkpoint.checkpoint import SETTINGS_FILE, Checkpoint
from ..errors import FastMTPError
from ..files import inputs
from ..files.known_files import read_object
from ..files.staging import staged
from ..files.table import Table, escape, markdown, markdown_table
from ..method.config import FastMTPConfig
from ..serving.launch import Flag, explain, serve_flags
from .entries import slices
from .merge import Merged, engine, load_results, notes
from .tables import (
    acceptance_table,
    concurrency_table,
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
_OF_THE_MACHINE = ("hidden_cache", "hidden_cache_gb", "loss_chunk_size")


def write_card(
    folder: str | Path,
    results: str | Path | Sequence[str | Path] | None = None,
    base_model: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Write README.md of an exported folder, full or draft-only. Returns its path.

    Args:
        results: results.json of `fastmtp bench`, one or several.
        base_model: the base's name on the hub, OWNER/NAME; default: what the base folder's path tells, if it does.
        overwrite: replace a README.md that is neither the base model's nor a card of ours.

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
    """Where the base model was, as far as an export tells."""
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
    base_path = _base_path(info)
    hub_name = base_model or hub_name_of(base_path)
    base = hub_name or Path(base_path).name or "its base model"
    linked = f"[{base}](https://huggingface.co/{base})" if hub_name else f"`{base}`"
    head = sum(math.prod(checkpoint.shape(n)) for n in checkpoint.under(*family.roots) if not family.is_copy(n))
    steps = info.get("num_speculative_steps") or 3
    what = (
        f"{linked} with its multi-token-prediction (MTP) layer fine-tuned by FastMTP ([paper]"
        f"(https://arxiv.org/abs/2509.18362)) to draft {steps} tokens in a row. All other weights are the base's, bit "
        "for bit, and every drafted token is verified by them: what the model says does not change, only how fast."
        if full
        else f"The multi-token-prediction (MTP) layer of {linked}, fine-tuned by FastMTP ([paper]"
        f"(https://arxiv.org/abs/2509.18362)) to draft {steps} tokens in a row. It holds nothing else: an engine loads "
        "it beside the base model, which verifies every drafted token, so what the model says does not change."
    )
    facts = [
        ("base model", linked),
        ("holds", "the whole model" if full else "config, tokenizer and the MTP layer"),
        ("architecture", f"`{(config.get('architectures') or ['unknown'])[0]}`, one MTP layer applied {steps} times"),
        ("parameters of the MTP layer", f"{head:,}"),
        ("fingerprint of the base's weights", f"`{str(info.get('base_fingerprint') or 'unknown')[:16]}`"),
        ("trained with", f"swift_fastmtp {info.get('swift_fastmtp', 'unknown')}"),
    ]
    knobs = [(f"`{f.name}`", _knob(info[f.name])) for f in fields(FastMTPConfig) if f.name in info]
    knobs = [knob for knob in knobs if knob[0].strip("`") not in _OF_THE_MACHINE]
    parts = [
        _front_matter(folder, base_path, hub_name, full),
        f"# {escape(folder.name)}\n\n{what}\n",
        _facts(facts),
        f"## Training\n\n{_data(info)}\n",
        _facts(knobs),
        *_measurements(measured),
        _serving(folder, base, full, family.engines.vllm),
        _limits(linked, steps, measured),
    ]
    return "\n".join(parts)


def hub_name_of(path: str) -> str | None:
    """OWNER/NAME that a model's path or name tells: a name itself, or a folder of a hub's download cache."""
    parts = Path(path).parts
    for part in parts:
        if match := re.fullmatch(r"models--([\w.-]+?)--([\w.-]+)", part):
            return f"{match[1]}/{match[2]}"
    if "modelscope" in parts and len(parts) - parts.index("modelscope") > 2:
        return "/".join(parts[-2:]).replace("___", ".")
    if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", path) and not Path(path).exists():
        return path
    return None


def _knob(value: Any) -> str:
    if isinstance(value, str) and "/" in value:
        value = Path(value).name
    return f"`{value}`" if value != "" else "–"


def _facts(pairs: list[tuple[str, str]]) -> str:
    return markdown_table(("", ""), pairs, num_text=2, raw=True) + "\n"


def _front_matter(folder: Path, base_path: str, hub_name: str | None, full: bool) -> str:
    import yaml

    theirs: dict[str, Any] = {}
    for card in (Path(base_path) / CARD if base_path else folder / CARD, folder / CARD):
        theirs = theirs or front_matter(card)
    matter: dict[str, Any] = {key: theirs[key] for key in _FROM_BASE if _is_text(theirs.get(key))}
    if hub_name:
        matter |= {"base_model": hub_name, "base_model_relation": "finetune"}
    matter["library_name"] = "transformers" if full else "sglang"
    matter["pipeline_tag"] = (
        theirs["pipeline_tag"] if isinstance(theirs.get("pipeline_tag"), str) else "text-generation"
    )
    matter["tags"] = ["fastmtp", "mtp", "multi-token-prediction", "speculative-decoding", "sglang"]
    text: str = yaml.safe_dump(matter, sort_keys=False, allow_unicode=True)
    missing = (
        "" if "license" in matter else "# license: not found in the base model's card; add it before you publish\n"
    )
    missing += "" if hub_name else "# base_model: OWNER/NAME, not known here; or fastmtp card --base_model OWNER/NAME\n"
    return f"---\n{text}{missing}---\n"


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


def _data(info: dict[str, Any]) -> str:
    names = info.get("dataset")
    if isinstance(names, str):
        names = [names]
    if isinstance(names, list) and names:
        return "Data: " + ", ".join(f"`{Path(str(name)).name}`" for name in names) + "."
    return "The folder does not tell which data the head was trained on."


def _measurements(results: Merged | None) -> list[str]:
    if results is None:
        return ["## Measured\n\nNothing yet: the card was made without a results file of `fastmtp bench`.\n"]
    first = slices(results)[0]
    tables: list[Table | None] = [
        main_table(results, *first),
        speedup_table(results, *first),
        map_table(results, *first),
        acceptance_table(results, first[0]),
        concurrency_table(results, first[0]),
        lossless_table(results),
        task_table(results),
    ]
    lines = []
    for _, content in results.files:
        known = content.provenance
        facts = (known.get("hardware"), engine(known), f"up to {content.settings.max_new_tokens} tokens an answer")
        lines.append(f"* {escape(', '.join(str(fact) for fact in facts if fact))}")
    models = {s.label: Path(s.draft_model or s.model).name for s in results.servers.values() if s.num_steps}
    lines += [f"* {escape(label)}: `{name}`" for label, name in models.items()]
    lines += [f"* **{escape(note)}**" for note in notes(results)]
    return ["## Measured\n\n" + "\n".join(lines) + "\n", *(markdown(table, 3) for table in tables if table)]


def _serving(folder: Path, base: str, full: bool, vllm: bool) -> str:
    """Launch commands of `serve_args`, with names where it has this machine's paths."""

    def shown(flags: list[Flag]) -> str:
        return explain(
            [replace(flag, words=tuple(_without_path(w, folder, base) for w in flag.words)) for flag in flags]
        )

    text = "## Serve\n\n" + ("" if full else f"`{base}` is the base model's folder, `{folder.name}` this one.\n\n")
    # The target of a draft-only folder is only a name here.
    text += f"Stock SGLang:\n\n```sh\n{shown(serve_flags(folder, model=None if full else base))}\n```\n"
    if full and vllm:
        text += f"\nvLLM (not run by this project so far):\n\n```sh\n{shown(serve_flags(folder, 'vllm'))}\n```\n"
    return text


def _without_path(word: str, folder: Path, base: str) -> str:
    if word == str(folder):
        return folder.name
    return Path(word).name if word.startswith(("/", "~", ".")) and word != base else word


def _limits(linked: str, steps: int, results: Merged | None) -> str:
    lines = [
        f"* The text is the base model's: its abilities, biases and risks are described in the card of {linked}.",
        "* The speedup depends on hardware, engine, batch size, language and task. It shrinks with many requests at a "
        "time; measure yours with `fastmtp bench`.",
        f"* The layer was trained for {steps} drafts a step; more of them are accepted less and less often.",
        "* It drafts for this base model only. After fine-tuning the base, train the layer again.",
    ]
    if results is None or lossless_table(results) is None:
        lines.append("* Whether answers stay token by token the same on your engine was not measured here.")
    return "## Limits\n\n" + "\n".join(lines) + f"\n\nCard written by swift_fastmtp {__version__}.\n"
