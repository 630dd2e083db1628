"""`fastmtp bench --costs`: what a server's steps take, by how many answers it decodes at once.

Whether drafts pay depends on the load. One request leaves most of a GPU's arithmetic idle, and verifying four tokens
takes as long as decoding one; in a large batch it takes four times as long. `fastmtp simulate --costs` puts these times
and the head's acceptance together (`simulate/schedule.py`).
"""

from pathlib import Path
from typing import Any

from ..errors import FastMTPError
from ..files.table import terminal_table
from ..simulate.step_times import StepTimes
from .results import Results, read_results

_QUESTIONS = Path(__file__).with_name("long_answers.jsonl")
_PAUSED = Path(__file__).with_name("paused.json")
"""A schedule of no drafts at any load that there is."""
COSTS: dict[str, Any] = {
    "tasks": [f"long_answers={_QUESTIONS}"],
    "max_new_tokens": 48,
    "temperatures": [0.0],
    "concurrency": [1, 2, 4, 8, 16, 32],
    "questions_per_slot": 1,
    "rounds": 1,
}
"""Values of a plan: in each run as many answers as are on their way at once, all begun together."""
COSTS_STEPS = [1, 2, 3]
"""K of a plan's servers, unless the plan or the user says which."""


def with_paused_servers(servers: dict[str, Any]) -> dict[str, Any]:
    """`servers` of a plan, and for each head that is started a server whose schedule makes no drafts.

    It is not as fast as one without a head: SGLang goes on filling the draft's cache (0.5.23 `eagle_worker_v2.py`), and
    vLLM runs the layer once (0.32.0 `llm_base_proposer.py`), for the load at which there are drafts again.
    """
    more = {}
    for name, server in servers.items():
        # What another key already decides is not ours to pause: its command, its schedule, a baseline's K of 0.
        drafts_by_us = isinstance(server, dict) and server.get("folder") and server.get("method") != "baseline"
        if not drafts_by_us or server.get("command") or server.get("base_url") or server.get("schedule"):
            continue
        kept = {key: value for key, value in server.items() if key not in ("num_steps", "label")}
        more[f"{name}-paused"] = {**kept, "schedule": str(_PAUSED)}
    return {**servers, **more}


def costs_table(results: Results) -> str:
    """Milliseconds of a step, a line for each server and a column for each number of answers at once."""
    sizes = sorted({run.concurrency for run in results.runs})
    lines = []
    for name, server in results.servers.items():
        by_size = {run.concurrency: run.step for run in results.runs if run.server == name}
        steps = [by_size.get(size) for size in sizes]
        steps_made = "0" if server.schedule else str(server.num_steps)
        lines.append([name, steps_made, *(f"{1000 * step.p50:.1f}" if step else "" for step in steps)])
    header = ["ms per step", "K", *(f"{size} at once" for size in sizes)]
    return terminal_table(header, lines)


def read_step_times(path: str) -> StepTimes:
    """The times of a `results.json`.

    Raises `FastMTPError` for a file that is none, for two servers with the same K, or with different token maps, and
    where no step was measured.
    """
    results = read_results(path)
    server_of: dict[int, str] = {}
    fixed = {name: server for name, server in results.servers.items() if not server.schedule}
    for name, server in fixed.items():
        if server.num_steps in server_of:
            raise FastMTPError(
                f"{path}: {server_of[server.num_steps]} and {name} both make {server.num_steps} drafts per step; "
                "measure the costs of one head with one map in a folder of their own"
            )
        server_of[server.num_steps] = name
    maps = {server.token_map for server in fixed.values() if server.num_steps}
    if len(maps) > 1:
        raise FastMTPError(f"{path}: the servers draft from different token maps; measure those of one map")
    milliseconds, paused = {}, {}
    for run in results.runs:
        if run.step is None:
            continue
        if run.server in fixed:
            milliseconds[fixed[run.server].num_steps, run.concurrency] = 1000 * run.step.p50
        elif _drafts_at(results.servers[run.server].schedule or {}, run.concurrency) == 0:
            paused[run.concurrency] = 1000 * run.step.p50
    if not milliseconds:
        raise FastMTPError(f"{path}: no step was measured at full load; make it with `fastmtp bench --costs`")
    alone = min((run for run in results.runs if run.ttft), key=lambda run: (run.concurrency, run.server), default=None)
    # A short prompt takes the server about a step; the rest of the time to the first token is spent on the way.
    first_token = 1000 * alone.ttft.p50 if alone and alone.ttft else 0.0
    prompt = min([first_token, *milliseconds.values()])
    return StepTimes(
        milliseconds,
        f"measured: {path}",
        next(iter(maps), None),
        paused,
        prompt=prompt,
        on_the_way=first_token - prompt,
    )


def _drafts_at(schedule: dict[str, int], concurrency: int) -> int:
    """That a schedule has made where so many answers are decoded at once."""
    return schedule[str(max(int(size) for size in schedule if int(size) <= concurrency))]
