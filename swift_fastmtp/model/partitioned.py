"""Loads a checkpoint into a model that ZeRO-3 partitions, one parameter at a time.

transformers' way puts the whole checkpoint into a dictionary on every rank. Plain tensors stay on disk until they are
touched, but experts are joined, and FP8 is dequantized, for the whole model before anything is partitioned. Here every
rank holds its part and the one parameter that rank 0 is reading.
"""

from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from transformers import GenerationConfig

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.compat_deepspeed import check_partitioned, is_partitioned
from ..checkpoint.fp8_config import SCALE
from ..checkpoint.mtp_tensors import read_plain
from .compat_transformers import kept_in_float32, making, tied_names
from .head import as_stored, fill


def sources(cls: Any, checkpoint: Checkpoint, config: Any) -> dict[str, list[str]] | None:
    """Name of every parameter and buffer → the names of the checkpoint's tensors that make it; None if the checkpoint
    has other names, as conversions of transformers' own would lead to."""
    with torch.device("meta"):
        model = cls(config)
    stored = {n: e.shape for n, e in checkpoint.headers.entries.items() if not n.endswith(SCALE)}
    tied = tied_names(model)
    parts_of = {}
    for name, tensor in model.state_dict().items():
        if name in tied:
            continue
        parts = {n: tuple(t.shape) for n, t in as_stored({name: tensor}, stored).items()}
        if any(stored.get(n) != shape for n, shape in parts.items()):
            return None
        parts_of[name] = list(parts)
    return parts_of


def load_partitioned(cls: Any, checkpoint: Checkpoint, config: Any, parts: dict[str, list[str]]) -> Any:
    """A model of `cls`, partitioned as ZeRO-3 says, with the tensors of a checkpoint (`sources`).

    Every rank calls this; rank 0 reads.
    """
    from deepspeed import zero
    from torch.distributed import get_rank

    config.name_or_path, config.dtype = str(checkpoint.folder), config.dtype or torch.float32
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with making(cls, config.dtype):
        model = cls(config)
    check_partitioned(model.parameters())
    targets = model.state_dict(keep_vars=True)
    for name, names in parts.items():
        target = targets[name]
        partitioned = is_partitioned(target)
        if not partitioned and any(part in name for part in kept_in_float32(model)):
            target.data = target.data.float()
        with zero.GatheredParameters([target], modifier_rank=0) if partitioned else nullcontext(), torch.no_grad():
            if not partitioned or get_rank() == 0:
                fill(target, names, partial(read_plain, checkpoint))
    model.tie_weights()
    if (checkpoint.folder / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(checkpoint.folder)
    return model.eval()
