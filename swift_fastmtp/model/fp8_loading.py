"""Loads FP8 checkpoints through transformers as plain weights of the dtype that is asked for, on every device.

transformers' own loader leaves FP8 where a GPU has kernels for it, which come from a hub, and would put the head into
FP8 modules that do not train; where it dequantizes, it takes the block size from the number of scales, which is wrong
for matrices with a ragged edge. So its quantizer is kept, with the arithmetic replaced (`compat_transformers.py`), and
always dequantizes.
"""

from typing import Any

from ..checkpoint.fp8 import DTYPE
from ..errors import FastMTPError
from .compat_transformers import FP8_METHOD, register_fp8, save_as_loaded_plain


def dequantized(config: Any) -> None:
    """Mark a model's config, so that `from_pretrained` dequantizes. In place."""
    register_fp8()
    config.quantization_config = {**config.quantization_config, "quant_method": FP8_METHOD, "dequantize": True}


def saved_plain(model: Any, model_dir: Any) -> None:
    """Let a dequantized model save the weights that it has; transformers would quantize them again.

    Raises `FastMTPError` if it is not dequantized: of experts that are stored joined, transformers ignores the scales.
    """
    for name, parameter in model.named_parameters():
        if parameter.dtype == DTYPE:
            raise FastMTPError(
                f"{model_dir}: {name} is in FP8, joined, which transformers cannot read; store one tensor per expert "
                "or start from the unquantized checkpoint"
            )
    save_as_loaded_plain(model)
