"""`fastmtp run`: from prompts to a measured head, stage by stage, each an existing verb.

What is finished is not repeated; what was killed goes on where its verb goes on. The commands are printed, and written
to `commands.sh`, so that anybody can take over at any point.
"""

import shlex
import stat
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Literal

import yaml

from ..bench.plan import Launch, make_plan
from ..bench.servers import started
from ..errors import FastMTPError
from ..files.jobs import take_away_merged
from ..files.staging import staged, take_away_leftovers
from .estimate import from_files, measured
from .measure import (
    Answers,
    Training,
    count_prompts,
    measure_answers,
    measure_training,
    take_away,
    why_not_measured,
)
from .page import write_page
from .plan import RunPlan, Verbs, read_run_plan
from .process import Ended, run_command
from .stages import Stage, bench_plan, resumed, stages
from .state import State, locked

COMMANDS, BENCH_PLAN = "commands.sh", "bench.yaml"
_PORT = 30000
"""Of the server in `commands.sh`; the one that is started here has a free one."""


def run(  # noqa: PLR0913
    verbs: Verbs,
    plan: Sequence[str] = (),
    *,
    model: str | None = None,
    prompts: Sequence[str] | None = None,
    output_dir: str | None = None,
    base_urls: Sequence[str] | None = None,
    seed: int | None = None,
    until: Literal["distill", "clean", "mix", "train", "vocab", "simulate", "export", "bench", "report"] | None = None,
    dry_run: bool = False,
    redo: bool = False,
) -> None:
    """Do what a plan says, and write `run.html`. Started again, it goes on.

    Args:
        verbs: what the command line knows of the other verbs
        plan: YAML files, put together; the options below go before them (docs/run.md)
        model: folder of the model
        prompts: files, or hf:NAME and swift:NAME
        output_dir: folder to write; an unfinished run is continued; default: output/run
        base_urls: servers of the model that give the answers
        seed: of answers, mixture, training and benchmark
        until: the last stage; the others are left for later
        dry_run: print estimate and commands, run nothing
        redo: where the plan has changed, remove what the changed stage and those after it made, and make it again

    Raises `FastMTPError` if the plan is not good or not the one that the folder was begun with, or a stage fails; what
    is finished is kept.
    """
    options = {"model": model, "prompts": prompts, "output_dir": output_dir, "base_url": base_urls, "seed": seed}
    # Everything that can be refused, before anything is written.
    given = {key: list(value) if isinstance(value, list | tuple) else value for key, value in options.items()}
    made = read_run_plan(plan, given, verbs)
    chosen = _until(stages(made), until)
    for stage in chosen:
        if stage.program[0] == "fastmtp":
            _check(made, stage)
    launch = _launch(made)
    if dry_run:
        estimated = from_files(made, chosen, count_prompts(made)).text()
        print("\n".join([estimated, "", *_script(made, chosen, launch)]))
        return

    out = made.out
    with locked(out) as lock:
        state = State(out)
        state.check(stages(made), made.where, redo)  # also those behind `until`, which were made from these
        _write_commands(made, chosen, launch)
        begun = time.monotonic()
        for place in range(len(chosen)):
            stage = resumed(_until(stages(made), until)[place])  # as it is by now
            title = f"== {place + 1}/{len(chosen)} {stage.name}"
            if state.is_done(stage):
                _tidy(stage)
                print(f"{title}: {_there(stage, state)}", flush=True)
                continue
            if stage.name == "distill" and not state.is_ours(stage):
                _estimate(made, chosen, launch, state, partial(run_command, lock=lock))
            with _server(made, stage, launch, state):
                print(f"{title} ({_clock(time.monotonic() - begun)} so far)\n$ {stage.line}", flush=True)
                _do(stage, state, lock)
        chosen = _until(stages(made), until)
        _write_commands(made, chosen, launch)
        page = write_page(made, chosen, state)
    print(f"{page}: what was done, and what came of it; {out / COMMANDS}: the commands")


def _check(plan: RunPlan, stage: Stage) -> None:
    """Raises `FastMTPError` if the verb would refuse a value."""
    try:
        plan.verbs.check(stage.words[1:])
    except FastMTPError as error:
        raise FastMTPError(f"{plan.where}: {error}") from None


def _until(made: list[Stage], last: str | None) -> list[Stage]:
    names = [stage.name for stage in made]
    if last is None:
        return made
    if last not in names:
        raise FastMTPError(f"--until {last}: this plan has {', '.join(names)}")
    return made[: names.index(last) + 1]


def _tidy(stage: Stage) -> None:
    """Take away what its verb would, had it not been killed just when its output was there."""
    if stage.output is not None:
        take_away_merged(stage.output)
        take_away_leftovers(stage.output)


def _there(stage: Stage, state: State) -> str:
    if stage.output is None:
        return "done"
    return f"{stage.output} is there" + ("" if state.is_ours(stage) else ", not made by this run; taken as it is")


def _do(stage: Stage, state: State, lock: int) -> None:
    """One stage. Raises `FastMTPError` if it fails, or ends without its output."""
    state.begin(stage)
    ended = run_command(stage.words, lock, stage.environment)
    is_there = stage.output is None or stage.output.exists()
    state.end(stage, ended, is_done=ended.status == 0 and is_there)
    if ended.status:
        raise FastMTPError(
            f"{stage.name} ended with status {ended.status}; its message is above; what is finished is kept, start "
            "again to go on"
        )
    if not is_there:
        raise FastMTPError(f"{stage.name} ended without {stage.output}; its messages are above")


def _estimate(plan: RunPlan, chosen: Sequence[Stage], launch: Launch | None, state: State, run: partial[Ended]) -> None:
    """Print what is known and what is measured before the first stage that takes long, and keep it for the page."""
    if state.estimate is None:
        by_name = {stage.name: stage for stage in chosen}
        distill, number = by_name["distill"], count_prompts(plan)
        answers: Answers | str = why_not_measured(plan, number, bool(plan.keys.base_url or launch))
        training: Training | str = "this run ends before it"
        if number and not answers:
            answers = measure_answers(plan, distill, number, run, lambda: _server(plan, distill, launch, state))
        if plan.layer is None:
            training = "the layer that is trained is made of the answers first"
        elif isinstance(answers, Answers) and "train" in by_name:
            # Behind the server, which would have the memory.
            training = measure_training(plan, by_name["clean"], by_name["train"], run)
        state.keep_estimate(measured(plan, chosen, number, answers, training))
    assert state.estimate is not None
    take_away(plan.out)
    print(state.estimate.text(), flush=True)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


# The engine.


def _launch(plan: RunPlan) -> Launch | None:
    """The server that answers the prompts: the model without drafts, as the benchmark starts its baseline. Checks the
    benchmark's plan too. None without an engine, or where servers run."""
    if plan.keys.engine == "none":
        return None
    keys = plan.keys
    values = {
        **{
            name: getattr(keys, name) for name in ("model", "engine", "python", "flags", "environment", "start_seconds")
        },
        "tasks": keys.tasks or ["smoke"],
        "servers": {"distill": {"method": "baseline"}},
    }
    (launch,) = make_plan(values).launches.values()
    return None if keys.base_url else launch


@contextmanager
def _server(plan: RunPlan, stage: Stage, launch: Launch | None, state: State) -> Iterator[None]:
    """While a stage asks the model, the server that a plan with an engine starts for it; and the benchmark's plan,
    before its turn."""
    if stage.name == "bench":
        with staged(plan.out / BENCH_PLAN) as file:
            file.write_text(yaml.safe_dump(bench_plan(plan), sort_keys=False, allow_unicode=True), encoding="utf-8")
    if launch is None or stage.name != "distill":
        yield
        return
    print(f"$ {shlex.join(launch.shown_command)}", flush=True)
    with started("distill", launch, state.out / "logs/distill.log", plan.keys.start_seconds) as server:
        stage.values["base_url"] = [server.url]
        yield


# The commands.


def _script(plan: RunPlan, chosen: Sequence[Stage], launch: Launch | None) -> list[str]:
    """The whole run as a shell script."""
    lines = []
    for stage in chosen:
        if stage.name == "distill" and launch is not None:
            words = [*launch.shown_command, "--port", str(_PORT)]
            lines.append(f"# Until it has ended, in another shell: {shlex.join(words)}")
            stage.values["base_url"] = [f"http://127.0.0.1:{_PORT}"]
        if stage.name == "train":
            lines.append(f"# Killed, it goes on with --resume_from_checkpoint {plan.out / 'train'}")
        lines.append(stage.line)
    return lines


def _write_commands(plan: RunPlan, chosen: Sequence[Stage], launch: Launch | None) -> None:
    head = [
        "#!/usr/bin/env bash",
        f"# What `fastmtp run` does for {plan.where}, from {Path.cwd()}. Run a line yourself to take over.",
        "set -euo pipefail",
    ]
    path = plan.out / COMMANDS
    with staged(path) as file:
        file.write_text("\n".join([*head, *_script(plan, chosen, launch)]) + "\n", encoding="utf-8")
        file.chmod(file.stat().st_mode | stat.S_IXUSR)
