"""The JSON files that this package reads, by name, and what their keys must hold."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import FastMTPError
from .inputs import read_json
from .kinds import NAME, NAME_OR_NAMES, NUMBER, OBJECT, PATH, TOKEN_IDS, Kind, is_int, whole, wrong_types
from .show import show

_WHOLE = Kind("a whole number", is_int)

SETTINGS: dict[str, Kind] = {
    "num_speculative_steps": whole(1, 1000),
    "beta": NUMBER,
    "rollout": NAME,
    "engine": NAME,
    "loss": NAME,
    "temperature": NUMBER,
    "lk_eta": NUMBER,
    "token_map": PATH,
    "backbone_lora": PATH,
    "on_bad_row": NAME,
    "other_val_dataset": PATH,
    "on_worse": NAME,
    "hidden_cache": NAME,
    "hidden_cache_gb": NUMBER,
    "loss_chunk_size": _WHOLE,
    "swift_fastmtp": NAME,
    "base_model": PATH,
    "base_fingerprint": NAME,
    "dataset": NAME_OR_NAMES,
    "compared": OBJECT,
}
"""The knobs of a run (`method/config.py`, a test compares them), and what it was made from and compared with."""

_FILES: dict[str, Mapping[str, Kind]] = {
    "fastmtp.json": SETTINGS,
    "args.json": {"model": PATH, "model_kwargs": OBJECT, "dataset": NAME_OR_NAMES},
    "adapter_config.json": {"peft_type": NAME, "r": whole(1, 2**20), "lora_alpha": NUMBER},
    "generation_config.json": {"eos_token_id": TOKEN_IDS},
    "config.json": {"quantization_config": OBJECT},
    "job.json": {},
    "cache.json": {"schema": NAME},
    "hf_quant_config.json": {"quantization": OBJECT, "producer": OBJECT},
}
_MAP_FACTS = {"tokenizer_sha256": NAME, "ids_sha256": NAME}


def read_object(path: str | Path) -> dict[str, Any]:
    """The object of a JSON file, its known keys of the types that files of this name have; {} where there is no file.

    Raises `FastMTPError` naming the file, and the key.
    """
    try:
        value = read_json(path)
    except FileNotFoundError:
        return {}
    if not isinstance(value, dict):
        raise FastMTPError(f"{path}: must hold a JSON object, not {type(value).__name__}; copy it from where it came")
    name = Path(path).name
    kinds = _MAP_FACTS if name.endswith(".meta.json") else _FILES.get(name, {})
    for key, what in wrong_types(value, kinds):
        raise FastMTPError(f"{path}: {key} is {show(value[key])}, it must be {what}; copy the file from where it came")
    return value
