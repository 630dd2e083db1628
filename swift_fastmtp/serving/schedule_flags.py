"""Drafts by load: the schedule of `fastmtp simulate --costs` in an engine's command."""

import json
from dataclasses import replace
from pathlib import Path

from ..checkpoint.checkpoint import Checkpoint
from ..errors import FastMTPError
from ..files.known_files import read_object
from ..files.show import show
from .flags import Flag


def read_schedule(file: Path) -> dict[int, int]:
    """From which batch size on how many drafts are made: a file for SGLang's --speculative-adaptive-config, with one K
    for each batch size.

    Raises `FastMTPError` for a file that is none, lets the engine choose, or has no entry for one request.
    """
    steps_from = {}
    for size, entry in read_object(file).items():
        candidates = entry.get("candidate_steps") if isinstance(entry, dict) else None
        steps = candidates[0] if isinstance(candidates, list) and len(candidates) == 1 else None
        if not size.isdecimal() or type(steps) is not int or steps < 0:
            raise FastMTPError(
                f'{file}: {show(size)}: must be a batch size with one K, as "8": {{"candidate_steps": [2]}}'
            )
        steps_from[int(size)] = steps
    if 1 not in steps_from:
        raise FastMTPError(f"{file}: has no entry for a batch size of 1")
    return steps_from


def most_drafts(file: Path) -> int:
    """The largest K of a schedule. Raises `FastMTPError` where that is 0."""
    most = max(read_schedule(file).values())
    if most == 0:
        raise FastMTPError(f"{file}: makes drafts at no load; serve the model without --speculative flags")
    return most


def with_schedule(checkpoint: Checkpoint, flags: list[Flag], engine: str, file: Path) -> list[Flag]:
    """A command that makes `most_drafts`, with K by load: SGLang reads the file, vLLM gets its ranges.

    SGLang sizes its buffers for the largest K of the file, and starts with the one that it is told, which must be in it
    (0.5.23 `speculative_hook.py:_init_adaptive_speculative_params`).

    Raises `FastMTPError` for what the engine does not do by load.
    """
    if engine == "sglang":
        if any(flag.words[0] == "--enable-lora" for flag in flags):
            raise FastMTPError(
                f"{checkpoint}: SGLang has no drafts by load beside LoRA adapters (0.5.23 `lora_hook.py`); leave out "
                "--schedule"
            )
        return [
            *flags,
            Flag(("--speculative-adaptive",), "K by load"),
            Flag(("--speculative-adaptive-config", str(file)), "from how many requests at once on which K"),
        ]
    steps_from = read_schedule(file)
    sizes = sorted(steps_from)
    ends = [size - 1 for size in sizes[1:]] + [sizes[-1]]  # vLLM goes on with the last range (dynamic/utils.py)
    ranges = [[start, end, steps_from[start]] for start, end in zip(sizes, ends, strict=True)]
    speculative = json.loads(flags[-1].words[1])
    speculative["num_speculative_tokens_per_batch_size"] = ranges
    words = (flags[-1].words[0], json.dumps(speculative))
    return [*flags[:-1], replace(flags[-1], words=words, why=f"K by load; {flags[-1].why}")]
