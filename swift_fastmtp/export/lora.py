"""LoRA on the head: merge the adapter into the head's matrices, by peft, without loading the backbone."""

from pathlib import Path
from typing import Any

import torch

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.headers import entries_of
from ..checkpoint.mtp_tensors import head_reader
from ..errors import FastMTPError, detail
from ..files.inputs import check_folder
from ..files.known_files import read_object
from ..model.config import load_config
from ..model.head import as_stored
from ..model.loading import head_shapes, load_head, model_class


def merge_head(base: Checkpoint, checkpoint: Path) -> dict[str, torch.Tensor]:
    """The head of `base` with the adapter of `checkpoint` merged, fp32, under checkpoint names.

    Raises `FastMTPError` if the adapter reaches beyond the head, or peft cannot read it.
    """
    from peft import PeftModel

    check_folder(checkpoint)
    read_object(checkpoint / "adapter_config.json")
    cls: Any = model_class(base)
    family = base.family
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
    try:
        merged = PeftModel.from_pretrained(model, checkpoint).merge_and_unload()
    except Exception as error:  # noqa: BLE001 (peft raises whatever a key of adapter_config.json makes it stumble over)
        raise FastMTPError(
            f"{checkpoint}: peft cannot read the adapter ({detail(error)}); take it from the run again"
        ) from None
    return as_stored({n: p.detach() for n, p in merged.head_tensors().items()}, expected)
