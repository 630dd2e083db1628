"""safetensors files written without holding them: one tensor, or a few megabytes, in memory at a time.

Format: eight bytes with the header's length (little endian), the header (JSON: name → dtype, shape, offsets counted
from its end), then the tensors' bytes without gaps (https://huggingface.co/docs/safetensors).
"""

import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, BinaryIO

import torch

from ..errors import FastMTPError
from . import fp8
from .finite import is_finite
from .headers import Entry, read_header

_BLOCK = 2**24  # bytes copied at a time
DTYPES = {
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float32: "F32",
    torch.float64: "F64",
    fp8.DTYPE: "F8_E4M3",
}
TORCH = {name: dtype for dtype, name in DTYPES.items()}


def write_tensors(
    path: Path, specs: dict[str, tuple[torch.dtype, tuple[int, ...]]], read: Callable[[str], torch.Tensor]
) -> dict[str, str]:
    """Write a file tensor by tensor, each read, checked and forgotten. Returns the SHA-256 of each one's bytes.

    Args:
        specs: name → dtype that it is cast to, and shape; in the order they are written.
        read: name → tensor.

    Raises `FastMTPError` if a tensor has another shape, or does not fit into its dtype.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, (dtype, shape) in specs.items():
        end = offset + torch.Size(shape).numel() * dtype.itemsize
        header[name] = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    hashes = {}
    with open(path, "wb") as file:
        file.write(pack_header(header))
        for name, (dtype, shape) in specs.items():
            hashes[name] = _put(file, name, read(name), dtype, shape)
    return hashes


def overwrite_tensors(path: Path, names: Iterable[str], read: Callable[[str], torch.Tensor]) -> dict[str, str]:
    """Replace tensors of a file in place; dtypes and shapes stay, so do the header and all offsets.

    Arguments, result and errors as `write_tensors`.
    """
    offset, header = read_header(path)
    hashes = {}
    with open(path, "r+b") as file:
        for name in names:
            file.seek(offset + header[name]["data_offsets"][0])
            hashes[name] = _put(file, name, read(name), TORCH[header[name]["dtype"]], tuple(header[name]["shape"]))
    return hashes


def _put(file: BinaryIO, name: str, tensor: torch.Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> str:
    tensor = tensor.to(dtype)
    if tuple(tensor.shape) != shape:
        raise FastMTPError(f"{name} has shape {list(tensor.shape)}, {list(shape)} was expected")
    if dtype != fp8.DTYPE and not is_finite(tensor):
        raise FastMTPError(f"{name} does not fit into {str(dtype).removeprefix('torch.')}: it becomes infinite")
    data = tensor.contiguous().view(-1).view(torch.uint8).numpy()
    file.write(data.data)
    return hashlib.sha256(data.data).hexdigest()


def tensor_hashes(path: Path, names: Iterable[str] | None = None) -> dict[str, str]:
    """The SHA-256 of the bytes of tensors of a file; default: of all."""
    offset, header = read_header(path)
    digests = {}
    with open(path, "rb") as file:
        for name in header if names is None else names:
            start, end = header[name]["data_offsets"]
            digest = hashlib.sha256()
            file.seek(offset + start)
            for block in _blocks(file, end - start):
                digest.update(block)
            digests[name] = digest.hexdigest()
    return digests


def copy_without(source: Path, target: Path, names: set[str]) -> None:
    """Copy a file without some of its tensors; the bytes of the others stay, in their order."""
    offset, header = read_header(source)
    kept = sorted((n for n in header if n not in names), key=lambda n: header[n]["data_offsets"])
    packed: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name in kept:
        start, end = header[name]["data_offsets"]
        packed[name] = {**header[name], "data_offsets": [position, position + end - start]}
        position += end - start
    with open(source, "rb") as old, open(target, "wb") as new:
        new.write(pack_header(packed))
        for name in kept:
            start, end = header[name]["data_offsets"]
            old.seek(offset + start)
            for block in _blocks(old, end - start):
                new.write(block)


def copy_tensors(entries: dict[str, Entry], target: Path) -> dict[str, str]:
    """Write a file of tensors of other files, byte for byte, whatever their dtype. Returns the SHA-256 of each one.

    Args:
        entries: name → where it is stored; in the order they are written.
        target: the file to write.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, entry in entries.items():
        end = position + entry.size
        header[name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [position, end]}
        position = end
    begins = {file: read_header(file)[0] for file in {entry.file for entry in entries.values()}}
    hashes = {}
    with open(target, "wb") as new:
        new.write(pack_header(header))
        for name, entry in entries.items():
            digest = hashlib.sha256()
            with open(entry.file, "rb") as old:
                old.seek(begins[entry.file] + entry.start)
                for block in _blocks(old, entry.size):
                    new.write(block)
                    digest.update(block)
            hashes[name] = digest.hexdigest()
    return hashes


def pack_header(header: dict[str, Any]) -> bytes:
    """The bytes of a file before its data: length and header, padded so that the data starts at a multiple of 8."""
    data = json.dumps(header, separators=(",", ":")).encode()
    data += b" " * (-len(data) % 8)
    return len(data).to_bytes(8, "little") + data


def _blocks(file: BinaryIO, count: int) -> Iterable[bytes]:
    while count:
        block = file.read(min(count, _BLOCK))
        if not block:
            raise FastMTPError(f"{file.name}: ends too early; download it again")
        count -= len(block)
        yield block
