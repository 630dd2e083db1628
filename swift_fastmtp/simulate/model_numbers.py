"""A model's numbers for `training_cost.py`: the model itself, made without memory, is asked.

config.json is enough; where the weight files are there too, their headers say how many bytes are stored.
"""

from typing import Any

import torch
from torch import nn

from ..checkpoint.checkpoint import Checkpoint
from ..families.family import is_embedding
from ..model.config import load_config, one_line
from ..model.loading import model_class
from .cost import experts_read
from .training_cost import WIDTH, ModelNumbers

_KEYS = ("k_proj", "kv_b_proj", "query_key_value")
"""Matrices of which each attention over all tokens has one."""


def read_numbers(checkpoint: Checkpoint) -> ModelNumbers:
    """The numbers of a folder's model.

    Raises `FastMTPError` for a layout that is unknown or cannot be trained, and for a config.json that makes no model.
    """
    cls: Any = model_class(checkpoint)
    config = load_config(checkpoint)
    with one_line(checkpoint), torch.device("meta"):
        model = cls(config)
    has_weights = any(checkpoint.folder.glob("*.safetensors"))
    stored = sum(entry.size for entry in checkpoint.headers.entries.values()) if has_weights else None
    return numbers_of(model, experts_read(checkpoint), stored, bool(checkpoint.value("quantization_config")))


def numbers_of(model: Any, experts: int, stored: int | None = None, quantized: bool = False) -> ModelNumbers:
    """The numbers of a model of `modeling.build_class`, also one on the device "meta".

    Args:
        model: the model.
        experts: how many of a mixture of experts a token is routed to.
        stored: bytes of its files; None where they are not there.
        quantized: where they are not there, a number is taken for a byte, else for bfloat16.
    """
    config, family = model.config, model.family
    tied = bool(config.tie_word_embeddings)
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    mtp = sum(p.numel() for p in model.head_parameters().values())
    embedding = sum(size for name, size in sizes.items() if is_embedding(name) and not family.owns(name))
    lm_head = model.lm_head.weight.numel()
    layers = sum(sizes.values()) - mtp - embedding - sizes.get("lm_head.weight", 0)
    every = layers + mtp + embedding + (0 if tied else lm_head)
    feed_forward = f".{family.names.mlp}."
    used = {"layers": 0.0, "entry": 0.0, "rest": 0.0}
    width, attentions, largest = 0.0, 0, 0
    for name, module in model.named_modules():
        own = {k: p for k, p in module.named_parameters(recurse=False) if not is_embedding(f"{name}.{k}")}
        if name == "lm_head":
            continue
        in_mtp = family.owns(f"{name}.")
        largest = max(largest, sum(p.numel() for p in own.values()))
        for parameter in own.values():
            read = _used(module, parameter, experts)
            part = "layers" if not in_mtp else "rest" if feed_forward in f"{name}." else "entry"
            used[part] += read
            width += _width(parameter, experts) if in_mtp and read else 0
        if not in_mtp and any(hasattr(module, key) for key in _KEYS):
            attentions += 1
    return ModelNumbers(
        layers=layers,
        layers_used=used["layers"],
        embedding=embedding,
        lm_head=lm_head,
        tied=tied,
        mtp=mtp,
        mtp_entry=used["entry"],
        mtp_rest=used["rest"],
        mtp_width=width,
        attentions=attentions,
        attention_width=_attention_width(config),
        largest=largest,
        hidden_size=config.hidden_size,
        stored=every * (1 if quantized else WIDTH) if stored is None else stored,
    )


def _used(module: nn.Module, parameter: torch.Tensor, experts: int) -> float:
    """Of a parameter, how many elements a token is multiplied with: of experts in one tensor [E, ., .] those that it is
    routed to, of norms and biases none."""
    if parameter.dim() < 2:
        return 0.0
    if parameter.dim() == 3 and not isinstance(module, nn.Conv1d):
        return parameter.numel() * experts / parameter.shape[0]
    return float(parameter.numel())


def _width(parameter: torch.Tensor, experts: int) -> float:
    """Inputs and outputs of a matrix, of one token."""
    return sum(parameter.shape[-2:]) * (experts if parameter.dim() == 3 else 1)


def _attention_width(config: Any) -> int:
    heads = config.num_attention_heads
    if getattr(config, "kv_lora_rank", None):
        return int(heads * (config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim))
    return int(heads * 2 * (getattr(config, "head_dim", None) or config.hidden_size // heads))
