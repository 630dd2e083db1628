"""A long job's answers on disk while it runs: nothing finished is lost or done twice, and several workers can share it.

Beside the output stands a folder `<output>.parts` with `job.json`, the settings that every worker must share, and one
file per shard, appended to in the order in which answers come. A key, (row, sample), is written once. When all keys are
there, whoever notices merges them, in order, into the output. Machines without a common folder copy their parts into
one.

Before the output appears the folder is marked as merged. A run that is killed between the two leaves both, and the next
one takes the folder away.

Workers end and begin while another one merges. What they see is one of two things: the folder as it was, or no folder
and the output. So everything that decides is done under one lock, and the folder disappears by a rename.
"""

import fcntl
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, NamedTuple

from ..errors import FastMTPError, cannot_write
from . import inputs
from .kinds import is_int
from .known_files import read_object
from .rows import Row, dump_row, write_rows
from .staging import claim, exists, refuse_existing, remove_at_once, take_away_leftovers, write_json

Key = tuple[int, int]
"""(number of the row among the good ones, number of the answer to it)"""

MERGED = "merged"
"""File in the parts folder of an output that is whole and about to appear."""
SYNC_SECONDS = 5.0
"""How much of finished work a power cut may cost; a killed process loses none."""


class _FolderGoneError(FastMTPError):
    """The parts folder is not the one that this job began with."""


class Place(NamedTuple):
    """Where the record of a key stands."""

    part: Path
    offset: int


def parts_folder(output: str | Path) -> Path:
    """Where a job's unfinished work is."""
    return Path(f"{output}.parts")


def take_away_merged(output: str | Path) -> None:
    """Remove what a run left that was killed when its output was there already: the parts folder, whole or half
    removed. Raises `FastMTPError` if the output's name is not possible."""
    folder = parts_folder(output)
    take_away_leftovers(folder)
    if exists(folder) and exists(Path(output)) and (folder / MERGED).exists():
        with suppress(OSError):  # another worker removes it just now
            remove_at_once(folder)


class Job:
    """The parts folder of one output.

    Raises `FastMTPError` if the output exists, also if another worker writes it just now, or the folder belongs to a
    job with other settings.
    """

    def __init__(self, output: str | Path, settings: dict[str, Any]) -> None:
        self.output = Path(output)
        self.folder = parts_folder(output)
        self.missing = 0
        """How many answers `merge` did not find, the last time that it was asked."""
        self._identity: tuple[int, int] | None = None
        refuse_existing(self.output)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise cannot_write(self.folder, error) from None
        self._agree(settings)

    def _agree(self, settings: dict[str, Any]) -> None:
        path = self.folder / "job.json"
        settings = json.loads(json.dumps(settings))
        with self._lock():
            recorded = read_object(path)
            if self.output.exists():
                # Another worker has written it since we looked, and the folder was made anew by us or by our like.
                if not recorded or (self.folder / MERGED).exists():
                    self._remove()
                refuse_existing(self.output)
            if not recorded:
                write_json(settings, path)
        for key in recorded and sorted(recorded.keys() | settings.keys()):
            if recorded.get(key) != settings.get(key):
                raise FastMTPError(
                    f"{path}: this job was started with {key} {recorded.get(key)!r}, not {settings.get(key)!r}; go on "
                    f"with the same settings, name another output, or remove {self.folder}"
                )

    @contextmanager
    def _lock(self) -> Iterator[None]:
        """One worker at a time. Raises `FastMTPError` if the folder is gone, see `_gone`."""
        try:
            file = open(self.folder / "lock", "a")  # noqa: SIM115
        except FileNotFoundError:
            raise self._gone() from None
        with file:
            fcntl.flock(file, fcntl.LOCK_EX)
            # While we waited the folder may have been renamed, and even made anew: then it is another lock.
            self._check_lock(file)
            yield

    def _check_lock(self, file: IO[str]) -> None:
        try:
            there = os.stat(self.folder / "lock")
        except FileNotFoundError:
            raise self._gone() from None
        if not os.path.samestat(there, os.fstat(file.fileno())):
            raise self._gone()
        if self._identity is None:
            self._identity = self._find_identity()
        self._check_folder()

    def _find_identity(self) -> tuple[int, int] | None:
        try:
            status = os.stat(self.folder)
        except FileNotFoundError:
            return None
        return status.st_dev, status.st_ino

    def _check_folder(self) -> None:
        """Raises `FastMTPError` if the folder is not the one that this job began with."""
        if self._identity is None or self._find_identity() != self._identity:
            raise self._gone()

    def _gone(self) -> FastMTPError:
        """What to say when the folder is not there any more: the job is finished, unless somebody removed it."""
        if self.output.exists():
            return _FolderGoneError(f"{self.output}: already exists; another worker has finished this job")
        return _FolderGoneError(f"{self.folder}: was removed while this job ran; start again")

    def _remove(self) -> None:
        """Only under the lock."""
        with suppress(FileNotFoundError):  # the output is there, and a run that began since has removed it
            remove_at_once(self.folder)

    def finished(self) -> dict[Key, Place]:
        """Every key whose record is whole on disk, in any worker's part.

        Raises `FastMTPError` if the folder is gone: what is not there must not be taken for not yet answered.
        """
        places: dict[Key, Place] = {}
        try:
            for part in sorted(self.folder.glob("shard-*.jsonl")):
                with inputs.open_file(part) as file:
                    offset = 0
                    for number, line in enumerate(file, start=1):
                        if line.endswith(b"\n"):  # else it is being written, or a kill cut it off
                            places.setdefault(_key(line, f"{part}:{number}"), Place(part, offset))
                        offset += len(line)
        except FileNotFoundError:
            raise self._gone() from None
        self._check_folder()
        return places

    @contextmanager
    def part(self, shard: int, shards: int) -> Iterator["Part"]:
        """This worker's part, open for appending. Raises `FastMTPError` if another process has it, or the folder is
        gone."""
        path = self.folder / f"shard-{shard}of{shards}.jsonl"
        try:
            file = open(path, "a+b")  # noqa: SIM115
        except FileNotFoundError:
            raise self._gone() from None
        except OSError as error:
            raise cannot_write(path, error) from None
        with own_part(file, f"{path}: another process works on this shard; give each its own --shard i/n") as part:
            yield part

    def merge(self, keys: int, before: Callable[[Path, list[Row]], None] | None = None) -> list[Row] | None:
        """Write the output in order of keys and remove the folder, if all of 0..`keys` - 1 answers are there.

        `before`: called with the file of rows that is about to become the output, and the records without a row; what
        belongs beside an output must be there before it.

        Returns records without a row (refused ones), or None if answers are still missing (`self.missing` says how
        many) or another worker has written the output (then none are).

        Raises `FastMTPError` if the folder is gone, and there is no output.
        """
        self.missing = 0
        try:
            return self._merge(keys, before)
        except _FolderGoneError:
            if self.output.exists():
                return None
            raise

    def _merge(self, keys: int, before: Callable[[Path, list[Row]], None] | None) -> list[Row] | None:
        with self._lock():
            if self.output.exists():
                return None
            places = self.finished()
            self.missing = max(keys - len(places), 0)
            if self.missing:
                return None
            refused = []
            files: dict[Path, IO[bytes]] = {}
            with write_rows(self.output) as out:
                for key in sorted(places):
                    place = places[key]
                    file = files.get(place.part) or files.setdefault(place.part, open(place.part, "rb"))  # noqa: SIM115
                    file.seek(place.offset)
                    record = json.loads(file.readline())
                    if "row" in record:
                        out.write(dump_row(record["row"]))
                    else:
                        refused.append(record)
                for file in files.values():
                    file.close()
                out.flush()
                if before:
                    before(Path(out.name), refused)
                with suppress(OSError):  # then the next run does not know, and only leaves the folder
                    (self.folder / MERGED).touch()
            self._remove()
        return refused


class Part:
    """One worker's file of finished records."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._synced = time.monotonic()

    def write(self, records: list[dict[str, Any]]) -> None:
        """Append records, each with its `key`. A kill from now on loses none of them.

        Raises `FastMTPError` if they cannot be written; what of them is on disk then is cut off by the next run.
        """
        data = "".join(dump_row(record) for record in records).encode()
        try:
            while data:  # past the file's buffer, which would be tried again when the file is closed
                data = data[os.write(self._file.fileno(), data) :]
        except OSError as error:
            raise cannot_write(self._file.name, error) from None
        if time.monotonic() - self._synced > SYNC_SECONDS:
            self.sync()

    def sync(self) -> None:
        """Have everything on disk. Raises `FastMTPError` if it cannot be."""
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise cannot_write(self._file.name, error) from None
        self._synced = time.monotonic()


@contextmanager
def own_part(file: IO[bytes], taken: str) -> Iterator[Part]:
    """A file that is open for appending, as this process's alone; it is closed at the end.

    Raises `FastMTPError` with the message `taken` if another process has it.
    """
    with file:
        claim(file, taken)
        cut_torn_line(file)
        part = Part(file)
        try:
            yield part
        finally:
            part.sync()


def _key(line: bytes, where: str) -> Key:
    try:
        record = inputs.loads(line)
        row, sample = record["key"]
        if not (isinstance(record, dict) and is_int(row) and is_int(sample)):
            raise ValueError("its key must be two whole numbers")
    except (ValueError, KeyError, TypeError) as error:
        raise FastMTPError(f"{where}: not a record of this job ({error}); delete the line and start again") from None
    return row, sample


def cut_torn_line(file: IO[bytes]) -> None:
    """What a kill left of a line at the end of the part is removed."""
    end = file.seek(0, os.SEEK_END)
    keep = end
    while keep:
        start = max(0, keep - 2**16)
        file.seek(start)
        newline = file.read(keep - start).rfind(b"\n")
        keep = start + newline + 1 if newline >= 0 else start
        if newline >= 0:
            break
    if keep < end:
        os.truncate(file.fileno(), keep)
    file.seek(0, os.SEEK_END)
