"""Kinds of values: what a key of somebody's file must hold, in words and as a test."""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple


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


def wrong_types(value: Mapping[str, Any], kinds: Mapping[str, Kind]) -> Iterator[tuple[str, str]]:
    """Each key that holds something else than its kind, and what it must be; null is a key that is not there."""
    for key, kind in kinds.items():
        if value.get(key) is not None and not kind.fits(value[key]):
            yield key, kind.what
