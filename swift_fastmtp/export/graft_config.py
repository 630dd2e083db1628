"""Whether a head fits a model that it was not trained with, and what that model's config.json must say then.

Both kinds of graft ask here before they write: the one that puts the layer into the model (`graft.py`), and the one
that puts it beside the model (`graft_draft.py`).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..checkpoint.checkpoint import Checkpoint
from ..errors import FastMTPError
from ..families.family import Family, config_value
from ..families.table import FAMILIES, match_family
from ..files.copies import file_hash, link_or_copy
from ..files.paths import check_link

_SIZES = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim", "hidden_act")


@dataclass(frozen=True)
class Graft:
    """What was done, for people: the family, the head, and everything a reader should know."""

    family: str
    tensors: int
    size: int
    notes: list[str]


def family_of(config: dict[str, Any], config_file: Path) -> Family:
    """The row of a model without a donor: by its architecture, or by the transformers class that runs the backbone."""
    architectures = config.get("architectures") or []
    rows = [f for f in FAMILIES if f.backbone.split(":")[1] in architectures]
    if len(rows) == 1:
        config = {**config, "architectures": rows[0].architectures}
    return match_family(config, config_file)


def with_head(
    config: dict[str, Any], theirs: dict[str, Any] | None, family: Family, model: Path, layers: int = 1
) -> dict[str, Any]:
    """config.json with what a save through transformers lost, and the number of MTP layers.

    Raises `FastMTPError` if the model's architecture is not the donor's, nor the one that runs its backbone.
    """
    new = dict(config)
    architectures = config.get("architectures") or []
    kept = any(a in family.architectures for a in architectures)
    plain = family.backbone.split(":")[1]
    if not kept and plain not in architectures:
        raise FastMTPError(
            f"{model / 'config.json'}: architectures {architectures}; a {family.name} head fits {plain} or "
            f"{', '.join(family.architectures)} only"
        )
    if not kept:
        new["architectures"] = (theirs or {}).get("architectures") or [family.architectures[0]]
    lost_code = config.get("model_type") == (theirs or {}).get("model_type") and not config.get("auto_map")
    if theirs and (not kept or lost_code):
        new["model_type"] = theirs.get("model_type")
        new.pop("auto_map", None)
        if theirs.get("auto_map"):
            new["auto_map"] = theirs["auto_map"]
    elif not theirs and family.plain_model_type and any(not (model / n).exists() for n in _code_files(new)):
        new.pop("auto_map")
    if new.get("model_type") == family.model_type and not new.get("auto_map") and family.plain_model_type:
        new["model_type"] = family.plain_model_type  # transformers does not know the other one without remote code
    text = new.get("text_config")
    lost = [k for k in family.engines.needed_keys if config_value(config, k) is None]
    back = {k: value for k in lost if (value := config_value(theirs or {}, k)) is not None}
    if not isinstance(text, dict):
        new.update(back)
        new[family.engines.num_layers_key] = layers
    elif family.engines.num_layers_key in ((theirs or {}).get("text_config") or text):
        new["text_config"] = {**text, **back, family.engines.num_layers_key: layers}
    else:
        new["text_config"] = {**text, **back}
        new[family.engines.num_layers_key] = layers
    return new


def changes(config: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """A note for each key of config.json that changed."""
    changed = [k for k in {**config, **new} if config.get(k) != new.get(k)]
    return [f"config.json: {k} is {new.get(k)}, was {config.get(k)}" for k in changed]


def _text(config: dict[str, Any]) -> dict[str, Any]:
    text = config.get("text_config")
    return {**config, **text} if isinstance(text, dict) else config


def _rope(config: dict[str, Any]) -> dict[str, Any]:
    """RoPE settings, alike for transformers 4 (rope_theta, rope_scaling) and 5 (rope_parameters)."""
    rope = dict(config.get("rope_scaling") or config.get("rope_parameters") or {})
    rope["rope_type"] = rope.pop("type", None) or rope.get("rope_type") or "default"
    rope.setdefault("rope_theta", config.get("rope_theta"))
    return rope


def compare(model: Checkpoint, donor: Checkpoint) -> list[str]:
    """Raises `FastMTPError` for another size; notes where the graft works, but the head starts from further away."""
    ours, base = _text(model.config), _text(donor.config)
    for key in _SIZES:
        a, b = ours.get(key), base.get(key)
        if a is not None and b is not None and a != b:
            raise FastMTPError(f"{model.config_file}: {key} is {a}, in {donor} it is {b}; the head does not fit")
    notes = []
    if _rope(ours) != _rope(base):
        notes.append(f"warning: RoPE is {_rope(ours)}, the donor's is {_rope(base)}; the head gets the model's")
    if ours.get("rms_norm_eps") != base.get("rms_norm_eps"):
        notes.append(f"warning: rms_norm_eps is {ours.get('rms_norm_eps')}, the donor's is {base.get('rms_norm_eps')}")
    if ours.get("vocab_size") != base.get("vocab_size"):
        notes.append(
            f"vocab_size is {ours.get('vocab_size')}, the donor's is {base.get('vocab_size')}: the head has no row per "
            "token, and shares the model's own matrices"
        )
    return notes + _compare_tokenizers(model.folder / "tokenizer.json", donor.folder / "tokenizer.json")


def _compare_tokenizers(ours: Path, theirs: Path) -> list[str]:
    if not ours.exists() or not theirs.exists() or file_hash(ours) == file_hash(theirs):
        return []
    from tokenizers import Tokenizer

    try:
        a, b = (Tokenizer.from_file(str(path)).get_vocab() for path in (ours, theirs))
    except Exception as error:  # noqa: BLE001 (the tokenizers library raises plain exceptions)
        raise FastMTPError(f"{ours}, {theirs}: cannot be read as tokenizers ({error})") from None
    other = sum(a.get(token) != number for token, number in b.items())
    if not other and len(a) == len(b):
        return []  # written by another version of the library
    return [
        f"warning: tokenizer.json differs from the donor's: {other} of its {len(b)} tokens are gone or renumbered, "
        f"{sum(t not in b for t in a)} are new; the head learnt the donor's"
    ]


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _code_files(config: dict[str, Any]) -> set[str]:
    """Files of the folder itself that auto_map names; a value may also point to another repository (`OWNER/NAME--`)."""
    values = (config.get("auto_map") or {}).values()
    named = [v for value in values for v in (value if isinstance(value, list) else [value])]
    return {f"{v.split('.')[0]}.py" for v in named if isinstance(v, str) and "--" not in v}


def remote_code(config: dict[str, Any], model: Path, donor: Path | None, out: Path) -> list[str]:
    """Copy the .py files that auto_map needs and the model lost. Raises `FastMTPError` if nobody has them."""
    lost = sorted(n for n in _code_files(config) if not (model / n).exists())
    if not lost:
        return []
    for name in lost:
        if donor is None or not (donor / name).exists():
            raise FastMTPError(f"{model / 'config.json'}: auto_map names {name}, which is not there; add the file")
    files = sorted(p for p in donor.glob("*.py") if not (model / p.name).exists()) if donor else []
    for source in files:  # remote code imports its neighbors
        check_link(source, source.parent)
        link_or_copy(source, out / source.name)
    return [f"{', '.join(p.name for p in files)}: from the donor"]
