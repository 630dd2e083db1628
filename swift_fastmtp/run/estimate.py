"""What a plan will take, before it takes it: what is known from files, and what follows from a minute of each stage
that takes long (`measure.py`).

The rest is arithmetic, and each assumption in it is a line beneath the table. What follows from nothing that was
measured is not estimated.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path

from pydantic import BaseModel

from ..bench.order import plan_passes
from ..bench.plan import make_plan
from ..checkpoint.checkpoint import Checkpoint
from ..export.inspection import size
from ..files.rows import iter_rows
from ..files.schema import Amount
from ..files.table import NOTHING, duration, terminal_table
from ..method.config import FastMTPConfig
from ..simulate.training_cost import ModelNumbers, Workload, operations, working_bytes
from .measure import Answers, Training
from .plan import RunPlan, eval_file
from .stages import Stage, bench_plan

_TOKENS, _SIMULATED_TOKENS = 4096, 1024
"""Defaults of `fastmtp distill` and `fastmtp simulate`."""
_VAL_RATIO = 0.005
"""Of `fastmtp mix`."""
_EVERY = 500
"""Steps between two evaluations, and two checkpoints, in ms-swift."""
_FP32 = 4
_CHECKPOINT, _DEEPSPEED_CHECKPOINT = 12, 16
"""Bytes of a checkpoint for each parameter of the head: weights and two moments in float32; with DeepSpeed a copy."""
_HEADS = 2
"""That `fastmtp simulate` compares."""


class Need(BaseModel):
    """What a stage takes; None: not known."""

    seconds: Amount | None = None
    disk: Amount | None = None
    """Bytes."""
    memory: Amount | None = None
    """Bytes of RAM of its largest process."""
    gpu_memory: Amount | None = None
    """Bytes of one GPU."""


class Estimate(BaseModel):
    """What the stages of a plan take, by name, and what was assumed."""

    needs: dict[str, Need] = {}
    lines: list[str] = []

    def text(self) -> str:
        """For people: the table, and the lines beneath it."""
        rows = [row for row in map(_row, self.needs, self.needs.values()) if any(cell != NOTHING for cell in row[1:])]
        if len(rows) > 1:
            rows.append(_row("the whole", whole(list(self.needs.values()))))
        table = terminal_table(["stage", "time", "disk", "memory"], rows, num_text=4) if rows else ""
        return "\n".join([*([table] if table else []), *self.lines])


def _row(name: str, need: Need) -> list[str]:
    return [name, time_of(need), disk_of(need), memory_of(need)]


def time_of(need: Need) -> str:
    return NOTHING if need.seconds is None else duration(need.seconds)


def disk_of(need: Need) -> str:
    return NOTHING if need.disk is None else size(round(need.disk))


def memory_of(need: Need) -> str:
    parts = [] if need.memory is None else [size(round(need.memory))]
    if need.gpu_memory is not None:
        parts.append(f"GPU {size(round(need.gpu_memory))}")
    return ", ".join(parts) or NOTHING


def whole(needs: Sequence[Need]) -> Need:
    """Of all stages together, as far as they are known; one runs at a time."""

    def known(name: str) -> list[float]:
        return [value for value in (getattr(need, name) for need in needs) if value is not None]

    seconds, disk = known("seconds"), known("disk")
    memory, gpu_memory = known("memory"), known("gpu_memory")
    return Need(
        seconds=sum(seconds) if seconds else None,
        disk=sum(disk) if disk else None,
        memory=max(memory, default=None),
        gpu_memory=max(gpu_memory, default=None),
    )


def from_files(plan: RunPlan, stages: Sequence[Stage], number: int | None) -> Estimate:
    """What follows from the files alone."""
    most = int(plan.keys.distill.get("max_new_tokens", _TOKENS))
    stored = sum(entry.size for entry in plan.checkpoint.entries.values())
    parameters = sum(_parameters(plan.checkpoint).values())
    many = "prompts of a hub, not counted" if number is None else f"{number:,} answers"
    needs = {stage.name: Need() for stage in stages if stage.name not in ("inspect", "report", "card")}
    if "train" in needs:
        needs["train"].disk = _checkpoints(plan, None)
    if "export" in needs:
        needs["export"].disk = stored
    each = _checkpoint_bytes(plan)
    lines = [
        f"answers: {many}, at most {most:,} tokens each",
        f"weights: {size(stored)} as stored, {size(_FP32 * parameters)} in float32, in each stage that computes; "
        "activations and caches come on top",
        f"disk: {'not known' if each is None else size(each)} for each checkpoint of the training; the export takes "
        "less where whole files are linked",
    ]
    return Estimate(needs=needs, lines=lines)


def _parameters(checkpoint: Checkpoint) -> dict[str, int]:
    """Of each tensor."""
    return {name: math.prod(checkpoint.shape(name)) for name in checkpoint.entries}


def _checkpoint_bytes(plan: RunPlan) -> int | None:
    """None where the layer is made later."""
    layer = plan.layer
    if layer is None:
        return None
    family = layer.family
    head = sum(count for name, count in _parameters(layer).items() if family.owns(name))
    return (_DEEPSPEED_CHECKPOINT if plan.asked("deepspeed") else _CHECKPOINT) * head


def _checkpoints(plan: RunPlan, written: int | None) -> float | None:
    """Bytes of the checkpoints that are there at once: `save_total_limit`, and the one that is being written.

    Args:
        written: how many checkpoints training writes; None: not known.
    """
    limit, each = plan.asked("save_total_limit"), _checkpoint_bytes(plan)
    numbers = [number for number in (written, limit and int(limit) + 1) if number]
    return float(min(numbers) * each) if numbers and each else None


def _how_often(plan: RunPlan, what: str, steps: int, epochs: float) -> int:
    """How often training evaluates (`eval`) or writes a checkpoint (`save`)."""
    strategy = plan.asked(f"{what}_strategy") or plan.asked("save_strategy", "steps")
    if strategy == "no":
        return 0
    if strategy == "epoch":
        return math.ceil(epochs)
    every = float(plan.asked(f"{what}_steps", _EVERY))
    return int(steps // max(1, every if every >= 1 else every * steps))  # a share of all steps


def measured(
    plan: RunPlan, stages: Sequence[Stage], number: int | None, answers: Answers | str, training: Training | str
) -> Estimate:
    """What follows from the measurements too.

    Args:
        number: of answers.
        answers: or why nothing was measured.
        training: the same.
    """
    made = from_files(plan, stages, number)
    if isinstance(answers, str) or number is None:
        made.lines.append(f"nothing was measured: {answers}")
        return made
    lines = [f"measured: {answers.answers} answers, {answers.tokens:,} tokens in {answers.seconds:.1f} s"]
    if not answers.whole:
        lines.append("only the answers that ended within the minute were counted, which are the short ones")
    scale = number / answers.answers
    needs = made.needs
    start = answers.server_seconds + answers.start_seconds
    needs["distill"] = Need(
        seconds=start + answers.seconds * scale, disk=answers.num_bytes * scale, memory=answers.memory
    )
    kept = 1.0 if isinstance(training, str) else training.kept
    for name in ("clean", "mix"):
        if name in needs:
            needs[name].disk = answers.num_bytes * scale * kept
    if "train" in needs:
        if isinstance(training, str):
            lines.append(f"train: not measured: {training}")
        else:
            needs["train"], added = _train(plan, number, training)
            lines += added
    per_token = None if isinstance(training, str) else training.step_seconds / training.step_rows / training.tokens
    if "simulate" in needs:
        lines += _simulate(plan, needs, number, answers, per_token)
    if "bench" in needs:
        lines += _bench(plan, needs["bench"], answers)
    lines.append("clean, mix, vocab, export: their time was not measured; no model runs in them")
    made.lines += lines
    return made


def _train(plan: RunPlan, number: int, training: Training) -> tuple[Need, list[str]]:
    from ..simulate.model_numbers import read_numbers

    settings = training.settings
    rows, steps = _rows_and_steps(plan, number, training)
    epochs = settings["num_train_epochs"]
    if int(plan.asked("max_steps", 0) or 0) > 0:
        epochs = steps * training.step_rows / max(1.0, _sequences(rows, training))
    seconds = training.start_seconds + steps * training.step_seconds

    # Evaluations: the one before the first step too.
    model, work = read_numbers(Checkpoint(plan.trained_model)), _workload(plan, training)
    share = _forward_share(model, work)
    val_rows = number * training.kept * _val_ratio(plan)
    evaluations = _how_often(plan, "eval", steps, epochs)
    evaluations += 1 if evaluations else 0
    seconds += evaluations * val_rows * share * training.step_seconds / training.step_rows

    packed = f" packed into {settings['max_length']:,}" if settings["packing"] else ""
    lines = [
        f"measured: {training.steps} steps of training, {training.step_seconds:.2f} s each, on "
        f"{100 * training.kept:.0f}% of these answers, which `fastmtp clean` kept",
        f"train: {steps:,} steps, {epochs:.2g} epochs of {rows:,.0f} rows of {training.tokens:.0f} tokens{packed}, "
        f"{training.step_rows} to a step; assumed: other answers are kept as often, and mixing takes all of them",
        f"train: {evaluations} evaluations of {val_rows:,.0f} rows; assumed: a row takes {100 * share:.0f}% of its "
        "time in a step, by the arithmetic of a pass without gradients",
    ]
    if training.fitting < 1:
        lines.append(f"train: {100 * (1 - training.fitting):.0f}% of the rows are longer than max_length, and left out")
    lines += _memory_of_the_longest(model, work, training)
    # One is written at the end too.
    disk = _checkpoints(plan, max(1, _how_often(plan, "save", steps, epochs)))
    return Need(seconds=seconds, disk=disk, memory=training.memory, gpu_memory=training.gpu_memory), lines


def _val_ratio(plan: RunPlan) -> float:
    return float(plan.keys.mix.get("val_ratio", _VAL_RATIO))


def _rows_and_steps(plan: RunPlan, number: int, training: Training) -> tuple[float, int]:
    """Rows that are trained on, and steps of the whole training."""
    settings = training.settings
    rows = number * training.kept * (1 - _val_ratio(plan)) * training.fitting
    if (tokens := plan.keys.mix.get("tokens")) is not None:
        from ..data.mix import parse_tokens

        rows = min(rows, parse_tokens(str(tokens)) / max(training.answer_tokens, 1))
    steps = int(plan.asked("max_steps", 0) or 0)
    if steps <= 0:
        batches = math.ceil(
            _sequences(rows, training) / settings["per_device_train_batch_size"] / settings["global_world_size"]
        )
        an_epoch = max(1, math.ceil(batches / settings["gradient_accumulation_steps"]))
        steps = math.ceil(settings["num_train_epochs"] * an_epoch)
    return rows, steps


def _sequences(rows: float, training: Training) -> float:
    """Rows, or as many as they are packed into."""
    settings = training.settings
    return rows * training.tokens / settings["max_length"] if settings["packing"] else rows


def _workload(plan: RunPlan, training: Training) -> Workload:
    knobs = FastMTPConfig.from_run(plan.asked("model_kwargs", {}), plan.train.environment)
    return Workload(
        tokens_per_row=max(1, round(training.tokens)),
        max_length=max(1, training.longest),
        answer_share=min(1.0, max(0.01, training.answer_tokens / max(training.tokens, 1))),
        rows_per_step=training.settings["per_device_train_batch_size"],
        num_speculative_steps=knobs.num_speculative_steps,
        loss="ce" if knobs.loss == "ce" else "kl",
        rollout="paper" if knobs.rollout == "paper" else "exact",
    )


def _forward_share(model: ModelNumbers, work: Workload) -> float:
    """Of a step's arithmetic, what a pass without gradients needs: the backbone, and a third of the head."""
    counted = operations(model, work)
    return (counted.backbone + counted.head / 3) / (counted.backbone + counted.head)


def _memory_of_the_longest(model: ModelNumbers, work: Workload, training: Training) -> list[str]:
    """What a batch of rows of `max_length` needs more than the longest that was measured."""
    most = training.settings["max_length"]
    if training.settings["packing"] or not most or most <= training.longest:
        return []
    longer = replace(work, max_length=int(most))
    more = working_bytes(model, longer, "one process")["activations"]
    more -= working_bytes(model, work, "one process")["activations"]
    return [
        f"train: the longest row that was measured has {training.longest:,} tokens; a batch of rows of max_length "
        f"({most:,}) needs {size(round(more))} more memory (computed)"
    ]


def _mean_tokens(answers: Answers, most: int) -> float:
    """Of an answer to another prompt; where only short ones were seen, as many as it may have."""
    return min(answers.tokens / answers.answers, most) if answers.whole else float(most)


def _simulate(
    plan: RunPlan, needs: dict[str, Need], number: int, answers: Answers, per_token: float | None
) -> list[str]:
    """Answers in process, and the passes of both heads over them."""
    given = plan.keys.simulate or {}
    if not answers.in_process or "device" in given or per_token is None:
        return ["simulate: not estimated; it computes in process, and nothing was measured there"]
    dataset = given.get("dataset") or eval_file(plan)
    if dataset is None:
        rows, tokens = number * _val_ratio(plan), 0.0
        what = f"{rows:,.0f} validation rows"
    else:
        count = sum(1 for _ in iter_rows(dataset)) if Path(dataset).is_file() else 0
        rows = min(count, int(given.get("max_rows") or count))
        tokens = rows * _mean_tokens(answers, int(given.get("max_new_tokens", _SIMULATED_TOKENS)))
        what = f"{rows:,.0f} answers"
    passes = _HEADS * rows * answers.tokens / answers.answers * per_token
    needs["simulate"] = Need(
        seconds=answers.start_seconds + tokens / answers.tokens_per_second + passes, memory=answers.memory
    )
    return [f"simulate: {what}, assumed as fast as the measured ones; each of {_HEADS} heads takes a pass over them"]


def _bench(plan: RunPlan, need: Need, answers: Answers) -> list[str]:
    """All passes of all servers, without what drafts save."""
    if answers.in_process:
        return ["bench: not estimated; no server answered"]
    values = bench_plan(plan)
    for server in values["servers"].values():  # the export is not there yet
        server["folder"] = plan.keys.model
    filled = {name: getattr(plan.keys, name) for name in values if hasattr(plan.keys, name)}  # where it has `${NAME}`
    made = make_plan({**values, **filled, **plan.keys.bench})
    passes = plan_passes(made.record())
    starts = len(made.launches) if made.together else sum(1 for _ in groupby(passes, key=lambda key: key[0]))
    tokens_each = _mean_tokens(answers, made.sampling.max_new_tokens)
    one = answers.tokens_per_second / answers.at_once
    seconds, asked_turns = starts * answers.server_seconds, 0
    for _, task, _, concurrency, _ in passes:
        turns = sum(len(question.turns) for question in made.questions(task, concurrency))
        asked_turns += turns
        seconds += turns * tokens_each / (min(concurrency, turns, answers.at_once) * one)
    need.seconds = seconds
    started = (
        f"{starts} starts of a server, {answers.server_seconds:.0f} s each"
        if answers.server_seconds
        else ("without the starts of servers, which were not measured")
    )
    return [
        f"bench, at most: {len(made.launches)} servers, {asked_turns:,} answers of {tokens_each:.0f} tokens, "
        f"{started}; assumed: an answer is as fast as one of {answers.at_once} at once was, without drafts"
    ]
