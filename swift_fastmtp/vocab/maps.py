"""Token maps: the ids that a draft may choose from (SGLang's `--speculative-token-map`), alone or by language."""

import json
import re
import shutil
from functools import cached_property
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from ..checkpoints import file_hash, read_json
from ..errors import FastMTPError
from ..paths import inside


def read_token_map(path: str | Path, vocab_size: int) -> torch.Tensor:
    """A token map in SGLang's format: `torch.save` of a list of ids, or of a tensor.

    Returns int64 ids [M]. Raises `FastMTPError` if it is something else, empty, or does not fit `vocab_size` rows.
    """
    try:
        ids = torch.as_tensor(torch.load(path, weights_only=True))
    except (OSError, ValueError, TypeError, RuntimeError, EOFError, UnpicklingError) as error:
        raise FastMTPError(f"{path}: not a token map, a torch file with a list of token ids ({error})") from None
    if ids.ndim != 1 or not len(ids) or ids.is_floating_point():
        raise FastMTPError(f"{path}: a token map is a flat list of token ids")
    if int(ids.min()) < 0 or int(ids.max()) >= vocab_size:
        raise FastMTPError(f"{path}: holds id {int(ids.max())}, the model has rows 0..{vocab_size - 1}")
    if len(set(ids.tolist())) != len(ids):
        raise FastMTPError(f"{path}: holds an id twice; make the ids unique")
    return ids.long()


def read_map_list(path: str | Path) -> dict[str, Path]:
    """Language -> file of its map, from a JSON object of languages and files that stand beside it.

    Raises `FastMTPError` if the file is not such a list, or a map is not there.
    """
    try:
        maps = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FastMTPError(f"{path}: cannot be read as JSON ({error})") from None
    return check_map_list(maps, Path(path))


def check_map_list(maps: Any, where: Path) -> dict[str, Path]:
    """The same for an object that was read from `where`."""
    if not isinstance(maps, dict) or not maps or not all(isinstance(v, str) for v in maps.values()):
        raise FastMTPError(f'{where}: must be an object of languages and files, as {{"zh": "zh-16384.pt"}}')
    found = {name: inside(where.parent, file, f"{where}: {name}") for name, file in maps.items()}
    for name, file in found.items():
        if not file.is_file():
            raise FastMTPError(f"{where}: {name}: {file}: no such file")
    return found


MAPS_FOLDER = "token_maps"


def copy_maps(maps: dict[str, Path], folder: Path) -> dict[str, str]:
    """Copy maps, with what is known of them, to `token_maps/` of a folder. Returns language -> file, below the folder.

    Raises `OSError` if it cannot.
    """
    (folder / MAPS_FOLDER).mkdir(exist_ok=True)
    copied = {}
    for number, (language, path) in enumerate(maps.items()):
        is_name = re.fullmatch(r"\w[\w-]{0,63}", language)  # groups of rows may be called anything
        copied[language] = f"{MAPS_FOLDER}/{language if is_name else f'map-{number}'}.pt"
        shutil.copyfile(path, folder / copied[language])
        if sidecar(path).exists():
            shutil.copyfile(sidecar(path), sidecar(folder / copied[language]))
    return copied


def sidecar(path: str | Path) -> Path:
    """Where the facts about a map are, if `fastmtp vocab` made it."""
    return Path(path).with_suffix(".meta.json")


def check_tokenizer(path: str | Path, model_dir: str | Path) -> None:
    """Raises `FastMTPError` if a map's sidecar names another tokenizer than the model's: its ids mean other tokens."""
    made_for = read_json(sidecar(path)).get("tokenizer_sha256")
    tokenizer = Path(model_dir) / "tokenizer.json"
    if made_for and tokenizer.exists() and made_for != file_hash(tokenizer):
        raise FastMTPError(f"{path}: made with another tokenizer.json than {model_dir}'s; make it for this model")


CONFIG_KEY = "fastmtp_token_maps"
"""Key of an exported model's config.json: language -> file of its map, below the folder."""


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
