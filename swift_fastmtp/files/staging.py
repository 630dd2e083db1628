"""Outputs that appear whole or not at all, and what killed runs leave of them.

An output is made in a hidden folder beside its place, `.NAME.xxxxxxxx.tmp`, and renamed when it is whole and on disk.
The run holds a lock on a file in that folder for as long as it lives. The next run that writes the same place takes
away the folders whose lock is free, and no others: a process that lives, here or on a machine that shares the disk,
keeps its own, whatever process ids say; a file system without locks keeps all of them.
"""

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ..errors import FastMTPError, cannot_write

LOCK = "fastmtp.lock"


_LONGEST = 200
"""Bytes of a name that a hidden folder's name repeats; file systems allow 255."""


def refuse_existing(path: str | Path) -> None:
    """Take away what killed runs left of an output. Raises `FastMTPError` if the output itself is there, or its name
    is not possible: nothing is overwritten."""
    path = Path(path)
    take_away_leftovers(path)
    if exists(path):
        raise FastMTPError(f"{path}: already exists; name another output or remove it")


def try_output(path: str | Path) -> None:
    """Before the work: raises `FastMTPError` if an output is there already, or could not be written after it."""
    path = Path(path)
    refuse_existing(path)
    try_place(path)


def try_place(path: Path) -> None:
    """Raises `FastMTPError` if `path` could not be written: its folder is a file, or not writable. Leaves nothing."""
    # In a folder that is there: one made for the trial would be taken away under another run that begins.
    first = path
    while not exists(first.parent):
        first = first.parent
    take_away_leftovers(first)
    try:
        with hidden_folder(first):
            pass
    except OSError as error:
        raise cannot_write(path, error) from None


def exists(path: Path) -> bool:
    """Whether anything has that name. Raises `FastMTPError` if nothing ever can."""
    try:
        os.lstat(path)
    except FileNotFoundError:
        return False
    except OSError as error:
        raise cannot_write(path, error) from None
    return True


@contextmanager
def staged(path: Path) -> Iterator[Path]:
    """A name to make a file or a folder under, which becomes `path` when the `with` ends well; else nothing is left.

    A file that is there is replaced; callers who must not do that ask `refuse_existing` first.

    Raises `FastMTPError` if it cannot be written.
    """
    made: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        take_away_leftovers(path)
        with hidden_folder(path) as folder:
            made = folder / path.name
            yield made
            flush(made)
            os.replace(made, path)
            with suppress(OSError):  # it is there, whether or not its folder can be opened
                _flush_one(path.parent)
    except OSError as error:
        raise cannot_write(path, error, made) from None


@contextmanager
def new_files(folder: Path, last: str) -> Iterator[Path]:
    """A folder whose files, those of folders in it too, move into `folder` when the `with` ends well; `last` at the
    end, which says that the others are there. Raises `FastMTPError` if they cannot be written."""
    made: Path | None = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        take_away_leftovers(folder / last)
        with hidden_folder(folder / last) as hidden:
            made = hidden / "files"
            made.mkdir()
            yield made
            flush(made)
            files = [path.relative_to(made) for path in made.rglob("*") if path.is_file()]
            for name in sorted(files, key=lambda name: str(name) == last):
                (folder / name).parent.mkdir(exist_ok=True)
                os.replace(made / name, folder / name)
    except OSError as error:
        raise cannot_write(folder, error, made) from None


@contextmanager
def hidden_folder(path: Path) -> Iterator[Path]:
    """A new hidden folder beside `path`, locked by this process, and gone when the `with` ends. Raises `OSError`."""
    folder, lock = _locked_folder(path)
    try:
        yield folder
    finally:
        discard(folder)
        os.close(lock)


def _locked_folder(path: Path) -> tuple[Path, int]:
    while True:
        try:
            folder = Path(tempfile.mkdtemp(prefix=f".{_short(path.name)}.", suffix=".tmp", dir=path.parent))
        except OSError as error:
            error.filename = str(path.parent)  # the hidden name says nothing
            raise
        # Until it is locked, another run may take it for a leftover: then we make another one.
        with suppress(FileNotFoundError):
            folder.chmod(0o755)
            lock = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT)
            if lock_file(lock, without_locks=True) and _is_there(folder / LOCK, lock):
                return folder, lock
            os.close(lock)


def lock_file(file: int, without_locks: bool = False, shared: bool = False) -> bool:
    """Whether this process has the lock of an open file now. `without_locks`: the answer on file systems that have
    none; `shared`: with others that want it shared."""
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return without_locks
    return True


def take_away_leftovers(path: Path) -> None:
    """Remove the hidden folders that killed runs left of an output. Those of runs that live stay."""
    ours = re.compile(rf"\.{re.escape(_short(path.name))}\.[a-z0-9_]{{8}}\.tmp")
    try:
        names = [name for name in os.listdir(path.parent) if ours.fullmatch(name)]
    except OSError:
        return  # the folder is not there, or cannot be read: writing will say so
    for name in names:
        take_away_if_dead(path.parent / name)


def take_away_if_dead(folder: Path) -> None:
    """Remove a hidden folder of ours, unless the run that made it lives."""
    if folder.is_symlink():
        return
    try:
        lock = os.open(folder / LOCK, os.O_RDWR)
    except OSError:
        with suppress(OSError):
            folder.rmdir()  # a run that was killed before it had a lock, or after; only if the folder is empty
        return
    try:
        if lock_file(lock) and _is_there(folder / LOCK, lock):
            discard(folder)
    finally:
        os.close(lock)


def discard(folder: Path) -> None:
    """Remove a hidden folder, its lock last: what a kill leaves of it in between is still known as ours."""
    with suppress(OSError):
        for entry in os.scandir(folder):
            if entry.is_dir(follow_symlinks=False):
                shutil.rmtree(entry.path, ignore_errors=True)
            elif entry.name != LOCK:
                os.unlink(entry.path)
        os.unlink(folder / LOCK)
        os.rmdir(folder)


def remove_at_once(path: Path) -> None:
    """A folder disappears as a whole: nobody sees it half removed. Raises `OSError` if it cannot be renamed."""
    with hidden_folder(path) as folder:
        os.replace(path, folder / path.name)


def flush(path: Path) -> None:
    """Have a file, or all files of a folder, on disk: a power cut after the rename must not find them empty."""
    if not path.is_dir():
        _flush_one(path)
        return
    for folder, _, names in os.walk(path):
        for name in names:
            if not os.path.islink(Path(folder, name)):
                _flush_one(Path(folder, name))
        _flush_one(Path(folder))


def _flush_one(path: Path) -> None:
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EBADF, errno.ENOTSUP):  # a file system that has no such thing
            raise
    finally:
        os.close(file)


def _is_there(path: Path, file: int) -> bool:
    """Whether an open file still has that name."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(file))
    except FileNotFoundError:
        return False


def _short(name: str) -> str:
    """A name that leaves room for what a hidden one adds."""
    if len(os.fsencode(name)) <= _LONGEST:
        return name
    return hashlib.sha256(os.fsencode(name)).hexdigest()[:16]


def write_json(value: Any, path: Path) -> None:
    """Write JSON that appears whole or not at all. Raises `FastMTPError` if it cannot be written."""
    with staged(path) as file:
        file.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


@contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """A folder that appears, complete, when the `with` ends well; an error leaves nothing behind.

    Raises `FastMTPError` if `path` exists or cannot be written.
    """
    path = Path(path)
    refuse_existing(path)
    with staged(path) as folder:
        folder.mkdir()
        yield folder


def claim(file: Any, message: str) -> None:
    """Keep an open file to this process until it is closed. Raises `FastMTPError` with `message` if another has it."""
    if not lock_file(file.fileno()):
        raise FastMTPError(message)
