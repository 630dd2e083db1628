"""What a checkpoint folder holds, by the headers of its safetensors files alone.

No tensor is read and torch is not imported, so a checkpoint of hundreds of gigabytes takes as long as its headers:
a few megabytes. A broken folder is described too: a shard that is missing or shorter than its header says is listed,
and the rest is still there to look at.
"""

import math
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from ..errors import FastMTPError
from ..families.family import Family, config_value, is_embedding
from ..files import inputs
from ..files.kinds import is_int
from ..files.show import show
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

    chosen: WeightFiles
    """The files of the folder and what becomes of them."""
    files: list[Path] = field(default_factory=list)
    entries: dict[str, Entry] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    """Name → file of tensors that the index lists in a file that is missing or damaged, and no other file holds.

    No problem by itself: a model may need none of them (`loading.needed_tensors`).
    """
    stale: dict[str, str] = field(default_factory=dict)
    """Name → file of tensors that the index lists in a file that is sound, and no file holds."""
    problems: list[str] = field(default_factory=list)


def read_header(path: Path) -> tuple[int, dict[str, Any]]:
    """Offset of a safetensors file's first data byte, and its header without `__metadata__`.

    Each entry is one that safetensors itself would take, but for the size of the file, which `_add` compares: a name,
    a shape of whole numbers, and as many bytes as dtype and shape need, without gaps between tensors.

    Raises `FastMTPError` if the file is no safetensors file, such as the pointer that git leaves without LFS.
    """
    try:
        with inputs.open_file(path) as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= _MAX_HEADER:
                raise ValueError(f"header of {length} bytes")
            if length > os.fstat(file.fileno()).st_size - 8:
                raise ValueError(f"header of {length} bytes, which is more than the file has")
            data = file.read(length)
        header = inputs.loads(data, unique_keys=True)
        if not isinstance(header, dict):
            raise ValueError("its header is not a JSON object")
        header.pop("__metadata__", None)
        _check_entries(header)
    except (OSError, ValueError) as error:
        raise FastMTPError(f"{path}: not a readable safetensors file ({error}); download it again") from None
    return 8 + length, header


_BITS = {
    **dict.fromkeys(("F4",), 4),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 64),
}
"""Size of a value by its dtype; a dtype that is not here is of a newer safetensors, and is taken as it is."""
_MAX_NAME, _MAX_DIMENSIONS = 1000, 64


def _check_entries(header: dict[str, Any]) -> None:
    """Raises `ValueError` naming the first tensor that is impossible."""
    for name, entry in header.items():
        if len(name) > _MAX_NAME:
            raise ValueError(f"a name of {len(name)} characters")
        if not isinstance(entry, dict):
            raise ValueError(f"{name}: {show(entry)} is no entry of a tensor")
        dtype = entry.get("dtype")
        shape: Any = entry.get("shape")
        offsets: Any = entry.get("data_offsets")
        if not isinstance(dtype, str):
            raise ValueError(f"{name}: dtype {show(dtype)}")
        if not _are_sizes(shape) or len(shape) > _MAX_DIMENSIONS:
            raise ValueError(f"{name}: shape {show(shape)}")
        if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
            raise ValueError(f"{name}: data_offsets {show(offsets)}")
        size, bits = offsets[1] - offsets[0], _BITS.get(dtype)
        if bits is not None and bits * math.prod(shape) != 8 * size:
            raise ValueError(f"{name}: {dtype} of shape {show(shape)} in {size} bytes")
    end = 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        if entry["data_offsets"][0] != end:
            raise ValueError(f"{name}: begins at byte {entry['data_offsets'][0]}, the tensor before it ends at {end}")
        end = entry["data_offsets"][1]


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(is_int(n) and 0 <= n < 2**63 for n in value)


def entries_of(path: Path) -> dict[str, Entry]:
    """The tensors of one file. Raises as `read_header`."""
    return {n: Entry(path, e["dtype"], tuple(e["shape"]), *e["data_offsets"]) for n, e in read_header(path)[1].items()}


def whole_entries(path: Path) -> dict[str, Entry]:
    """The tensors of one file. Raises as `read_header`, and if the file was cut off."""
    offset, header = read_header(path)
    end = offset + max((e["data_offsets"][1] for e in header.values()), default=0)
    if path.stat().st_size != end:
        raise FastMTPError(f"{path}: {path.stat().st_size} bytes, its header says {end}; download or save it again")
    return entries_of(path)


def read_headers(folder: str | Path) -> Headers:
    """All tensors of a checkpoint folder, from the files that are loaded (`weight_files.resolve`).

    Raises `FastMTPError` as `resolve`.
    """
    folder = Path(folder)
    chosen = resolve(folder)
    headers = Headers(chosen, list(chosen.files))
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


@dataclass(frozen=True)
class Elsewhere:
    """Tensors of the MTP layer that are in the folder, where no engine finds them."""

    names: frozenset[str]
    """Those that engines look for."""
    places: tuple[tuple[Path, str], ...]
    """Each file that holds one, and the tensor's name there."""
    text: str
    """One line: where they are, what engines do with them, and how to fix it."""


def find_elsewhere(headers: Headers, family: Family) -> Elsewhere | None:
    """The part of the MTP layer that lies in files which the index leaves out, or under another path.

    Another path is what a save of a wrapped model gives: `model.language_model.mtp.*` for `mtp.*`, or one without its
    `model.`. Engines compare names from their beginning (SGLang `qwen3_5_mtp.py`, `deepseek_weight_loader.py`; vLLM
    `is_unused_checkpoint_weight`), so they pass over those.
    """
    chosen = headers.chosen
    names: set[str] = set()
    places: list[tuple[Path, str]] = []
    unlisted: set[str] = set()
    paths: set[tuple[str, str]] = set()
    # Every tensor of every file, by the name that engines would know it by.
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
    # Where they are, and what to do about each.
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


def open_safetensors(path: Path) -> Any:
    """A file of safetensors' own reader. Raises `FastMTPError` if it is none."""
    inputs.check_file(path)  # of a pipe, safetensors would wait for the end
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise FastMTPError(f"{path}: not a readable safetensors file ({error}); download it again") from None
