"""The benchmark's results: their schema, and how they are read back.

Everything that reports, compares or plots reads `results.json` through `read_results`; `from_records.py` makes it.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from ..errors import FastMTPError, detail
from ..files.inputs import loads
from ..files.schema import Amount, Count, ListOf, Positive, Rate, Tau, Whole, build, check_values, read_text
from ..files.show import show
from ..redaction import redact_words
from .distribution import Distribution

SCHEMA = "swift_fastmtp.bench/2"
OLDER_SCHEMAS = ("swift_fastmtp.bench/1",)
"""Read too: /1 has one round, and no CPU time."""
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
