"""What a checkpoint folder holds, by the headers of its safetensors files alone.

No tensor is read and torch is not imported, so a checkpoint of hundreds of gigabytes takes as long as its headers:
a few megabytes. Unlike `checkpoints.Weights`, which refuses a broken folder, this also describes one: a shard that is
missing or shorter than its header says is listed, and the rest is still there to look at.
"""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .errors import FastMTPError

INDEX_FILE = "model.safetensors.index.json"
_MAX_HEADER = 100_000_000  # bytes; safetensors' own limit


@dataclass(frozen=True)
class Entry:
    """One tensor: its file, what it is, and where its bytes lie (counted from the end of the header)."""

    file: Path
    dtype: str
    """As safetensors writes it: BF16, F32, F8_E4M3, ..."""
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def size(self) -> int:
        return self.end - self.start

    @property
    def params(self) -> int:
        return math.prod(self.shape)


@dataclass
class Headers:
    """The tensors of a folder by name, and what is wrong with its files."""

    files: list[Path] = field(default_factory=list)
    entries: dict[str, Entry] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    """Name → file of tensors that the index lists in a file that is not there."""
    problems: list[str] = field(default_factory=list)

    def under(self, *paths: str) -> list[str]:
        """Names below module paths, sorted."""
        return sorted(n for n in self.entries if n.startswith(tuple(f"{path}." for path in paths)))


def read_header(path: Path) -> tuple[int, dict[str, Any]]:
    """Offset of a safetensors file's first data byte, and its header without `__metadata__`.

    Raises `FastMTPError` if the file is no safetensors file, such as the pointer that git leaves without LFS.
    """
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= _MAX_HEADER:
                raise ValueError(f"header of {length} bytes")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        for entry in header.values():
            entry["dtype"], entry["shape"], entry["data_offsets"][1]
    except (OSError, ValueError, TypeError, LookupError, AttributeError) as error:
        raise FastMTPError(f"{path}: not a readable safetensors file ({error}); download it again") from None
    return 8 + length, header


def entries_of(path: Path) -> dict[str, Entry]:
    """The tensors of one file. Raises as `read_header`."""
    return {n: Entry(path, e["dtype"], tuple(e["shape"]), *e["data_offsets"]) for n, e in read_header(path)[1].items()}


def read_headers(folder: str | Path) -> Headers:
    """All tensors of a checkpoint folder, from the files that its index selects, or else from every file.

    Raises `FastMTPError` if there is no safetensors file at all, or the index is broken.
    """
    folder = Path(folder)
    index = folder / INDEX_FILE
    found = Headers()
    listed: dict[str, str] = {}
    if index.exists():
        try:
            listed = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
            found.files = sorted({folder / name for name in listed.values()})
        except (OSError, ValueError, TypeError, LookupError) as error:
            raise FastMTPError(f"{index}: cannot be read as a safetensors index ({error!r})") from None
    else:
        found.files = sorted(folder.glob("*.safetensors"))
    if not found.files:
        raise FastMTPError(f"{folder}: holds no *.safetensors file; convert the checkpoint to safetensors")
    for path in found.files:
        if path.exists():
            _add(found, path)
        else:
            names = {n: f for n, f in listed.items() if f == path.name}
            found.absent.update(names)
            found.problems.append(f"{path.name}: listed in the index, but missing; it holds {len(names)} tensors")
    lost = sorted(n for n in listed if n not in found.entries and n not in found.absent)
    if lost:
        found.problems.append(f"{index.name}: lists {lost[0]}, which no file holds ({len(lost)} such tensors)")
    return found


def _add(found: Headers, path: Path) -> None:
    try:
        offset, header = read_header(path)
    except FastMTPError as error:
        found.problems.append(str(error))
        return
    for name, entry in header.items():
        if name in found.entries:
            found.problems.append(f"{path.name}: {name} is also in {found.entries[name].file.name}; remove one")
        found.entries[name] = Entry(path, entry["dtype"], tuple(entry["shape"]), *entry["data_offsets"])
    end = offset + max((e["data_offsets"][1] for e in header.values()), default=0)
    if path.stat().st_size != end:
        found.problems.append(f"{path.name}: {path.stat().st_size} bytes, its header says {end}; download it again")
