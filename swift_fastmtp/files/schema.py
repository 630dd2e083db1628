"""The door for plans, results and records of requests: what a file holds is checked before anything works with it.

A file may hold anything, and be anything: a pipe, a folder, a gigabyte. What comes through is a text of bounded size;
then a value without surprises (`check_values`: bounded depth, finite numbers, text that can be written); then the
dataclass that was asked for (`build`), whose annotations say the type and the range of every field.
"""

import math
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin, get_type_hints

from ..errors import FastMTPError
from . import inputs

MAX_DEPTH = 32
"""Lists and objects inside of each other."""
MAX_INTEGER = 2**63 - 1
"""What other readers of JSON hold as an integer."""

T = TypeVar("T")


@dataclass(frozen=True)
class Range:
    """As `Annotated[float, Range(0, 1)]`: what a number may be."""

    least: float
    most: float = MAX_INTEGER


Rate = Annotated[float, Range(0, 1)]
Count = Annotated[int, Range(0)]
Positive = Annotated[int, Range(1)]
Amount = Annotated[float, Range(0)]
Tau = Annotated[float, Range(1)]


def read_text(path: str | Path, max_bytes: int) -> str:
    """The text of a file. Raises `FastMTPError` as `inputs.read_text`, and for a missing file."""
    try:
        return inputs.read_text(path, max_bytes)
    except FileNotFoundError as error:
        raise inputs.cannot_read(path, error) from None


def check_values(value: Any, where: str = "", depth: int = 0) -> None:
    """Raises `FastMTPError` with the first place where a value cannot be computed with, or written again."""
    here = where or "the file"
    if depth > MAX_DEPTH:
        raise FastMTPError(f"{_cut(here, 300)}: nested deeper than {MAX_DEPTH}")
    if isinstance(value, str):
        _check_text(value, here)
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise FastMTPError(f"{here}: {value} is not a finite number")
    elif isinstance(value, int):
        if abs(value) > MAX_INTEGER:
            raise FastMTPError(f"{here}: {show(value)} is too large")
    elif isinstance(value, dict):
        for key, inner in value.items():
            if not isinstance(key, str):
                raise FastMTPError(f"{here}: its key {show(key)} must be a text")
            _check_text(key, here)
            check_values(inner, f"{where}.{show_key(key)}".lstrip("."), depth + 1)
    elif isinstance(value, list):
        _check_list(value, where, depth)
    elif value is not None:
        raise FastMTPError(f"{here}: {show(value)} is no text, number, list or mapping")


def _check_list(values: list[Any], where: str, depth: int) -> None:
    if {type(value) for value in values} == {int}:  # long lists of token ids
        if max(values) > MAX_INTEGER or min(values) < -MAX_INTEGER:
            raise FastMTPError(f"{where or 'the file'}: an integer in it is too large")
        return
    for i, value in enumerate(values):
        check_values(value, f"{where}[{i}]", depth + 1)


def _check_text(text: str, where: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise FastMTPError(f"{where}: half a surrogate pair, which is no text") from None


def build(kind: type[T], value: Any, where: str = "") -> T:
    """`value` as a `kind`: a dataclass, whose fields are dataclasses, lists, dicts, unions with None or plain types,
    numbers within their `Range`.

    Raises `FastMTPError` with the place where it is not.
    """
    made: T = _build(kind, value, where)
    return made


def _build(kind: Any, value: Any, where: str) -> Any:
    origin, args = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if origin is Annotated:
        return _in_range(_build(args[0], value, where), args[1], where)
    if origin in (UnionType, Union):
        if value is None and NoneType in args:
            return None
        return _build(next(a for a in args if a is not NoneType), value, where)
    if is_dataclass(kind):
        return _build_dataclass(kind, value, where)
    if origin in (list, dict):
        if not isinstance(value, origin):
            raise FastMTPError(f"{where}: must be a {origin.__name__}, not {type(value).__name__}")
        if origin is list:
            if _are_plain_numbers(args[0], value):
                return value
            return [_build(args[0], v, f"{where}[{i}]") for i, v in enumerate(value)]
        return {k: _build(args[1], v, f"{where}.{show_key(k)}") for k, v in value.items()}
    wanted = (int, float) if kind is float else kind
    if not isinstance(value, wanted) or (isinstance(value, bool) and kind is not bool):
        raise FastMTPError(f"{where}: must be {kind.__name__}, not {show(value)}")
    if isinstance(value, float) and not math.isfinite(value):
        raise FastMTPError(f"{where}: {value} is not a finite number")
    if isinstance(value, str):
        _check_text(value, where)
    return value


def _are_plain_numbers(kind: Any, values: list[Any]) -> bool:
    """Whether all are numbers of a kind and within its range, at once: answers have thousands. If not, who looks at
    each of them says which is not."""
    plain, allowed = get_args(kind) if get_origin(kind) is Annotated else (kind, Range(-MAX_INTEGER))
    if plain not in (int, float) or not values:
        return False
    if not {type(value) for value in values} <= {int, plain}:
        return False
    # First the range: an integer beyond it may be too large to be a float. NaN is in no order.
    in_range = allowed.least <= min(values) and max(values) <= allowed.most
    return in_range and not (plain is float and math.isnan(sum(values)))


def _build_dataclass(kind: Any, value: Any, where: str) -> Any:
    if not isinstance(value, dict):
        raise FastMTPError(f"{where or 'the file'}: must be an object, not {type(value).__name__}")
    hints = get_type_hints(kind, include_extras=True)
    needed = [f.name for f in fields(kind) if f.default is MISSING and f.default_factory is MISSING]
    if missing := [name for name in needed if name not in value]:
        raise FastMTPError(f"{where or 'the file'} lacks {', '.join(missing)}")
    names = [f.name for f in fields(kind) if f.name in value]
    made = {name: _build(hints[name], value[name], f"{where}.{name}".lstrip(".")) for name in names}
    return kind(**made)


def _in_range(value: Any, allowed: Range, where: str) -> Any:
    if not allowed.least <= value <= allowed.most:
        bounds = f"at least {allowed.least:g}"
        if allowed.most < MAX_INTEGER:
            bounds = f"from {allowed.least:g} to {allowed.most:g}"
        raise FastMTPError(f"{where}: {show(value)} is not possible, it must be {bounds}")
    return value


def show(value: Any, most: int = 80) -> str:
    """A value in an error: short, in one line, whatever it is."""
    if isinstance(value, int) and abs(value) > MAX_INTEGER:
        return f"an integer of {value.bit_length()} bits"
    if isinstance(value, dict | list | tuple | set):  # its repr may be longer than memory
        return f"a {type(value).__name__}"
    return _cut(repr(value), most)


def show_key(key: str) -> str:
    """A key in the name of a place."""
    return key if len(key) <= 80 and key.isprintable() else _cut(repr(key), 80)


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"


def listed(names: Sequence[str], most: int = 5) -> str:
    """Names in an error, only the first ones of many."""
    shown = ", ".join(show_key(name) for name in names[:most])
    return shown + (f" and {len(names) - most} more" if len(names) > most else "")
