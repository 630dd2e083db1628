"""In which order servers are measured: they take turns, so that a machine that gets slower is slower for all of them.

A round is one pass of a server over all runs of a plan, that is tasks, temperatures and concurrencies. One measurement
is a run in a round.

* Servers that are up together take turns run by run, in the opposite order in every second round: A B, B A, A B. A
  machine that drifts steadily then adds as much to the one as to the other.
* Servers that are up one at a time cannot: each start takes minutes. The baseline is measured before the others and
  once more behind them: A B C A, and with more rounds A B C A B C A.
"""

from typing import Any

from .distribution import DISTRIBUTION
from .results import PassKey, RunKey


def plan_runs(plan: dict[str, Any]) -> list[RunKey]:
    """All runs of a plan, in the order in which they are done and shown."""
    return [
        (server, task, float(temperature), concurrency)
        for server in plan["servers"]
        for temperature in plan["temperatures"]
        for concurrency in plan["concurrency"]
        for task in plan["settings"]["tasks"]
    ]


def plan_passes(plan: dict[str, Any]) -> list[PassKey]:
    """All that a plan measures, each run in each of its rounds once, in the order in which it is done.

    `plan` is `plan.json`.
    """
    settings = plan["settings"]
    rounds, together = settings.get("rounds", 1), settings.get("together", False)
    servers = list(plan["servers"])
    runs = {server: [run for run in plan_runs(plan) if run[0] == server] for server in servers}
    passes: list[PassKey] = []

    if together and rounds > 1:
        for number in range(rounds):
            turn = servers[::-1] if number % 2 else servers
            for same_run in zip(*(runs[server] for server in turn), strict=True):
                passes += [(*run, number) for run in same_run]
        for server in servers:
            passes += _of_distribution(plan, server)
        return passes

    for number in range(max(1, rounds - 1)):
        for server in servers:
            passes += [(*run, number) for run in runs[server]]
            if not number:
                passes += _of_distribution(plan, server)
    if rounds > 1 and plan["baseline"] is not None:
        passes += [(*run, rounds - 1) for run in runs[plan["baseline"]]]
    return passes


def _of_distribution(plan: dict[str, Any], server: str) -> list[PassKey]:
    """The answers that test a server's distribution: once, with as many at a time as there are in any run."""
    if not plan.get("distribution_samples"):
        return []
    sampled = [float(temperature) for temperature in plan["temperatures"] if temperature]
    return [(server, DISTRIBUTION, temperature, max(plan["concurrency"]), 0) for temperature in sampled]
