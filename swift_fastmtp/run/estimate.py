"""What a plan will take, before it takes it: what is known from files, and what a minute of answering shows.

Answers are most of the work where they are long, and the only stage whose work can be sampled before anything else
exists: some prompts, spread over the files, are answered by the stage's own command. Everything else is arithmetic on
that, and says so; what follows from nothing that was measured is not estimated.
"""

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from ..checkpoint.checkpoint import Checkpoint
from ..errors import FastMTPError
from ..files.jobs import parts_folder
from ..files.rows import BadRows, Row, dump_row, iter_rows, write_rows
from .plan import RunPlan
from .stages import Stage

MEASURED_SECONDS = 60.0
SAMPLE = "estimate"
"""Folder of the answers that are measured."""
WORTH = 4
"""A job of fewer samples than so many is not measured: it is about as long."""
_BATCH, _CONCURRENCY, _TOKENS = 32, 128, 4096
"""Defaults of `fastmtp distill`."""
_ROW_COPIES = 3
"""A row is in distilled.jsonl, clean.jsonl and mixed."""
_FP32, _STATES = 4, 3
"""Bytes of a value; a checkpoint holds the head and two moments of AdamW."""


@dataclass
class Measured:
    """What answering some prompts took."""

    answers: int
    tokens: int
    num_bytes: int
    seconds: float
    whole: bool
    """False if the time was over before all were answered: only the shorter answers are in."""


def count_prompts(plan: RunPlan) -> int | None:
    """None if some are a hub's, which are not here yet."""
    if any(name.partition(":")[0] in ("hf", "swift") for name in plan.keys.prompts):
        return None
    number = 0
    for _ in _rows(plan):
        number += 1
    return number * int(plan.keys.distill.get("num_answers", 1))


def known(plan: RunPlan, number: int | None) -> list[str]:
    """Lines that follow from the files alone."""
    most = int(plan.keys.distill.get("max_new_tokens", _TOKENS))
    checkpoint = Checkpoint(plan.keys.model)
    entries = checkpoint.entries
    stored = sum(entry.size for entry in entries.values())
    values = {name: math.prod(checkpoint.shape(name)) for name in entries}
    head = sum(count for name, count in values.items() if checkpoint.family.owns(name))
    many = "prompts of a hub, not counted" if number is None else f"{number:,} answers"
    lines = [
        f"answers: {many}, at most {most:,} tokens each",
        f"memory: weights of {_size(stored)} as stored, {_size(_FP32 * sum(values.values()))} in float32, in each "
        "stage that computes; activations and caches come on top",
        f"disk: up to {_size(stored)} for the export, less where whole files are linked; "
        f"{_size(_FP32 * _STATES * head)} for each checkpoint of the training",
    ]
    return lines


def sample(plan: RunPlan, stage: Stage, number: int | None, run: Callable[..., int | None]) -> Measured | None:
    """Answer some prompts for at most a minute, with the stage's own command in a folder of its own.

    Args:
        stage: distill.
        number: of all answers.
        run: runs a command: words, `seconds`.

    Returns None where it is not worth it, or nothing was answered.
    """
    keys = plan.keys
    on_servers = bool(stage.values.get("base_url"))
    default = _CONCURRENCY if on_servers else _BATCH
    several = int(keys.distill.get("concurrency" if on_servers else "batch_size", default))
    if number is None or number <= WORTH * several:
        return None
    # The first of two shards: it leaves its answers, and when it began, in the job's folder.
    folder = plan.out / SAMPLE
    prompts, output = folder / "prompts.jsonl", folder / "answers.jsonl"
    with write_rows(prompts) as file:
        for row in _spread(plan, 2 * several):
            file.write(dump_row(row))
    values = {**stage.values, "prompts": [str(prompts)], "output": str(output), "num_answers": 1, "shard": "0/2"}
    words = Stage(stage.name, stage.program, values, output, options=stage.options).words
    print(f"estimate: {several} of {number:,} prompts are answered, for at most a minute", flush=True)
    status = run(words, seconds=MEASURED_SECONDS)
    if status not in (0, None):
        raise FastMTPError(f"distill failed with status {status} on the first prompts; its message is above")
    return _measured(parts_folder(output), status == 0)


def _measured(folder: Path, whole: bool) -> Measured | None:
    """What a job's folder tells; None if no answer ended."""
    (part,) = folder.glob("shard-*.jsonl")
    # The last line may be torn.
    lines = [line for line in part.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
    rows = [record["row"] for record in map(json.loads, lines) if "row" in record]
    if not rows:
        return None
    tokens = sum(len(message.get("token_ids", [])) for row in rows for message in row["messages"])
    seconds = part.stat().st_mtime - (folder / "job.json").stat().st_mtime
    return Measured(len(rows), tokens, sum(len(dump_row(row).encode()) for row in rows), max(seconds, 0.1), whole)


def _spread(plan: RunPlan, count: int) -> Iterator[Row]:
    """So many rows from all over the prompt files."""
    number = sum(1 for _ in _rows(plan))
    every = max(1, number // count)
    return islice(_rows(plan), 0, every * count, every)


def _rows(plan: RunPlan) -> Iterator[Row]:
    """The good rows of the prompt files. Raises `FastMTPError` for a bad one, unless the plan skips them."""
    bad = BadRows(plan.keys.distill.get("on_bad_row", "stop"))
    return (row for name in plan.keys.prompts for _, row in iter_rows(name, bad))


def predicted(number: int, measured: Measured) -> list[str]:
    """Lines that follow from the measurement."""
    scale = number / measured.answers
    least = "" if measured.whole else "at least "
    seconds = measured.seconds * scale
    lines = [
        f"measured: {measured.answers} answers, {measured.tokens:,} tokens in {measured.seconds:.1f} s",
        f"distill: {least}{_time(seconds)}, {measured.tokens * scale:,.0f} tokens (measured, times {scale:.1f})",
        f"disk: {_size(_ROW_COPIES * measured.num_bytes * scale)} for the rows in {_ROW_COPIES} forms",
        "clean, mix, vocab, simulate, export, bench: not measured",
        "train: not known before its first steps, whose progress line tells; the same rows are read in every epoch",
    ]
    if not measured.whole:
        lines.append("only the answers that ended within the minute were counted, which are the short ones")
    return lines


def _size(num_bytes: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.3g} TB"


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
