"""Which backbone a head belongs to: the identity of a checkpoint's tensors outside the MTP layer."""

import hashlib
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import FastMTPError
from ..families.family import Family, is_embedding
from .headers import Entry, open_safetensors, read_header

_FINGERPRINT = "v2:"


WHOLE_BELOW = 32 * 10**9
"""Bytes of a backbone up to which every byte counts."""


_SPACING, _BLOCK, _SMALL = 2**22, 2**12, 2**16
"""Above that: bytes between two samples of a matrix, bytes of a sample, bytes of a tensor that is read whole."""


_PIECE = 2**20


def is_new(recorded: str) -> bool:
    """Whether a recorded fingerprint is of the form that `fingerprint` gives."""
    return str(recorded).startswith(_FINGERPRINT)


def fingerprint(folder: Path, entries: Mapping[str, Entry], family: Family | None) -> str:
    """Identity of a checkpoint's backbone, to tell later whether a head belongs to it: `v2:` and 64 hexadecimal digits.

    It covers name, dtype, shape and values of every tensor outside the head, in the order of the names, so how they
    are spread over files does not matter. Values are read with a checksum, because SHA-256 (0.5 GB/s) would take longer
    than the disk; SHA-256 binds the checksums. It is called when a run saves first, by exports and the doctor.

    * Backbones up to 32 GB: every byte, so a change of one value is noticed. As long as reading the files: 16 GB in 5
      to 10 s.
    * Larger ones: whole are embedding, output matrix and everything small, of which a training may change single rows;
      of each other matrix 4 KB from every 4 MB, at least two samples, at places that its name gives. Full tuning, a
      merged LoRA, a tuned layer or expert change nearly every value of a matrix, so each is noticed by any of its
      samples; an edit of a few rows of one such matrix may not be. 200 GB: 50 000 samples, 0.2 GB, seconds.
    """
    names = sorted(n for n in entries if family is None or not family.owns(n))
    files = {entry.file for entry in entries.values()}
    starts = {file: read_header(file)[0] for file in files}
    whole = sum(entries[n].size for n in names) <= WHOLE_BELOW
    digest = hashlib.sha256()
    opened: dict[Path, Any] = {}
    try:
        for name in names:
            entry = entries[name]
            if entry.file not in opened:
                opened[entry.file] = open(entry.file, "rb", buffering=0)  # noqa: SIM115
            first, size = starts[entry.file] + entry.start, entry.size
            parts = [(first, size)]
            if not (whole or size <= _SMALL or is_embedding(name) or name.endswith("lm_head.weight")):
                parts = [(first + at, _BLOCK) for at in _sampled(name, size)]
            digest.update(
                f"{name} {entry.dtype} {list(entry.shape)} {_checksums(opened[entry.file], parts)}\n".encode()
            )
    except OSError as error:
        raise FastMTPError(f"{folder}: cannot be read ({error})") from None
    finally:
        for file in opened.values():
            file.close()
    return _FINGERPRINT + digest.hexdigest()


def _sampled(name: str, size: int) -> list[int]:
    """Where the samples of a matrix begin: one in each of equal parts, at a place that the tensor's name gives."""
    parts = max(2, -(-size // _SPACING))
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")
    places = np.random.default_rng(seed).random(parts)
    return [int((i + place) * (size - _BLOCK) / parts) for i, place in enumerate(places)]


def _checksums(file: Any, parts: list[tuple[int, int]]) -> str:
    """Checksums of the bytes at (start, length), in pieces of 1 MB: sum of word times odd random factor, modulo 2**64.

    A change of one word always changes the sum, of several with a probability of 1 - 2**-63 or so.
    """
    sums = hashlib.sha256()
    buffer = np.zeros(_PIECE, dtype=np.uint8)
    view = memoryview(buffer.data)
    for start, length in parts:
        file.seek(start)
        for done in range(0, length, _PIECE):
            piece = view[: min(_PIECE, length - done)]
            filled = 0
            while filled < len(piece):
                count = file.readinto(piece[filled:])
                if not count:
                    raise OSError("a file is shorter than its header says")
                filled += count
            buffer[filled : -(-filled // 8) * 8] = 0
            words = buffer[: -(-filled // 8) * 8].view(np.int64)
            sums.update(np.dot(words, _factors()[: len(words)]).tobytes())
    return sums.hexdigest()


@cache
def _factors() -> "np.ndarray[Any, np.dtype[np.int64]]":
    """Odd numbers, the same on every machine."""
    factors = np.random.Generator(np.random.PCG64(2509_18362)).integers(0, 2**63, _PIECE // 8, dtype=np.int64)
    return factors | 1


def first_rows(entries: Mapping[str, Entry], family: Family) -> str:
    """The fingerprint before `v2:`: of every matrix only the first row counted."""
    import torch  # takes seconds, and of most folders no fingerprint is asked

    digest = hashlib.sha256()
    opened: dict[Path, Any] = {}  # opening parses the header: once per file, not once per tensor
    for name in sorted(n for n in entries if not family.owns(n)):
        path = entries[name].file
        if path not in opened:
            opened[path] = open_safetensors(path)
        view = opened[path].get_slice(name)
        shape = view.get_shape()
        digest.update(f"{name} {view.get_dtype()} {shape}\n".encode())
        row = view[:1] if len(shape) > 1 else view[:]
        digest.update(row.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
