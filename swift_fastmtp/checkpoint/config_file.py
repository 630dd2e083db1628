"""config.json: read once, every key that is used of the type that the code behind trusts."""

from pathlib import Path
from typing import Any

from ..errors import FastMTPError
from ..families.family import config_value
from ..families.table import row_of
from ..files import inputs
from ..files.kinds import FLAG, NAME, NAMES, NUMBER, OBJECT, TOKEN_IDS, Kind, is_int, not_finite, wrong_types
from ..files.show import show


class WrongTypeError(FastMTPError):
    """A key of config.json holds something of another type than this package and the engines read."""


def read_config(model_dir: str | Path) -> dict[str, Any]:
    """config.json of a checkpoint folder.

    Raises `FastMTPError` if it is missing or not a JSON object; `WrongTypeError` naming the first key of `_TYPES` that
    is of another type, or the first that holds NaN or an infinite number.
    """
    path = Path(model_dir) / "config.json"
    try:
        config = inputs.read_json(path)
    except FileNotFoundError:
        raise FastMTPError(f"{path}: not found; pass the folder of a Hugging Face checkpoint") from None
    if not isinstance(config, dict):
        raise FastMTPError(
            f"{path}: must hold a JSON object, not {type(config).__name__}; restore it from the base model"
        )
    _check_types(config, path)
    return config


TOKEN_MAPS_KEY = "fastmtp_token_maps"
"""Of an exported model: language -> file of its map, below the folder."""
TOKEN_MAPS_VARIABLE = "SWIFT_FASTMTP_MAPS"
"""Environment variable that goes before that key; engines' plugins read it."""
_COUNT = Kind("a whole number that is not negative, and at most 2**24", lambda v: is_int(v) and 0 <= v <= 2**24)


_LAYERS = Kind("a whole number that is not negative, and at most 1000", lambda v: is_int(v) and 0 <= v <= 1000)


_EXPERTS = Kind("a whole number that is not negative, and at most 10000", lambda v: is_int(v) and 0 <= v <= 10_000)


_TYPES: dict[str, Kind] = {
    "architectures": NAMES,
    "model_type": NAME,
    **dict.fromkeys(("text_config", "quantization_config", "auto_map", "rope_scaling", "rope_parameters"), OBJECT),
    "tie_word_embeddings": FLAG,
    "dtype": NAME,
    "torch_dtype": NAME,
    "eos_token_id": TOKEN_IDS,
    "rms_norm_eps": NUMBER,
    "rope_theta": NUMBER,
}
"""Keys of config.json that are read here, and what they hold; null is a key that is not there."""


_SHAPES: dict[str, Kind] = {
    **dict.fromkeys(
        ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim"),
        _COUNT,
    ),
    # transformers makes lists of so many entries, and layers.
    **dict.fromkeys(
        ("num_hidden_layers", "num_layers", "num_nextn_predict_layers", "mtp_num_hidden_layers"),
        _LAYERS,
    ),
    **dict.fromkeys(
        ("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts", "num_experts_per_tok"),
        _EXPERTS,
    ),
}
"""Keys that modules are made from. Models of no layout here may hold a list, a number for each of their parts."""


_MAY_BE_INFINITE = ("time_step_limit",)
"""Of state-space layers, in published files."""


def _check_types(config: dict[str, Any], path: Path) -> None:
    text = config.get("text_config")
    parts = (("", config), ("text_config.", text if isinstance(text, dict) else {}))
    _check_parts(parts, _TYPES, path)
    if row_of(config.get("architectures") or []):
        _check_parts(parts, _SHAPES, path)
    for key, value in not_finite(config):
        if key.rpartition(".")[2] not in _MAY_BE_INFINITE:
            raise WrongTypeError(
                f"{path}: {key} is {value}, it must be a finite number; take it from the base model's config.json"
            )


def _check_parts(parts: tuple[tuple[str, dict[str, Any]], ...], kinds: dict[str, Kind], path: Path) -> None:
    for where, part in parts:
        for key, what in wrong_types(part, kinds):
            raise WrongTypeError(
                f"{path}: {where}{key} is {show(part[key])}, it must be {what}; take it from the base model's "
                "config.json"
            )


def vocabulary_size(config: dict[str, Any], where: str | Path) -> int:
    """V, the rows of the output matrix. Raises `FastMTPError` if config.json does not say."""
    rows = config_value(config, "vocab_size")
    if not is_int(rows) or rows < 1:
        raise FastMTPError(f"{where}: vocab_size is {rows!r}; it must be the rows of the output matrix")
    return int(rows)
