"""LoRA on the head: merge the adapter into the head's matrices, by peft, without loading the backbone."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from ..checkpoints import read_head
from ..errors import FastMTPError
from ..families import match_family, read_config
from ..head import split_experts
from ..modeling import head_shapes, load_head, model_class


def merge_head(base: Path, checkpoint: Path) -> dict[str, torch.Tensor]:
    """The head of `base` with the adapter of `checkpoint` merged, fp32, under checkpoint names.

    Raises `FastMTPError` if the adapter reaches beyond the head.
    """
    from peft import PeftModel
    from safetensors import safe_open

    cls: Any = model_class(base)
    family = match_family(read_config(base))
    with safe_open(checkpoint / "adapter_model.safetensors", framework="pt") as file:
        outside = [n for n in file.keys() if f".{family.prefix}." not in n]  # noqa: SIM118 (not a dict)
    if outside:
        raise FastMTPError(
            f"{checkpoint}: adapter tensor {outside[0]} lies outside the MTP head; it cannot be exported"
        )
    with torch.device("meta"):
        model = cls(AutoConfig.from_pretrained(base))
    model.head.to_empty(device="cpu")
    load_head(model, read_head(base, family, head_shapes(base)))
    merged = PeftModel.from_pretrained(model, checkpoint).merge_and_unload()
    return split_experts({n: p.detach() for n, p in merged.head_tensors().items()})
