"""Loads FP8 checkpoints through transformers as plain weights of the dtype that is asked for, on every device.

transformers' own loader leaves FP8 where a GPU has kernels for it, which come from a hub, and would put the head into
FP8 modules that do not train; where it dequantises, it takes the block size from the number of scales, which is wrong
for matrices with a ragged edge. So its quantiser is kept, with the arithmetic replaced, and always dequantises.
"""

from typing import Any

import torch
from transformers import FineGrainedFP8Config
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, register_quantization_config, register_quantizer
from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer

from ..checkpoint.fp8 import DTYPE, dequantise
from ..checkpoint.fp8_config import Blocks
from ..errors import FastMTPError

_METHOD = "fastmtp_fp8"


class _Dequantise(Fp8Dequantize):
    def _dequantize_one(
        self, quantized: torch.Tensor, scales: torch.Tensor, output_dtype: torch.dtype | None = None
    ) -> torch.Tensor:
        rows, cols = self.hf_quantizer.quantization_config.weight_block_size
        return dequantise(quantized[...], scales[...], Blocks((rows, cols))).to(output_dtype or torch.float32)


class _Quantizer(FineGrainedFP8HfQuantizer):
    def update_weight_conversions(self, weight_conversions: list[Any]) -> list[Any]:
        found = super().update_weight_conversions(weight_conversions)
        for conversion in found:
            if isinstance(conversion, WeightConverter):
                conversion.operations = [
                    _Dequantise(self) if isinstance(op, Fp8Dequantize) else op for op in conversion.operations
                ]
        return list(found)


if _METHOD not in AUTO_QUANTIZER_MAPPING:
    register_quantization_config(_METHOD)(type("DequantisedFP8Config", (FineGrainedFP8Config,), {}))
    register_quantizer(_METHOD)(_Quantizer)


def dequantised(config: Any) -> None:
    """Mark a model's config, so that `from_pretrained` dequantises. In place."""
    config.quantization_config = {**config.quantization_config, "quant_method": _METHOD, "dequantize": True}


def saved_plain(model: Any, model_dir: Any) -> None:
    """Let a dequantised model save the weights that it has; transformers would quantise them again.

    Raises `FastMTPError` if it is not dequantised: of experts that are stored joined, transformers ignores the scales.
    """
    for name, parameter in model.named_parameters():
        if parameter.dtype == DTYPE:
            raise FastMTPError(
                f"{model_dir}: {name} is in FP8, joined, which transformers cannot read; store one tensor per expert "
                "or start from the unquantised checkpoint"
            )
    model._weight_conversions = get_model_conversion_mapping(model)
