"""Duplicates: the same row again, and rows that are nearly the same, found with MinHash and locality-sensitive hashing.

MinHash only proposes pairs; every pair is then compared exactly, so a removed row is a near-duplicate by definition and
not by luck. What is compared is prompt and answer, each with its own similarity: several answers to one prompt are not
duplicates unless the answers are, however long the prompt is, and equal short answers do not make two questions one.

Memory per row is fixed, whatever its length: the band keys, 8 bytes each (504 bytes at the default similarity). The
n-grams wait in an unnamed file next to the output, 4 bytes each.
"""

import hashlib
import json
import tempfile
from array import array
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..files.rows import Row
from .conversation import message_text
from .shingles import Hashes, jaccard, runs, units

Places = NDArray[np.int64]

PERMUTATIONS = 126
WINDOW = 32
"""Rows with one band key are compared with so many neighbors, which keeps the work linear in the rows."""
_GENERATOR = np.random.Generator(np.random.PCG64(0))
# h -> (a h + b) mod 2^64, upper half: Dietzfelbinger's multiply-shift, for numbers that are hashes already.
_A = _GENERATOR.integers(0, 2**63, PERMUTATIONS, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
_B = _GENERATOR.integers(0, 2**63, PERMUTATIONS, dtype=np.uint64)
_WEIGHTS = _GENERATOR.integers(0, 2**63, 16, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
_HALF = np.uint64(32)


def prompt_and_answer(row: Row) -> tuple[str, str]:
    """The text that is asked and the text that is answered, all turns. System messages, which many rows share, are left
    out."""
    asked = [m["content"] for m in row["messages"] if m["role"] in ("user", "tool")]
    return "\n".join(asked), "\n".join(message_text(m) for m in row["messages"] if m["role"] == "assistant")


class ExactDuplicates:
    """Rows whose messages (`of` "row") or prompts ("prompt") and tools are, but for white space, those of an earlier
    row."""

    def __init__(self, of: str) -> None:
        self._of = of
        self._first: dict[bytes, str] = {}

    def __call__(self, row: Row, where: str) -> str | None:
        """Why this row is removed, or None if it is the first of its kind."""
        digest = hashlib.blake2b(json.dumps(row.get("tools")).encode(), digest_size=16)
        for message in row["messages"]:
            if message["role"] != "assistant":
                text = message["content"]
            elif self._of == "row":
                text = message_text(message)
            else:
                continue
            digest.update(f"\0{message['role']}\0{' '.join(text.split())}".encode("utf-8", "surrogatepass"))
        first = self._first.setdefault(digest.digest(), where)
        return None if first == where else f"the same {self._of} as {first}"


class NearDuplicates:
    """Rows whose prompts and answers (`of` "row"), or prompts ("prompt"), are nearly those of an earlier row.

    Two rows are near-duplicates if the Jaccard similarity of the sets of their `ngram`-grams reaches `similarity`, for
    the prompts and for the answers; rows that are linked by near-duplicates are one cluster, whose first row stays.

    Candidates have equal band keys: `r` minima of the prompt and `r` of the answer. With similarity s of either, a
    pair of rows shares one of `b` keys with probability 1 - (1 - s^2r)^b (s^r for prompts only): 0.9998 at s = 0.6
    with r = 2, b = 63, and 0.987 with r = 4, b = 31.
    """

    def __init__(self, of: str, similarity: float, ngram: int, folder: str | Path) -> None:
        self._of = of
        self._similarity = similarity
        self._ngram = ngram
        self._rows_per_band = _rows_per_band(similarity, sides=2 if of == "row" else 1)
        self._bands = PERMUTATIONS // self._rows_per_band
        self._keys = bytearray()
        self._ends = array("Q", [0])
        self._shingles = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (lives as long as this object)

    def add(self, row: Row) -> None:
        """The next row."""
        prompt, answer = prompt_and_answer(row)
        sides = [np.unique(runs(units(text), self._ngram)) for text in (prompt, answer if self._of == "row" else "")]
        bands = signature(sides, self._bands, self._rows_per_band)
        self._keys += (bands * _WEIGHTS[: bands.shape[1]]).sum(1, dtype=np.uint64).tobytes()
        for hashes in sides:
            shingles = np.unique((hashes >> _HALF).astype(np.uint32))
            self._shingles.write(shingles.tobytes())
            self._ends.append(self._ends[-1] + len(shingles))

    def clusters(self) -> Iterator[tuple[int, int, float]]:
        """(row, first row of its cluster, their similarity) of every row that is not the first, in order.

        The similarity is the smaller of the prompts' and the answers'; it is below the threshold where the two are only
        linked by others.
        """
        self._shingles.flush()
        first = np.arange(len(self._ends) // 2)
        compared: set[tuple[int, int]] = set()
        for left, right in self._candidates():
            apart = _roots(first, left) != _roots(first, right)
            for a, b in zip(left[apart].tolist(), right[apart].tolist(), strict=True):
                root_a, root_b = sorted((_root(first, a), _root(first, b)))
                if root_a != root_b and (a, b) not in compared:
                    compared.add((a, b))
                    if self._alike(a, b) >= self._similarity:
                        first[root_b] = root_a
        roots = _roots(first, first).tolist()
        for row, root in enumerate(roots):
            if root != row:
                yield row, root, self._alike(root, row)

    def _candidates(self) -> Iterator[tuple[Places, Places]]:
        """Pairs of rows that share a key. In a large group, put in order by the next keys, only neighbors."""
        keys = np.frombuffer(self._keys, np.uint64).reshape(-1, self._bands)
        for band in range(self._bands):
            columns = [keys[:, (band + k) % self._bands] for k in (2, 1, 0)]
            order = np.lexsort(columns)
            key = columns[-1][order]
            for distance in range(1, WINDOW + 1):
                (hits,) = np.nonzero(key[distance:] == key[:-distance])
                if not len(hits):
                    break
                pairs = np.sort(np.stack((order[hits], order[hits + distance])), axis=0)
                yield pairs[0], pairs[1]

    def _alike(self, a: int, b: int) -> float:
        return min(jaccard(x, y) for x, y in zip(self._read(a), self._read(b), strict=True))

    def _read(self, row: int) -> Iterator[NDArray[np.uint32]]:
        start, middle, end = self._ends[2 * row : 2 * row + 3]
        self._shingles.seek(4 * start)
        both = np.frombuffer(self._shingles.read(4 * (end - start)), np.uint32)
        yield both[: middle - start]
        yield both[middle - start :]


def signature(sides: list[Hashes], bands: int, rows_per_band: int) -> Hashes:
    """[bands, sides x rows_per_band]: `rows_per_band` minima of each side's set of hashes, 32 bits each."""
    return np.hstack([_minima(h)[: bands * rows_per_band].reshape(bands, rows_per_band) for h in sides])


def _minima(hashes: Hashes) -> Hashes:
    """The MinHash signature of a set: its smallest member under each permutation."""
    least = np.full(PERMUTATIONS, 2**32 - 1, np.uint64)
    for start in range(0, len(hashes), 4096):  # a long text takes no more memory than this
        least = np.minimum(least, ((hashes[start : start + 4096, None] * _A + _B) >> _HALF).min(0))
    return least


def _rows_per_band(similarity: float, sides: int) -> int:
    """The most selective banding that still finds 98.5 % of the pairs at the threshold."""
    for r in range(8, 1, -1):
        if 1 - (1 - similarity ** (sides * r)) ** (PERMUTATIONS // r) >= 0.985:
            return r
    return 1


def _root(first: Places, row: int) -> int:
    """The first row of a row's cluster (union-find, with path halving)."""
    while first[row] != row:
        first[row] = first[first[row]]
        row = int(first[row])
    return row


def _roots(first: Places, rows: Places) -> Places:
    """The same of many rows at once: in a large cluster nearly all pairs are joined already, and end here."""
    while not np.array_equal(up := first[rows], rows):
        rows = up
    return rows
