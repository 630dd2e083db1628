"""The frozen backbone's hidden states on disk, so that later epochs need no backbone.

The backbone never changes during training, so its last hidden states of a document are the same in every epoch. The
first epoch writes them here as it computes them; later ones read them back through a memory map, in the backbone's own
dtype, bit for bit. A document is found by a hash of its token ids, which covers data, template and tokenizer; the
folder belongs to one backbone, config and way to compute (`states_depend_on`), or is refused.

    cache.json          what the folder belongs to
    states-R.bin        hidden states of rank R, appended
    index-R.bin         one record per document, appended after its states: a killed run loses at most one document

Ranks read each other's files and write their own. A run is a reader until it has a document to add; so any number of
runs read a cache that is complete for them, and one writes.
"""

import fcntl
import hashlib
import json
import os
import time
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from ..errors import FastMTPError, cannot_write
from ..files.inputs import check_folder, open_file
from ..files.known_files import read_object
from ..files.staging import lock_file, write_json
from .compat_transformers import attention_of

_RECORD = np.dtype([("digest", "S16"), ("start", "<u8"), ("rows", "<u8")])
_INFO = "cache.json"
_SCHEMA = "swift_fastmtp.hidden_cache/2"
_TRIES = 10
"""To become the writer, a tenth of a second apart: a run that starts looks for one, and holds the lock for a moment."""
_WRITTEN = "another run is writing this cache; wait for it, or name another folder"
# Keys of a config that do not change the backbone's states: names and versions, token ids, what generation, heads and
# losses read. `dtype` is the cache's own. Everything else does, or may.
_NO_STATES = {
    "_name_or_path",
    "architectures",
    "auto_map",
    "transformers_version",
    "torch_dtype",
    "dtype",
    "use_cache",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "sep_token_id",
    "decoder_start_token_id",
    "tie_word_embeddings",
    "num_nextn_predict_layers",
    "mtp_num_hidden_layers",
    "mtp_use_dedicated_embeddings",
    "num_mtp_layers",
    "mtp_loss_scaling_factor",
    "id2label",
    "label2id",
    "problem_type",
    "finetuning_task",
    "output_attentions",
    "output_hidden_states",
    "return_dict",
    "output_router_logits",
    "router_aux_loss_coef",
    "aux_loss_alpha",
    "initializer_range",
    "is_decoder",
    "is_encoder_decoder",
    "fastmtp_token_maps",
    "keys_to_ignore_at_inference",
}


def states_depend_on(model: Any, fingerprint: str, autocast: torch.dtype | None, quantization: Any) -> dict[str, Any]:
    """Everything but the token ids that the backbone's hidden states depend on, as JSON; the cache's `key`.

    Args:
        model: a transformers model; its config says RoPE, norms, masks, experts and the like in one form, however
            config.json writes them.
        fingerprint: of the backbone's weights (`fingerprint.fingerprint`).
        autocast: what matrix products are computed in; None: in the weights' own dtype.
        quantization: config.json's `quantization_config`, by which FP8 blocks become numbers.

    The backbone is frozen; where an adapter is merged into it, the model says which (`backbone_lora.merge_lora`).
    """
    config = {k: v for k, v in model.config.to_dict().items() if k not in _NO_STATES and k != "quantization_config"}
    key = {
        "backbone": fingerprint,
        "attention": attention_of(model.config),
        "autocast": None if autocast is None else str(autocast),
        "quantization_config": quantization,
        "config": config,
    }
    if model.head.graph.hidden_before_norm:
        key["states"] = "before the final norm"
    if getattr(model, "backbone_lora", None):
        key["backbone_lora"] = model.backbone_lora
    plain: dict[str, Any] = json.loads(json.dumps(key, default=str))
    return plain


class EngineStates(NamedTuple):
    """Where states came from that an engine computed."""

    engine: str
    version: str
    dtype: str
    """Of the engine's model, as torch calls it; states are kept in it."""
    quantization: str | None
    width: int
    before_norm: bool = False
    """They are the last layer's, to which the final norm is yet to be applied."""
    backbone_lora: str | None = None
    """Identity of the LoRA adapter that the model was served with (`backbone_lora.lora_hash`)."""

    def __str__(self) -> str:
        quantized = f", {self.quantization}" if self.quantization else ""
        side = ", before the final norm" if self.before_norm else ""
        adapter = ", with a LoRA adapter" if self.backbone_lora else ""
        return f"{self.engine} {self.version}, {self.dtype}{quantized}{side}{adapter}"


def engine_states(folder: str | Path) -> EngineStates | None:
    """Where the states of a cache came from; None where a run of ours computed them, and for a folder that is none."""
    stored = read_object(Path(folder) / _INFO).get("engine")
    if not isinstance(stored, dict):
        return None
    values: dict[str, Any] = {name: stored.get(name) for name in EngineStates._fields}
    values["before_norm"] = bool(values["before_norm"])
    return EngineStates(**values)


class HiddenCache:
    """Hidden states of documents, by content.

    Args:
        folder: made if it does not exist.
        key: what the states depend on besides the tokens; another key in the folder is an error.
        width: D.
        dtype: of the states.
        max_bytes: for all files of the folder; documents beyond that are computed every time.
        rank: of this process, which writes `states-<rank>.bin`.
        named_by: what the user names the folder with, for messages.

    Raises `FastMTPError` if the folder belongs to another model or another run is writing it; so does `put`, if another
    has become the writer since.
    """

    def __init__(
        self,
        folder: str | Path,
        key: dict[str, Any],
        width: int,
        dtype: torch.dtype,
        max_bytes: int,
        rank: int = 0,
        named_by: str = "fastmtp_hidden_cache",
    ) -> None:
        self.folder, self.width, self.dtype, self.max_bytes = Path(folder), width, dtype, max_bytes
        self._named_by = named_by
        self._open_folder({"schema": _SCHEMA, **key, "width": width, "dtype": str(dtype)})
        self.row_bytes = width * torch.empty((), dtype=dtype).element_size()
        self._maps: dict[Path, np.memmap[Any, Any]] = {}
        self._places: dict[bytes, tuple[Path, int, int]] = {}
        self._read: dict[Path, int] = {}
        self._rank = rank
        self._own: tuple[Any, Any] | None = None
        self._check_no_writer()
        self._refresh()
        self.full = False
        self.origin: EngineStates | None = None
        """Where they came from; None: from the run's own backbone."""

    @classmethod
    def from_engine(cls, folder: str | Path, fingerprint: str, states: EngineStates, max_bytes: int) -> "HiddenCache":
        """A cache of states that an engine computed for the backbone with that fingerprint.

        They are the same whatever a run's autocast is. Raises as `HiddenCache`.
        """
        origin = states._asdict()
        for name in ("before_norm", "backbone_lora"):
            if not origin[name]:
                del origin[name]  # folders of earlier versions do not have it
        key = {"backbone": fingerprint, "engine": origin}
        dtype = getattr(torch, states.dtype)
        cache = cls(folder, key, states.width, dtype, max_bytes, named_by="--hidden_cache")
        cache.origin = states
        return cache

    def _open_folder(self, info: dict[str, Any]) -> None:
        path = self.folder / _INFO
        check_folder(self.folder)
        if not os.path.lexists(path):
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                self._write_info(info, path)
            except OSError as error:
                raise FastMTPError(f"{self.folder}: cannot hold a hidden-state cache ({error})") from None
        stored = read_object(path)
        if stored.get("schema") != _SCHEMA:
            raise FastMTPError(
                f"{self.folder}: its hidden states are of another version of this package ({stored.get('schema')}), "
                f"which may depend on other settings; name another folder as {self._named_by}, or delete this one"
            )
        before, now = _flat(stored), _flat(info)
        for name in sorted(before.keys() | now.keys()):
            if before.get(name) != now.get(name):
                raise FastMTPError(
                    f"{self.folder}: holds hidden states of another model ({name} is {before.get(name)!r}, this run "
                    f"has {now.get(name)!r}); name another folder as {self._named_by}, or delete this one"
                )

    def _write_info(self, info: dict[str, Any], path: Path) -> None:
        """Of several runs that start at once, the first says whose the folder is, and the others compare with that."""
        folder = os.open(self.folder, os.O_RDONLY)
        try:
            with suppress(OSError):  # file systems without locks
                fcntl.flock(folder, fcntl.LOCK_EX)
            if not os.path.lexists(path):
                write_json(info, path)
        finally:
            os.close(folder)

    def _check_no_writer(self) -> None:
        """Raises `FastMTPError` if another run is writing. What this one needs may be among what is not there yet, and
        it should hear that now, not after hours."""
        path = self.folder / f"states-{self._rank}.bin"
        if path.exists():
            with open_file(path) as states:
                if not lock_file(states.fileno(), without_locks=True, shared=True):
                    raise FastMTPError(f"{self.folder}: {_WRITTEN}")

    def _open_own(self) -> tuple[Any, Any]:
        """Files of this rank, to write; cut to the last whole document."""
        try:
            states = open(self.folder / f"states-{self._rank}.bin", "ab")  # noqa: SIM115
            index = open(self.folder / f"index-{self._rank}.bin", "ab")  # noqa: SIM115
        except OSError as error:
            raise cannot_write(self.folder, error) from None
        for _ in range(_TRIES):
            if lock_file(states.fileno()):
                break
            time.sleep(0.1)
        else:
            raise FastMTPError(f"{self.folder}: {_WRITTEN}")
        index.truncate(index.tell() // _RECORD.itemsize * _RECORD.itemsize)
        index.seek(0, os.SEEK_END)
        records = np.fromfile(index.name, _RECORD)
        # A record whose states did not reach the disk (a power cut, not a kill) ends the file before it.
        whole = _whole(records, states.tell() // self.row_bytes)
        index.truncate(whole * _RECORD.itemsize)
        index.seek(0, os.SEEK_END)
        states.truncate(int((records["start"] + records["rows"])[:whole].max(initial=0)) * self.row_bytes)
        states.seek(0, os.SEEK_END)
        return states, index

    def _refresh(self) -> bool:
        """Read what any rank has added since the last look. Returns whether there was something."""
        new = False
        for path in sorted(self.folder.glob("index-*.bin")):
            states = path.with_name(path.name.replace("index", "states"))
            if not (path.is_file() and states.is_file()):
                continue
            seen, size = self._read.get(path, 0), path.stat().st_size // _RECORD.itemsize
            if size <= seen:
                continue
            records = np.fromfile(path, _RECORD, count=size - seen, offset=seen * _RECORD.itemsize)
            # States are written before their record: one whose states are not there is damaged. It and those behind it
            # are what the next writer cuts off and writes over.
            whole = _whole(records, states.stat().st_size // self.row_bytes)
            for record in records[:whole]:
                # numpy drops trailing zero bytes of fixed-width strings
                digest = bytes(record["digest"]).ljust(16, b"\0")
                self._places[digest] = (states, int(record["start"]), int(record["rows"]))
            self._read[path] = seen + whole
            new |= whole > 0
        return new

    @property
    def num_bytes(self) -> int:
        """Size of the states of all ranks."""
        return sum(path.stat().st_size for path in self.folder.glob("states-*.bin"))

    def has(self, ids: torch.Tensor) -> bool:
        """Whether the states of a document (token ids [T]) are here."""
        return self._digest(ids) in self._places

    def get(self, documents: list[torch.Tensor]) -> list[torch.Tensor] | None:
        """States [T, D] of every document (token ids [T]), on the CPU, or None if any is missing."""
        digests = [self._digest(ids) for ids in documents]
        if any(d not in self._places for d in digests) and (
            not self._refresh() or any(d not in self._places for d in digests)
        ):
            return None
        return [self._load(*self._places[d]) for d in digests]

    def _load(self, path: Path, start: int, rows: int) -> torch.Tensor:
        data = self._maps.get(path)
        first, last = start * self.row_bytes, (start + rows) * self.row_bytes
        if data is None or last > len(data):
            data = self._maps[path] = np.memmap(path, np.uint8, mode="r")
        return torch.from_numpy(np.array(data[first:last])).view(self.dtype).view(rows, self.width)

    def _digest(self, ids: torch.Tensor) -> bytes:
        """Of a document's token ids, and of what autocast computes with at the moment: a run's evaluation may differ.

        An engine's states have nothing to do with that.
        """
        device = ids.device.type
        in_autocast = self.origin is None and torch.is_autocast_enabled(device)
        autocast = str(torch.get_autocast_dtype(device)) if in_autocast else ""
        data = ids.cpu().numpy().astype("<i8").tobytes() + autocast.encode()
        return hashlib.blake2b(data, digest_size=16).digest()

    def put(self, documents: list[torch.Tensor], states: list[torch.Tensor]) -> None:
        """Append documents (token ids [T]) with their states [T, D], but none that is here or exceeds the limit.

        Raises `FastMTPError` if another run is writing, or the disk does not take them.
        """
        if self.full:
            return
        for ids, rows in zip(documents, states, strict=True):
            digest = self._digest(ids)
            if digest in self._places:
                continue
            if self.num_bytes + len(rows) * self.row_bytes > self.max_bytes:
                self.full = True
                if self.origin is None:  # else whoever fills it says so
                    warnings.warn(f"{self.folder}: full; further documents are computed in every epoch", stacklevel=2)
                return
            if self._own is None:
                self._own = self._open_own()
            own_states, own_index = self._own
            data = rows.detach().to("cpu", self.dtype).contiguous().view(torch.uint8).numpy()
            start = own_states.tell() // self.row_bytes
            try:
                own_states.write(data.data)
                own_states.flush()
                own_index.write(np.array([(digest, start, len(rows))], _RECORD).tobytes())
                own_index.flush()
            except OSError as error:
                raise cannot_write(self.folder, error) from None


def documents_of(segment_ids_BT: torch.Tensor) -> list[tuple[int, int, int]]:
    """(batch row, start, end) of every document of a batch; padding is none."""
    spans = []
    for b, segments in enumerate(segment_ids_BT.cpu()):
        ids, counts = torch.unique_consecutive(segments, return_counts=True)
        start = 0
        for segment, count in zip(ids.tolist(), counts.tolist(), strict=True):
            if segment >= 0:
                spans.append((b, start, start + count))
            start += count
    return spans


def _whole(records: "np.ndarray[Any, Any]", rows_on_disk: int) -> int:
    """How many records, from the first, have their states in a file of so many rows."""
    return int(_are_in(records, rows_on_disk).cumprod().sum())


def _are_in(records: "np.ndarray[Any, Any]", rows_on_disk: int) -> "np.ndarray[Any, Any]":
    """Whether the states of each record are in a file of so many rows; a damaged record may hold any numbers."""
    starts, rows = records["start"], records["rows"]
    most = np.uint64(rows_on_disk)
    return (starts <= most) & (rows <= most - np.minimum(starts, most))


def _flat(value: dict[str, Any], above: str = "") -> dict[str, Any]:
    """Objects in objects as one, with dotted names."""
    flat: dict[str, Any] = {}
    for name, inner in value.items():
        if isinstance(inner, dict) and inner:
            flat |= _flat(inner, f"{above}{name}.")
        else:
            flat[f"{above}{name}"] = inner
    return flat
