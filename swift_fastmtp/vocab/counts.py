"""How often the model says each token, by language and domain: what token maps are made of.

Counted are self-distilled responses, token by token, not web pages. Rows are read once, one after the other, and
counted in chunks by as many processes as wanted. The counts of a file are kept until the maps are written, so that a
killed job starts again at the file it was at. Some prompts are held out, for coverage that was not measured on what was
counted.
"""

import hashlib
import json
import multiprocessing
import os
import re
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from tqdm import tqdm

from ..data.conversation import message_text
from ..data.language import language
from ..data.language_names import UNKNOWN, language_code
from ..data.mix import prompt_text
from ..data.mix_groups import Groups, language_of
from ..errors import FastMTPError, cannot_write
from ..files import inputs
from ..files.copies import file_hash
from ..files.rows import BadRows, Row, iter_rows
from ..files.staging import staged
from .must_keep import Vocabulary

Ints = NDArray[np.int64]
Chunk = list[tuple[str, Row]]

FORMAT = 2
"""Of the counts on disk; another number, and they are counted again."""
COUNTS = "counts-*.safetensors"
"""Names of the files of counts, one for each file that was counted."""
MAX_CELLS = 256
CHUNK_ROWS, CHUNK_CHARACTERS = 1024, 2**20


@dataclass(frozen=True)
class CountSettings:
    """What the counts of a file depend on, beside the file and the tokenizer."""

    count: str = "answers"
    """`answers` or `all` messages."""
    categories: bool = False
    """Whether the domain of a row is its `category` as it stands, or `code`, `math` or `general`."""
    held_out: float = 0.05
    """Fraction of the prompts whose rows are not counted, but used to measure coverage."""
    on_bad_row: str = "stop"


@dataclass
class Counts:
    """Tokens by cell, `language/domain`: int64 [V] each, of counted and of held-out rows."""

    rows: int
    """V"""
    counted: dict[str, Ints] = field(default_factory=dict)
    held_out: dict[str, Ints] = field(default_factory=dict)
    how: Counter[str] = field(default_factory=Counter)
    """Messages whose tokens are their own `token_ids`, or the tokenizer's."""
    bad: dict[str, Any] = field(default_factory=dict)
    """Bad rows that were skipped: what is wrong -> number of rows, and places of some."""

    def cell(self, name: str) -> tuple[Ints, Ints]:
        """(counted, held out), zeros if the cell is new. Raises `FastMTPError` if there are too many."""
        if name not in self.counted:
            if len(self.counted) == MAX_CELLS:
                raise FastMTPError(
                    f"--by: rows have more than {MAX_CELLS} kinds of language and category; use --by language, or fix "
                    f"`language` and `category` (the last one is {name!r})"
                )
            self.counted[name], self.held_out[name] = (np.zeros(self.rows, dtype=np.int64) for _ in range(2))
        return self.counted[name], self.held_out[name]

    def add(self, other: "Counts") -> None:
        for name in other.counted:
            for mine_V, theirs_V in zip(self.cell(name), other.cell(name), strict=True):
                mine_V += theirs_V
        self.how.update(other.how)
        for what, theirs in other.bad.items():
            mine = self.bad.setdefault(what, {"count": 0, "rows": []})
            mine["count"] += theirs["count"]
            mine["rows"] = (mine["rows"] + theirs["rows"])[:5]

    def save(self, path: Path) -> None:
        """A safetensors file, whole or not there: `counted` and `held_out`, int64 [cells, V]; cells in the metadata."""
        cells = sorted(self.counted)
        empty = np.zeros((0, self.rows), dtype=np.int64)
        arrays = {
            name: np.stack([of[cell] for cell in cells]) if cells else empty
            for name, of in (("counted", self.counted), ("held_out", self.held_out))
        }
        # One key: safetensors writes several in any order.
        about = {"cells": cells, "how": dict(sorted(self.how.items())), "bad": self.bad}
        with staged(path) as file:
            try:
                save_file(arrays, file, metadata={"counts": json.dumps(about, sort_keys=True)})
            except SafetensorError as error:
                raise cannot_write(path, error) from None
            file.chmod(0o644)  # safetensors writes 0600

    @classmethod
    def load(cls, path: Path) -> "Counts":
        """Raises `FastMTPError` if the file is not one of `save`."""
        inputs.check_file(path)
        try:
            with safe_open(path, framework="numpy") as file:
                about = inputs.loads(file.metadata()["counts"])
                counted, held_out = (
                    dict(zip(about["cells"], file.get_tensor(name), strict=True)) for name in ("counted", "held_out")
                )
                rows = file.get_slice("counted").get_shape()[1]
            return cls(rows, counted, held_out, Counter(about["how"]), about["bad"])
        except (OSError, SafetensorError, LookupError, AttributeError, TypeError, ValueError) as error:
            raise FastMTPError(f"{path}: cannot be read as counts ({error}); delete it") from None


def count_files(
    inputs: Sequence[str], settings: CountSettings, vocabulary: Vocabulary, cache_folder: Path, jobs: int = 1
) -> tuple[Counts, list[str]]:
    """The tokens of all files, and the files' hashes. The result does not depend on `jobs` or on the files' order.

    `cache_folder`: where the counts of finished files are, for a job that is started again.

    Raises `FastMTPError` if a file cannot be read, changes meanwhile or is named twice, a row is bad (unless
    `settings.on_bad_row` is "skip"), or there is nothing to count.
    """
    if len({os.path.realpath(path) for path in inputs}) < len(inputs):
        raise FastMTPError("--inputs: a file is named twice; each is counted once")
    total, hashes = Counts(vocabulary.rows), []
    with ExitStack() as stack:
        pool: ProcessPoolExecutor | None = None
        for path in inputs:
            hashes.append(file_hash(path))
            kept = cache_folder / COUNTS.replace("*", _key(path, hashes[-1], settings, vocabulary))
            if kept.exists():
                total.add(Counts.load(kept))
                continue
            if jobs > 1 and pool is None:
                pool = stack.enter_context(_pool(jobs, settings, vocabulary))
            counts = _count_file(path, settings, vocabulary, pool, jobs)
            if file_hash(path) != hashes[-1]:
                raise FastMTPError(f"{path}: changed while it was read; start again when it is complete")
            try:
                cache_folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise cannot_write(cache_folder, error) from None
            counts.save(kept)
            total.add(counts)
    if not any(of_V.any() for of_V in total.counted.values()):
        raise FastMTPError(f"{', '.join(inputs)}: no tokens to count")
    return total, hashes


def _key(path: str, digest: str, settings: CountSettings, vocabulary: Vocabulary) -> str:
    # The name, too: places of bad rows have it, and Parquet is told by it.
    values = {**asdict(settings), "file": path, "sha256": digest, "format": FORMAT}
    values |= {"tokenizer": vocabulary.tokenizer_sha256, "rows": vocabulary.rows}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:32]


def _count_file(
    path: str, settings: CountSettings, vocabulary: Vocabulary, pool: ProcessPoolExecutor | None, jobs: int
) -> Counts:
    counts = Counts(vocabulary.rows)
    read, counted = BadRows(settings.on_bad_row), BadRows(settings.on_bad_row)

    def submit(chunk: Chunk) -> "Future[ChunkCounts]":
        if pool is not None:
            return pool.submit(_count_in_worker, chunk)
        done: Future[ChunkCounts] = Future()
        done.set_result(count_chunk(chunk, settings, vocabulary))
        return done

    with tqdm(unit="row", desc=f"count {Path(path).name}") as progress:
        for chunk in _in_order(_chunks(path, read), submit, ahead=2 * jobs if pool else 0):
            progress.update(chunk.rows)
            for fault in chunk.bad:
                counted.add(*fault)
            counts.how.update(chunk.how)
            for (cell, held), (ids, numbers) in chunk.tokens.items():
                counts.cell(cell)[held][ids] += numbers
    counts.bad = dict(sorted({**read.report(), **counted.report()}.items()))
    return counts


def _chunks(path: str, bad: BadRows) -> Iterator[Chunk]:
    chunk: Chunk = []
    size = 0
    try:
        for where, row in iter_rows(path, bad):
            chunk.append((where, row))
            size += sum(len(m["content"]) for m in row["messages"])
            if len(chunk) == CHUNK_ROWS or size >= CHUNK_CHARACTERS:
                yield chunk
                chunk, size = [], 0
    except FastMTPError:
        yield chunk  # a row before the one that stops the reader may be a bad one, too
        raise
    if chunk:
        yield chunk


def _in_order(
    chunks: Iterator[Chunk], submit: Callable[[Chunk], "Future[ChunkCounts]"], ahead: int
) -> Iterator["ChunkCounts"]:
    """Results in the order of the chunks, at most `ahead` of them under way. What stops the reader is raised behind the
    results of everything before it, so that the first bad row is the same one whatever `ahead` is."""
    waiting: deque[Future[ChunkCounts]] = deque()
    stopped: FastMTPError | None = None
    try:
        while True:
            try:
                chunk = next(chunks, None)
            except FastMTPError as error:
                stopped, chunk = error, None
            if chunk is None:
                break
            waiting.append(submit(chunk))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool:
        raise FastMTPError("a counting process was killed (out of memory?); start again, with fewer --jobs") from None
    finally:
        for future in waiting:
            future.cancel()
    if stopped is not None:
        raise stopped


@dataclass
class ChunkCounts:
    """What one chunk has: per (cell, whether held out) the ids that occur and how often."""

    rows: int
    tokens: dict[tuple[str, bool], tuple[Ints, Ints]]
    how: Counter[str]
    bad: list[tuple[str, str, str]]


def count_chunk(chunk: Chunk, settings: CountSettings, vocabulary: Vocabulary) -> ChunkCounts:
    """Count some rows. Runs in a process of its own where there are several."""
    ids: dict[tuple[str, bool], list[Ints]] = {}
    how: Counter[str] = Counter()
    bad: list[tuple[str, str, str]] = []
    texts: list[str] = []
    of_text: list[tuple[str, bool]] = []
    for where, row in chunk:
        messages = [m for m in row["messages"] if settings.count == "all" or m["role"] == "assistant"]
        own, fault = _own_ids(messages, vocabulary)
        spoken = [text for m in messages if m.get("token_ids") is None and (text := message_text(m))]
        if fault:
            bad.append((where, *fault))
        elif not spoken and not any(map(len, own)):
            bad.append((where, "has no answer to count", "--count all counts prompts")
                       if settings.count == "answers" else (where, "has no text to count", ""))  # fmt: skip
        else:
            key = cell_of(row, settings.categories), _is_held_out(row, settings.held_out)
            ids.setdefault(key, []).extend(own)
            texts += spoken
            of_text += [key] * len(spoken)
            how.update({"token_ids": len(own), "tokenizer": len(spoken)})
    if texts:
        encodings = vocabulary.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        for key, encoding in zip(of_text, encodings, strict=True):
            ids[key].append(np.array(encoding.ids, dtype=np.int64))
    tokens = {key: np.unique(np.concatenate(parts), return_counts=True) for key, parts in ids.items()}
    return ChunkCounts(len(chunk), tokens, +how, bad)


def _own_ids(messages: list[Row], vocabulary: Vocabulary) -> tuple[list[Ints], tuple[str, str] | None]:
    """The `token_ids` of messages that have them, or what is wrong with one."""
    arrays = []
    for message in messages:
        ids = message.get("token_ids")
        if ids is None:
            continue
        if not isinstance(ids, list) or not all(type(i) is int and abs(i) < 2**62 for i in ids):
            return [], ("token_ids must be a list of whole numbers", f"{ids!r:.60}")
        array = np.array(ids, dtype=np.int64)
        inside = (array >= 0) & (array < vocabulary.rows)
        outside = array[~inside] if not inside.all() else array[~vocabulary.exists_V[array]]
        if len(outside):
            return [], ("token_ids of another tokenizer than --model's", f"it has no token {outside[0]}")
        arrays.append(array)
    return arrays, None


def cell_of(row: Row, categories: bool = False) -> str:
    """`language/domain` of a row.

    The language is the code of the row's `language` (`language_code`), else zh by script, else what py3langid says of
    prompt and answer where it is sure, else `unknown`. The domain is `code`, `math` or `general` by its category, as
    in `fastmtp mix`, or the category itself.
    """
    told = language_of(row)
    if told == UNKNOWN:
        told = language("\n".join(m["content"] for m in row["messages"] if m["role"] != "system")) or UNKNOWN
    name = language_code(told)
    category = row.get("category")
    if categories:
        return f"{plain(name)}/{plain(category) if isinstance(category, str) else UNKNOWN}"
    groups = Groups()
    # A language of its own says nothing about the domain: Chinese code is code.
    domains = {c: group for group, names in groups.categories.items() if group not in groups.languages for c in names}
    domain = domains.get(category, groups.other) if isinstance(category, str) else groups.other
    return f"{plain(name)}/{domain}"


def plain(name: str) -> str:
    """A name that can be part of a file's."""
    return re.sub(r"[^\w.+]+", "_", name)[:40] or UNKNOWN


def _is_held_out(row: Row, ratio: float) -> bool:
    """By the prompt's text, so that all answers to it are on one side, and stay there whatever else is counted."""
    digest = hashlib.blake2b(prompt_text(row).encode(), digest_size=8, key=b"fastmtp vocab").digest()
    return int.from_bytes(digest, "big") < ratio * 2**64


_worker: tuple[CountSettings, Vocabulary] | None = None


def _pool(jobs: int, settings: CountSettings, vocabulary: Vocabulary) -> ProcessPoolExecutor:
    # Not forked: this process may have threads, of torch and of the tokenizer, and forks of those can hang.
    spawn = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(jobs, spawn, initializer=_start_worker, initargs=(settings, vocabulary))


def _start_worker(settings: CountSettings, vocabulary: Vocabulary) -> None:
    global _worker
    _worker = settings, vocabulary
    os.environ["TOKENIZERS_PARALLELISM"] = "false"

    def watch() -> None:
        """A worker whose parent was killed would wait for work for ever."""
        parent = multiprocessing.parent_process()
        if parent is not None:
            parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _count_in_worker(chunk: Chunk) -> ChunkCounts:
    assert _worker is not None
    return count_chunk(chunk, *_worker)
