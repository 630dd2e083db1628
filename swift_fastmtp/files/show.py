"""Values and names in an error: short, in one line, whatever they are, and without secrets."""

import difflib
import reprlib
from collections.abc import Sequence
from typing import Any

from ..redaction import redact

MAX_INTEGER = 2**63 - 1
"""What other readers of JSON hold as an integer."""
MAX_CHARACTERS = 80

# Of lists in lists only a few: a YAML file of some lines may stand for more than memory holds. Of texts more than is
# shown, so that a key in it is still recognized as a whole.
_BOUNDED = reprlib.Repr()
_BOUNDED.maxlevel = 3
_BOUNDED.maxstring = 2000


def show(value: Any) -> str:
    """A value in an error, at most `MAX_CHARACTERS` of it."""
    if isinstance(value, int) and abs(value) > MAX_INTEGER:
        return f"an integer of {value.bit_length()} bits"
    return _shortened(redact(_BOUNDED.repr(value)))


def show_key(key: str) -> str:
    """A key in the name of a place, such as `servers.base.command`."""
    return key if len(key) <= MAX_CHARACTERS and key.isprintable() else show(key)


def listed(names: Sequence[str], most: int = 5) -> str:
    """Names in an error, only the first ones of many."""
    shown = ", ".join(show_key(name) for name in names[:most])
    return shown + (f" and {len(names) - most} more" if len(names) > most else "")


def meant(name: str, names: Sequence[str]) -> str:
    """The end of an error about an unknown name: the one that was meant, or all of them."""
    close = difflib.get_close_matches(name, names, n=1)
    return f"did you mean {close[0]}?" if close else f"it has {listed(names, 40)}"


def _shortened(text: str) -> str:
    return text if len(text) <= MAX_CHARACTERS else f"{text[: MAX_CHARACTERS - 1]}…"
