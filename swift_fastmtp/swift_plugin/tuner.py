"""Tuner type `fastmtp`: only the head trains, and a checkpoint is only the head.

The folder of a checkpoint is at once what training resumes from, what `--adapters` takes, and a draft folder for
SGLang's `--speculative-draft-model-path`.
"""

from typing import Any

import torch
from swift.tuner_plugin import Tuner
from swift.utils import get_logger

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.mtp_tensors import head_reader
from ..errors import FastMTPError
from ..export.folders import save_trained
from ..model.loading import head_shapes, load_head
from .compat_swift import head_only_deepspeed_checkpoints

logger = get_logger()


class FastMTPTuner(Tuner):
    """ms-swift's tuner interface; the model stays a plain transformers model."""

    @staticmethod
    def prepare_model(args: Any, model: Any) -> Any:
        model.freeze_backbone()
        if not args.deepspeed:  # DeepSpeed keeps its own fp32 master copy
            _upcast_head(model)
        if _uses_deepspeed():
            head_only_deepspeed_checkpoints()
        return model

    @staticmethod
    def save_pretrained(model: Any, save_directory: str, state_dict: dict[str, Any] | None = None, **_: Any) -> None:
        save_trained(model, save_directory, state_dict)

    @staticmethod
    def from_pretrained(model: Any, model_id: str, is_trainable: bool = False, **_: Any) -> Any:
        model.freeze_backbone()
        base, trained = Checkpoint(model.model_dir), Checkpoint(model_id)
        if is_trainable:
            try:
                trained.check_backbone(base)
            except FastMTPError as error:  # how a tuned model's head is healed
                logger.warning(f"{error}; it is where this training starts")
            # Before loading: a checkpoint holds the fp32 master copy, and resuming must not round it.
            if _uses_deepspeed():
                head_only_deepspeed_checkpoints()
            else:
                _upcast_head(model)
        expected = head_shapes(base)
        load_head(model, head_reader(trained, model.family, expected), expected)
        return model


def _upcast_head(model: Any) -> None:
    """bf16 steps of AdamW at these learning rates round to nothing: the trained copy is fp32, autocast computes."""
    for parameter in model.head_parameters().values():
        parameter.data = parameter.data.to(torch.float32)


def _uses_deepspeed() -> bool:
    from accelerate.utils import is_deepspeed_available
    from transformers.integrations.deepspeed import deepspeed_config

    return is_deepspeed_available() and deepspeed_config() is not None
