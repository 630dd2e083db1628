"""Rows of prompts and answers, read from files one at a time, and written so that a file is whole or not there.

A row is a JSON object with `messages`, made of whatever form it has in the file (`row_forms.py`). A bad one is named by
file and line, and stops the run or is counted and left out, as the user chose; nothing is dropped silently.
"""

import gzip
import hashlib
import json
import lzma
import zlib
from codecs import BOM_UTF8
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import IO, Any, BinaryIO

from ..errors import FastMTPError, detail
from . import inputs
from .row_forms import Row as Row
from .row_forms import UnreadableRowError, normalize
from .staging import refuse_existing, staged

MAX_ROW_BYTES = 32 * 2**20
"""A longer line is a broken file, not a conversation; it is never held in memory."""
EXAMPLES = 5
_PARQUET_ROWS = 128
"""Rows in memory at once."""


class BadRows:
    """What to do with a bad row: `stop` raises; `skip` counts it, by what is wrong, and keeps a few places."""

    def __init__(self, policy: str = "stop", how_to_skip: str | None = "--on_bad_row skip") -> None:
        """`how_to_skip`: what the user can say to have it skipped; None if nothing."""
        if policy not in ("stop", "skip"):
            raise FastMTPError(f"--on_bad_row: {policy!r} is neither `stop` nor `skip`")
        self.policy = policy
        self._fix = f"fix it, or {how_to_skip}" if how_to_skip else "fix it"
        self.counts: Counter[str] = Counter()
        self.places: dict[str, list[str]] = {}
        self._ids: dict[int, str] = {}

    def add(self, where: str, what: str, detail: str = "") -> None:
        """Row `where` cannot be used: `what` kind of fault, `detail` of this row. Raises if that is to stop the run."""
        if self.policy == "stop":
            raise FastMTPError(f"{where}: {what}{f' ({detail})' if detail else ''}; {self._fix}")
        self.counts[what] += 1
        places = self.places.setdefault(what, [])
        if len(places) < EXAMPLES:
            places.append(f"{where}{f' ({detail})' if detail else ''}")

    def new_id(self, row: Row, where: str) -> bool:
        """Whether the row's `id`, with its `sample` where a prompt has several answers, is the first of its kind."""
        if row.get("id") is None:
            return True
        name = repr((row["id"], row.get("sample")))
        key = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big")
        first = self._ids.setdefault(key, where)
        if first != where:
            self.add(where, "duplicate id", f"{row['id']!r}, first at {first}")
            return False
        return True

    @property
    def total(self) -> int:
        return sum(self.counts.values())

    def report(self) -> dict[str, Any]:
        """Counts and places, for a report file."""
        return {what: {"count": n, "rows": self.places[what]} for what, n in self.counts.most_common()}


def iter_rows(
    path: str | Path, bad: BadRows | None = None, unique_ids: bool = False, name: str | None = None
) -> Iterator[tuple[str, Row]]:
    """(`file:line`, row) for each row of a JSONL (plain, .gz, .xz) or Parquet file, in the form of `row_forms.py`.

    `name`: what the rows are of, if the file is only a copy; places are then `name, row 3`.

    Raises `FastMTPError` if the file cannot be read, or for the first bad row unless `bad` says otherwise.
    """
    bad = bad or BadRows(how_to_skip=None)  # who gives none has no such option
    for where, value in iter_values(path, bad, name):
        fault = None
        try:
            row = normalize(value)
        except UnreadableRowError as error:
            fault = error
        if fault is not None:
            bad.add(where, fault.what, fault.detail)
        elif not unique_ids or bad.new_id(row, where):
            yield where, row


def iter_values(path: str | Path, bad: BadRows, name: str | None = None) -> Iterator[tuple[str, Any]]:
    """(`file:line`, value) of such a file, whatever its rows are. Lines that are no JSON go to `bad`.

    Raises `FastMTPError` if the file cannot be read.
    """
    path = Path(path)
    place = f"{path}:" if name is None else f"{name}, row "
    yield from _parquet(path, place) if path.suffix == ".parquet" else _json_lines(path, bad, place)


def read_rows(path: str | Path, at_most: int | None = None) -> list[Row]:
    """The rows of a file, or those at its top. Raises `FastMTPError` naming file and line of the first bad row, or if
    there is no row."""
    rows = [row for _, row in islice(iter_rows(path), at_most)]
    if not rows:
        raise FastMTPError(f"{path}: holds no rows")
    return rows


@contextmanager
def write_rows(path: str | Path) -> Iterator[IO[str]]:
    """A text file for rows (`dump_row`) that appears, complete, when the `with` ends well.

    Raises `FastMTPError` if it exists already or cannot be written.
    """
    path = Path(path)
    refuse_existing(path)
    with staged(path) as made:
        with open(made, "w", encoding="utf-8") as file:
            yield file
        refuse_existing(path)  # made by somebody else in the meantime


def save_hub_dataset(name: str, path: Path) -> None:
    """Write the rows of a dataset on Hugging Face's hub, `name[:subset]`, split `train`, or of a local folder of one.

    What is no JSON, as an image or a date, becomes text. Raises `FastMTPError` if it cannot be loaded.
    """
    name, _, subset = name.partition(":")
    try:
        import datasets

        rows = datasets.load_dataset(name, subset or None, split="train", streaming=True)
        with write_rows(path) as file:
            for row in rows:
                file.write(dump_row(as_json(row)))
    except Exception as error:  # noqa: BLE001 (whatever a network and somebody's files may do)
        raise FastMTPError(f"hf:{name}: cannot be loaded ({' '.join(str(error).split())[:300]})") from None


def dump_row(row: Row) -> str:
    """One line of JSON, with its line end."""
    return json.dumps(row, ensure_ascii=False) + "\n"


def _json_lines(path: Path, bad: BadRows, place: str) -> Iterator[tuple[str, Any]]:
    number = 0
    try:
        with _open(path) as file:
            while line := file.readline(MAX_ROW_BYTES):
                number += 1
                where = f"{place}{number}"
                if len(line) == MAX_ROW_BYTES and not line.endswith(b"\n"):
                    while (rest := file.readline(MAX_ROW_BYTES)) and not rest.endswith(b"\n"):
                        pass
                    bad.add(where, f"longer than {MAX_ROW_BYTES // 2**20} MiB")
                elif line.strip():
                    try:
                        value = inputs.loads(line.removeprefix(BOM_UTF8) if number == 1 else line)
                    except UnicodeEncodeError as error:
                        bad.add(where, "half a surrogate pair, which is no text", str(error))
                    except UnicodeDecodeError as error:
                        bad.add(where, "not UTF-8", str(error))
                    except ValueError as error:
                        bad.add(where, "not JSON", str(error))
                    else:
                        yield where, value
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise FastMTPError(f"{path}: cannot be read after line {number} ({error})") from None


@contextmanager
def _open(path: Path) -> Iterator[BinaryIO]:
    """The file's bytes, unpacked. Raises as `inputs.open_file`."""
    opener: Any = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix)
    with inputs.open_file(path) as file:
        if opener is None:
            yield file
            return
        with opener(file, "rb") as unpacked:
            yield unpacked


def _parquet(path: Path, place: str) -> Iterator[tuple[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with inputs.open_file(path) as file, pyarrow.parquet.ParquetFile(file) as table:
            for batch in table.iter_batches(batch_size=_PARQUET_ROWS):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{place}{number}", as_json(row)
    except FastMTPError:
        raise
    except (OSError, ValueError, OverflowError, pyarrow.ArrowException) as error:
        raise FastMTPError(f"{path}: cannot be read after row {number} ({detail(error)})") from None


def as_json(value: Any) -> Any:
    """A value of Arrow as JSON has it: without the nulls that pad structs for fields which a row never had; what JSON
    has no form for, a date or bytes, as text."""
    if isinstance(value, dict):
        return {str(k): as_json(v) for k, v in value.items() if v is not None}
    if isinstance(value, list | tuple):
        return [as_json(v) for v in value]
    return value if value is None or isinstance(value, str | int | float) else str(value)
