"""Evaluation tasks: what is asked, from a descriptor of a few lines (`tasks/*.yaml`) and rows that stay where they are.

No third party's text is in this package. A task is read from Hugging Face's hub or an address, once, into the user's
cache, or from a file that the user gives; a row becomes the user's turns of a conversation, and the assistant's turns
are always the model's own.
"""

import hashlib
import json
import os
import random
import string
import urllib.request
from collections.abc import Iterable
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import yaml

from ..errors import FastMTPError, detail
from ..files.inputs import check_file
from ..files.row_forms import NO_MESSAGES, UnreadableRowError, normalize
from ..files.rows import BadRows, Row, iter_values
from ..files.show import MAX_INTEGER, show
from ..files.staging import staged

FOLDER = Path(__file__).with_suffix("")
"""The descriptors, and the prompts that were written for this package."""
MAX_NAME = 200
"""Characters of a task's or a question's name."""


@dataclass(frozen=True)
class Descriptor:
    """A task as data: a file of `tasks/`."""

    title: str
    """As in the paper's tables."""
    language: str
    licence: str
    turns: str | list[str] = "turns"
    """The field that holds the list of turns, or one template per turn with `{field}` of the row."""
    id: str | None = None
    """The field that names a row; default: its number."""
    hub: str | None = None
    """A dataset of Hugging Face's hub, of which `files` (patterns) are read."""
    files: list[str] = field(default_factory=list)
    url: str | None = None
    file: str | None = None
    """A file of this package."""
    where: dict[str, Any] = field(default_factory=dict)
    """Only rows with these values."""
    per_file: int | None = None
    """Questions taken of every file, drawn by the seed."""
    num_questions: int | None = None
    """Questions drawn by the seed unless the user says how many; default: all."""
    placeholder: str | None = None
    """The turn of a row whose text the source does not hold; such a row is refused."""
    filled_by: str = ""
    """What puts these texts in."""

    @property
    def source(self) -> str:
        return f"hf:{self.hub}/{','.join(self.files)}" if self.hub else self.url or f"swift_fastmtp/{self.file}"


@dataclass(frozen=True)
class Question:
    """The user's side of one conversation."""

    id: str
    turns: list[str]
    system: str | None = None


@dataclass(frozen=True)
class Task:
    """Questions, and where they are from."""

    name: str
    title: str
    language: str
    licence: str
    source: str
    questions: list[Question]

    @property
    def sha256(self) -> str:
        """Hash of what is asked, in order."""
        text = json.dumps([vars(q) for q in self.questions], ensure_ascii=False, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def info(self) -> dict[str, Any]:
        """For a results file (`results.TaskInfo`)."""
        kept = {k: getattr(self, k) for k in ("title", "language", "source", "licence", "sha256")}
        return {**kept, "num_rows": len(self.questions)}


def task_names() -> list[str]:
    """Tasks that can be called by name."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def read_descriptor(name: str) -> Descriptor:
    """The descriptor of a task. Raises `FastMTPError` if there is none of this name."""
    path = FOLDER / f"{name}.yaml"
    if name not in task_names():
        raise FastMTPError(
            f"no task is called {show(name)}; there are {', '.join(task_names())}, and any FILE or name=FILE"
        )
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert set(values) <= {f.name for f in fields(Descriptor)}, path
    return Descriptor(**values)


def load_task(spec: str, num_questions: int | None = None, seed: int = 0, offline: bool = False) -> Task:
    """A task by name, `name=FILE` (the file that the name's source would have given, or rows as below), or a FILE.

    Args:
        spec: rows of a user's file (JSONL, plain, .gz or .xz, or Parquet) have `turns`, `prompt` or `messages`. Behind
            a name, `:CATEGORY` takes the rows of one `category` alone.
        num_questions: how many are drawn, by `seed`, and kept in order; default: the descriptor's number, or all.
        offline: take only what is in the cache.

    Raises `FastMTPError` for an unknown name, a source that cannot be reached, or a bad row, by file and line.
    """
    name, _, file = spec.partition("=")
    whole, _, category = name.partition(":")
    if not file and whole not in task_names() and (os.path.lexists(spec) or Path(spec).suffix):
        name, file, category = Path(spec).name.split(".")[0], spec, ""
        whole = name
    if not name or not name.isprintable() or len(name) > MAX_NAME:
        raise FastMTPError(f"tasks: {show(spec)}: the task has no plain name; name it as name=FILE")
    if file:
        check_file(file)
    known = not file or whole in task_names()
    described = read_descriptor(whole) if known else Descriptor("", "", "not stated")
    if category:
        described = replace(described, title=f"{described.title or whole}: {category}", num_questions=None)
    paths = [Path(file)] if file else _fetch(name, described, offline)
    # Drawn of every file first, where the task says so, then of all.
    rng = random.Random(f"{seed} {name}")
    questions: list[Question] = []
    for path in paths:
        of_file = _read(path, described, f"{path.parent.name}/" if len(paths) > 1 else "", category)
        questions += _draw(of_file, described.per_file if num_questions is None and len(paths) > 1 else None, rng)
    if not questions:
        of = f" of the category {show(category)}" if category else ""
        raise FastMTPError(f"task {name}: {paths[0]}: holds no questions{of}")
    seen: set[str] = set()
    for question in questions:
        if question.id in seen:
            raise FastMTPError(
                f"task {name}: {paths[0]}: two questions have the id {show(question.id)}; give each its own"
            )
        seen.add(question.id)
    questions = _draw(questions, num_questions or described.num_questions, rng)
    source = described.source if known and not file else Path(file).name
    return Task(name, described.title or name, described.language, described.licence, source, questions)


def _draw(questions: list[Question], number: int | None, rng: random.Random) -> list[Question]:
    if number is None or number >= len(questions):
        return questions
    return [questions[i] for i in sorted(rng.sample(range(len(questions)), number))]


def _read(path: Path, described: Descriptor, prefix: str, category: str) -> list[Question]:
    questions: list[Question] = []
    for where, row in iter_values(path, BadRows(how_to_skip=None)):
        if not isinstance(row, dict):
            raise FastMTPError(f"{where}: a row must be a JSON object; fix the row")
        if category and row.get("category") != category:
            continue
        if all(row.get(k) == v for k, v in described.where.items() if k in row):
            name = row.get(described.id or "id")
            _check_id(name, where)
            questions.append(_question(row, described, f"{prefix}{len(questions) if name is None else name}", where))
    return questions


def _check_id(name: Any, where: str) -> None:
    is_number = isinstance(name, int | float) and abs(name) <= MAX_INTEGER
    if name is not None and not is_number and not (isinstance(name, str) and len(name) <= MAX_NAME):
        raise FastMTPError(f"{where}: its id {show(name)} must be a text of at most {MAX_NAME} characters, or a number")


def _question(row: Row, described: Descriptor, name: str, where: str) -> Question:
    system = None
    if isinstance(described.turns, list) and not _missing(described.turns, row):
        turns: Any = [template.format_map(row).strip() for template in described.turns]
    elif isinstance(described.turns, str) and described.turns in row:
        turns = row[described.turns]
    elif "turns" in row and not row.get("messages"):
        turns = row["turns"]
    else:
        try:
            messages = normalize(row)["messages"]
        except UnreadableRowError as error:
            if error.what != NO_MESSAGES:
                raise FastMTPError(
                    f"{where}: its turns must be texts, none of them empty ({detail(error)}); fix the row"
                ) from None
            wanted = "turns, prompt or messages"
            if isinstance(described.turns, list):
                wanted = f"{', '.join(_missing(described.turns, row))} (or {wanted})"
            raise FastMTPError(f"{where}: needs {wanted}; fix the row") from None
        turns = [m["content"] for m in messages if m["role"] == "user"]
        system = "\n".join(m["content"] for m in messages if m["role"] == "system") or None
    if not isinstance(turns, list) or not turns or not all(isinstance(t, str) and t.strip() for t in turns):
        raise FastMTPError(f"{where}: its turns must be texts, none of them empty; fix the row")
    if described.placeholder and any(described.placeholder in turn for turn in turns):
        raise FastMTPError(f"{where}: its text is not in this file, but a placeholder; {described.filled_by}")
    return Question(name, turns, system)


def _missing(templates: Iterable[str], row: Row) -> list[str]:
    used = {name for t in templates for _, name, _, _ in string.Formatter().parse(t) if name}
    return sorted(name for name in used if not isinstance(row.get(name), (str, int, float)))


def _fetch(name: str, described: Descriptor, offline: bool) -> list[Path]:
    """The files of a task, from the cache or the network."""
    fix = f"give its file as {name}=FILE"
    if described.file:
        return [FOLDER / described.file]
    if described.url:
        return [_download(name, described.url, offline, fix)]
    import huggingface_hub

    assert described.hub
    try:
        folder = huggingface_hub.snapshot_download(
            described.hub, repo_type="dataset", allow_patterns=described.files, local_files_only=offline
        )
    except Exception as error:  # noqa: BLE001 (whatever a network may do)
        raise FastMTPError(
            f"task {name}: {described.source} cannot be read from the hub ({detail(error, 160)}); go online, or {fix}"
        ) from None
    files = sorted({path for pattern in described.files for path in Path(folder).glob(pattern)})
    if not files:
        raise FastMTPError(f"task {name}: {described.source} is not in the cache; go online, or {fix}")
    return files


def _download(name: str, url: str, offline: bool, fix: str) -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "swift_fastmtp" / "tasks"
    path = cache / f"{hashlib.sha256(url.encode()).hexdigest()[:12]}-{url.rsplit('/', 1)[1]}"
    if path.exists():
        return path
    try:
        if offline or os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON"):
            raise OSError("offline, and it is not in the cache")
        with urllib.request.urlopen(url, timeout=60) as response:
            content = response.read()
    except OSError as error:
        raise FastMTPError(f"task {name}: {url} cannot be read ({detail(error, 160)}); go online, or {fix}") from None
    with staged(path) as file:
        file.write_bytes(content)
    return path
