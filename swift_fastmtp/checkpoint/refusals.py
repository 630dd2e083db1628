"""What config.json says against training a checkpoint, one line for each reason."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import FastMTPError
from ..families.family import Family, config_value
from ..families.table import (
    match_family,
)


@dataclass(frozen=True)
class Refusal:
    """One reason against training a checkpoint, in one line."""

    about: str
    """`draft`: engines would draft wrongly with it, or not start; `training`: only training stands against it."""
    key: str
    """Of config.json."""
    text: str


def find_family(config: dict[str, Any], where: str | Path = "config.json") -> Family:
    """The row for a checkpoint that we can train.

    Raises `FastMTPError` if no row matches, or with the first of `refusals`.
    """
    family = match_family(config, where)
    for refusal in refusals(config, family, where):
        raise FastMTPError(refusal.text)
    return family


def refusals(config: dict[str, Any], family: Family, where: str | Path = "config.json") -> Iterator[Refusal]:
    """What config.json says against training a checkpoint of this family.

    It has no `model_type`; it has another number of MTP layers than the one that FastMTP shares between all steps; it
    has a setting that the family's classes here do not know; it is quantized otherwise than in FP8 blocks
    (`fp8.read_blocks`); it ties its output matrix to the embedding where the engines do not, or says two things of
    that.
    """
    if not config_value(config, "model_type"):  # LongCat-Flash-Thinking-2601's once had none
        text = f'{where}: has no model_type; add "model_type": "{family.model_type}"'
        yield Refusal("draft", "model_type", text)
    layers = config_value(config, family.engines.num_layers_key, 1)
    if layers != 1:
        text = (
            f"{where}: {family.engines.num_layers_key} is {layers}; FastMTP shares one MTP layer between all steps, "
            f"so the checkpoint must have exactly 1{'' if layers else ': `fastmtp graft` puts one in'}"
        )
        yield Refusal("draft", family.engines.num_layers_key, text)
    for key, value in family.block.only:
        if (actual := config_value(config, key, value)) != value:
            text = (
                f"{where}: {key} is {json.dumps(actual)}; {family.architectures[0]} can be trained with "
                f"{json.dumps(value)} only"
            )
            yield Refusal("training", key, text)
    from .fp8_config import read_blocks  # this module alone needs no torch

    try:
        read_blocks(config, where)
    except FastMTPError as error:
        yield Refusal("training", "quantization_config", str(error))
    parts = (config, config.get("text_config") or {})
    tied = [part["tie_word_embeddings"] for part in parts if part.get("tie_word_embeddings") is not None]
    if len(set(tied)) > 1:
        text = (
            f"{where}: tie_word_embeddings is {tied[0]}, and in text_config {tied[1]}; the target goes by the first, "
            "SGLang's draft by the second: set both alike"
        )
        yield Refusal("draft", "tie_word_embeddings", text)
    elif any(tied) and not family.engines.tied_embeddings:
        text = (
            f"{where}: tie_word_embeddings is true, but {family.architectures[0]} has its own lm_head in every "
            "engine; set it to false and store lm_head.weight"
        )
        yield Refusal("draft", "tie_word_embeddings", text)
