"""Regular expressions out of a config.json, which is anybody's file: bounded in size and in time."""

import math
import re
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

from ..errors import FastMTPError, detail

# `regex` writes repetitions out when it compiles, each as often as the ones around it say.
_LONGEST, _DEEPEST, _MOST_REPETITIONS = 500, 5, 200
_SECONDS_OF_A_MATCH = 0.2


class Expression:
    """A regular expression of a config.json, which is anybody's: one that would take for ever is given up.

    Python's own engine cannot be stopped; `regex` can. That one is slow to compile, and most entries are plain names,
    of which there may be thousands: those without a repetition or an alternative go to Python's.

    Raises `ValueError` for what is no expression, or too large a one.
    """

    def __init__(self, pattern: str) -> None:
        self._text = pattern
        self._limit: dict[str, float] = {}
        if len(pattern) > _LONGEST or _nesting(pattern) > _DEEPEST or _repetitions(pattern) > _MOST_REPETITIONS:
            raise ValueError("it is too large")
        try:
            if not set("*+?{|") & set(pattern):
                self._pattern: Any = re.compile(pattern)
                return
            import regex  # of transformers

            self._pattern, self._limit = regex.compile(pattern), {"timeout": _SECONDS_OF_A_MATCH}
        except Exception as error:  # noqa: BLE001 (each engine has its own, and others for odd expressions)
            raise ValueError(detail(error)) from None

    def match(self, name: str, how: str = "match") -> bool:
        """Whether it matches (`match`, `fullmatch`, `search`). Raises `FastMTPError` if that takes too long."""
        try:
            return getattr(self._pattern, how)(name, **self._limit) is not None
        except TimeoutError:
            raise FastMTPError(
                f"quantization_config: {self._text[:80]!r} takes over {_SECONDS_OF_A_MATCH} s to match {name}; "
                "write it without repetitions in repetitions"
            ) from None


def _nesting(pattern: str) -> int:
    """How many groups are in each other, at most; an escaped parenthesis counts, which does no harm."""
    depth = deepest = 0
    for character in pattern:
        depth += (character == "(") - (character == ")")
        deepest = max(deepest, depth)
    return deepest


def _repetitions(pattern: str) -> int:
    """The product of all counts, `{3}` or `{1,5}`."""
    counts = [int(most or least or 1) for least, most in re.findall(r"\{(\d*)(?:,(\d*))?\}", pattern)]
    return math.prod(max(count, 1) for count in counts)


@lru_cache(maxsize=2**16)
def _compiled(pattern: str) -> "Expression | str":
    """The expression, or why it is none: kept, too, because every part of a layer asks for it."""
    try:
        return Expression(pattern)
    except ValueError as error:
        return str(error)


def expression_or_none(pattern: str) -> Expression | None:
    """None: it is no expression."""
    compiled = _compiled(pattern)
    return None if isinstance(compiled, str) else compiled


def matches_whole(expression: Expression, parts: Iterable[str]) -> bool:
    return any(expression.match(part, "fullmatch") for part in parts)


def expression(pattern: str, key: str) -> Expression:
    compiled = _compiled(pattern)
    if isinstance(compiled, str):
        raise FastMTPError(
            f"quantization_config: {key} has {pattern[:80]!r}, which is no regular expression ({compiled})"
        )
    return compiled
