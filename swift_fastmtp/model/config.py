"""transformers' configuration of a checkpoint, made without running code of its folder."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig

from ..checkpoint.checkpoint import Checkpoint
from ..errors import FastMTPError, detail
from ..families import bailing  # noqa: F401 (it registers what transformers has no classes for)
from ..families.table import FAMILIES
from ..files.known_files import read_object
from .head import import_class

# So that transformers reads the config.json of models for which it has no class of its own.
for _row in FAMILIES:
    if _row.config_class:
        AutoConfig.register(_row.model_type, import_class(_row.config_class), exist_ok=True)


def load_config(checkpoint: Checkpoint) -> Any:
    """transformers' config of what is trained and run: the text model's, where a checkpoint has several.

    No code of the folder runs. Raises `FastMTPError` if transformers cannot build it without.
    """
    stored, path = checkpoint.config, checkpoint.config_file
    if "auto_map" in stored and stored["auto_map"] is None:
        raise FastMTPError(f"{path}: auto_map is null; remove the key")
    kind = stored.get("model_type")
    if stored.get("auto_map") and kind not in CONFIG_MAPPING:
        raise FastMTPError(
            f"{path}: model_type {kind!r} is known to Python code of the folder only (auto_map), and this package "
            f"runs none; set it to {checkpoint.family.model_type!r} if the model is one"
        )
    read_object(checkpoint.folder / "generation_config.json")  # transformers loads it with the model
    with one_line(checkpoint):
        # Said outright, because transformers would otherwise ask, at the terminal, whether to run code of the folder.
        return text_config(AutoConfig.from_pretrained(checkpoint.folder, trust_remote_code=False), checkpoint)


@contextmanager
def one_line(checkpoint: Checkpoint) -> Iterator[None]:
    """A config.json that transformers cannot take raises whatever it likes; this makes one line of it."""
    try:
        yield
    except FastMTPError:
        raise
    except Exception as error:  # noqa: BLE001 (whatever others' code raises)
        raise FastMTPError(
            f"{checkpoint.config_file}: transformers cannot build it ({detail(error)}); compare with the base "
            "model's, where a key is null or of another type"
        ) from None


def text_config(config: Any, checkpoint: Checkpoint) -> Any:
    """The text part of a checkpoint's config, or the config itself where it has no parts."""
    text = config.get_text_config()
    if text is not config:
        text.tie_word_embeddings = bool(checkpoint.value("tie_word_embeddings"))
    if quantization := checkpoint.value("quantization_config"):
        text.quantization_config = quantization
    elif hasattr(text, "quantization_config"):
        del text.quantization_config  # null or empty: an unquantized checkpoint
    if getattr(text, "head_dim", 0) is None:  # engines take it as missing, transformers' older classes do not
        text.head_dim = text.hidden_size // text.num_attention_heads
    _check_rope(getattr(text, "rope_parameters", None), checkpoint.config_file)
    return text


def _check_rope(parameters: Any, path: Path) -> None:
    """Raises `FastMTPError` for a `rope_theta` that is no number; transformers computes with it without a look."""
    if not isinstance(parameters, dict):
        return
    for part in (parameters, *(v for v in parameters.values() if isinstance(v, dict))):  # one for each kind of layer
        theta = part.get("rope_theta", 1.0)
        if isinstance(theta, bool) or not isinstance(theta, int | float) or theta <= 0:
            raise FastMTPError(f"{path}: rope_theta is {theta!r}, it must be a positive number; take the base model's")
