"""A minute of the two stages that take longest, before anything else is done: some answers, and steps on them.

Both are measured by the stage's own command, in a folder of its own, so that what is measured is what will run: the
same model, servers, batch and options. What was measured is kept in that folder until the estimate is made of it, so a
run that is killed meanwhile measures only what it had not finished.
"""

import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from itertools import cycle, islice
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel

from ..errors import FastMTPError
from ..files.jobs import parts_folder
from ..files.known_files import read_object
from ..files.rows import BadRows, Row, dump_row, iter_rows, read_rows, write_rows
from ..files.schema import Amount, Count, Positive, build
from ..files.staging import write_json
from .plan import RunPlan
from .process import Ended
from .stages import Stage

SECONDS = 60.0
"""For answers, and for steps; what comes before the first of them, as loading a model, is not counted."""
FOLDER = "estimate"
WORTH = 4
"""A job of fewer samples than so many is not measured: it is about as long."""
STEPS = 8
"""Of training."""
_BATCH, _CONCURRENCY = 32, 128
"""Defaults of `fastmtp distill`."""
_TOTAL_BATCH = 16
"""Rows of a step, from which ms-swift chooses `gradient_accumulation_steps`."""

Measured = TypeVar("Measured", bound=BaseModel)
Run = Callable[..., Ended]
"""Runs a command: words, then `environment`, `seconds`, `since` (`process.run_command`)."""


class Answers(BaseModel):
    """What answering some prompts took."""

    answers: Positive
    at_once: Positive
    tokens: Count
    num_bytes: Count
    seconds: Amount
    start_seconds: Amount
    """Until the first prompt was asked: imports, loading the model."""
    server_seconds: Amount = 0.0
    """Until the engine's server was ready; 0 where none was started."""
    memory: Count | None
    in_process: bool
    whole: bool
    """False if the time was over before all were answered: only the shorter answers are in."""

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds


class Training(BaseModel):
    """What some steps of training on these answers took."""

    kept: Amount
    """Of the answers, the share that `fastmtp clean` kept."""
    num_bytes: Amount
    """Of a kept row."""
    tokens: Amount
    """Of a row, prompt and answer, on average; without the rows that are longer than `max_length`."""
    answer_tokens: Amount
    longest: Count
    fitting: Amount
    """Share of the rows that are not longer than `max_length`."""
    steps: Positive
    step_seconds: Amount
    start_seconds: Amount
    """Of the command without its steps."""
    memory: Count | None
    gpu_memory: Amount | None
    """Bytes of one GPU, as ms-swift logs them."""
    settings: dict[str, Any]
    """ms-swift's own (`args.json`), as far as they count here."""

    @property
    def step_rows(self) -> int:
        """Rows of a step, on all processes; where they are packed, sequences."""
        return int(
            self.settings["per_device_train_batch_size"]
            * self.settings["gradient_accumulation_steps"]
            * self.settings["global_world_size"]
        )


def count_prompts(plan: RunPlan) -> int | None:
    """Answers that the plan asks for. None if some prompts are a hub's, which are not here yet."""
    if any(name.partition(":")[0] in ("hf", "swift") for name in plan.keys.prompts):
        return None
    number = 0
    for _ in prompt_rows(plan):
        number += 1
    return number * int(plan.keys.distill.get("num_answers", 1))


def prompt_rows(plan: RunPlan) -> Iterator[Row]:
    """The good rows of the prompt files. Raises `FastMTPError` for a bad one, unless the plan skips them."""
    bad = BadRows(plan.keys.distill.get("on_bad_row", "stop"))
    return (row for name in plan.keys.prompts for _, row in iter_rows(name, bad))


def why_not_measured(plan: RunPlan, number: int | None, on_servers: bool) -> str:
    """The reason, or `` where a measurement is worth it."""
    if not plan.keys.estimate:
        return "the plan has `estimate: off`"
    if number is None:
        return "the prompts are a hub's, and not here yet"
    several = at_once(plan, on_servers)
    if number <= WORTH * several:
        return f"{number:,} answers are at most {WORTH} times as many as the {several:,} that are generated together"
    return ""


def at_once(plan: RunPlan, on_servers: bool) -> int:
    """Answers that are generated together."""
    if on_servers:
        return int(plan.keys.distill.get("concurrency", _CONCURRENCY))
    return int(plan.keys.distill.get("batch_size", _BATCH))


def take_away(out: Path) -> None:
    """Remove what was measured. Raises `FastMTPError` if that cannot be."""
    folder = out / FOLDER
    try:
        if folder.exists():
            shutil.rmtree(folder)
    except OSError as error:
        raise FastMTPError(f"{folder}: cannot be removed ({error.strerror})") from None


# Answers.


def measure_answers(
    plan: RunPlan, stage: Stage, number: int, run: Run, server: Callable[[], AbstractContextManager[None]]
) -> Answers | str:
    """Answer some prompts for at most a minute. Returns why nothing was measured, if so.

    Args:
        stage: distill.
        number: of all answers.
        server: the engine's, while it is needed; it tells the stage its address.
    """
    folder = plan.out / FOLDER
    settings = stage.settings(plan.out)
    if kept := _kept(folder / "answers.json", Answers, settings):
        return kept
    take_away(plan.out)
    begun = time.monotonic()
    with server():
        server_seconds = time.monotonic() - begun
        in_process = not stage.values.get("base_url")
        several = at_once(plan, not in_process)
        # The first of two shards: it leaves its answers, and when it began, in the job's folder.
        prompts, output = folder / "prompts.jsonl", folder / "answers.jsonl"
        with write_rows(prompts) as file:
            for row in _spread(plan, 2 * several):
                file.write(dump_row(row))
        values = {**stage.values, "prompts": [str(prompts)], "output": str(output), "num_answers": 1, "shard": "0/2"}
        words = Stage(stage.name, stage.program, values, output, options=stage.options).words
        print(f"estimate: {several} of {number:,} prompts are answered, for at most a minute", flush=True)
        started = time.time()
        job = parts_folder(output) / "job.json"
        ended = run(words, seconds=SECONDS, since=job)
    if ended.status not in (0, None):
        raise FastMTPError(f"distill failed with status {ended.status} on the first prompts; its message is above")

    parts = list(job.parent.glob("shard-*.jsonl"))
    # The last line may be torn.
    lines: list[bytes] = []
    for part in parts:
        lines += part.read_bytes().splitlines(keepends=True)
    records = [json.loads(line) for line in lines if line.endswith(b"\n")]
    rows = [record["row"] for record in records if "row" in record]
    if not rows:
        return f"no answer ended within {SECONDS:.0f} s"
    with write_rows(output) as file:
        for row in rows:
            file.write(dump_row(row))
    asked = job.stat().st_mtime
    answers = Answers(
        answers=len(rows),
        at_once=several,
        tokens=sum(len(message.get("token_ids", [])) for row in rows for message in row["messages"]),
        num_bytes=output.stat().st_size,
        seconds=max(parts[0].stat().st_mtime - asked, 0.1),
        start_seconds=max(asked - started, 0.0),
        server_seconds=server_seconds if stage.values.get("base_url") and not plan.keys.base_url else 0.0,
        memory=ended.memory,
        in_process=in_process,
        whole=ended.status == 0,
    )
    _keep(answers, settings, folder / "answers.json")
    return answers


def _kept(record: Path, kind: type[Measured], settings: dict[str, Any]) -> Measured | None:
    """What a run that was killed had measured; None if it had not, or with another plan."""
    known = read_object(record)
    if known.get("settings") != settings:
        return None
    return build(kind, known.get("measured"), str(record))


def _keep(measured: BaseModel, settings: dict[str, Any], record: Path) -> None:
    write_json({"settings": settings, "measured": measured.model_dump()}, record)


def _spread(plan: RunPlan, count: int) -> Iterator[Row]:
    """So many rows from all over the prompt files."""
    number = sum(1 for _ in prompt_rows(plan))
    every = max(1, number // count)
    return islice(prompt_rows(plan), 0, every * count, every)


# Training.


def measure_training(plan: RunPlan, clean: Stage, train: Stage, run: Run) -> Training | str:
    """Clean the answers, and train on what is left for a few steps, without evaluations and checkpoints.

    Returns why nothing was measured, if so. Raises `FastMTPError` if training fails, unless servers that we did not
    start give the answers: they may have the memory that it would need.
    """
    folder = plan.out / FOLDER / "training"
    record = plan.out / FOLDER / "training.json"
    of_plan = {stage.name: stage.settings(plan.out) for stage in (clean, train)}
    if kept := _kept(record, Training, of_plan):
        return kept
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir()

    # What would be trained on.
    answers, cleaned = folder.parent / "answers.jsonl", folder / "clean.jsonl"
    values = {**clean.values, "inputs": [str(answers)], "output": str(cleaned)}
    ended = run(Stage("clean", clean.program, values, cleaned, options=clean.options).words)
    if ended.status or not cleaned.exists():
        return "`fastmtp clean` failed on the first answers; its message is above"
    rows = read_rows(cleaned)
    if not rows:
        return "`fastmtp clean` kept none of the first answers; their report is above"

    # Their steps, each as large as the plan's.
    sizes = [_size(row) for row in rows]
    step_rows = _rows_of_a_step(plan, sum(prompt + answer for prompt, answer in sizes) / len(sizes))
    sample, output = folder / "rows.jsonl", folder / "train"
    with write_rows(sample) as file:
        for row in islice(cycle(rows), max(STEPS * step_rows, len(rows))):
            file.write(dump_row(row))
    changed = _changed(plan, train, sample, output)
    if isinstance(changed, str):
        return changed
    print(f"estimate: {STEPS} steps of training on {len(rows)} of these answers, for at most a minute", flush=True)
    stage = Stage(train.name, train.program, changed, output, words_before=train.words_before)
    log = output / "logging.jsonl"
    ended = run(stage.words, environment=train.environment, seconds=SECONDS, since=log)
    times = logged_steps(log)
    if ended.status not in (0, None) or not times:
        why = f"train failed with status {ended.status} on the first answers; its message is above"
        if plan.keys.base_url:
            return f"{why}; the servers at base_url may have the memory that it needs"
        raise FastMTPError(
            f"{why}; change what it names and start again, or leave the measurement out with `estimate: off`"
        )

    settings = _settings(output)
    limit = settings["max_length"] or math.inf
    fitting = [(prompt, answer) for prompt, answer in sizes if prompt + answer <= limit]
    steps, elapsed, gpu_memory = times
    # The first step warms up, and counts as part of the start.
    step_seconds = (elapsed[-1] - elapsed[0]) / (steps - 1) if steps > 1 else elapsed[0]
    in_steps = steps * step_seconds if ended.status == 0 else SECONDS + step_seconds
    training = Training(
        kept=len(rows) / len(read_rows(answers)),
        num_bytes=cleaned.stat().st_size / len(rows),
        tokens=sum(map(sum, fitting)) / max(1, len(fitting)),
        answer_tokens=sum(answer for _, answer in fitting) / max(1, len(fitting)),
        longest=max(map(sum, sizes)),
        fitting=len(fitting) / len(sizes),
        steps=steps,
        step_seconds=step_seconds,
        start_seconds=max(0.0, ended.seconds - in_steps),
        memory=ended.memory,
        gpu_memory=gpu_memory,
        settings=settings,
    )
    _keep(training, of_plan, record)
    return training


def _size(row: Row) -> tuple[int, int]:
    """Tokens of the last prompt, which has the turns before it, and of the answer to it."""
    last = row["messages"][-1]
    return len(last.get("prompt_token_ids", [])), len(last.get("token_ids", []))


def _rows_of_a_step(plan: RunPlan, tokens: float) -> int:
    """As far as the plan tells; a packed sequence is as long as it may be."""
    variables = {**os.environ, **plan.asked("ENV", {}), **plan.train.environment}
    processes = int(variables.get("NPROC_PER_NODE", 1)) * int(variables.get("NNODES", 1))
    batch = int(plan.asked("per_device_train_batch_size", 1)) * processes
    rows = batch * int(plan.asked("gradient_accumulation_steps", math.ceil(_TOTAL_BATCH / batch)))
    packed = math.ceil(int(plan.asked("max_length", 2048)) / max(tokens, 1)) if plan.asked("packing") else 1
    return rows * packed


def _changed(plan: RunPlan, train: Stage, rows: Path, output: Path) -> dict[str, Any] | str:
    """The values of the measurement's command, or why there is none."""
    dataset = f"fastmtp-self-distill:{rows}"
    values = {
        **train.values,
        "dataset": dataset,
        "val_dataset": dataset,
        "output_dir": str(output),
        "max_steps": STEPS,
        "logging_steps": 1,
        "eval_strategy": "no",
        "eval_on_start": False,
        "save_strategy": "no",
        "load_best_model_at_end": False,
        "create_checkpoint_symlink": False,
        "report_to": "none",
    }
    knobs = dict(plan.asked("model_kwargs", {}))
    cache = next((key for key in knobs if key.lower() == "fastmtp_hidden_cache"), None)
    if cache is not None:
        if Path(str(knobs[cache])).exists():
            return f"its hidden states are taken from {knobs[cache]}, which has none of the first answers"
        values["model_kwargs"] = {**knobs, cache: str(output.parent / "states")}
    return values


def logged_steps(log: Path) -> tuple[int, list[float], float | None] | None:
    """Steps, the seconds from the beginning to the end of each, and bytes of a GPU; None if no step was logged."""
    elapsed, gpu_memory = [], None
    for line in log.read_bytes().splitlines(keepends=True) if log.exists() else []:
        if not line.endswith(b"\n"):
            continue  # torn
        logged = json.loads(line)
        if "loss" not in logged:
            continue
        step = int(str(logged["global_step/max_steps"]).partition("/")[0])
        elapsed.append(step * float(logged["train_speed(s/it)"]))
        if "memory(GiB)" in logged:
            gpu_memory = float(logged["memory(GiB)"]) * 2**30
    return (len(elapsed), elapsed, gpu_memory) if elapsed else None


def _settings(output: Path) -> dict[str, Any]:
    """Of ms-swift's `args.json`."""
    args = read_object(output / "args.json")
    batch, processes = int(args.get("per_device_train_batch_size") or 1), int(args.get("global_world_size") or 1)
    accumulated = args.get("gradient_accumulation_steps") or math.ceil(_TOTAL_BATCH / batch / processes)
    return {
        "per_device_train_batch_size": batch,
        "global_world_size": processes,
        "gradient_accumulation_steps": int(accumulated),
        "num_train_epochs": float(args.get("num_train_epochs") or 1),
        "max_length": args.get("max_length"),
        "packing": bool(args.get("packing")),
        "save_total_limit": args.get("save_total_limit"),
        "deepspeed": bool(args.get("deepspeed")),
        "model_kwargs": args.get("model_kwargs") or {},
    }
