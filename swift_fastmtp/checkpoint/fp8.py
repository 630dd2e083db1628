"""FP8 in blocks: the one quantized form of a checkpoint that is read, trained and written back.

A matrix W is stored as `W.weight` in float8_e4m3fn and `W.weight_scale_inv` S, one number for each block of
`weight_block_size` (the last row and column of blocks may be smaller), and means W * S (DeepSeek-V3's format; SGLang
`layers/quantization/fp8.py`, transformers `FineGrainedFP8Config`). Which tensors are stored so is read off the files:
those with such a sibling. The rest of a checkpoint is plain.
"""

import torch
from torch.nn.functional import pad

from ..errors import FastMTPError
from .fp8_config import Blocks

DTYPE = torch.float8_e4m3fn


_MAX = torch.finfo(DTYPE).max  # 448


_SCALE_DTYPES = (torch.float32, torch.bfloat16)  # both reach down to 1e-38


def _tiles(tensor: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """[..., rows, columns] as [..., R, a, C, b], zeros behind a ragged edge."""
    (rows, cols), (a, b) = tensor.shape[-2:], size
    if rows % a or cols % b:
        tensor = pad(tensor, (0, -cols % b, 0, -rows % a))
    return tensor.unflatten(-1, (-1, b)).unflatten(-3, (-1, a))


def _matrix(tiles: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    return tiles.flatten(-2).flatten(-3, -2)[..., : shape[-2], : shape[-1]].contiguous()


def dequantize(weight: torch.Tensor, scale: torch.Tensor, blocks: Blocks) -> torch.Tensor:
    """W * S in float32.

    Raises `FastMTPError` if the scales do not cover the weight, or have a dtype that no engine reads as numbers.
    """
    if scale.dtype not in _SCALE_DTYPES or tuple(scale.shape) != blocks.grid(weight.shape):
        raise FastMTPError(
            f"weight {list(weight.shape)} has scales {list(scale.shape)} of {scale.dtype}; blocks of "
            f"{list(blocks.size)} need {list(blocks.grid(weight.shape))} in float32 or bfloat16"
        )
    tiles = _tiles(weight.float(), blocks.size)
    return _matrix(tiles.mul_(scale.float()[..., None, :, None]), weight.shape)


def quantize(
    tensor: torch.Tensor, blocks: Blocks, scale_dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight and scale of a finite tensor [..., rows, columns].

    The largest value of a block becomes 448, the largest of the format. So the error of a value x is at most
    |x| / 16 (half of the last of 3 mantissa bits), or scale / 1024 where |x| is below scale / 64.
    """
    tiles = _tiles(tensor.float(), blocks.size)
    largest = tiles.abs().amax((-3, -1))
    scale = _storable(largest / _MAX, blocks, scale_dtype)
    scale = torch.where(largest > 0, scale, torch.ones_like(scale))
    return _matrix(_round(tiles, scale), tensor.shape), scale


def _storable(scale: torch.Tensor, blocks: Blocks, dtype: torch.dtype) -> torch.Tensor:
    scale = scale.clamp(min=torch.finfo(torch.float32).tiny)  # a subnormal scale would be rounded away, and divide by 0
    if blocks.power_of_two:
        mantissa, exponent = torch.frexp(scale)
        scale = torch.ldexp(torch.ones_like(scale), exponent - (mantissa == 0.5).int())
    return scale.to(dtype)


def _round(tiles: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Clamped, because a stored scale may be a little smaller than the exact one, and the format has no infinity."""
    return (tiles / scale.float()[..., None, :, None]).clamp_(-_MAX, _MAX).to(DTYPE)


def requantize(
    tensor: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, blocks: Blocks
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight and scale for a trained tensor, in the form of the base's own `weight` and `scale`.

    A block that rounds to the base's bytes under the base's scale keeps both, so what training did not move stays bit
    for bit; any other block gets the scale of its own largest value.
    """
    kept = _round(_tiles(tensor.float(), blocks.size), scale).view(torch.uint8)
    same = (kept == _tiles(weight.view(torch.uint8), blocks.size)).all(-1).all(-2)
    del kept
    new_weight, new_scale = quantize(tensor, blocks, scale.dtype)
    new = torch.where(
        same[..., None, :, None],
        _tiles(weight.view(torch.uint8), blocks.size),
        _tiles(new_weight.view(torch.uint8), blocks.size),
    )
    return _matrix(new, weight.shape).view(DTYPE), torch.where(same, scale, new_scale)
