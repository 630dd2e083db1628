"""The benchmark's results: their schema, how they follow from the requests, and how they are read back.

`results.json` is a pure function of what a run left on disk (`plan.json`, `requests.jsonl`), so it can be made again.
Everything that reports, compares or plots reads it through `read_results`.
"""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from ..errors import FastMTPError, detail
from ..files.inputs import loads
from ..files.schema import Amount, Count, ListOf, Positive, Rate, Tau, Whole, build, check_values, read_text
from ..files.show import show
from ..method.metrics import (
    busy_seconds,
    conditional_rates,
    first_difference,
    macro_tau_of,
    marginal_rates,
    micro_tau_of,
    percentiles,
    speedup,
    steps_by_chunk,
    tau_by_position,
    token_gaps,
)
from ..redaction import redact_words

SCHEMA = "swift_fastmtp.bench/1"
SEED = 0
"""Of the bootstrap."""
MAX_BYTES = 8 * 2**20
"""Of a results file: some thousand runs."""
MAX_STEPS = 1000
"""Drafts per step: far more than anybody serves with."""

Record = dict[str, Any]
"""A line of `requests.jsonl`."""


@dataclass
class Percentiles:
    """Seconds."""

    p50: Amount
    p90: Amount
    p99: Amount


@dataclass
class Interval:
    """A ratio and its 95 % interval."""

    value: Amount
    low: Amount
    high: Amount


@dataclass
class Part:
    """tau of the verification steps that start in one part of the answer, in tokens from its beginning."""

    start: Count
    end: Count
    tau: Tau
    steps: Positive


@dataclass
class Divergence:
    """Where an answer first differs from the baseline's. `token` counts characters if the server tells no ids."""

    id: str
    turn: Count
    token: Count


@dataclass
class Lossless:
    """Greedy answers against the baseline's. Turns behind an answer that already differed are not compared."""

    compared: Count
    equal: Count
    first_divergence: Divergence | None


@dataclass
class Run:
    """One server on one task at one temperature and concurrency."""

    server: str
    task: str
    temperature: Amount
    concurrency: Positive
    num_requests: Count
    num_failed: Count
    """Requests that the server refused; they are in `num_requests` and in nothing else."""
    completion_tokens: Count
    tau_micro: Tau | None
    tau_macro: Tau | None
    marginal: ListOf[Rate]
    """Per depth, [num_steps]; empty for a baseline, and where the server does not tell."""
    conditional: ListOf[Rate]
    histogram: ListOf[Count]
    """Verification steps that accepted 0..num_steps drafts, [num_steps + 1]; empty like `marginal`."""
    tau_by_position: ListOf[Part]
    """Only of answers that arrived step by step."""
    tokens_per_second: Amount
    """Completion tokens over the seconds in which at least one request was on its way."""
    tokens_per_second_per_request: Amount
    """Median over requests of completion tokens / latency."""
    ttft: Percentiles | None
    itl: Percentiles | None
    speedup: Interval | None
    """Decode speed, sum of (tokens - 1) / sum of seconds after the first, over the baseline's on the same prompts."""
    lossless: Lossless | None


@dataclass
class Server:
    """One configuration that is compared."""

    label: str
    method: str
    """`baseline`, `vanilla`, `tuned` or `tuned+map`."""
    num_steps: Annotated[Count, Field(le=MAX_STEPS)]
    """K; 0 for a baseline."""
    token_map: str | None
    token_map_size: Positive | None
    model: str
    draft_model: str | None
    command: ListOf[str] | None


@dataclass
class TaskInfo:
    """What was asked."""

    title: str
    language: str
    source: str
    licence: str
    num_rows: Count
    sha256: str


@dataclass
class Settings:
    """What all servers were asked alike."""

    max_new_tokens: Positive
    seed: Count
    warmup: Count
    tasks: dict[str, TaskInfo]
    top_k: Whole = 20
    top_p: Rate = 0.95
    """`top_k` and `top_p` count where the temperature is above 0."""
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass
class Results:
    """`results.json`."""

    schema: str
    provenance: dict[str, Any]
    settings: Settings
    servers: dict[str, Server]
    baseline: str | None
    runs: ListOf[Run]

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


RunKey = tuple[str, str, float, int]
"""(server, task, temperature, concurrency)"""


def run_key(record: Record) -> RunKey:
    return record["server"], record["task"], float(record["temperature"]), int(record["concurrency"])


def summarize(records: Iterable[Record], plan: dict[str, Any]) -> Results:
    """Results of a run.

    Args:
        records: lines of `requests.jsonl` (`bench.measure`): answers, failures (`error`), and a server's counters.
        plan: `plan.json`.
    """
    runs: dict[RunKey, list[Record]] = {}
    counters: dict[RunKey, list[list[int]]] = {}
    for record in records:
        if "counters" in record:
            counters.setdefault(run_key(record), []).append(record["counters"])
        else:
            runs.setdefault(run_key(record), []).append(record)
    servers = {name: build(Server, value, f"servers.{name}") for name, value in plan["servers"].items()}
    settings = build(Settings, plan["settings"], "settings")
    baseline = plan["baseline"]
    order = {key: i for i, key in enumerate(plan_runs(plan))}
    made = []
    for key in sorted(runs, key=lambda k: order.get(k, len(order))):
        reference = None
        if baseline is not None and key[0] != baseline:
            reference = runs.get((baseline, *key[1:]))
        made.append(_run(key, runs[key], reference, counters.get(key), servers[key[0]], settings))
    engines = [r["engine"] for answers in runs.values() for r in answers if r.get("engine")]
    provenance = {
        **plan["provenance"],
        "seconds": round(sum(_seconds(answers) for answers in runs.values()), 1),
        "engine": dict(zip(("name", "version"), engines[0], strict=True)) if engines else None,
    }
    return Results(SCHEMA, provenance, settings, servers, baseline, made)


def plan_runs(plan: dict[str, Any]) -> list[RunKey]:
    """All runs of a plan, in the order in which they are done and shown."""
    return [
        (server, task, float(temperature), concurrency)
        for server in plan["servers"]
        for temperature in plan["temperatures"]
        for concurrency in plan["concurrency"]
        for task in plan["settings"]["tasks"]
    ]


def _run(
    key: RunKey,
    records: list[Record],
    reference: list[Record] | None,
    counters: list[list[int]] | None,
    server: Server,
    settings: Settings,
) -> Run:
    answers = [r for r in records if "error" not in r]
    tokens = sum(r["completion_tokens"] for r in answers)
    counts = [(r["accepted"], r["steps"]) for r in answers if r["steps"] is not None]
    histogram = _sum([r["histogram"] for r in answers if r["histogram"]], server.num_steps)
    if counters and not counts:  # a server that only tells its sums
        histogram = _sum(counters, server.num_steps)
        counts = [(sum(j * n for j, n in enumerate(histogram)), sum(histogram))]
    width = max(16, min(256, settings.max_new_tokens // 4))
    streamed = [r for r in answers if r["chunk_tokens"]]
    known = [steps_by_chunk(r["chunk_tokens"], r["accepted"], r["steps"]) for r in streamed if r["steps"]]
    speeds = [t / s for t, s in map(_speed_of, answers) if s > 0]
    gaps = [g for r in streamed for g in token_gaps(r["chunk_tokens"], r["chunk_seconds"])]
    ttft = percentiles([r["ttft"] for r in answers if r["ttft"] is not None])
    itl = percentiles(gaps)
    ratio = _speedup(reference, answers) if reference else None
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
        tau_by_position=[Part(*p) for p in tau_by_position([s for k in known if k for s in k], width)],
        tokens_per_second=tokens / max(_seconds(answers), 1e-9),
        tokens_per_second_per_request=(percentiles(speeds) or (0.0,))[0],
        ttft=Percentiles(*ttft) if ttft else None,
        itl=Percentiles(*itl) if itl else None,
        speedup=Interval(*ratio) if ratio else None,
        lossless=_lossless(reference, answers) if reference and not key[2] else None,
    )


def _sum(histograms: Sequence[Sequence[int]], num_steps: int) -> list[int]:
    """[num_steps + 1], or [] of nothing."""
    if not histograms:
        return []
    width = max(num_steps + 1, *map(len, histograms))
    return [sum(h[j] for h in histograms if j < len(h)) for j in range(width)]


def _seconds(records: list[Record]) -> float:
    return busy_seconds([(r["start"], r["start"] + r["latency"]) for r in records if "error" not in r])


def _speed_of(record: Record) -> tuple[float, float]:
    """Tokens of an answer, and the seconds that it took, its prompt included. Not from the first token on: a client
    that reads late finds all of a short answer at once, which would take no time at all."""
    return record["completion_tokens"], record["latency"]


def _by_turn(records: list[Record]) -> dict[tuple[str, int], Record]:
    return {(r["id"], r["turn"]): r for r in records if "error" not in r}


def _speedup(reference: list[Record], answers: list[Record]) -> tuple[float, float, float] | None:
    """Paired by prompt: all turns of a conversation together."""
    both = _by_turn(reference), _by_turn(answers)
    sums: dict[str, list[list[float]]] = {}
    for name, turn in sorted(both[0].keys() & both[1].keys()):
        pair = sums.setdefault(name, [[0.0, 0.0], [0.0, 0.0]])
        for total, side in zip(pair, both, strict=True):
            for i, value in enumerate(_speed_of(side[name, turn])):
                total[i] += value
    return speedup([(p[0][0], p[0][1]) for p in sums.values()], [(p[1][0], p[1][1]) for p in sums.values()], SEED)


def generated_text(record: Record) -> str:
    """All that the model wrote in one answer, its reasoning first."""
    return (record.get("reasoning_content") or "") + record.get("text", "")


def _lossless(reference: list[Record], answers: list[Record]) -> Lossless:
    base, own = _by_turn(reference), _by_turn(answers)
    compared = equal = 0
    diverged: set[str] = set()
    first = None
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


def read_results(path: str | Path) -> Results:
    """A results file, without secrets that an older version may have written into it.

    Raises `FastMTPError` in one line if it is none, of another version, lacks something, or holds a number that cannot
    be (not finite, a rate above 1, a negative count).
    """
    name = str(path)
    try:
        value = loads(read_text(path, MAX_BYTES))
    except FastMTPError:
        raise
    except ValueError as error:
        raise FastMTPError(f"{name}: not JSON ({detail(error)}); make it again with fastmtp bench") from None
    found = value.get("schema") if isinstance(value, dict) else None
    if found != SCHEMA:
        raise FastMTPError(
            f"{name}: its schema is {show(found)}, this version reads {SCHEMA!r}; make it again with this version's "
            "fastmtp bench (in the same folder: finished requests are not repeated), or read it with the version that "
            "wrote it"
        )
    try:
        check_values(value)
        results = build(Results, value)
        _check_provenance(results.provenance)
        for i, run in enumerate(results.runs):
            if run.server not in results.servers or run.task not in results.settings.tasks:
                raise FastMTPError(f"runs[{i}]: of a server or task that is not listed")
            check_run(run, f"runs[{i}]")
        if results.baseline is not None and results.baseline not in results.servers:
            raise FastMTPError(f"baseline: {show(results.baseline)} is not among the servers")
    except FastMTPError as error:
        raise FastMTPError(f"{name}: {error}; make it again with fastmtp bench") from None
    return _without_secrets(results)


def check_results(results: Results) -> None:
    """Raises `FastMTPError`, naming the run, if a number cannot be: nobody shall read it, and nobody could."""
    for run in results.runs:
        where = f"{run.server} on {run.task}, T={run.temperature:g}, {run.concurrency} at once"
        try:
            build(Run, asdict(run))
            check_run(run, "the run")
        except FastMTPError as error:
            raise FastMTPError(f"{where}: {error}; what the server tells cannot be trusted") from None


def check_run(run: Run, where: str) -> None:
    """Raises `FastMTPError` if numbers of a run contradict each other."""
    if run.num_failed > run.num_requests:
        raise FastMTPError(f"{where}.num_failed: {run.num_failed} of {run.num_requests} requests is not possible")
    if run.lossless and run.lossless.equal > run.lossless.compared:
        raise FastMTPError(
            f"{where}.lossless: {run.lossless.equal} equal of {run.lossless.compared} compared is not possible"
        )
    if run.speedup and not run.speedup.low <= run.speedup.high:
        raise FastMTPError(f"{where}.speedup: its low end is above its high end")


def _check_provenance(provenance: dict[str, Any]) -> None:
    """The facts that tables and cards use; the others are only shown."""
    build(ListOf[str] | None, provenance.get("command"), "provenance.command")  # type: ignore[arg-type]
    build(dict[str, str] | None, provenance.get("engine"), "provenance.engine")  # type: ignore[arg-type]


def _without_secrets(results: Results) -> Results:
    provenance = dict(results.provenance)
    if provenance.get("command"):
        provenance["command"] = redact_words(provenance["command"], "--a")
    servers = {}
    for name, server in results.servers.items():
        servers[name] = replace(server, command=redact_words(server.command) if server.command else server.command)
    return replace(results, provenance=provenance, servers=servers)
