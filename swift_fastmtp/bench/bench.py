"""`fastmtp bench`: what servers do on tasks, every request kept.

Servers are measured one after another, each on all tasks, temperatures and concurrencies of the plan, with its prefix
cache flushed before every run. A request is a line of `requests.jsonl` as soon as it ends, so a run that was killed
goes on where it was; `results.json` follows from the lines (`results.summarize`).
"""

import asyncio
import hashlib
import json
import os
import time
from collections.abc import Container, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..data.chat_template import check_chat_template, load_tokenizer
from ..data.client import RefusedError
from ..data.conversation import Message
from ..data.tasks import Question, Task
from ..errors import FastMTPError, cannot_write, detail
from ..files.inputs import loads
from ..files.jobs import Part, cut_torn_line
from ..files.provenance import provenance
from ..files.schema import Amount, Count, ListOf, Positive, build, check_values, read_text
from ..files.staging import claim, write_json
from ..redaction import without_login
from .engines import Answer, Engine, Identity
from .plan import Launch, Plan, make_plan, read_plan, server_urls
from .results import (
    MAX_BYTES,
    Record,
    Results,
    RunKey,
    Server,
    check_results,
    generated_text,
    plan_runs,
    run_key,
    summarize,
)
from .servers import Started, started

WARM_UP_TOKENS = 32
ALIVE_SECONDS = 0.5


def bench(
    output_dir: str,
    *,
    plan: str | Sequence[str] | None = None,
    base_urls: Sequence[str] = (),
    api_key: str | None = None,
    **values: Any,
) -> Results:
    """Measure, and write `plan.json`, `requests.jsonl`, `results.json` and the servers' logs to `output_dir`.

    Args:
        plan: YAML file, or several that are put together (`plan.read_plan`, docs/bench.md); or
        base_urls: running servers, each `URL` or `name=URL`.
        values: values of a plan that go before the file's.

    Raises `FastMTPError` if the plan is not good, the folder is another plan's, or a server fails; what is finished is
    kept.
    """
    if bool(plan) == bool(base_urls):
        raise FastMTPError("either --plan or --base_url says which servers to measure")
    wanted = {**(read_plan(plan) if plan else {"servers": server_urls(base_urls)})}
    wanted |= {k: v for k, v in values.items() if v is not None}
    made = make_plan(wanted)
    tokenizer = load_tokenizer(made.model)
    if any(any("sglang" in part for part in launch.command) for launch in made.launches.values()):
        check_chat_template(tokenizer, made.model)  # before a server is started, which takes minutes
    folder = Path(output_dir)
    _meet(made, folder, tokenizer, api_key)
    with open_records(folder, made) as (records, part, record):
        left = _left(made, record, records)
        for name, launch in made.launches.items():
            if any(key[0] == name for key in left):
                with _reach(name, launch, made, folder) as (url, server):
                    engine = _engine(url, made, tokenizer, api_key)
                    asyncio.run(_Measure(made, name, engine, server, records, part).all(left))
        results = summarize(records, record)
        check_results(results)
        write_json(results.as_json(), folder / "results.json")
    print(table(results))
    print(f"{folder / 'results.json'}: {len(results.runs)} runs, {sum(r.num_requests for r in results.runs)} requests")
    for line in warnings(results):
        print(line)
    return results


@contextmanager
def open_records(folder: Path, plan: Plan) -> Iterator[tuple[list[Record], Part, dict[str, Any]]]:
    """What is finished, the file for more, and `plan.json`. Raises `FastMTPError` if the folder is another plan's."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / "requests.jsonl", "a+b")  # noqa: SIM115
    except OSError as error:
        raise cannot_write(folder, error) from None
    with file:
        claim(file, f"{folder}: another fastmtp bench writes here; name another --output_dir")
        found, wanted = _read_plan(folder), json.loads(json.dumps(plan.record()))
        wanted["sha256"] = _digest(wanted)
        if not found:
            made_by = provenance()
            made_by["started"] = made_by.pop("utc")
            wanted["provenance"] = made_by
            write_json(wanted, folder / "plan.json")
            found = wanted
        elif found.get("sha256") != wanted["sha256"]:
            where, before, now = _difference(found, wanted)
            raise FastMTPError(
                f"{folder / 'plan.json'}: this folder is of a plan with {where} {before}, not {now}; go on with that "
                "plan, or name another --output_dir"
            )
        elif _digest(found) != found["sha256"]:
            raise FastMTPError(f"{folder / 'plan.json'}: was changed by hand; name another --output_dir")
        cut_torn_line(file)
        file.seek(0)
        records = _read_records(file, folder / "requests.jsonl", set(plan_runs(found)))
        part = Part(file)
        try:
            yield records, part, found
        finally:
            part.sync()


def _read_plan(folder: Path) -> dict[str, Any]:
    """`plan.json`, or {} where there is none. Raises `FastMTPError` if it is none of ours."""
    path = folder / "plan.json"
    if not os.path.lexists(path):
        return {}
    try:
        value = loads(read_text(path, MAX_BYTES))
        check_values(value)
        plan = build(dict[str, Any], value, "the file")
        build(dict[str, Server], plan.get("servers"), "servers")
        build(dict[str, Any], plan.get("provenance"), "provenance")
    except ValueError as error:  # a FastMTPError is one
        what = detail(error).removeprefix(f"{path}: ")
        raise FastMTPError(f"{path}: not the plan of a benchmark ({what}); name another --output_dir") from None
    return plan


def _digest(plan: dict[str, Any]) -> str:
    """Of all that must be the same to go on in a folder."""
    kept = {key: value for key, value in plan.items() if key not in ("sha256", "provenance")}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


@dataclass
class _Place:
    """What every line of `requests.jsonl` has: the run that it is of."""

    server: str
    task: str
    temperature: Amount
    concurrency: Positive


@dataclass
class _Request:
    """What the line of a request has besides."""

    id: str
    turn: Count
    engine: ListOf[str]


def _check_record(record: Any, runs: Container[RunKey]) -> None:
    """Raises `FastMTPError` if a line of `requests.jsonl` is none that we wrote."""
    build(_Place, record)
    if run_key(record) not in runs:
        raise FastMTPError("of a run that plan.json does not have")
    for kind, type_ in (("void", str), ("counters", ListOf[Count])):
        if kind in record:
            build(type_, record[kind], kind)
            return
    build(_Request, record)
    if len(record["engine"]) != 2:
        raise FastMTPError("engine: must be a name and a version")
    if "error" in record:
        build(str, record["error"], "error")
        return
    answer = build(Answer, record)
    if (answer.steps is None) != (answer.accepted is None) or len(answer.chunk_tokens) != len(answer.chunk_seconds):
        raise FastMTPError("its counts contradict each other")


def _read_records(lines: Any, path: Path, runs: Container[RunKey]) -> list[Record]:
    """Lines, without those of a run that a later line declares void.

    Raises `FastMTPError` with file and line of the first that is not of this benchmark.
    """
    records: list[Record] = []
    for number, line in enumerate(lines, start=1):
        try:
            record = loads(line.decode())
            _check_record(record, runs)
            key = run_key(record)
        except ValueError as error:  # no UTF-8, no JSON, or a FastMTPError
            raise FastMTPError(
                f"{path}:{number}: not a line of this run ({detail(error)}); delete it and start again"
            ) from None
        if "void" in record:
            records = [r for r in records if run_key(r) != key]
        else:
            records.append(record)
    return records


def _difference(found: Any, wanted: Any, where: str = "") -> tuple[str, str, str]:
    """The first place where two plans differ."""
    if isinstance(found, dict) and isinstance(wanted, dict):
        for key in [*wanted, *found]:
            if key not in ("sha256", "provenance") and found.get(key) != wanted.get(key):
                return _difference(found.get(key), wanted.get(key), f"{where}.{key}".lstrip("."))
    before, now = (json.dumps(x, ensure_ascii=False)[:200] for x in (found, wanted))
    return where, before, now


def _left(plan: Plan, record: dict[str, Any], records: list[Record]) -> dict[RunKey, int]:
    """Turns that are missing, of every run that is not finished. A conversation ends at a turn that was refused."""
    done: dict[RunKey, dict[str, int]] = {}
    for r in records:
        if "counters" not in r:
            turns = done.setdefault(run_key(r), {})
            turns[r["id"]] = 10**9 if "error" in r else turns.get(r["id"], 0) + 1
    left = {}
    for key in plan_runs(record):
        turns = done.get(key, {})
        missing = sum(max(0, len(q.turns) - turns.get(q.id, 0)) for q in plan.tasks[key[1]].questions)
        if missing:
            left[key] = missing
    return left


def _engine(url: str, plan: Plan, tokenizer: Any, api_key: str | None) -> Engine:
    return Engine(
        url,
        tokenizer,
        plan.sampling,
        plan.served_model_name,
        api_key,
        timeout=plan.timeout,
        retry_seconds=plan.retry_seconds,
        concurrency=max(plan.concurrency),
    )


def _meet(plan: Plan, folder: Path, tokenizer: Any, api_key: str | None) -> None:
    """Ask running servers what they are. One that was asked when the folder was begun need not be there any more."""
    known = _read_plan(folder).get("servers", {})
    for name, launch in plan.launches.items():
        if launch.base_url is None:
            continue
        asked = launch.server
        if name in known:
            recorded = {k: known[name][k] for k in ("num_steps", "token_map", "draft_model", "command", "method")}
            launch.server = replace(asked, **recorded)
            continue

        async def ask(url: str) -> Identity:
            engine = _engine(url, plan, tokenizer, api_key)
            try:
                return await engine.connect()
            finally:
                await engine.close()

        identity = asyncio.run(ask(launch.base_url))
        steps = identity.num_steps if asked.num_steps < 0 else asked.num_steps
        if steps is not None and asked.method and (asked.method == "baseline") != (steps == 0):
            what = f"makes {steps} drafts per step" if steps else "makes no drafts"
            raise FastMTPError(
                f"{name}: the server at {without_login(launch.base_url)} {what}, so it is no {asked.method} server; "
                "name it by what it is, or serve it so"
            )
        token_map = asked.token_map or (Path(identity.token_map).stem if identity.token_map else None)
        launch.server = replace(
            asked,
            num_steps=steps or 0,
            token_map=token_map,
            method=asked.method or ("tuned+map" if token_map else "tuned" if steps else "baseline"),
            draft_model=(identity.draft_model or identity.model_path) if steps else None,
            command=identity.command,
        )
    if plan.baseline is None:
        plan.baseline = next((n for n, x in plan.launches.items() if x.server.method == "baseline"), None)


@contextmanager
def _reach(name: str, launch: Launch, plan: Plan, folder: Path) -> Iterator[tuple[str, Started | None]]:
    if launch.base_url is not None:
        yield launch.base_url, None
        return
    with started(name, launch, folder / "logs" / f"{name}.log", plan.start_seconds) as server:
        yield server.url, server


class _Measure:
    """All runs of one server."""

    def __init__(
        self, plan: Plan, name: str, engine: Engine, server: Started | None, records: list[Record], part: Part
    ) -> None:
        self.plan, self.name, self.engine, self.server = plan, name, engine, server
        self.spec = plan.launches[name].server
        self.records, self.part = records, part
        mine = [r for r in records if r["server"] == name and "counters" not in r and "error" not in r]
        self.model = mine[0]["model"] if mine else None
        self.version = tuple(mine[0]["engine"]) if mine else None

    async def all(self, left: dict[RunKey, int]) -> None:
        """Raises `FastMTPError` as soon as the server fails, has ended, or is not what it was."""
        work = asyncio.create_task(self._runs(left))
        watch = asyncio.create_task(self._watch())
        try:
            done, _ = await asyncio.wait((work, watch), return_when=asyncio.FIRST_COMPLETED)
            if work in done and work.exception() is not None and self.server is not None:
                await asyncio.sleep(ALIVE_SECONDS)  # a server that has just died has more to say than a connection
                self.server.check()
            for task in done:
                task.result()
        finally:
            for task in (work, watch):
                task.cancel()
            await asyncio.gather(work, watch, return_exceptions=True)
            await self.engine.close()

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(ALIVE_SECONDS)
            if self.server is not None:
                self.server.check()

    async def _runs(self, left: dict[RunKey, int]) -> None:
        warm: set[int] = set()
        for key, turns in left.items():
            if key[0] != self.name:
                continue
            _, name, temperature, concurrency = key
            await self._same_server()
            task = self.plan.tasks[name]
            if concurrency not in warm:
                await self._warm_up(task, concurrency)
                warm.add(concurrency)
            await self.engine.flush()
            before = await self.engine.counters() if self.spec.num_steps else None
            title = f"{self.name} {name}" + (f" T={temperature:g}" if temperature else "") + f" c={concurrency}"
            with tqdm(total=turns, unit="answer", desc=title, smoothing=0.05) as bar:
                await self._run(key, task, bar)
            if before is not None:
                self._count(key, before, await self.engine.counters())
            await self._same_server(key)
            self._check_answers(key)

    async def _same_server(self, key: RunKey | None = None) -> None:
        """It must still be what it was; else what it answered last, in run `key`, is void."""
        found = await self.engine.connect()
        what = None
        if self.version is not None and found.engine != self.version:
            what = f"{' '.join(found.engine)}, it was {' '.join(self.version)}"
        elif found.num_steps is not None and found.num_steps != self.spec.num_steps:
            what = f"a server with {found.num_steps} drafts per step, not {self.spec.num_steps}"
        elif self.engine.native and self.model is not None and found.model != self.model:
            what = f"model {found.model}, it was {self.model}"
        if what is not None:
            self._changed(what, key)
        self.version = found.engine
        if self.engine.native:
            self.model = found.model

    def _changed(self, what: str, key: RunKey | None) -> None:
        if key is not None:
            self.part.write([{**_named(key), "void": what}])
            self.part.sync()
        raise FastMTPError(
            f"{self.name}: the server at {self.engine.url} is now {what}; "
            + ("answers of its last run do not count; " if key else "")
            + "serve what it was and start again, or measure both in a folder of their own"
        )

    async def _warm_up(self, task: Task, concurrency: int) -> None:
        """Answers that are not kept: kernels are compiled and caches filled before anything is timed."""
        asked = [task.questions[i % len(task.questions)] for i in range(self.plan.warmup)]
        limit = min(WARM_UP_TOKENS, self.plan.sampling.max_new_tokens)

        async def one(question: Question) -> None:
            with suppress(RefusedError):  # said when it is measured
                await self.engine.answer(_messages(question, []), 0.0, 0, limit)

        for start in range(0, len(asked), concurrency):
            await asyncio.gather(*(one(q) for q in asked[start : start + concurrency]))

    async def _run(self, key: RunKey, task: Task, bar: Any) -> None:
        """`concurrency` conversations at a time; the first failure of the run cancels the others."""
        answered: dict[str, list[Message]] = {}
        ended: set[str] = set()
        for r in self.records:
            if run_key(r) == key and "counters" not in r:
                answered.setdefault(r["id"], []).append(_message(r))
                if "error" in r:
                    ended.add(r["id"])
        questions = iter(
            [q for q in task.questions if q.id not in ended and len(answered.get(q.id, ())) < len(q.turns)]
        )
        tokens = 0
        begin = time.monotonic()

        async def worker() -> None:
            nonlocal tokens
            for question in questions:
                history = list(answered.get(question.id, ()))
                for turn in range(len(history), len(question.turns)):
                    answer = await self._ask(key, question, history, turn)
                    bar.update(1)
                    if answer is None:
                        bar.update(len(question.turns) - turn - 1)
                        break
                    history.append(_message(asdict(answer)))
                    tokens += answer.completion_tokens
                    bar.set_postfix_str(f"{tokens / max(time.monotonic() - begin, 1e-9):.1f} tok/s", refresh=False)

        workers = [asyncio.create_task(worker()) for _ in range(min(key[3], len(task.questions)))]
        try:
            for done in asyncio.as_completed(workers):
                await done
        finally:
            for one in workers:
                one.cancel()
            await asyncio.gather(*workers, return_exceptions=True)

    async def _ask(self, key: RunKey, question: Question, history: list[Message], turn: int) -> Answer | None:
        named = {**_named(key), "id": question.id, "turn": turn, "engine": self.engine.identity.engine}
        try:
            answer = await self.engine.answer(_messages(question, history), key[2], _seed(self.plan, question.id, turn))
        except RefusedError as error:
            self._keep({**named, "error": str(error)})
            return None
        except FastMTPError as error:
            raise FastMTPError(f"{_sentence(key)}: {error}") from None
        if self.model is None:
            self.model = answer.model
        if answer.model != self.model:
            self._changed(f"model {answer.model}, it was {self.model}", key)
        self._keep({**named, **asdict(answer)})
        return answer

    def _keep(self, record: Record) -> None:
        self.part.write([record])
        self.records.append(record)

    def _count(self, key: RunKey, before: list[int], after: list[int] | None) -> None:
        """vLLM's counters of this run as a histogram: steps that accepted 0, 1, .. drafts."""
        if after is None or len(after) < len(before):
            return
        reached = [a - b for a, b in zip(after, [*before, *[0] * len(after)], strict=False)] + [0]
        if min(reached) >= 0 and reached[0]:
            counts = [a - b for a, b in pairwise(reached)]
            if min(counts) < 0:
                raise FastMTPError(
                    f"{_sentence(key)}: of {reached[0]} steps {reached[1:-1]} accepted the drafts of each depth, which "
                    "is not possible; its acceptance cannot be trusted"
                )
            self._keep({**_named(key), "counters": counts})

    def _check_answers(self, key: RunKey) -> None:
        answers = [r for r in self.records if run_key(r) == key and "counters" not in r]
        if all("error" in r for r in answers):
            self.part.write([{**_named(key), "void": "nothing was answered"}])
            raise FastMTPError(f"{self.name}: refuses every request of {key[1]} ({answers[0]['error']})")
        if all(r.get("completion_tokens", 1) == 1 or not generated_text(r).strip() for r in answers):
            self.part.write([{**_named(key), "void": "empty"}])
            raise FastMTPError(
                f"{self.name}: every answer to {key[1]} is empty; is {self.plan.model} the model that it serves?"
            )


def _sentence(key: RunKey) -> str:
    server, task, temperature, concurrency = key
    return f"{server} on {task}, T={temperature:g}, {concurrency} at once"


def _named(key: RunKey) -> Record:
    return dict(zip(("server", "task", "temperature", "concurrency"), key, strict=True))


def _message(record: Record) -> Message:
    """An answer as the next turn's history has it: as the server gave it, for the chat template to choose from. Where
    nobody parsed the text it is all content, in which templates of reasoning models look for `</think>` themselves."""
    message = {"role": "assistant", "content": record.get("text", "")}
    if record.get("reasoning_content"):
        message["reasoning_content"] = record["reasoning_content"]
    return message


def _messages(question: Question, history: list[Message]) -> list[Message]:
    """The conversation up to the next answer, with the model's own answers so far."""
    messages = [{"role": "system", "content": question.system}] if question.system else []
    for turn, answer in zip(question.turns, [*history, None], strict=False):
        messages.append({"role": "user", "content": turn})
        if answer is not None:
            messages.append(answer)
    return messages


def _seed(plan: Plan, question: str, turn: int) -> int:
    """The same for every server, whoever asks first."""
    text = f"{plan.seed} {question} {turn}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=4).digest(), "big") >> 1


def table(results: Results) -> str:
    """The terminal's table, one line per run."""
    head = ("server", "task", "T", "at once", "tau", "tok/s each", "tok/s", "speedup", "lossless")
    lines = [head]
    for run in results.runs:
        ratio, lossless = run.speedup, run.lossless
        lines.append(
            (
                run.server,
                run.task,
                f"{run.temperature:g}",
                str(run.concurrency),
                "" if run.tau_micro is None else f"{run.tau_micro:.3f}",
                f"{run.tokens_per_second_per_request:.1f}",
                f"{run.tokens_per_second:.1f}",
                f"{ratio.value:.2f} [{ratio.low:.2f}, {ratio.high:.2f}]" if ratio else "",
                f"{lossless.equal}/{lossless.compared}" if lossless else "",
            )
        )
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return "\n".join("  ".join(x.ljust(w) for x, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def warnings(results: Results) -> list[str]:
    """What a reader of the table must know."""
    found = []
    for run in results.runs:
        where = _sentence((run.server, run.task, run.temperature, run.concurrency))
        if run.num_failed:
            found.append(f"warning: {where}: {run.num_failed} of {run.num_requests} requests refused")
        if run.tau_micro is None and results.servers[run.server].num_steps:
            found.append(f"warning: {where}: the server does not tell what it accepted; tau is not known")
        if run.lossless and run.lossless.first_divergence:
            first = run.lossless.first_divergence
            other = run.lossless.compared - run.lossless.equal
            found.append(
                f"warning: {where}: {other} of {run.lossless.compared} answers are not the baseline's; "
                f"first: {first.id}, turn {first.turn}, token {first.token}"
            )
    return found
