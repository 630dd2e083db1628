"""The table of MTP layouts: one row per family of checkpoints.

A row says where the head's tensors live in a checkpoint, how the head fuses hidden state and token embedding,
and which decoder block it wraps. Everything that differs between families is here; nothing else in the package
asks which family it has.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import FastMTPError


@dataclass(frozen=True)
class Family:
    """One MTP layout. `{}`-free strings are module names relative to the head."""

    name: str
    architectures: tuple[str, ...]
    """`architectures` of the checkpoints' config.json."""
    backbone: str
    """transformers class that runs the backbone, as 'module:Class'."""
    block: str
    """Decoder block of the head, as 'module:Class'."""
    prefix: str
    """Path of the head in the checkpoint, without the trailing dot."""
    hidden_norm: str
    token_norm: str
    proj: str
    final_norm: str
    hidden_first: bool
    """Order of the fused input: [hidden, embed] if true, else [embed, hidden]."""
    mask_position_zero: bool
    """Engines zero the token embedding where the position is 0 (SGLang and vLLM `mimo_mtp.py`)."""
    config_model_type: str
    """`model_type` of config.json."""
    num_layers_key: str
    """config.json key that holds the number of MTP layers."""
    plain_model_type: str | None
    """A `model_type` of transformers itself under which engines load config.json without remote code."""


FAMILIES: tuple[Family, ...] = (
    Family(
        name="mimo",
        architectures=("MiMoForCausalLM",),
        backbone="transformers.models.qwen2.modeling_qwen2:Qwen2ForCausalLM",
        block="transformers.models.qwen2.modeling_qwen2:Qwen2DecoderLayer",
        prefix="model.mtp_layers.0",
        hidden_norm="hidden_layernorm",
        token_norm="token_layernorm",
        proj="input_proj",
        final_norm="final_layernorm",
        hidden_first=True,
        mask_position_zero=True,
        config_model_type="mimo",
        num_layers_key="num_nextn_predict_layers",
        plain_model_type="qwen2",
    ),
)


def read_config(model_dir: str | Path) -> dict[str, Any]:
    """config.json of a checkpoint folder. Raises `FastMTPError` if it is missing or not JSON."""
    path = Path(model_dir) / "config.json"
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FastMTPError(f"{path}: not found; pass the folder of a Hugging Face checkpoint") from None
    except (OSError, ValueError) as error:
        raise FastMTPError(f"{path}: cannot be read as JSON ({error})") from None
    return config


def match_family(config: dict[str, Any], where: str | Path = "config.json") -> Family:
    """The row whose architectures a checkpoint's config.json names. Raises `FastMTPError` if there is none."""
    architectures = config.get("architectures") or []
    for family in FAMILIES:
        if any(a in family.architectures for a in architectures):
            return family
    known = ", ".join(a for f in FAMILIES for a in f.architectures)
    raise FastMTPError(f"{where}: architectures {architectures} has no known MTP layout; known: {known}")


def find_family(config: dict[str, Any], where: str | Path = "config.json") -> Family:
    """The row for a checkpoint that we can train.

    Raises `FastMTPError` if no row matches, if the checkpoint says it has another number of MTP layers than the
    one that FastMTP shares between all steps, or if it is quantised (the frozen head is read as plain weights).
    """
    family = match_family(config, where)
    layers = config.get(family.num_layers_key, 1)
    if layers != 1:
        raise FastMTPError(
            f"{where}: {family.num_layers_key} is {layers}; FastMTP shares one MTP layer between all steps, "
            f"so the checkpoint must have exactly 1"
        )
    if config.get("quantization_config"):
        raise FastMTPError(
            f"{where}: quantization_config is set; FastMTP reads lm_head and the MTP layer as plain weights, "
            "so start from the unquantised checkpoint"
        )
    if config.get("tie_word_embeddings"):
        raise FastMTPError(
            f"{where}: tie_word_embeddings is true, but {family.architectures[0]} has its own lm_head in every "
            "engine; set it to false and store lm_head.weight"
        )
    return family
