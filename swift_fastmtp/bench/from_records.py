"""How a benchmark's results follow from the records of its requests.

`results.json` is a pure function of what a run left on disk (`plan.json`, `requests.jsonl`), so it can be made again.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from ..files.schema import build
from ..method.metrics import (
    busy_seconds,
    conditional_rates,
    first_difference,
    macro_tau_of,
    marginal_rates,
    micro_tau_of,
    percentiles,
    speedup,
    step_seconds,
    steps_by_chunk,
    tau_by_context,
    tau_by_position,
    tau_interval,
    token_gaps,
)
from .distribution import DISTRIBUTION, TOKENS, Sample, compare_distributions, prompt_of
from .order import plan_runs
from .results import (
    SCHEMA,
    CpuTime,
    Divergence,
    Interval,
    Lossless,
    Part,
    Percentiles,
    Record,
    Results,
    Run,
    RunKey,
    Server,
    Settings,
    run_key,
)

SEED = 0
"""Of the bootstrap."""


def summarize(records: Iterable[Record], plan: dict[str, Any]) -> Results:
    """Results of a run.

    Args:
        records: lines of `requests.jsonl` (`bench/records.py`): answers, failures (`error`), and a server's counters.
        plan: `plan.json`.
    """
    runs: dict[RunKey, list[Record]] = {}
    sampled: dict[tuple[str, float], list[Sample]] = {}
    counters: dict[RunKey, list[list[int]]] = {}
    for record in records:
        if "counters" in record:
            counters.setdefault(run_key(record), []).append(record["counters"])
        elif record["task"] != DISTRIBUTION or not plan.get("distribution_samples"):
            runs.setdefault(run_key(record), []).append(record)
        elif "error" not in record:
            sample = (prompt_of(record["id"]), record["output_ids"], generated_text(record))
            sampled.setdefault((record["server"], float(record["temperature"])), []).append(sample)
    servers = {name: build(Server, value, f"servers.{name}") for name, value in plan["servers"].items()}
    settings = build(Settings, plan["settings"], "settings")
    baseline = plan["baseline"]
    order = {key: i for i, key in enumerate(plan_runs(plan))}
    summaries = []
    for key in sorted(runs, key=lambda k: order.get(k, len(order))):
        reference = None
        if baseline is not None and key[0] != baseline:
            reference = runs.get((baseline, *key[1:]))
        summaries.append(_run(key, runs[key], reference, counters.get(key), servers[key[0]], settings))
    engines = [r["engine"] for answers in runs.values() for r in answers if r.get("engine")]
    provenance = {
        **plan["provenance"],
        "seconds": round(sum(_seconds(answers) for answers in runs.values()), 1),
        "engine": dict(zip(("name", "version"), engines[0], strict=True)) if engines else None,
    }
    names = list(servers)
    sampled = dict(sorted(sampled.items(), key=lambda item: (names.index(item[0][0]), item[0][1])))
    distributions = compare_distributions(sampled, baseline, min(TOKENS, settings.max_new_tokens)) if baseline else []
    return Results(SCHEMA, provenance, settings, servers, baseline, summaries, distributions)


def _run(
    key: RunKey,
    records: list[Record],
    reference: list[Record] | None,
    counters: list[list[int]] | None,
    server: Server,
    settings: Settings,
) -> Run:
    # Acceptance: of every answer; of all together where a server only tells its sums.
    answers = [r for r in records if "error" not in r]
    tokens = sum(r["completion_tokens"] for r in answers)
    counts = [(r["accepted"], r["steps"]) for r in answers if r["steps"] is not None]
    histogram = _sum([r["histogram"] for r in answers if r["histogram"]], server.num_steps)
    if counters and not counts:
        histogram = _sum(counters, server.num_steps)
        counts = [(sum(j * n for j, n in enumerate(histogram)), sum(histogram))]
    # Acceptance along the answer, in parts of a quarter of the longest possible one, within limits.
    width = max(16, min(256, settings.max_new_tokens // 4))
    streamed = [r for r in answers if r["chunk_tokens"]]
    positions, contexts = [], []
    for record in streamed:
        known = steps_by_chunk(record["chunk_tokens"], record["accepted"], record["steps"]) if record["steps"] else None
        positions += known or []
        prompt_tokens = record.get("prompt_tokens")
        if known and prompt_tokens is not None:
            contexts += [(prompt_tokens + before, accepted) for before, accepted in known]
    # Times.
    speeds = [t / s for t, s in map(_speed_of, answers) if s > 0]
    gaps = [g for r in streamed for g in token_gaps(r["chunk_tokens"], r["chunk_seconds"])]
    ttft = percentiles([r["ttft"] for r in answers if r["ttft"] is not None])
    itl = percentiles(gaps)
    step = percentiles(step_seconds([(r["start"], r["chunk_seconds"]) for r in streamed], key[3]))
    return Run(
        *key,
        num_requests=len(records),
        num_failed=len(records) - len(answers),
        completion_tokens=tokens,
        tau_micro=micro_tau_of(counts),
        tau_macro=macro_tau_of(counts) if any(r["steps"] is not None for r in answers) else None,
        marginal=marginal_rates(histogram),
        conditional=conditional_rates(histogram),
        histogram=histogram,
        tau_by_position=[Part(*part) for part in tau_by_position(positions, width)],
        tau_by_context=[Part(*part) for part in tau_by_context(contexts)],
        tokens_per_second=tokens / max(_seconds(answers), 1e-9),
        tokens_per_second_per_request=(percentiles(speeds) or (0.0,))[0],
        ttft=Percentiles(*ttft) if ttft else None,
        itl=Percentiles(*itl) if itl else None,
        speedup=_ratio(reference, answers, settings, _latency) if reference else None,
        lossless=_lossless(reference, answers) if reference and not key[2] else None,
        round_speeds=_round_speeds(answers),
        tau_interval=_tau_interval(answers),
        step=Percentiles(*step) if step else None,
        cpu=_cpu(answers, reference, settings),
    )


def _tau_interval(answers: list[Record]) -> Interval | None:
    """Turns of one conversation, and rounds, are one prompt: they are not independent."""
    prompts: dict[str, list[int]] = {}
    for r in answers:
        if r["steps"] is not None:
            counts = prompts.setdefault(r["id"], [0, 0])
            counts[0] += r["accepted"]
            counts[1] += r["steps"]
    counted = [(accepted, steps) for accepted, steps in prompts.values() if steps]
    interval, tau = tau_interval(counted, SEED), micro_tau_of(counted)
    return Interval(tau, *interval) if interval and tau else None


def _sum(histograms: Sequence[Sequence[int]], num_steps: int) -> list[int]:
    """[num_steps + 1], or [] of nothing."""
    if not histograms:
        return []
    width = max(num_steps + 1, *map(len, histograms))
    return [sum(h[j] for h in histograms if j < len(h)) for j in range(width)]


def _seconds(records: list[Record]) -> float:
    """In which at least one request was on its way that was answered."""
    return busy_seconds([(r["start"], r["start"] + r["latency"]) for r in records if "error" not in r])


def _speed_of(record: Record) -> tuple[float, float]:
    """Tokens of an answer, and the seconds that it took, its prompt included. Not from the first token on: a client
    that reads late gets all of a short answer at once, which would take no time at all."""
    return record["completion_tokens"], record["latency"]


Turn = tuple[str, int]
"""Id of the question, number of the turn."""


def _by_round(records: list[Record]) -> list[dict[Turn, Record]]:
    """The answers of each round, by turn."""
    rounds: dict[int, dict[Turn, Record]] = {}
    for r in records:
        answers = rounds.setdefault(int(r.get("round", 0)), {})
        if "error" not in r:
            answers[r["id"], r["turn"]] = r
    return [rounds[number] for number in sorted(rounds)]


def _answered_in_all(rounds: list[dict[Turn, Record]]) -> list[Turn]:
    turns = set.intersection(*(set(answers) for answers in rounds)) if rounds else set()
    return sorted(turns)


def _round_speeds(records: list[Record]) -> list[float]:
    """Tokens / seconds of each round; [] if no turn was answered in all of them."""
    rounds = _by_round(records)
    turns = _answered_in_all(rounds)
    speeds = []
    for answers in rounds if turns else []:
        tokens = sum(answers[turn]["completion_tokens"] for turn in turns)
        seconds = sum(answers[turn]["latency"] for turn in turns)
        speeds.append(tokens / max(seconds, 1e-9))
    return speeds


def _ratio(
    reference: list[Record], answers: list[Record], settings: Settings, seconds_of: Callable[[Record], float | None]
) -> Interval | None:
    """Tokens / seconds over the baseline's, with its interval.

    Of the turns that both servers answered in all of their rounds; those of one conversation are one prompt, which the
    bootstrap draws or leaves out. None if `seconds_of` is not known of one of them.
    """
    base, own = _by_round(reference), _by_round(answers)
    turns = _answered_in_all([*base, *own])
    totals = []
    for rounds in (base, own):
        of_server = []
        for records in rounds:
            prompts: dict[str, list[float]] = {}
            for turn in turns:
                seconds = seconds_of(records[turn])
                if seconds is None:
                    return None
                prompt = prompts.setdefault(turn[0], [0.0, 0.0])
                prompt[0] += records[turn]["completion_tokens"]
                prompt[1] += seconds
            of_server.append([(tokens, seconds) for tokens, seconds in prompts.values()])
        totals.append(of_server)
    ratio = speedup(totals[0], totals[1], SEED, paired=settings.together)
    return Interval(*ratio) if ratio else None


def _cpu(records: list[Record], reference: list[Record] | None, settings: Settings) -> CpuTime | None:
    """None where the server's CPU time is not known of every answer."""
    seconds = [_cpu_seconds(r) for r in records]
    known = [s for s in seconds if s is not None]
    if len(known) < len(seconds) or not sum(known):
        return None
    tokens = sum(r["completion_tokens"] for r in records)
    ratio = _ratio(reference, records, settings, _cpu_seconds) if reference else None
    return CpuTime(tokens / sum(known), ratio)


def _latency(record: Record) -> float | None:
    return float(record["latency"])


def _cpu_seconds(record: Record) -> float | None:
    return record.get("cpu_seconds")


def generated_text(record: Record) -> str:
    """All that the model wrote in one answer, its reasoning first."""
    return (record.get("reasoning_content") or "") + record.get("text", "")


def _lossless(reference: list[Record], answers: list[Record]) -> Lossless:
    """Each round against the baseline's same round."""
    compared = equal = 0
    first = None
    for base, own in zip(_by_round(reference), _by_round(answers), strict=False):
        diverged: set[str] = set()
        for name, turn in sorted(own):
            if (name, turn) not in base or name in diverged:
                continue
            compared += 1
            one, other = base[name, turn], own[name, turn]
            if one["output_ids"] is None or other["output_ids"] is None:
                place = first_difference(generated_text(one), generated_text(other))
            else:
                place = first_difference(one["output_ids"], other["output_ids"])
            if place is None:
                equal += 1
            else:
                diverged.add(name)
                first = first or Divergence(name, turn, place)
    return Lossless(compared, equal, first)
