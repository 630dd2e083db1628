"""A plan's YAML as values: bounded, and with the environment's variables filled in so that they can be taken out again.

`${NAME}` is filled in after the YAML is read: a value cannot change what the plan means, and no error about the YAML
quotes it. A word that holds a value keeps what the plan wrote (`Filled.shown`), which is all that is ever recorded.
"""

import os
import re
from pathlib import Path
from typing import Any

from ..errors import FastMTPError
from ..files.inputs import yaml_value
from ..files.schema import check_values, read_text
from ..redaction import hide

MAX_BYTES = 2**18

_VARIABLE = re.compile(r"\$\{(\w+)\}")
# In the place of `${` and `}`, which mean something else inside of YAML's brackets. Nobody writes these characters.
_OPEN, _CLOSE = "\ue000", "\ue001"
_MARKED = re.compile(f"{_OPEN}(\\w+){_CLOSE}")


class Filled(str):
    """A word in which variables are filled in. `shown` is the word as the plan has it."""

    shown: str

    def __new__(cls, value: str, shown: str | None = None) -> "Filled":
        made = super().__new__(cls, value)
        made.shown = value if shown is None else shown
        return made

    def replace(self, old: Any, new: Any, count: Any = -1) -> "Filled":
        return Filled(super().replace(old, new, count), self.shown.replace(old, new, count))


def as_written(value: Any) -> Any:
    """`value` with `${NAME}` where a variable was filled in, also in lists and mappings."""
    if isinstance(value, Filled):
        return value.shown
    if isinstance(value, dict):
        return {key: as_written(inner) for key, inner in value.items()}
    return [as_written(inner) for inner in value] if isinstance(value, list | tuple) else value


def variables_in(text: str) -> list[str]:
    """Names of the variables that `text` names, and that are set."""
    return sorted({name for name in _VARIABLE.findall(text) if name in os.environ})


def typed(value: Any) -> Any:
    """A filled in word as YAML would read it, if that is a number, true, false or nothing."""
    if isinstance(value, dict):
        return {key: typed(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [typed(inner) for inner in value]
    if not isinstance(value, Filled):
        return value
    try:
        read = yaml_value(str(value))  # libyaml takes no class of ours
    except ValueError:
        return value
    return read if read is None or isinstance(read, bool | int | float) else value


def several(value: Any) -> list[Any]:
    """A list's element, or each of those that a variable holds in its place, as `${MAPS}` with `a.pt,b.pt`."""
    if not isinstance(value, Filled) or not _VARIABLE.fullmatch(value.shown) or "," not in value:
        return [value]
    parts = [part.strip() for part in value.strip("[] ").split(",")]
    return [Filled(part, value.shown) for part in parts if part]


def read_file(path: str) -> dict[str, Any]:
    """One plan file.

    Raises `FastMTPError` if it cannot be read, is no YAML, expands to more than a plan needs, holds what no plan holds,
    or names a variable that is not set.
    """
    where = str(path)
    marked = _VARIABLE.sub(rf"{_OPEN}\1{_CLOSE}", read_text(path, MAX_BYTES))
    try:
        value = yaml_value(marked)
    except ValueError as error:
        raise FastMTPError(f"{where}: not YAML ({_unmarked(str(error))})") from None
    if not isinstance(value, dict):
        raise FastMTPError(f"{where}: a plan is a mapping with `servers`, not {type(value).__name__}")
    try:
        check_values(value)
        filled: dict[str, Any] = _fill(value)
    except FastMTPError as error:
        raise FastMTPError(f"{where}: {_unmarked(str(error))}") from None
    return filled


def _fill(value: Any) -> Any:
    if isinstance(value, dict):
        return {_unmarked(key): _fill(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_fill(inner) for inner in value]
    if isinstance(value, str) and _MARKED.search(value):
        return Filled(_MARKED.sub(_variable, value), _unmarked(value))
    return value


def _variable(match: re.Match[str]) -> str:
    name = match[1]
    if name not in os.environ:
        raise FastMTPError(f"${{{name}}} is not set; set the variable, or write its value")
    value = os.environ[name]
    # The name of a file may be read in errors; anything else that a variable holds may be a key.
    if not all(Path(part).exists() for part in value.split(",")):
        hide(value, f"${{{name}}}")
    return value


def _unmarked(text: str) -> str:
    return _MARKED.sub(r"${\1}", text)
