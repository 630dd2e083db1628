"""The benchmark's results: their schema, how they follow from the requests, and how they are read back.

`results.json` is a pure function of what a run left on disk (`plan.json`, `requests.jsonl`), so it can be made again.
Everything that reports, compares or plots reads it through `read_results`.
"""

from collections.abc import Callable, Iterable, Sequence
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
    step_seconds,
    steps_by_chunk,
    tau_by_context,
    tau_by_position,
    tau_interval,
    token_gaps,
)
from ..redaction import redact_words
from .distribution import DISTRIBUTION, TOKENS, Distribution, Sample, compare_distributions, prompt_of

SCHEMA = "swift_fastmtp.bench/2"
OLDER_SCHEMAS = ("swift_fastmtp.bench/1",)
"""Read too: /1 has one round, and no CPU time."""
SEED = 0
"""Of the bootstrap."""
MAX_BYTES = 8 * 2**20
"""Of a results file: some thousand runs."""
MAX_STEPS = 1000
"""Drafts per step: far more than anybody serves with."""
DRIFT = 0.05
"""Of the baseline's speed between two rounds: a machine that changes more is named to the reader."""

Record = dict[str, Any]
"""A line of `requests.jsonl`."""


@dataclass
class Percentiles:
    """Seconds: the median, and what 90 and 99 of 100 do not exceed, linearly interpolated."""

    p50: Amount
    p90: Amount
    p99: Amount


@dataclass
class Interval:
    """A ratio, and the ends of its 95 % interval by bootstrap, over prompts and rounds (`method.metrics.speedup`) where
    nothing else is written."""

    value: Amount
    low: Amount
    high: Amount


@dataclass
class Part:
    """tau of the verification steps that start in one part of the answers, or of the contexts.

    `start` (included) and `end` (excluded) count tokens from an answer's beginning, the prefill's token too, or from
    the prompt's; `tau` is 1 + accepted drafts / `steps`.
    """

    start: Count
    end: Count
    tau: Tau
    steps: Positive


@dataclass
class Divergence:
    """Where an answer first differs from the baseline's: question, turn, and how many tokens before it are equal; or
    how many characters, its reasoning first, if one of the two servers tells no token ids."""

    id: str
    turn: Count
    token: Count


@dataclass
class Lossless:
    """Greedy answers against the baseline's to the same turns: how many both gave, and how many of these are equal in
    every token id (or character). Turns after an answer that differed are not compared: they were asked otherwise."""

    compared: Count
    equal: Count
    first_divergence: Divergence | None


@dataclass
class CpuTime:
    """What answers cost the server in CPU time, of all its processes; idle waiting between requests is in it."""

    tokens_per_second: Amount
    """Completion tokens over CPU seconds."""
    ratio: Interval | None
    """Over the baseline's, of the same turns as `speedup`."""


@dataclass
class Run:
    """One server on one task at one temperature and concurrency, all rounds together."""

    server: str
    task: str
    temperature: Amount
    concurrency: Positive
    num_requests: Count
    """Turns that were asked, answered or refused."""
    num_failed: Count
    """Requests that the server refused; they are in `num_requests` and in nothing else."""
    completion_tokens: Count
    """Of all answers, each with the prefill's token."""
    tau_micro: Tau | None
    """1 + accepted drafts / verification steps, both summed over all answers; None if the server tells no steps."""
    tau_macro: Tau | None
    """Mean over answers with a step of 1 + accepted drafts / steps; None too if the server only tells its sums."""
    marginal: ListOf[Rate]
    """[num_steps], for k = 1, 2, ..: share of verification steps that accepted k drafts or more; empty for a baseline,
    and where the server does not tell."""
    conditional: ListOf[Rate]
    """[num_steps]: of the steps that accepted k - 1 drafts or more, the share that accepted the k-th too; 0 of none."""
    histogram: ListOf[Count]
    """[num_steps + 1]: verification steps that accepted exactly 0, 1, .. drafts; empty like `marginal`."""
    tau_by_position: ListOf[Part]
    """Only of answers of which each chunk was the prefill's token or one verification step."""
    tokens_per_second: Amount
    """`completion_tokens` over the seconds in which at least one request was on its way that was answered."""
    tokens_per_second_per_request: Amount
    """Median over answers of completion tokens / latency, the prompt's time included; 0 without an answer."""
    ttft: Percentiles | None
    """Over answers: from the request to the first chunk."""
    itl: Percentiles | None
    """Over tokens after an answer's first chunk: tokens that arrive together share the time since the chunk before."""
    speedup: Interval | None
    """Sum of completion tokens / sum of latencies, prompts included, over the baseline's; of both only the turns that
    both answered."""
    lossless: Lossless | None
    """At temperature 0, and not of the baseline itself; every round against the baseline's same round."""
    round_speeds: ListOf[Amount] = field(default_factory=list)
    """[rounds]: of each round, sum of completion tokens / sum of latencies, of the turns that were answered in all."""
    tau_interval: Interval | None = None
    """`tau_micro` and its 95 % interval by bootstrap over prompts (`method.metrics.tau_interval`); None where the
    server does not tell the steps of each answer, and of one prompt."""
    step: Percentiles | None = None
    """Over answers: seconds of one step of the server, a decoding step or a round of drafts and verification, while it
    works on `concurrency` answers (`method.metrics.step_seconds`); None where it never did, or chunks are no steps."""
    cpu: CpuTime | None = None
    """Of a server that the benchmark started itself, on Linux."""
    tau_by_context: ListOf[Part] = field(default_factory=list)
    """As `tau_by_position`, by tokens of prompt and answer before the step, in parts that double: 0 to 64, to 128 .."""


@dataclass
class Server:
    """One configuration that is compared."""

    label: str
    method: str
    """`baseline`, `vanilla`, `tuned` or `tuned+map`."""
    num_steps: Annotated[Count, Field(le=MAX_STEPS)]
    """K; 0 for a baseline, and for a running server that does not tell."""
    token_map: str | None
    token_map_size: Positive | None
    """Token ids in the map; None without one, for maps per language, and for a server that ran already."""
    model: str
    draft_model: str | None
    command: ListOf[str] | None
    schedule: dict[str, Count] | None = None
    """From how many answers at once on how many drafts are made; `num_steps` is the most. None: at every load as many.
    """


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
    rounds: Positive = 1
    """How often the baseline was measured (`bench/order.py`)."""
    together: bool = False
    """The servers were up together and took turns."""


@dataclass
class Results:
    """`results.json`."""

    schema: str
    provenance: dict[str, Any]
    settings: Settings
    servers: dict[str, Server]
    baseline: str | None
    runs: ListOf[Run]
    distributions: ListOf[Distribution] = field(default_factory=list)
    """Of each server but the baseline, at each temperature above 0, where answers were sampled for it."""

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class _UsedProvenance:
    """The facts that tables and cards use; the others are only shown."""

    command: ListOf[str] | None = None
    engine: dict[str, str] | None = None


RunKey = tuple[str, str, float, int]
"""(server, task, temperature, concurrency)"""
PassKey = tuple[str, str, float, int, int]
"""The same, and which round it is, from 0."""


def run_key(record: Record) -> RunKey:
    return record["server"], record["task"], float(record["temperature"]), int(record["concurrency"])


def pass_key(record: Record) -> PassKey:
    return (*run_key(record), int(record.get("round", 0)))


def pass_fields(key: PassKey) -> Record:
    """The run and round in a record: what `pass_key` reads."""
    return dict(zip(("server", "task", "temperature", "concurrency", "round"), key, strict=True))


def run_title(key: RunKey | PassKey) -> str:
    """A run in a message."""
    server, task, temperature, concurrency = key[:4]
    return f"{server} on {task}, T={temperature:g}, {concurrency} at once"


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


def drift(runs: Sequence[Run], baseline: str | None) -> str | None:
    """A sentence on the machine, if the baseline, which is the same in all rounds, was not equally fast in them."""
    worst, moved = None, DRIFT
    for run in runs:
        if run.server == baseline and len(run.round_speeds) > 1:
            slowest, fastest = min(run.round_speeds), max(run.round_speeds)
            if slowest < fastest / (1 + moved):
                worst, moved = run, fastest / max(slowest, 1e-9) - 1
    if worst is None:
        return None
    where = run_title((worst.server, worst.task, worst.temperature, worst.concurrency))
    speeds = ", ".join(f"{speed:.1f}" for speed in worst.round_speeds)
    return (
        f"the machine drifted: {where} gave {speeds} token/s in its rounds, a difference of {100 * moved:.0f} %; "
        "the intervals have it in them, but measure again on a machine that does nothing else, or in more rounds"
    )


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
    schema = value.get("schema") if isinstance(value, dict) else None
    if schema != SCHEMA and schema not in OLDER_SCHEMAS:
        raise FastMTPError(
            f"{name}: its schema is {show(schema)}, this version reads {SCHEMA!r}; make it again with this version's "
            "fastmtp bench (in the same folder: finished requests are not repeated), or read it with the version that "
            "wrote it"
        )
    try:
        check_values(value)
        results = build(Results, value)
        build(_UsedProvenance, results.provenance, "provenance")
        for i, run in enumerate(results.runs):
            if run.server not in results.servers or run.task not in results.settings.tasks:
                raise FastMTPError(f"runs[{i}]: of a server or task that is not listed")
            check_run(run, f"runs[{i}]")
        for i, one in enumerate(results.distributions):
            if one.server not in results.servers:
                raise FastMTPError(f"distributions[{i}]: of a server that is not listed")
        if results.baseline is not None and results.baseline not in results.servers:
            raise FastMTPError(f"baseline: {show(results.baseline)} is not among the servers")
    except FastMTPError as error:
        raise FastMTPError(f"{name}: {error}; make it again with fastmtp bench") from None
    return _without_secrets(results)


def check_results(results: Results) -> None:
    """Raises `FastMTPError`, naming the run, if a number cannot be: nobody shall read it, and nobody could."""
    for run in results.runs:
        where = run_title((run.server, run.task, run.temperature, run.concurrency))
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
    intervals = {"speedup": run.speedup, "cpu.ratio": run.cpu and run.cpu.ratio, "tau_interval": run.tau_interval}
    for name, ratio in intervals.items():
        if ratio and not ratio.low <= ratio.high:
            raise FastMTPError(f"{where}.{name}: its low end is above its high end")


def _without_secrets(results: Results) -> Results:
    provenance = dict(results.provenance)
    if provenance.get("command"):
        provenance["command"] = redact_words(provenance["command"], "--a")
    servers = {}
    for name, server in results.servers.items():
        servers[name] = replace(server, command=redact_words(server.command) if server.command else server.command)
    return replace(results, provenance=provenance, servers=servers)
