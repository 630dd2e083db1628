"""The one door for files that others wrote: text, JSON and YAML, in bounded time and memory, with one line for what is
wrong with them.

Whatever a file holds, reading it ends: only regular files are read (a pipe would be waited for, a device has no end),
up to a limit, and neither deep nesting nor a number of a thousand digits reaches the code behind. What a known file
must hold stands in tables, key by key, so that the code behind can trust the types it meets.
"""

import json
import os
import stat
from collections import Counter
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import FastMTPError, detail

MAX_BYTES = 16 * 2**20
"""Of a JSON file; an index of hundreds of thousands of tensors may be larger, and says so."""


MAX_YAML_BYTES = 2**18


MAX_YAML_VALUES = 20_000
"""With every alias as large as what it stands for."""


MAX_DEPTH = 100
"""Objects and lists in each other; Python's own limit is hit in the middle of the code behind."""


def open_file(path: str | Path) -> BinaryIO:
    """A regular file, open for reading bytes. Never waits.

    Raises `FastMTPError` if it is a folder, a pipe or a device, or cannot be opened; `FileNotFoundError` if it is not
    there, for which every caller has words of its own.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise cannot_read(path, error) from None
    kind = _kind(os.fstat(descriptor).st_mode)
    if kind is not None:
        os.close(descriptor)
        raise FastMTPError(f"{path}: is {kind}, not a file; name a file, or save there what it gives")
    return os.fdopen(descriptor, "rb")


def check_file(path: str | Path) -> None:
    """Raises `FastMTPError` for what `open_file` refuses, or a missing file; before a library that would wait for it
    opens it."""
    try:
        open_file(path).close()
    except FileNotFoundError as error:
        raise cannot_read(path, error) from None


def check_folder(folder: str | Path) -> None:
    """Raises `FastMTPError` for a pipe, socket or device in a model folder, whose files libraries open by their names.

    Folders and links that lead nowhere are nobody's trouble.
    """
    try:
        with os.scandir(folder) as entries:
            paths = [entry.path for entry in entries if not entry.is_file() and not entry.is_dir()]
    except (OSError, ValueError):
        return  # who reads the folder says so
    for path in paths:
        try:
            kind = _kind(os.stat(path).st_mode)
        except OSError:
            continue
        if kind is not None:
            raise FastMTPError(f"{path}: is {kind}, not a file; remove it from the model folder")


def _kind(mode: int) -> str | None:
    """What a file that is no regular one is; None for a regular one."""
    kinds = {
        stat.S_IFDIR: "a folder",
        stat.S_IFIFO: "a pipe",
        stat.S_IFSOCK: "a socket",
        stat.S_IFCHR: "a device",
        stat.S_IFBLK: "a device",
    }
    return None if stat.S_ISREG(mode) else kinds.get(stat.S_IFMT(mode), "something else")


def cannot_read(path: str | Path, error: Exception) -> FastMTPError:
    """What to raise when a file could not be opened or read."""
    what = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return FastMTPError(f"{path}: cannot be read ({what})")


def read_bytes(path: str | Path, limit: int = MAX_BYTES) -> bytes:
    """A whole file of at most `limit` bytes. Raises as `open_file`, and `FastMTPError` for a larger one."""
    with open_file(path) as file:
        try:
            data = file.read(limit + 1)
        except OSError as error:
            raise cannot_read(path, error) from None
    if len(data) > limit:
        raise FastMTPError(f"{path}: is larger than {limit / 2**20:g} MiB, so it is not what it should be")
    return data


def read_text(path: str | Path, limit: int = MAX_BYTES) -> str:
    """The same as UTF-8, with or without a byte order mark. Raises `FastMTPError` if it is something else."""
    try:
        return read_bytes(path, limit).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise FastMTPError(f"{path}: is not UTF-8 ({error}); save it as UTF-8") from None


def read_json(path: str | Path, limit: int = MAX_BYTES) -> Any:
    """The value of a JSON file.

    Raises `FileNotFoundError` if it is not there, `FastMTPError` naming the file, and what is wrong with it.
    """
    data = read_bytes(path, limit)
    if data.startswith(b"\xef\xbb\xbf"):
        raise FastMTPError(f"{path}: cannot be read as JSON by engines (a byte order mark); save it without")
    try:
        return loads(data)
    except ValueError as error:
        raise FastMTPError(f"{path}: cannot be read as JSON ({error})") from None


def loads(text: str | bytes, unique_keys: bool = False) -> Any:
    """The value of some JSON. Raises `ValueError` alone, whatever the text: for what is no JSON, is nested deeper than
    `MAX_DEPTH`, has an integer of thousands of digits, half a surrogate pair, which is no text, or, where that is asked
    for, a key twice in one object."""
    data = text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass")
    text = data.decode()
    try:
        value = json.loads(text, object_pairs_hook=_once if unique_keys else None)
    except RecursionError:
        raise ValueError(f"nested deeper than {MAX_DEPTH} levels") from None
    if data.count(b"[") + data.count(b"{") > MAX_DEPTH and _depth(value) > MAX_DEPTH:
        raise ValueError(f"nested deeper than {MAX_DEPTH} levels")
    if b"\\ud" in data or b"\\uD" in data:
        json.dumps(value, ensure_ascii=False).encode()
    return value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        (name, _), *_ = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"it has {name!r} twice")
    return value


def _depth(value: Any) -> int:
    """How many objects and lists are in each other; counts no further than one beyond `MAX_DEPTH`."""
    level, depth = [value], 0
    while depth <= MAX_DEPTH:
        inner: list[Any] = []
        for item in level:
            inner += item.values() if isinstance(item, dict) else item if isinstance(item, list) else ()
        depth += any(isinstance(item, dict | list) for item in level)
        if not inner:
            break
        level = inner
    return depth


def read_yaml(path: str | Path) -> Any:
    """The value of a YAML file of settings, without tags that build objects.

    Raises `FastMTPError`, also for a missing file.
    """
    try:
        text = read_text(path, MAX_YAML_BYTES)
    except FileNotFoundError as error:
        raise cannot_read(path, error) from None
    return parse_yaml(text, path)


def parse_yaml(text: str, where: str | Path) -> Any:
    """The same for text that was read from `where`."""
    try:
        return yaml_value(text)
    except ValueError as error:
        raise FastMTPError(f"{where}: cannot be read as YAML ({error})") from None


def yaml_value(text: str) -> Any:
    """The value of one YAML document, of plain values only. Raises `ValueError`, in one line."""
    import yaml

    loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the same, twenty times as fast
    try:
        _check_yaml(text, loader)
        return yaml.load(text, Loader=loader)
    except yaml.MarkedYAMLError as error:
        # What is wrong and where, without the lines of the file that YAML quotes.
        what = ", ".join(part for part in (error.context, error.problem) if part)
        mark = error.problem_mark or error.context_mark
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ValueError(detail(ValueError(what)) + place) from None
    except Exception as error:  # noqa: BLE001 (a tag with a wrong value (`!!bool x`) raises whatever Python does)
        raise ValueError(detail(error)) from None


def _check_yaml(text: str, loader: Any) -> None:
    """Raises `ValueError` for more than `MAX_YAML_VALUES` values, each alias counted as often as it is used: a few
    lines of them can stand for more than memory holds; and for what is nested too deep."""
    import yaml

    sizes: dict[str, int] = {}
    open_collections: list[tuple[str | None, int]] = []  # anchor, and the values before it
    total = 0
    for event in yaml.parse(text, Loader=loader):
        if isinstance(event, yaml.AliasEvent):
            if any(anchor == event.anchor for anchor, _ in open_collections):
                raise ValueError(f"the alias {event.anchor!r} stands inside of itself")
            total += sizes.get(event.anchor, 1)
        elif isinstance(event, yaml.CollectionStartEvent):
            open_collections.append((event.anchor, total))
            total += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = open_collections.pop()
            if anchor:
                sizes[anchor] = total - before
        elif isinstance(event, yaml.ScalarEvent):
            total += 1
        if total > MAX_YAML_VALUES:
            raise ValueError(f"more than {MAX_YAML_VALUES} values, aliases counted each time")
        if len(open_collections) > MAX_DEPTH:
            raise ValueError(f"nested deeper than {MAX_DEPTH} levels")
