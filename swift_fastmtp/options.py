"""Options of a command line from what is written once, at the function that does the work: names, types and defaults
are its signature's, help is its docstring's.

The function is read and not imported: its module may load torch, which takes seconds, and neither `--help` nor the line
about a misspelt option should.
"""

import argparse
import ast
import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from .files.inputs import loads

_PACKAGE = Path(__file__).parent


def add_options(
    parser: argparse.ArgumentParser, place: str, words: tuple[str, ...] = (), names: Mapping[str, str] | None = None
) -> None:
    """Give a parser an option for each parameter of a function, or for each field with a default of a dataclass. One
    that the user leaves out gets no value, so that the function's default applies.

    Args:
        parser: of one verb
        place: module and name in this package, such as "data.mix:mix"
        words: the parameters that are given without the name of an option
        names: parameter → option, where they differ; "" for a parameter that is no option
    """
    for name, (option, settings) in settings_of(place, names).items():
        if name in words:
            parser.add_argument(name, metavar=option, **{k: v for k, v in settings.items() if k != "required"})
            continue
        if "type" in settings:
            settings["metavar"] = option.upper()
        parser.add_argument(f"--{option}", dest=name, default=argparse.SUPPRESS, **settings)


def settings_of(place: str, names: Mapping[str, str] | None = None) -> dict[str, tuple[str, dict[str, Any]]]:
    """Parameter → its option, and what argparse is to know of it. Arguments are those of `add_options`."""
    node = _definition(place)
    helps = _helps(ast.get_docstring(node) or "")
    found = {}
    for name, kind, default in _fields(node) if isinstance(node, ast.ClassDef) else _parameters(node.args):
        option = (names or {}).get(name, name)
        if option:
            settings = _settings(ast.unparse(kind), default, helps.get(name, ""))
            found[name] = (option, {**settings, "required": not default})
    return found


def words_of(option: str, value: Any, settings: Mapping[str, Any]) -> list[str]:
    """An option on a command line, from a value of a plan: true is the bare option, false none; a mapping is JSON where
    one is meant, else NAME=VALUE for each of its keys."""
    if settings.get("action") == "store_true":
        return [f"--{option}"] if value else []
    if isinstance(value, dict) and settings.get("type") is _json_object:
        return [f"--{option}", json.dumps(value, ensure_ascii=False)]
    if isinstance(value, dict):
        value = [f"{key}={inner}" for key, inner in value.items()]
    return [f"--{option}", *as_words(value)]


def as_words(value: Any) -> list[str]:
    """A value or several; texts stay the objects that they are, which may know how they are shown."""
    return [each if isinstance(each, str) else str(each) for each in _several(value)]


def _definition(place: str) -> ast.FunctionDef | ast.ClassDef:
    module, _, name = place.partition(":")
    source = (_PACKAGE / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8")
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == name:
            return node
    raise LookupError(place)


_Signature = list[tuple[str, Any, ast.expr | None]]
"""Name, annotation and default of each parameter; no default if it has to be given."""


def _parameters(node: ast.arguments) -> _Signature:
    required = len(node.args) - len(node.defaults)
    defaults = [*[None] * required, *node.defaults, *node.kw_defaults]
    arguments = [*node.args, *node.kwonlyargs]
    return [(each.arg, each.annotation, default) for each, default in zip(arguments, defaults, strict=True)]


def _fields(node: ast.ClassDef) -> _Signature:
    lines = [line for line in node.body if isinstance(line, ast.AnnAssign) and line.value]
    fields = [line for line in lines if "ClassVar" not in ast.unparse(line.annotation)]
    return [(ast.unparse(line.target), line.annotation, line.value) for line in fields]


def _helps(docstring: str) -> dict[str, str]:
    """Name → text of the lines below `Args:`, each of which may go on in deeper ones."""
    section = docstring.partition("Args:\n")[2].split("\n\n")[0]
    entries = re.findall(r"^    (\w+): (.*(?:\n     .*)*)", section, re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in entries}


def _settings(annotation: str, default: ast.expr | None, text: str) -> dict[str, Any]:
    """What argparse is to know of a parameter."""
    try:
        value = None if default is None else ast.literal_eval(default)
    except ValueError:  # one that is computed
        value = None
    if value not in (None, (), {}) and not isinstance(value, bool):
        shown = [f"{each:g}" if isinstance(each, float) else str(each) for each in _several(value)]
        text += f"; default: {' '.join(shown)}"
    settings: dict[str, Any] = {"help": text.replace("%", "%%")}
    kinds = re.findall(r"\w+", annotation)
    if "bool" in kinds:
        return {**settings, "action": "store_true"}
    if literal := re.search(r"Literal(\[.*?\])", annotation):
        settings["choices"] = ast.literal_eval(literal[1])
    else:
        settings["type"] = next((_TYPES[kind] for kind in kinds if kind in _TYPES), str)
    if {"list", "Sequence", "Several"} & set(kinds):
        settings["nargs"] = "*" if value == () else "+"  # where none is the default, none may be named
    return settings


def _several(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


def _json_object(text: str) -> dict[str, Any]:
    value = loads(text)
    if not isinstance(value, dict):
        raise ValueError
    return value


def number(text: str) -> float:
    """No NaN, which is below and above no limit, and no infinity."""
    value = float(text)
    if not math.isfinite(value):
        raise ValueError
    return value


def tokens(text: str) -> int:
    from .data.mix import parse_tokens

    return parse_tokens(text)


_TYPES: dict[str, Callable[[str], Any]] = {
    "int": int,
    "float": number,
    "dict": _json_object,
    "TokenCount": tokens,
    # Of a plan's keys (`bench/plan_keys.py`).
    **dict.fromkeys(("Number", "Concurrency", "DraftSteps", "Positive", "Count", "Whole"), int),
    **dict.fromkeys(("Temperature", "Rate", "Seconds"), number),
}
"""Name in an annotation → what reads a word of the command line. argparse's errors name the latter."""
