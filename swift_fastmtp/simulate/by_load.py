"""What `--costs` and `--request_rates` add, printed: drafts by load, and what users of a service see."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from ..errors import FastMTPError
from .acceptance import Text
from .result import HeadResult
from .schedule import Depth, depths_by_load, schedule, schedule_line, schedule_table
from .service import Drafting, Offer, offers, offers_table
from .step_times import StepTimes, predicted_step_times


def check_service(
    request_rates: Sequence[float], most: int, within: float | None, step_times: StepTimes | str | None
) -> None:
    if request_rates and step_times is None:
        raise FastMTPError("--request_rates: needs --costs, what a server's steps take")
    if min([*request_rates, most, within or 1.0]) <= 0:
        raise FastMTPError("--request_rates, --most_at_once, --within: must be positive")


def best_by_load(
    model_dir: str, results: list[HeadResult], times: StepTimes | str, context: int
) -> tuple[list[Depth], HeadResult, StepTimes]:
    """The best K by load, printed, with what it follows from. Drafts are from the map that the times are of, or,
    predicted, from the fastest.

    Raises `FastMTPError` if acceptance with that map was not measured, and for a GPU or checkpoint that no prediction
    is made for.
    """
    if isinstance(times, str):
        result = max(results, key=lambda r: max(r.speedup))
        times = predicted_step_times(model_dir, times, len(result.tau_micro), result.num_ids, context)
    else:
        by_map = {Path(r.token_map).stem if r.token_map else None: r for r in results}
        if times.token_map not in by_map:
            raise FastMTPError(
                f"{times.source}: its servers draft from the token map {times.token_map}; name it with --token_map"
            )
        result = by_map[times.token_map]
    depths = depths_by_load(result.tau_micro, times)
    print(f"\nspeed over no drafts by load, {result.name}; steps {times.source}")
    print(schedule_table(depths))
    print(schedule_line(depths))
    return depths, result, times


def services(
    asked: tuple[Sequence[float], int, float | None],
    texts: list[Text],
    depths: list[Depth],
    result: HeadResult,
    times: StepTimes,
) -> list[Offer]:
    """What servers do under each rate of requests, printed; `asked`: rates, answers at once at the most, seconds."""
    request_rates, most, within = asked
    if not request_rates:
        return []
    lengths = [(text.start, text.end - text.start) for text in texts]
    # Of K drafts the k-th adds what tau with k drafts is above tau with one less.
    rates = [max(0.0, tau - before) for before, tau in pairwise([1.0, *result.tau_micro])]
    ways = {"no head": Drafting({1: 0}, rates)}
    for K in range(1, len(rates) + 1):
        if any(steps == K for steps, _ in times.milliseconds):
            ways[f"K={K}"] = Drafting({1: K}, rates)
    by_load = {int(size): entry["candidate_steps"][0] for size, entry in schedule(depths).items()}
    ways["by load"] = Drafting(by_load, rates)
    made = offers(request_rates, lengths, ways, times, most, within)
    limit = f"95 % of the answers within {within:g} s" if within else "as many servers as keep up"
    print(f"\nservice: requests at random times, lengths as in the answers above, at most {most} at once, {limit}")
    print(offers_table(made))
    return made
