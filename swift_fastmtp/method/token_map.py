"""Token maps: the ids that a draft may choose from (SGLang's `--speculative-token-map`), alone or by language."""

import os
import zipfile
from functools import cached_property
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from ..errors import FastMTPError
from ..files import inputs


def read_token_map(path: str | Path, vocab_size: int) -> torch.Tensor:
    """A token map in SGLang's format: `torch.save` of a list of ids, or of a tensor.

    Returns int64 ids [M]. Raises `FastMTPError` if it is something else, empty, or does not fit `vocab_size` rows. What
    the file takes to read is bounded by `vocab_size`, whatever it claims to hold.
    """
    if not isinstance(vocab_size, int) or vocab_size < 1:
        raise FastMTPError(f"{path}: cannot be compared with the model, whose config.json has vocab_size {vocab_size}")
    _check_archive(Path(path), vocab_size)
    try:
        stored = torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError:
        # torch's own text advises to load it all the same, which would run what is in it.
        raise FastMTPError(
            f"{path}: holds more than tensors and lists, which could be code; it was not loaded; {_HOW_TO_MAKE}"
        ) from None
    except Exception as error:  # noqa: BLE001 (whatever torch's reader stumbles over in a broken file)
        raise _no_map(path, f"{type(error).__name__}: {error}") from None
    ids = _flat_ids(stored, vocab_size)
    if ids is None:
        raise FastMTPError(f"{path}: not a token map, a flat list of at most {vocab_size} token ids; {_HOW_TO_MAKE}")
    if int(ids.min()) < 0 or int(ids.max()) >= vocab_size:
        outside = int(ids.min()) if int(ids.min()) < 0 else int(ids.max())
        raise FastMTPError(f"{path}: holds id {outside}, the model has rows 0..{vocab_size - 1}")
    if len(ids.unique()) != len(ids):
        raise FastMTPError(f"{path}: holds an id twice; make the ids unique")
    return ids


_HOW_TO_MAKE = "`fastmtp vocab` makes maps, as NAME-SIZE.pt"
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def _no_map(path: str | Path, what: str) -> FastMTPError:
    what = " ".join(what.split())[:200]
    return FastMTPError(f"{path}: not a token map, a torch file with a list of token ids ({what}); {_HOW_TO_MAKE}")


def _check_archive(path: Path, vocab_size: int) -> None:
    """Raises `FastMTPError` for what is no zip archive, which is what `torch.save` writes, or one that holds more than
    so many ids can need, unpacked."""
    most = 16 * vocab_size + 2**20
    try:
        with inputs.open_file(path) as file:
            begin = file.read(64).lstrip()
            if begin.startswith(b"["):
                raise FastMTPError(_of_json(path))
            if not begin.startswith(b"PK"):
                is_pickle = begin.startswith(b"\x80")
                raise _no_map(path, "a pickle, as torch wrote before 1.6" if is_pickle else "no torch file")
            with zipfile.ZipFile(file) as archive:
                size = sum(entry.file_size for entry in archive.infolist())
    except FileNotFoundError as error:
        raise inputs.cannot_read(path, error) from None
    except (OSError, ValueError, zipfile.BadZipFile, NotImplementedError) as error:
        if isinstance(error, FastMTPError):
            raise
        raise _no_map(path, str(error)) from None
    if size > most:
        raise FastMTPError(
            f"{path}: unpacks to {size} bytes, more than {vocab_size} ids need; it is not a map for this model"
        )


def _of_json(path: Path) -> str:
    """What to say of a JSON list of ids, which SGLang does not read."""
    ours = path.with_suffix(".pt")
    if os.path.isfile(ours):
        return f"{path}: is a JSON list, which SGLang does not read; pass {ours}, which holds the same ids"
    convert = f"torch.save(json.load(open({path.name!r})), {ours.name!r})"
    command = f'python -c "import json, torch; {convert}"'
    return f"{path}: is a JSON list, which SGLang does not read; convert it in its folder: {command}"


def _flat_ids(stored: Any, vocab_size: int) -> torch.Tensor | None:
    """The ids of a list or a tensor, [M] int64; None if it is something else. Nothing larger than M is copied: a tensor
    of one stored value may claim any shape."""
    if isinstance(stored, list):
        if not 0 < len(stored) <= vocab_size or not all(type(i) is int and abs(i) < 2**62 for i in stored):
            return None
        return torch.tensor(stored, dtype=torch.int64)
    plain = type(stored) is torch.Tensor and stored.layout == torch.strided and stored.device.type == "cpu"
    if not plain or stored.dtype not in _INTEGERS or stored.ndim != 1 or not 0 < len(stored) <= vocab_size:
        return None
    return stored.to(torch.int64).clone()


class DraftVocabulary:
    """The output matrix restricted to a token map, and the way between full and draft ids.

    Args:
        weight_VD: the frozen output matrix.
        ids_M: the map; None is the full vocabulary, without a copy.
    """

    def __init__(self, weight_VD: torch.Tensor, ids_M: torch.Tensor | None = None) -> None:
        self.full = weight_VD
        self.ids = None if ids_M is None else ids_M.to(weight_VD.device)
        if self.ids is not None:
            self.draft_ids = torch.full((weight_VD.shape[0],), -1, device=weight_VD.device)
            self.draft_ids[self.ids] = torch.arange(len(self.ids), device=weight_VD.device)

    @cached_property
    def weight(self) -> torch.Tensor:
        """The map's rows of the matrix, [M, D]; copied when first asked for."""
        return self.full if self.ids is None else self.full[self.ids]

    def columns(self, logits_NV: torch.Tensor) -> torch.Tensor:
        """The map's part of full logits, [N, M]."""
        return logits_NV if self.ids is None else logits_NV[:, self.ids]

    def encode(self, tokens: torch.Tensor) -> torch.Tensor:
        """Full ids → rows of `weight`; -1 where the map does not hold the token."""
        return tokens if self.ids is None else self.draft_ids[tokens]

    def decode(self, draft_ids: torch.Tensor) -> torch.Tensor:
        """Rows of `weight` → full ids."""
        return draft_ids if self.ids is None else self.ids[draft_ids]
