"""What a checkpoint folder holds, by the headers of its safetensors files alone.

No tensor is read and torch is not imported, so a checkpoint of hundreds of gigabytes takes as long as its headers:
a few megabytes. Unlike `checkpoints.Weights`, which refuses a broken folder, this also describes one: a shard that is
missing or shorter than its header says is listed, and the rest is still there to look at.
"""

import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .errors import FastMTPError
from .families import Family, config_value, is_embedding, read_config
from .weight_files import INDEX_FILE, WeightFiles, resolve

TOWER = re.compile(r"vision|visual|audio|encoder", re.I)
"""In names of tensors that belong to what a model sees or hears with."""
_PLAIN = ("F64", "F32", "F16", "BF16", "F8_E4M3")
"""Types of matrices that have a row for each of their rows; packed ones have other shapes."""
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
    """Name → file of tensors that the index lists in a file that is missing or damaged, and no other file holds.

    No problem by itself: a model may need none of them (`modeling.needed_tensors`).
    """
    stale: dict[str, str] = field(default_factory=dict)
    """Name → file of tensors that the index lists in a file that is sound, and no file holds."""
    problems: list[str] = field(default_factory=list)
    chosen: WeightFiles | None = None
    """The files of the folder and what becomes of them."""

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
    """All tensors of a checkpoint folder, from the files that are loaded (`weight_files.resolve`).

    Raises `FastMTPError` as `resolve`.
    """
    folder = Path(folder)
    chosen = resolve(folder)
    headers = Headers(list(chosen.files), chosen=chosen)
    damaged = {path.name for path in chosen.files if not _add(headers, path)}
    for name, file in (chosen.index or {}).items():
        if name in headers.entries:
            continue
        if file in chosen.missing or file in damaged:
            headers.absent[name] = file
        else:
            headers.stale[name] = file
    return headers


def _add(headers: Headers, path: Path) -> bool:
    """Whether the file's header could be read."""
    try:
        offset, header = read_header(path)
    except FastMTPError as error:
        headers.problems.append(str(error))
        return False
    for name, entry in header.items():
        if name in headers.entries:
            headers.problems.append(f"{path.name}: {name} is also in {headers.entries[name].file.name}; remove one")
        headers.entries[name] = Entry(path, entry["dtype"], tuple(entry["shape"]), *entry["data_offsets"])
    end = offset + max((e["data_offsets"][1] for e in header.values()), default=0)
    if path.stat().st_size != end:
        headers.problems.append(f"{path.name}: {path.stat().st_size} bytes, its header says {end}; download it again")
    return True


def vocab_size_fault(headers: Headers, config: dict[str, Any]) -> str | None:
    """What is wrong with config.json's vocab_size, by the rows of embedding and output matrix; None if nothing is, or
    neither is there. Engines and maps take it for the number of rows."""
    size = config_value(config, "vocab_size")
    for name, entry in sorted(headers.entries.items()):
        is_matrix = is_embedding(name) or name.endswith("lm_head.weight")
        if not is_matrix or TOWER.search(name) or len(entry.shape) != 2 or entry.dtype not in _PLAIN:
            continue
        if entry.shape[0] != size:
            return f"vocab_size is {size}, and {name} has {entry.shape[0]} rows; set it to that"
    return None


def read_vocab_size(folder: str | Path) -> int:
    """Tokens of a model by config.json, which must agree with the matrices where the folder holds some.

    Raises `FastMTPError` if it does not, or there is no such number.
    """
    path = Path(folder) / "config.json"
    config = read_config(folder)
    size = config_value(config, "vocab_size")
    if not isinstance(size, int) or size < 1:
        raise FastMTPError(f"{path}: vocab_size is {size!r}; it must be the rows of the output matrix")
    if any(Path(folder).glob("*.safetensors")) and (fault := vocab_size_fault(read_headers(folder), config)):
        raise FastMTPError(f"{path}: {fault}")
    return size


@dataclass(frozen=True)
class Elsewhere:
    """Tensors of the MTP layer that are in the folder, where no engine finds them."""

    names: frozenset[str]
    """Those that engines look for."""
    places: tuple[tuple[Path, str], ...]
    """Each file that holds one, and the tensor's name there."""
    text: str
    """One line: where they are, what engines do with them, and how to fix it."""


def layer_elsewhere(folder: str | Path, family: Family) -> Elsewhere | None:
    """The part of the MTP layer that lies in files which the index leaves out, or under another path.

    Another path is what a save of a wrapped model gives: `model.language_model.mtp.*` for `mtp.*`, or one without its
    `model.`. Engines compare names from their beginning (SGLang `qwen3_5_mtp.py`, `deepseek_weight_loader.py`; vLLM
    `is_unused_checkpoint_weight`), so they pass over those.
    """
    headers = read_headers(folder)
    chosen = headers.chosen
    assert chosen is not None
    names: set[str] = set()
    places: list[tuple[Path, str]] = []
    unlisted: set[str] = set()
    paths: set[tuple[str, str]] = set()
    for path in (*chosen.files, *chosen.unlisted):
        try:
            stored = entries_of(path)
        except FastMTPError:  # a file that nobody loads may be anything; the others' faults are in `problems`
            continue
        for name in stored:
            root = next((r for r in family.roots if name.startswith(f"{r}.")), None)
            here = name
            if root is None:
                other = _other_path(name, family.roots)
                if other is None:
                    continue
                root, path_here = other
                here = root + name[len(path_here) :]
                paths.add((path_here, root))
            if here in headers.entries:
                continue
            if path in chosen.unlisted:
                unlisted.add(path.name)
            names.add(here)
            places.append((path, name))
    if not names:
        return None
    parts = []
    if unlisted:
        parts.append(f"in {', '.join(sorted(unlisted))}, which {INDEX_FILE} does not list")
    if paths:
        parts += [f"named {old}.*, where engines look for {new}.*" for old, new in sorted(paths)]
    how = [*(["list the file's tensors in the index"] if unlisted else []), *(["rename them"] if paths else [])]
    text = (
        f"{len(names)} tensors of the MTP layer are {' and '.join(parts)}: SGLang and vLLM leave them out; "
        f"{' and '.join(how)} (docs/inspect.md has the lines)"
    )
    return Elsewhere(frozenset(names), tuple(places), text)


def _other_path(name: str, roots: tuple[str, ...]) -> tuple[str, str] | None:
    """The root that a name would belong to but for what stands before it, and the path that it has instead."""
    for root in roots:
        short = root.removeprefix("model.")
        match = re.match(rf"((?:\w+\.)*{re.escape(short)})\.", name)
        if match and match[1] != root and not TOWER.search(match[1]):
            return root, match[1]
    return None
