"""Whether a draft is that of its base model: the same tensors, and a config.json that means the same."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.fp8_config import SCALE
from ..families.family import Family, config_value
from .dense import as_qwen2, is_qwen2s
from .finding import Finding

# A draft that reads these otherwise than its target sees other positions, keys, experts, sizes or tokens. The value is
# what transformers takes for a missing one, where that is the same for all families.
_SHARED_KEYS: dict[str, Any] = {
    "hidden_size": None,
    "num_attention_heads": None,
    "num_key_value_heads": None,
    "head_dim": None,
    "vocab_size": None,
    "rms_norm_eps": None,
    "max_position_embeddings": None,
    "hidden_act": "silu",
    "attention_bias": None,
    "tie_word_embeddings": False,
    "layer_types": None,
    "sliding_window": None,
    "num_experts_per_tok": None,
    "norm_topk_prob": None,
    "routed_scaling_factor": None,
    "n_group": None,
    "topk_group": None,
}
_ROPE_KEYS = ("rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor")


def check_origin(checkpoint: Checkpoint, family: Family, model: str | Path | None) -> Iterator[Finding]:
    folder = checkpoint.folder
    base = Checkpoint(model or checkpoint.settings.get("base_model") or "/nonexistent")
    trained_for = checkpoint.settings.get("base_fingerprint")
    here = checkpoint if checkpoint.has_backbone() else base
    if trained_for and here.config_file.exists() and not here.has_fingerprint(trained_for):
        yield Finding(
            "error",
            f"the head was trained for another backbone than {here}",
            "a head follows the hidden states of the weights it saw; after merging or more training they differ",
            "train the head for this backbone; a few hundred steps heal it",
        )
    if os.path.realpath(base.folder) == os.path.realpath(folder) or not base.config_file.exists():
        return
    here_config, base_config = checkpoint.config, base.config
    if not checkpoint.has_backbone() and is_qwen2s(family) and (dense := as_qwen2(base)):
        base_config = dense.config  # a Llama's layer is a Qwen2's
    for key in _differences(here_config, base_config):
        ours, theirs = config_value(here_config, key), config_value(base_config, key)
        yield Finding(
            "error",
            f"config.json: {key} is {ours}, in {base} it is {theirs}",
            "draft and target must agree; a RoPE scaling set on one only costs acceptance in long contexts",
            "use the base model's value in both",
        )
    every = [n for n in checkpoint.under(*family.roots) if not family.is_copy(n)]
    names = [n for n in every if n in base.file_of]  # not those that a tool packed with the base: they have other names
    yield from _forms(checkpoint, base, names)
    same = [n for n in names if torch.equal(checkpoint.read(n).float(), base.read(n).float())]
    if every and len(same) == len(every):
        yield Finding(
            "warning",
            f"the MTP layer equals the one of {base}",
            "it is the untrained head: it drafts one token well and then collapses",
            "export the checkpoint of a training run",
        )


def _differences(ours: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    """Keys by which two config.json describe other computations, however they are written."""
    keys = [key for key in _SHARED_KEYS if _meant(ours, key) != _meant(theirs, key)]
    if None in (_meant(ours, "layer_types"), _meant(theirs, "layer_types")) and "layer_types" in keys:
        keys.remove("layer_types")  # transformers makes it of other keys where it is missing
    if _rope(ours) != _rope(theirs):
        keys += [key for key in _ROPE_KEYS if config_value(ours, key) != config_value(theirs, key)]
    return keys


def _meant(config: dict[str, Any], key: str) -> Any:
    """What a key comes to."""
    value = config_value(config, key)
    if key == "sliding_window" and not config_value(config, "use_sliding_window", True):
        return None
    if key == "head_dim" and value is None:
        size, heads = (config_value(config, k) for k in ("hidden_size", "num_attention_heads"))
        return size // heads if isinstance(size, int) and isinstance(heads, int) and heads else None
    if key == "num_key_value_heads" and value is None:
        return config_value(config, "num_attention_heads")
    return _SHARED_KEYS[key] if value is None else value


def _rope(config: dict[str, Any]) -> dict[str, Any]:
    """RoPE in one form: transformers 5 has all of it in `rope_parameters`, before there were `rope_theta`,
    `rope_scaling` and `partial_rotary_factor`, and in that `type` for `rope_type`."""
    rope: dict[str, Any] = {}
    for key in ("rope_scaling", "rope_parameters"):
        value = config_value(config, key)
        if isinstance(value, dict):
            rope |= value
    for key in ("rope_theta", "partial_rotary_factor"):
        rope.setdefault(key, config_value(config, key))
    kind = rope.pop("type", None)
    rope.setdefault("rope_type", kind)
    if rope["rope_type"] in (None, "default", "mrope"):  # sections of axes; for text the plain RoPE
        rope["rope_type"] = "default"
    if rope["partial_rotary_factor"] == 1:
        rope["partial_rotary_factor"] = None
    return {key: value for key, value in rope.items() if value is not None}


def _forms(checkpoint: Checkpoint, base: Checkpoint, names: list[str]) -> Iterator[Finding]:
    """Where config.json says FP8, an engine expects it for the tensors that the base model stores so."""
    if not checkpoint.config.get("quantization_config"):
        return
    for name in (n for n in names if not n.endswith(SCALE)):
        here, there = name + SCALE in checkpoint.file_of, name + SCALE in base.file_of
        if here != there:
            yield Finding(
                "error",
                f"{name} is {'FP8 in blocks' if here else 'not quantized'}, in {base} it is the other way",
                "engines build the layer that config.json describes, and load these numbers as something else",
                "`fastmtp export` writes each tensor as the base model stores it",
            )
