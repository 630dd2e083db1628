"""What a user's file holds, checked before anything works with it: plans, results, records of requests, mix recipes.

A file may hold anything, and be anything: a pipe, a folder, a gigabyte. What comes through is a text of bounded size;
then a value without surprises (`check_values`: bounded depth, finite numbers, text that can be written); then the
dataclass or pydantic model that was asked for (`build`), whose annotations say the type and the range of every field.
"""

import math
from functools import cache
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import Field, TypeAdapter, ValidationError

from ..errors import FastMTPError
from . import inputs
from .show import MAX_INTEGER, show, show_key

MAX_DEPTH = 32
"""Lists and objects inside of each other."""
MAX_ENTRIES = 10_000
"""Of a mapping."""

T = TypeVar("T")
ListOf = Annotated[list[T], Field(fail_fast=True)]
"""A list of which the first error is enough: pydantic collects all, and a hostile file has a million."""

Rate = Annotated[float, Field(strict=True, ge=0, le=1, allow_inf_nan=False)]
Amount = Annotated[float, Field(strict=True, ge=0, le=MAX_INTEGER, allow_inf_nan=False)]
Tau = Annotated[float, Field(strict=True, ge=1, le=MAX_INTEGER, allow_inf_nan=False)]
Whole = Annotated[int, Field(strict=True, ge=-MAX_INTEGER, le=MAX_INTEGER)]
Count = Annotated[int, Field(strict=True, ge=0, le=MAX_INTEGER)]
Positive = Annotated[int, Field(strict=True, ge=1, le=MAX_INTEGER)]


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
        raise FastMTPError(f"{here}: nested deeper than {MAX_DEPTH}")
    if isinstance(value, str):
        _check_text(value, here)
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise FastMTPError(f"{here}: {value} is not a finite number")
    elif isinstance(value, int):
        if abs(value) > MAX_INTEGER:
            raise FastMTPError(f"{here}: {show(value)} is too large")
    elif isinstance(value, dict):
        if len(value) > MAX_ENTRIES:
            raise FastMTPError(f"{here}: {len(value)} keys; at most {MAX_ENTRIES} are possible")
        for key, inner in value.items():
            if not isinstance(key, str):
                raise FastMTPError(f"{here}: its key {show(key)} must be a text")
            _check_text(key, here)
            check_values(inner, _below(where, key), depth + 1)
    elif isinstance(value, list):
        if {type(inner) for inner in value} == {int}:  # long lists of counts, at once
            value = [min(value), max(value)]
        for i, inner in enumerate(value):
            check_values(inner, _below(where, i), depth + 1)
    elif value is not None:
        raise FastMTPError(f"{here}: {show(value)} is no text, number, list or mapping")


def _check_text(text: str, where: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise FastMTPError(f"{where}: half a surrogate pair, which is no text") from None


def build(kind: type[T], value: Any, where: str = "") -> T:
    """`value` as a `kind`.

    Args:
        kind: a dataclass, a pydantic model, or any type that pydantic knows, with numbers such as `Count`.
        where: the place of `value` in its file; that of a field follows it, as in `servers.base.command[2]`.

    Raises `FastMTPError` with the first place where it is not, what is there, and what must be.
    """
    try:
        made: T = _validator(kind).validate_python(value)  # type: ignore[arg-type] # a type is hashable
    except ValidationError as error:
        raise FastMTPError(_first_problem(error, where)) from None
    return made


_validator = cache(TypeAdapter)


def _first_problem(error: ValidationError, where: str) -> str:
    """pydantic's first error in our form: place, what must be, what is there."""
    problems = error.errors(include_url=False)
    first = problems[0]
    kind, keys = first["type"], first["loc"]
    if kind == "missing":
        missing = [str(p["loc"][-1]) for p in problems if p["type"] == kind and p["loc"][:-1] == keys[:-1]]
        return f"{_place(where, keys[:-1])} lacks {', '.join(missing)}"
    place = _place(where, keys)
    if kind == "value_error":  # of a function of ours, which has written a whole message
        return f"{place}: {first['ctx']['error']}"
    is_object = kind in ("dataclass_type", "model_type")
    what = "must be an object" if is_object else first["msg"].replace("Input should be", "must be")
    return f"{place}: {what}, not {show(first['input'])}"


def _place(where: str, keys: tuple[int | str, ...]) -> str:
    for key in keys:
        where = _below(where, key)
    return where or "the file"


def _below(where: str, key: int | str) -> str:
    return f"{where}[{key}]" if isinstance(key, int) else f"{where}.{show_key(key)}".lstrip(".")
