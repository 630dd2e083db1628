"""Checkpoint folders as files: tensors by name, without building or loading a model.

Which files are read is `weight_files.resolve`'s to say. All weights are read with safetensors; nothing here unpickles.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from . import fp8, inputs
from .errors import FastMTPError, cannot_write
from .families import Family, config_value, is_embedding, read_config
from .finite import is_finite
from .headers import Entry, entries_of, layer_elsewhere, read_header
from .staging import lock_file, refuse_existing, staged
from .weight_files import resolve

SETTINGS_FILE = "fastmtp.json"
WEIGHTS_FILE = "model.safetensors"
_DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64", "F8_E4M3": "float8_e4m3fn",
           "F8_E5M2": "float8_e5m2", "I8": "int8", "U8": "uint8", "I32": "int32", "I64": "int64"}  # fmt: skip


class Weights:
    """The tensors of a checkpoint folder. Raises `FastMTPError` for missing, unreadable or duplicated ones."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.chosen = resolve(self.folder)
        self.files = list(self.chosen.files)
        self.file_of: dict[str, Path] = {}
        for path in self.files:
            for name in _open(path).keys():  # noqa: SIM118 (safe_open is not a dict)
                if name in self.file_of:
                    raise FastMTPError(f"{path}: {name} is also in {self.file_of[name].name}; remove the stale one")
                self.file_of[name] = path
        self.lost = {n: file for n, file in (self.chosen.index or {}).items() if n not in self.file_of}
        """Name → file of tensors that the index lists and no file holds; what is needed says who needs it."""

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(_open(self.file_of[name]).get_slice(name).get_shape())

    def entries(self) -> dict[str, Entry]:
        """What every tensor is and where it lies, by the files' headers."""
        return {name: entry for path in self.files for name, entry in entries_of(path).items()}

    def dtypes(self) -> dict[str, str]:
        """Type of every tensor, as torch calls it; as safetensors does where torch has none."""
        return {name: _DTYPES.get(entry.dtype, entry.dtype) for name, entry in self.entries().items()}

    def sizes(self) -> dict[str, int]:
        """Bytes of every tensor, by the files' headers."""
        return {name: entry.size for name, entry in self.entries().items()}

    def read(self, name: str) -> torch.Tensor:
        tensor: torch.Tensor = _open(self.file_of[name]).get_tensor(name)
        return tensor

    def has_backbone(self, config: dict[str, Any]) -> bool:
        """Whether the model is here too, not only its MTP layer: what tells is the output matrix, which may be tied.

        By the index too, so that a download that lacks a shard is not taken for a draft.
        """
        tied = bool(config_value(config, "tie_word_embeddings"))
        names = (*self.file_of, *self.lost)
        return any(n == "lm_head.weight" or (tied and is_embedding(n)) for n in names)

    def under(self, *paths: str) -> list[str]:
        """Names below module paths, sorted."""
        return sorted(n for n in self.file_of if n.startswith(tuple(f"{path}." for path in paths)))


def _open(path: Path) -> Any:
    inputs.check_file(path)  # of a pipe, safetensors would wait for the end
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise FastMTPError(f"{path}: not a readable safetensors file ({error}); download it again") from None


def read_head(folder: str | Path, family: Family, expected: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """The head's tensors of a checkpoint, each accounted for by name, shape and finiteness.

    Args and errors as `head_reader`.
    """
    read = head_reader(folder, family, expected)
    return {name: read(name) for name in expected}


def check_head(folder: str | Path, family: Family, expected: dict[str, tuple[int, ...]]) -> None:
    """Raises as `read_head`, without keeping more than one tensor."""
    read = head_reader(folder, family, expected)
    for name in expected:
        read(name)


def head_reader(
    folder: str | Path, family: Family, expected: dict[str, tuple[int, ...]]
) -> Callable[[str], torch.Tensor]:
    """A function that reads one of the head's tensors; for heads that should not be in memory as a whole.

    Args:
        folder: a full or a head-only checkpoint.
        family: its row.
        expected: name → shape of every tensor the head must have (`modeling.head_shapes`).

    FP8 in blocks is read as the float32 values that it stands for. Raises `FastMTPError` naming the first tensor that
    is missing or unknown; the function, if the one it reads is misshapen, quantised otherwise or not finite.
    """
    weights = Weights(folder)
    found = sorted(n for n in weights.file_of if family.owns(n) and not family.is_copy(n))
    missing = [n for n in expected if n not in weights.file_of]
    elsewhere = layer_elsewhere(folder, family) if missing else None
    if elsewhere and (not found or set(missing) <= elsewhere.names):
        raise FastMTPError(f"{folder}: {elsewhere.text}")
    if not found and not any(n in weights.lost for n in missing):
        raise FastMTPError(
            f"{folder}: no tensor under '{family.root}.'; this checkpoint lost its MTP layer (saving through plain "
            "transformers drops it): `fastmtp graft` takes the tensors from the original model"
        )
    projection = f"{family.prefix}.{family.proj}.weight"
    if projection in weights.file_of and weights.shape(projection)[:1] != expected[projection][:1]:
        raise FastMTPError(
            f"{folder}: the MTP layer has hidden size {weights.shape(projection)[0]}, the model "
            f"{expected[projection][0]}; it belongs to another model"
        )
    for name in missing:
        file, listed = weights.lost.get(name), ""
        if file:
            state = weights.chosen.missing.get(file)
            listed = f" (the index has it in {file}, which {f'is {state}' if state else 'lacks it'})"
        raise FastMTPError(f"{folder}: MTP tensor {name} is missing{listed}; download or export the checkpoint again")
    for name in found:
        if name.removesuffix(fp8.SCALE) not in expected:
            why = "engines would load it over another one"
            if family.is_other_layer(name):
                why = "it is of a second MTP layer, and FastMTP shares one between all steps: keep one"
            raise FastMTPError(f"{folder}: unexpected MTP tensor {name}; {why}")

    def read(name: str) -> torch.Tensor:
        if weights.shape(name) != expected[name]:
            raise FastMTPError(
                f"{folder}: {name} has shape {list(weights.shape(name))}, config.json says {list(expected[name])}"
            )
        tensor = read_plain(weights, name)
        if not is_finite(tensor):
            raise FastMTPError(f"{folder}: {name} holds NaN or infinite values; the checkpoint is broken")
        return tensor

    return read


def read_plain(weights: Weights, name: str) -> torch.Tensor:
    """A tensor as numbers: FP8 in blocks becomes float32, everything else is as stored.

    Raises `FastMTPError` for other quantised forms.
    """
    tensor, scaled = weights.read(name), name + fp8.SCALE in weights.file_of
    if tensor.dtype == fp8.DTYPE and scaled:
        blocks = fp8.read_blocks(read_config(weights.folder), weights.folder / "config.json")
        if blocks is None:
            raise FastMTPError(f"{weights.folder}: {name} is FP8 in blocks, of which config.json says nothing")
        try:
            return fp8.dequantise(tensor, weights.read(name + fp8.SCALE), blocks)
        except FastMTPError as error:
            raise FastMTPError(f"{weights.folder}: {name}: {error}") from None
    if not tensor.is_floating_point() or tensor.element_size() < 2 or scaled:
        what = f"{tensor.dtype} {'beside' if scaled else 'without'} {name + fp8.SCALE}"
        raise FastMTPError(
            f"{weights.folder}: {name} is stored as {what}; a quantised MTP layer cannot be trained, unless it is FP8 "
            "in blocks: start from the unquantised checkpoint"
        )
    return tensor


_FINGERPRINT = "v2:"
WHOLE_BELOW = 32 * 10**9
"""Bytes of a backbone up to which every byte counts."""
_SPACING, _BLOCK, _SMALL = 2**22, 2**12, 2**16
"""Above that: bytes between two samples of a matrix, bytes of a sample, bytes of a tensor that is read whole."""
_PIECE = 2**20


def fingerprint(folder: str | Path, family: Family) -> str:
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
    weights = Weights(folder)
    names = sorted(n for n in weights.file_of if not family.owns(n))
    entries = weights.entries()
    starts = {path: read_header(path)[0] for path in weights.files}
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


def has_fingerprint(folder: str | Path, family: Family, recorded: str) -> bool:
    """Whether a backbone is the one of a fingerprint in a `fastmtp.json`, new or of before there was `v2:`."""
    if str(recorded).startswith(_FINGERPRINT):
        return fingerprint(folder, family) == recorded
    return _first_rows(folder, family) == recorded


def check_backbone(checkpoint: str | Path, model_dir: str | Path, family: Family) -> None:
    """Raises `FastMTPError` if a checkpoint says that its head was trained for another backbone than a model's.

    One without `fastmtp.json` (tuner types `full` and `lora`) does not say.
    """
    recorded = inputs.read_object(Path(checkpoint) / SETTINGS_FILE).get("base_fingerprint")
    if recorded and not has_fingerprint(model_dir, family, recorded):
        raise FastMTPError(
            f"{checkpoint}: this head was trained for another backbone than {model_dir}; pass the right one"
        )


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


def _first_rows(folder: str | Path, family: Family) -> str:
    """The fingerprint before `v2:`: of every matrix only the first row counted."""
    weights = Weights(folder)
    digest = hashlib.sha256()
    opened: dict[Path, Any] = {}  # opening parses the header: once per file, not once per tensor
    for name in sorted(n for n in weights.file_of if not family.owns(n)):
        path = weights.file_of[name]
        if path not in opened:
            opened[path] = _open(path)
        view = opened[path].get_slice(name)
        shape = view.get_shape()
        digest.update(f"{name} {view.get_dtype()} {shape}\n".encode())
        row = view[:1] if len(shape) > 1 else view[:]
        digest.update(row.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def file_hash(path: str | Path) -> str:
    """SHA-256 of a file's bytes, for manifests."""
    digest = hashlib.sha256()
    try:
        with inputs.open_file(path) as file:
            while block := file.read(2**20):
                digest.update(block)
        return digest.hexdigest()
    except OSError as error:
        raise inputs.cannot_read(path, error) from None


def save_tensors(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Write a safetensors file that appears whole or not at all. Raises `FastMTPError` if it cannot be written."""
    with staged(path) as file:
        try:
            save_file({n: t.detach().cpu().contiguous() for n, t in tensors.items()}, file, metadata={"format": "pt"})
        except SafetensorError as error:
            raise cannot_write(path, error) from None
        file.chmod(0o644)  # safetensors writes 0600


def write_json(value: Any, path: Path) -> None:
    """Write JSON that appears whole or not at all. Raises `FastMTPError` if it cannot be written."""
    with staged(path) as file:
        file.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


@contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """A folder that appears, complete, when the `with` ends well; an error leaves nothing behind.

    Raises `FastMTPError` if `path` exists or cannot be written.
    """
    path = Path(path)
    refuse_existing(path)
    with staged(path) as folder:
        folder.mkdir()
        yield folder


def claim(file: Any, message: str) -> None:
    """Keep an open file to this process until it is closed. Raises `FastMTPError` with `message` if another has it."""
    if not lock_file(file.fileno()):
        raise FastMTPError(message)


def link_or_copy(source: Path, target: Path) -> None:
    """Put a file into a new folder: a hard link for `*.safetensors` where the file system allows it, else a copy.

    Weights are large, and nothing edits them in place. Everything else is small, and people do edit it: through a link
    they would edit the model that it came from.
    """
    source = Path(os.path.realpath(source))  # hub caches are folders of symbolic links
    if target.suffix == ".safetensors":
        try:
            os.link(source, target)
            return
        except OSError:  # another file system, or one without links
            pass
    shutil.copyfile(source, target)
