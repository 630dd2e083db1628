"""GPUs by their data sheets, defined once: what a server's steps take (`step_times.py`) and what training takes
(`training_cost.py`)."""

import re
from dataclasses import dataclass

from ..errors import FastMTPError


@dataclass(frozen=True)
class GPU:
    """Of the data sheet: bytes of memory, bytes per second from it, operations per second in bfloat16, dense, and bytes
    per second to another GPU, one way."""

    memory: float
    bandwidth: float
    operations: float
    link: float


_NVLINK_3, _NVLINK_4 = 300e9, 450e9
_PCIE_4 = 32e9

GPUS = {
    "a100": GPU(80e9, 2.04e12, 312e12, _NVLINK_3),
    "h20": GPU(96e9, 4.0e12, 148e12, _NVLINK_4),
    "h100": GPU(80e9, 3.35e12, 989e12, _NVLINK_4),
    "h200": GPU(141e9, 4.8e12, 989e12, _NVLINK_4),
    "a10": GPU(24e9, 0.6e12, 125e12, _PCIE_4),
    "l40s": GPU(48e9, 0.864e12, 362e12, _PCIE_4),
    "rtx4090": GPU(24e9, 1.008e12, 165.2e12, _PCIE_4),
}
"""NVIDIA's SXM modules (A100: 80 GB; H20: 96 GB), cards for the others, all by NVIDIA's data sheets; the RTX 4090 by
the Ada architecture's white paper, its products accumulated in float32. Memory is in powers of 1000, as printed: cards
hold up to 7% more, which the CUDA context takes."""


def find_gpu(name: str, problem: str) -> GPU:
    """A GPU of the table. Raises `FastMTPError` with the problem and the known names for one that is not in it."""
    if name not in GPUS:
        raise FastMTPError(f"{problem} ({', '.join(GPUS)})")
    return GPUS[name]


def read_gpus(text: str) -> tuple[int, str]:
    """How many of which, of `8xH20` or `H20`; spaces, hyphens and underscores do not count.

    Raises `FastMTPError` for another form, none, or an unknown GPU.
    """
    plain = re.sub(r"[\s_-]", "", text).lower()
    match = re.fullmatch(r"(?:(\d{1,5})x)?([a-z]\w*|4090)", plain)
    number = int(match[1] or 1) if match else 0
    if not match or not number:
        raise FastMTPError(f"--gpus {text}: write how many of which, such as 8xH20 ({', '.join(GPUS)})")
    name = "rtx4090" if match[2] == "4090" else match[2]
    find_gpu(name, f"--gpus {text}: is no GPU that is known")
    return number, name
