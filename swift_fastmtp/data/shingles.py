"""What two texts have in common, as numbers: the units of a text, and hashes of runs of them.

A unit is a word, or one character of a script that is written without spaces (Chinese, Japanese). So an n-gram is words
in English, characters in Chinese and the right mixture in a text of both, and no text has to be sorted by
language first.
"""

import re
import zlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .scripts import CJK, normalized

Hashes = NDArray[np.uint64]

# Punctuation is left out, operators are not: `3 + 5` and `3 - 5` are two questions.
_UNIT = re.compile(rf"[{CJK}]|[^\W{CJK}]+|[-+*/%=<>^&|~!]")
_FACTOR = 0x9E3779B97F4A7C15
_MIX = np.uint64(0xFF51AFD7ED558CCD)  # MurmurHash3's finaliser
_SHIFT = np.uint64(33)


def units(text: str) -> list[str]:
    """Words and CJK characters of a text, in its order, without differences of case and width (NFKC)."""
    text = normalized(text).casefold()
    return _UNIT.findall(text) or text.split()


def runs(words: list[str], n: int) -> Hashes:
    """64-bit hashes of each run of `n` units, in order. A shorter text is one run, an empty one has none.

    Equal on every machine and in every run, unlike Python's `hash`.
    """
    codes = np.fromiter((zlib.crc32(w.encode("utf-8", "surrogatepass")) for w in words), np.uint64, len(words))
    n = min(n, len(words))
    value = np.zeros(len(words) - n + 1 if n else 0, np.uint64)
    for start in range(n):
        value = value * np.uint64(_FACTOR) + codes[start : len(codes) - n + 1 + start]
    value ^= value >> _SHIFT
    value *= _MIX
    value ^= value >> _SHIFT
    return value


def jaccard(a: NDArray[Any], b: NDArray[Any]) -> float:
    """Shared part of two sets (arrays of distinct numbers): |a and b| / |a or b|; 1 if both are empty."""
    shared = len(np.intersect1d(a, b, assume_unique=True))
    union = len(a) + len(b) - shared
    return shared / union if union else 1.0
