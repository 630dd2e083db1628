"""LoRA on the head: merge the adapter into the head's matrices, by peft, without loading the backbone."""

from pathlib import Path
from typing import Any

import torch

from ..checkpoints import head_reader
from ..errors import FastMTPError
from ..families import match_family, read_config
from ..head import as_stored
from ..headers import entries_of
from ..modeling import head_shapes, load_config, load_head, model_class


def merge_head(base: Path, checkpoint: Path) -> dict[str, torch.Tensor]:
    """The head of `base` with the adapter of `checkpoint` merged, fp32, under checkpoint names.

    Raises `FastMTPError` if the adapter reaches beyond the head.
    """
    from peft import PeftModel

    cls: Any = model_class(base)
    family = match_family(read_config(base))
    stored = entries_of(checkpoint / "adapter_model.safetensors")
    names = [name.removeprefix("base_model.model.") for name in stored]
    outside = [n for n in names if not family.owns(n)]
    if outside:
        raise FastMTPError(
            f"{checkpoint}: adapter tensor {outside[0]} lies outside the MTP head; it cannot be exported"
        )
    with torch.device("meta"):
        model = cls(load_config(base))
    model.head.to_empty(device="cpu")
    expected = head_shapes(base)
    load_head(model, head_reader(base, family, expected), expected)
    merged = PeftModel.from_pretrained(model, checkpoint).merge_and_unload()
    return as_stored({n: p.detach() for n, p in merged.head_tensors().items()}, expected)
