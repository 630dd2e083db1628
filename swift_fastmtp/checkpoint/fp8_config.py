"""FP8 in blocks as config.json describes it; needs no torch. The numbers are `fp8.py`'s."""

from dataclasses import dataclass
from typing import Any

from ..errors import FastMTPError

SCALE = "_scale_inv"
"""What the name of a matrix's scales ends with."""


@dataclass(frozen=True)
class Blocks:
    """How a checkpoint's matrices are quantized."""

    size: tuple[int, int]
    """Rows and columns that share a scale."""
    power_of_two: bool = False
    """Scales are powers of two (`scale_fmt` ue8m0, as DeepSeek-V3.1 has them)."""

    def grid(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the scales of a tensor [..., rows, columns]; dimensions before are other matrices, as experts."""
        (rows, cols), (a, b) = shape[-2:], self.size
        return (*shape[:-2], -(-rows // a), -(-cols // b))


def read_blocks(config: dict[str, Any], where: Any = "config.json") -> Blocks | None:
    """What `quantization_config` of a config.json says; None is an unquantized checkpoint.

    Raises `FastMTPError` for every other kind of quantization.
    """
    text = config.get("text_config")
    quantization = config.get("quantization_config") or (
        text.get("quantization_config") if isinstance(text, dict) else None
    )
    if not quantization:
        return None
    size = quantization.get("weight_block_size")
    sound = isinstance(size, list | tuple) and len(size) == 2 and all(isinstance(n, int) and n > 0 for n in size)
    kind = (
        quantization.get("quant_method"),
        quantization.get("fmt", "e4m3"),
        str(quantization.get("activation_scheme", "dynamic")).lower(),
    )
    if kind != ("fp8", "e4m3", "dynamic") or not sound:
        raise FastMTPError(
            f"{where}: quantization_config is {kind[0]!r} with weight_block_size {size}, "
            f"activations {kind[2]}; of quantized checkpoints only FP8 in blocks "
            "('fp8', e4m3, [128, 128] or so, dynamic) is trained: start from that or from the unquantized checkpoint"
        )
    return Blocks((size[0], size[1]), quantization.get("scale_fmt") == "ue8m0")


def without_quantization(config: dict[str, Any]) -> dict[str, Any]:
    """config.json for a folder whose tensors are all plain."""
    plain = {k: v for k, v in config.items() if k != "quantization_config"}
    if isinstance(plain.get("text_config"), dict):
        plain["text_config"] = {k: v for k, v in plain["text_config"].items() if k != "quantization_config"}
    return plain
