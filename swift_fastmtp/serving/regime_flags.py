"""Above temperature 0: the regime of drafts (`method.verification`) in an engine's command."""

import json
from dataclasses import replace

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.config_file import TOKEN_MAPS_KEY, TOKEN_MAPS_VARIABLE
from ..errors import FastMTPError
from ..method.verification import BLOCK, GREEDY, Regime
from .flags import ENVIRONMENT, Flag, static_map


def sampled_flags(checkpoint: Checkpoint, flags: list[Flag], engine: str, regime: Regime) -> list[Flag]:
    """A command with what selects a regime above temperature 0.

    SGLang verifies sampled drafts against the whole vocabulary and refuses its own token map with them (0.5.23
    `eagle_worker_v2.py`, `alloc_memory_pool`); this package's plugin keeps the vocabulary and takes the same file.

    Raises `FastMTPError` for what the engine would do otherwise than asked.
    """
    why = f"{regime.title}{_trained_otherwise(checkpoint, regime)}"
    if engine == "sglang":
        if regime.sglang and static_map(flags):
            if any(flag.words[0] == "--enable-lora" for flag in flags):
                raise FastMTPError(
                    f"{checkpoint.folder}: with adapters SGLang has no token map for sampled drafts; use --regime "
                    "greedy"
                )
            flags = _with_plugin_map(flags)
        return [*flags, Flag(regime.sglang, why)] if regime.sglang else flags
    mapped = TOKEN_MAPS_KEY in checkpoint.config or static_map(flags)
    if regime == BLOCK and mapped:
        raise FastMTPError(
            f"{checkpoint.folder}: in vLLM token maps need its older model runner, which has no block verification and "
            "would make greedy drafts; use --regime rejection"
        )
    speculative = json.loads(flags[-1].words[1]) | regime.vllm
    words = (flags[-1].words[0], json.dumps(speculative))
    return [*flags[:-1], replace(flags[-1], words=words, why=f"{flags[-1].why}; {why}")]


def _with_plugin_map(flags: list[Flag]) -> list[Flag]:
    """SGLang's command with its token map handed to this package's plugin."""
    (place,) = [i for i, flag in enumerate(flags) if flag.words[0] == "--speculative-token-map"]
    named = f"{TOKEN_MAPS_VARIABLE}={flags[place].words[1]}"
    why = (
        "the draft's smaller vocabulary, with this package beside SGLang, which refuses its own map with sampled drafts"
    )
    return [Flag((ENVIRONMENT, named), why), *flags[:place], *flags[place + 2 :]]  # --tp-size 1 goes with the map


def _trained_otherwise(checkpoint: Checkpoint, regime: Regime) -> str:
    """What to add to the reason for a regime's flags where the head's loss was measured to be the wrong one for it."""
    if regime == GREEDY or checkpoint.settings.get("loss") != "ce":
        return ""
    return (
        "; trained with `ce`, which with sampled drafts reached 2.16 tokens a step at temperature 1 where `kl` reached "
        "2.50, on the tiny model, and as many with greedy ones (docs/results/losses.md)"
    )
