"""What the user named, and what is only a default of ms-swift's.

The default of `tuner_type` is `lora`, and a user who wants LoRA says `lora` too: the value does not tell the two apart,
so what was named is watched. A recipe (YAML, JSON) is turned into flags of a second process by ms-swift, so it is a
command line like others. From Python the arguments are an object, made from keywords, or a list of flags.

This file imports nothing heavy: `autoload` uses it in every process that imports ms-swift.
"""

import argparse
import sys
from collections.abc import Iterable, Sequence
from dataclasses import fields
from typing import Any

_flags: list[str] | None = None
"""The command line that is being parsed; None if none is."""
_keywords: set[str] | None = None
"""The arguments that the newest object was made from; None before anything was watched."""


def watch(arguments_class: Any) -> None:
    """Note from now on how objects of ms-swift's argument classes are made. Doing it again changes nothing."""
    _watch_command_lines()
    _watch_objects(arguments_class)


def is_typed(args: Any, name: str) -> bool:
    """Whether the user named the argument `name`, whatever its value. Only for use while `args` is being made."""
    if _flags is not None:
        return name in typed_names(_names(type(args)), _flags)
    if _keywords is not None:
        return name in _keywords
    # Loaded by --external_plugins, while the command line was already being parsed.
    typed = typed_names(_names(type(args)), sys.argv[1:])
    return "model_type" not in typed or name in typed


def typed_names(names: Iterable[str], flags: Sequence[str]) -> set[str]:
    """Which of `names` a command line sets: `--tuner_type x`, `--tuner_type=x`, `--tuner-type x`, or an abbreviation
    that fits one name only, as argparse reads them."""
    parser = argparse.ArgumentParser(add_help=False, argument_default=argparse.SUPPRESS)
    for name in names:
        spellings = dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}"))
        parser.add_argument(*spellings, dest=name, nargs="*")
    given, _ = parser.parse_known_args(list(flags))
    return set(vars(given))


def _names(arguments_class: Any) -> list[str]:
    return [field.name for field in fields(arguments_class) if field.init]


def _watch_command_lines() -> None:
    from transformers import HfArgumentParser

    original = HfArgumentParser.parse_args_into_dataclasses
    if getattr(original, "of_fastmtp", False):
        return

    def parse_args_into_dataclasses(self: Any, args: Any = None, *more: Any, **options: Any) -> Any:
        global _flags
        outer = _flags
        _flags = [str(arg) for arg in (sys.argv[1:] if args is None else args)]
        try:
            return original(self, args, *more, **options)
        finally:
            _flags = outer

    parse_args_into_dataclasses.of_fastmtp = True  # type: ignore[attr-defined]
    HfArgumentParser.parse_args_into_dataclasses = parse_args_into_dataclasses


def _watch_objects(arguments_class: Any) -> None:
    original = arguments_class.__new__
    if getattr(original, "of_fastmtp", False):
        return

    def new(cls: Any, *args: Any, **keywords: Any) -> Any:
        global _keywords
        _keywords = {*_names(cls)[: len(args)], *keywords}
        if original is object.__new__:
            return object.__new__(cls)
        return original(cls, *args, **keywords)

    new.of_fastmtp = True  # type: ignore[attr-defined]
    arguments_class.__new__ = staticmethod(new)
