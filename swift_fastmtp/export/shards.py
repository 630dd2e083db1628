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

from ..checkpoints import is_finite
from ..errors import FastMTPError
from ..headers import read_header

_BLOCK = 2**24  # bytes copied at a time
DTYPES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}


def write_tensors(
    path: Path,
    shapes: dict[str, tuple[int, ...]],
    dtypes: dict[str, torch.dtype],
    read: Callable[[str], torch.Tensor],
) -> dict[str, str]:
    """Write a file tensor by tensor, each read, checked and forgotten. Returns the SHA-256 of each one's bytes.

    Args:
        shapes: name → shape, in the order they are written.
        dtypes: name → what it is cast to.
        read: name → tensor.

    Raises `FastMTPError` if a tensor has another shape, or does not fit into its dtype.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in shapes.items():
        end = offset + torch.Size(shape).numel() * dtypes[name].itemsize
        header[name] = {"dtype": DTYPES[dtypes[name]], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    hashes = {}
    with open(path, "wb") as file:
        file.write(pack_header(header))
        for name, shape in shapes.items():
            tensor = read(name).to(dtypes[name])
            if tuple(tensor.shape) != shape:
                raise FastMTPError(f"{name} has shape {list(tensor.shape)}, {list(shape)} was expected")
            if not is_finite(tensor):
                raise FastMTPError(
                    f"{name} does not fit into {str(tensor.dtype).removeprefix('torch.')}: it becomes infinite"
                )
            data = tensor.contiguous().view(-1).view(torch.uint8).numpy()
            hashes[name] = hashlib.sha256(data.data).hexdigest()
            file.write(data.data)
            del tensor, data  # before the next one is read
    return hashes


def tensor_hashes(path: Path) -> dict[str, str]:
    """The SHA-256 of the bytes of every tensor of a file."""
    offset, header = read_header(path)
    found = {}
    with open(path, "rb") as file:
        for name, entry in header.items():
            start, end = entry["data_offsets"]
            digest = hashlib.sha256()
            file.seek(offset + start)
            for block in _blocks(file, end - start):
                digest.update(block)
            found[name] = digest.hexdigest()
    return found


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
