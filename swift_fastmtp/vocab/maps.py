"""Token maps on disk: written with all that is known of them, and verified against a model."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..checkpoint.mtp_tensors import save_tensors
from ..files.known_files import read_object
from ..files.staging import write_json
from ..method.map_files import sidecar
from ..method.token_map import read_token_map
from .coverage import TokenMap
from .must_keep import Vocabulary, read_vocabulary


def write_map(token_map: TokenMap, vocabulary: Vocabulary, folder: Path, about: dict[str, Any]) -> None:
    """NAME-SIZE.pt (SGLang: `torch.save` of a list of ids), .json (the same list), -d2t.safetensors and .meta.json.

    `d2t` int64 [size] and `t2d` bool [V] are those of EAGLE3 checkpoints, as speculators writes them
    (`train/vocab_mapping.py`): target id = draft id + d2t[draft id].
    """
    ids = token_map.ids.tolist()
    stem = f"{token_map.name}-{len(ids)}"
    torch.save(ids, folder / f"{stem}.pt")
    (folder / f"{stem}.json").write_text(json.dumps(ids) + "\n", encoding="utf-8")
    ids_M = torch.tensor(ids)
    t2d_V = torch.zeros(vocabulary.rows, dtype=torch.bool).index_fill(0, ids_M, True)
    save_tensors({"d2t": ids_M - torch.arange(len(ids)), "t2d": t2d_V}, folder / f"{stem}-d2t.safetensors")
    write_json({**about, "ids_sha256": ids_hash(ids)}, folder / f"{stem}.meta.json")


def ids_hash(ids: Sequence[int]) -> str:
    return hashlib.sha256(json.dumps(sorted(ids)).encode()).hexdigest()


def verify_map(path: str | Path, model_dir: str | Path) -> list[str]:
    """What is wrong with a map for this model, one line each; empty if nothing is.

    Raises `FastMTPError` if the file is no map, holds ids that the model has no row for, or the model cannot be read.
    """
    path = Path(path)
    vocabulary = read_vocabulary(model_dir)
    ids = read_token_map(path, vocabulary.rows).tolist()
    about = read_object(sidecar(path))
    faults = []
    if not about:
        faults.append(f"{sidecar(path)}: missing; nothing says which tokenizer the map is for")
    elif about.get("tokenizer_sha256") != vocabulary.tokenizer_sha256:
        faults.append(f"{path}: made with another tokenizer.json than {model_dir}'s; make it again for this model")
    elif about.get("ids_sha256") != ids_hash(ids):
        faults.append(f"{path}: not the ids that {sidecar(path).name} is about; make the map again")
    padding = [i for i in ids if not vocabulary.exists_V[i]]
    if padding:
        faults.append(f"{path}: holds {len(padding)} ids without a token, as {padding[0]}; make it for this model")
    missing = sorted(set(vocabulary.must_keep) - set(ids))
    if missing:
        faults.append(
            f"{path}: lacks {len(missing)} special and basic tokens, as {missing[-1]}; they are never drafted; "
            "make the map with `fastmtp vocab`"
        )
    return faults
