"""What DeepSpeed's ZeRO-3 makes of a parameter: attributes that it adds, and does not document.

Tried with deepspeed 0.19.8 (`runtime/zero/partition_parameters.py`, `_convert_to_deepspeed_param`). Whether they are
there is looked at once a model has been made (`check_partitioned`); without that look a renamed one would be silent: a
part of a parameter would be taken for the whole.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch.distributed import get_world_size

from ..files.libraries import changed

# Each parameter has a number, its whole shape, and this rank's flat part of it.
_NAMES = ("ds_id", "ds_shape", "ds_tensor")


def is_partitioned(tensor: Any) -> bool:
    """Whether ZeRO-3 has taken the tensor apart."""
    return hasattr(tensor, "ds_id")


def whole_shape(tensor: Any) -> torch.Size:
    """The shape of the whole parameter, whoever holds its parts."""
    shape: torch.Size = getattr(tensor, "ds_shape", tensor.shape)
    return shape


def own_part(tensor: Any) -> torch.Tensor:
    """What this rank holds of a parameter: all of it, or its flat part."""
    part: torch.Tensor = getattr(tensor, "ds_tensor", tensor)
    return part


def check_partitioned(parameters: Iterable[Any]) -> None:
    """For the parameters of a model that was just made under ZeRO-3, at least one of which is partitioned.

    Raises `FastMTPError` if none is, or one has not all of the attributes that this file reads.
    """
    partitioned = [p for p in parameters if any(hasattr(p, name) for name in _NAMES)]
    if not partitioned:
        raise changed("deepspeed", f"ZeRO-3 gives parameters none of {', '.join(_NAMES)} (their whole shape)")
    for parameter in partitioned:
        for name in _NAMES:
            if not hasattr(parameter, name):
                raise changed("deepspeed", f"ZeRO-3 gives a parameter no {name} (its whole shape, or this rank's part)")
        whole, part = parameter.ds_shape.numel(), parameter.ds_tensor.numel()
        if part * get_world_size() < whole:
            raise changed("deepspeed", f"ds_tensor is no rank's part of ds_shape ({part} of {whole} numbers)")
