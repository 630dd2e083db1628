"""The one door for files that others wrote: text, JSON and YAML, in bounded time and memory, with one line for what is
wrong with them.

Whatever a file holds, reading it ends: only regular files are read (a pipe would be waited for, a device has no end),
up to a limit, and neither deep nesting nor a number of a thousand digits reaches the code behind. What a known file
must hold stands in tables, key by key, so that the code behind can trust the types it meets.
"""

import json
import math
import os
import re
import stat
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from .config import FastMTPConfig
from .errors import FastMTPError, detail

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


def not_finite(value: Any) -> Iterator[tuple[str, float]]:
    """Each key, with dots between those in each other, that holds NaN or an infinite number, and that."""
    waiting = [("", value)]
    while waiting:
        key, item = waiting.pop()
        if isinstance(item, dict):
            waiting += [(f"{key}.{name}" if key else name, inner) for name, inner in item.items()]
        elif isinstance(item, list):
            waiting += [(key, inner) for inner in item]
        elif isinstance(item, float) and not math.isfinite(item):
            yield key, item


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
    except Exception as error:  # a tag with a wrong value (`!!bool x`) raises whatever Python does
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


# --- what known files hold ------------------------------------------------------------------------------------------


class Kind(NamedTuple):
    """A type of value: in words, and a test of it."""

    what: str
    fits: Callable[[Any], bool]


def is_int(value: Any) -> bool:
    """Whether a value is a whole number; true and false are none."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Whether a value is a number that is finite."""
    return is_int(value) or (isinstance(value, float) and math.isfinite(value))


def whole(least: int, most: int) -> Kind:
    """A whole number in these limits."""
    return Kind(f"a whole number from {least} to {most}", lambda v: is_int(v) and least <= v <= most)


def _is_path(value: Any) -> bool:
    if not isinstance(value, str) or "\0" in value:
        return False
    data = value.encode("utf-8", "surrogateescape")
    return len(data) < 4096 and all(len(part) <= 255 for part in data.split(b"/"))


NAME = Kind("a name", lambda v: isinstance(v, str))
NAMES = Kind("a list of names", lambda v: isinstance(v, list) and all(isinstance(name, str) for name in v))
OBJECT = Kind("an object", lambda v: isinstance(v, dict))
FLAG = Kind("true or false", lambda v: isinstance(v, bool))
NUMBER = Kind("a number", is_number)
POSITIVE = Kind("a positive number", lambda v: is_number(v) and v > 0)
PATH = Kind("a path, of at most 255 bytes between slashes", _is_path)
NAME_OR_NAMES = Kind("a name or a list of them", lambda v: NAME.fits(v) or NAMES.fits(v))
TOKEN_IDS = Kind(
    "a token id or a list of them",
    lambda v: all(is_int(i) and 0 <= i < 2**31 for i in (v if isinstance(v, list) else [v])),
)

_KNOB_KINDS = {int: Kind("a whole number", is_int), float: NUMBER, str: NAME}
_SETTINGS = {
    **{f.name: _KNOB_KINDS[type(f.default)] for f in fields(FastMTPConfig)},
    "num_speculative_steps": whole(1, 1000),
    "token_map": PATH,
    "swift_fastmtp": NAME,
    "base_model": PATH,
    "base_fingerprint": NAME,
    "dataset": NAME_OR_NAMES,
}
_FILES: dict[str, Mapping[str, Kind]] = {
    "fastmtp.json": _SETTINGS,
    "args.json": {"model": PATH, "model_kwargs": OBJECT, "dataset": NAME_OR_NAMES},
    "adapter_config.json": {"peft_type": NAME, "r": whole(1, 2**20), "lora_alpha": NUMBER},
    "generation_config.json": {"eos_token_id": TOKEN_IDS},
    "config.json": {"quantization_config": OBJECT},
    "job.json": {},
    "cache.json": {"schema": NAME},
    "hf_quant_config.json": {"quantization": OBJECT, "producer": OBJECT},
}
_MAP_FACTS = {"tokenizer_sha256": NAME, "ids_sha256": NAME}


def read_object(path: str | Path) -> dict[str, Any]:
    """The object of a JSON file, its known keys of the types that files of this name have; {} where there is no file.

    Raises `FastMTPError` naming the file, and the key.
    """
    try:
        value = read_json(path)
    except FileNotFoundError:
        return {}
    if not isinstance(value, dict):
        raise FastMTPError(f"{path}: must hold a JSON object, not {type(value).__name__}; copy it from where it came")
    name = Path(path).name
    kinds = _MAP_FACTS if name.endswith(".meta.json") else _FILES.get(name, {})
    for key, what in wrong_types(value, kinds):
        raise FastMTPError(f"{path}: {key} is {shown(value[key])}, it must be {what}; copy the file from where it came")
    return value


def wrong_types(value: Mapping[str, Any], kinds: Mapping[str, Kind]) -> Iterator[tuple[str, str]]:
    """Each key that holds something else than its kind, and what it must be; null is a key that is not there."""
    for key, kind in kinds.items():
        if value.get(key) is not None and not kind.fits(value[key]):
            yield key, kind.what


def shown(value: Any) -> str:
    """A value for a message, as the file has it, at most 80 characters of it."""
    if isinstance(value, dict | list) and len(value) > 80:
        return f"{type(value).__name__} of {len(value)} entries"
    text = json.dumps(value, ensure_ascii=False, default=repr)
    return re.sub(r"(?s)(.{77}).{4,}", r"\1...", text)
