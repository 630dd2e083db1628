"""Names of other libraries that are private or undocumented, and the one line that is raised when one has changed.

Where a library offers no other way, this package uses such names. They stand in one `compat_*.py` of the folder that
needs them, each with the reason and a check, so that a new version of a library that renames one, or gives it another
meaning, stops with a line that says which version to install. Nothing goes on with wrong numbers.
"""

import inspect
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from ..errors import FastMTPError

TRIED = {
    "torch": ("2.13.0",),
    "transformers": ("5.19.0",),
    "accelerate": ("1.15.0",),
    "deepspeed": ("0.19.8",),
    "datasets": ("4.8.4",),
    "ms-swift": ("4.6.0",),
    "modelscope": ("1.40.2",),
    "sglang": ("0.5.19", "0.5.20", "0.5.21", "0.5.22", "0.5.23"),
    "vllm": ("0.32.0",),
}
"""Library → the versions that every name in the `compat_*.py` files was tried with."""


@dataclass(frozen=True)
class Name:
    """One private or undocumented name.

    Attributes:
        library: as in `TRIED`.
        path: 'module:attribute', or 'module:Class.attribute'.
        why: what it is needed for.
        first: its first parameters, where it is called or replaced; None is not looked at.
        among: parameters that it must have anywhere.
    """

    library: str
    path: str
    why: str
    first: tuple[str, ...] | None = None
    among: tuple[str, ...] = ()

    @property
    def short(self) -> str:
        """For a reader: without the module."""
        return self.path.partition(":")[2]


def installed(library: str) -> str:
    """The version of a library, or a text that it has none."""
    try:
        return version(library)
    except PackageNotFoundError:
        return "of unknown version"


def changed(library: str, what: str) -> FastMTPError:
    """What to raise when a name of a library is gone or means something else."""
    tried = TRIED[library]
    return FastMTPError(
        f"{library} {installed(library)}: {what}; this package was tried with {', '.join(tried)}: install "
        f"{library}=={tried[-1]}"
    )


def owner_of(name: Name) -> tuple[Any, str]:
    """The module or class that holds a name, and the last part of the name.

    Raises `FastMTPError` if there is no such module or class.
    """
    module, _, attributes = name.path.partition(":")
    *classes, last = attributes.split(".")
    try:
        owner: Any = import_module(module)
        for attribute in classes:
            owner = getattr(owner, attribute)
    except (ImportError, AttributeError):
        raise _gone(name) from None
    return owner, last


def find(name: Name) -> Any:
    """What a name stands for. Raises `FastMTPError` if it is gone, or takes other parameters than it did."""
    owner, last = owner_of(name)
    try:
        value = getattr(owner, last)
    except AttributeError:
        raise _gone(name) from None
    if name.first is not None or name.among:
        _check_parameters(name, value)
    return value


def check_names(names: tuple[Name, ...]) -> None:
    """Raises `FastMTPError` for the first name that is gone or takes other parameters than it did."""
    for name in names:
        find(name)


def _gone(name: Name) -> FastMTPError:
    return changed(name.library, f"{name.short} of {name.path.partition(':')[0]} is gone ({name.why})")


def _check_parameters(name: Name, function: Any) -> None:
    """Of what is wrapped already, `inspect` looks at the original."""
    try:
        parameters = list(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        raise changed(name.library, f"{name.short} is no function any more ({name.why})") from None
    first = name.first or ()
    missing = [parameter for parameter in name.among if parameter not in parameters]
    if tuple(parameters[: len(first)]) != first or missing:
        wanted = ", ".join(dict.fromkeys((*first, *name.among)))
        raise changed(name.library, f"{name.short} takes ({', '.join(parameters)}), it took ({wanted}) ({name.why})")
