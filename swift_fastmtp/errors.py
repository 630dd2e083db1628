"""The one exception users are meant to read.

Every check of user input (a knob, a checkpoint, a dataset, an output folder) raises `FastMTPError` with one
line that names what is wrong and how to fix it. The command line prints that line and exits with 1; no
traceback, because the mistake is not in the program.
"""

import errno
import os
import re
from pathlib import Path

from .redaction import redact

MAX_LINE = 700
"""Characters of a message; a longer one holds a name or a value that nobody can read at once."""


class FastMTPError(ValueError):
    """Bad input. The message is one line: what is wrong (file, key or row) and how to fix it.

    It holds no secret. Names and values in it may be anybody's: line ends, control characters and what is no text are
    written as escapes, and of a message longer than `MAX_LINE` the middle is left out.
    """

    def __init__(self, message: str) -> None:
        super().__init__(_one_line(redact(message)))


def _one_line(text: str) -> str:
    text = _shortened(text)
    if text.isprintable():
        return text
    return _shortened("".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text))


def _shortened(text: str) -> str:
    if len(text) <= MAX_LINE:
        return text
    return f"{text[: MAX_LINE // 2]} ... {text[5 - MAX_LINE // 2 :]}"


def detail(error: BaseException, most: int = 300) -> str:
    """What a library says, as a part of one line: at most so many characters; its type, where it says nothing."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= most else f"{text[: most - 1]}…"


_HOW_TO_FIX = {
    errno.ENOSPC: "free space and start again",
    errno.EDQUOT: "free space, or ask for a larger quota, and start again",
    errno.EFBIG: "the file is larger than the file system or `ulimit -f` allows; raise that, or choose another folder",
    errno.EACCES: "choose another folder, or make this one writable",
    errno.EPERM: "choose another folder, or make this one writable",
    errno.EROFS: "it is mounted read-only; choose another folder",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ENOTDIR: "a part of the path is a file, no folder; choose another folder",
    errno.EEXIST: "something else has that name; choose another one",
    errno.EISDIR: "a folder has that name; choose another one",
    errno.ENOENT: "a folder on the way to it is gone; start again when nothing removes it",
    errno.EMFILE: "too many files are open; raise `ulimit -n`",
    errno.ENFILE: "too many files are open; close other programs",
    errno.EIO: "the disk may be faulty; choose another one",
}


def cannot_write(path: str | Path, error: Exception, inside: Path | None = None) -> FastMTPError:
    """What to raise when `path` could not be written: what the error says, of which file, and how to fix it.

    Args:
        path: what was being made.
        error: an `OSError`, or one of a library that only repeats its text (safetensors: "(os error 28)").
        inside: the temporary file or folder that `path` is being made as. An error about a file outside it is of
            something that was read, which no other output folder would fix.
    """
    number, what, file = _parts(error)
    on_the_way = bool(file) and _is_below(str(path), Path(file))
    if inside is not None and file and not on_the_way and not _is_below(file, inside):
        readable = "; make it readable" if number in (errno.EACCES, errno.EPERM) else ""
        return FastMTPError(f"{file}: cannot be read ({what}){readable}; {path} was not written")
    if inside is not None and file and _is_below(file, inside):
        # The temporary name itself says nothing.
        file = "" if Path(file) == inside else os.path.relpath(file, inside)
    if number is None:
        return FastMTPError(f"{path}: cannot be written ({what})")
    about = f"{what}: {file}" if file and Path(file) != Path(path) else what
    how = _HOW_TO_FIX.get(number)
    return FastMTPError(f"{path}: cannot be written ({about})" + (f"; {how}" if how else ""))


def _parts(error: Exception) -> tuple[int | None, str, str]:
    """Number, text and file of an error."""
    text = " ".join(str(error).split())
    if isinstance(error, OSError) and error.errno is not None:
        file = error.filename2 or error.filename or ""
        return error.errno, error.strerror or text, os.fsdecode(file) if isinstance(file, str | bytes) else ""
    match = re.search(r"\(os error (\d+)\)", text)  # all that safetensors keeps of it
    return int(match[1]) if match else None, text or type(error).__name__, ""


def _is_below(file: str, folder: Path) -> bool:
    return Path(file).absolute().is_relative_to(folder.absolute())
