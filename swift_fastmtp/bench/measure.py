"""One turn of a server: questions asked, each answer kept as soon as it ends, and the server watched meanwhile."""

import asyncio
import hashlib
import time
from contextlib import suppress
from dataclasses import asdict
from itertools import pairwise
from typing import Any

from tqdm import tqdm

from ..data.client import RefusedError, all_or_first_failure
from ..data.conversation import Message
from ..data.tasks import Question, Task
from ..errors import FastMTPError
from ..files.jobs import Part
from .cpu_time import CpuClock
from .distribution import DISTRIBUTION, TOKENS
from .engines import Answer, Engine
from .from_records import generated_text
from .plan import Plan
from .results import PassKey, Record, pass_fields, pass_key, run_title
from .servers import Started

WARM_UP_TOKENS = 32
ALIVE_SECONDS = 0.5


class Measurement:
    """One turn of a server: the runs that it does until another server has its turn."""

    def __init__(
        self, plan: Plan, name: str, engine: Engine, server: Started | None, records: list[Record], part: Part
    ) -> None:
        self.plan, self.name, self.engine, self.server = plan, name, engine, server
        self.spec = plan.launches[name].server
        self.records, self.part = records, part
        mine = [r for r in records if r["server"] == name and "counters" not in r and "error" not in r]
        self.model = mine[0]["model"] if mine else None
        self.version = tuple(mine[0]["engine"]) if mine else None
        self.clock: CpuClock | None = None

    async def all(self, left: dict[PassKey, int]) -> None:
        """Ask the turns that are `left` of each of the passes, all of this server.

        Raises `FastMTPError` as soon as the server fails, has ended, or is not what it was."""
        work = asyncio.create_task(self._runs(left))
        watch = asyncio.create_task(self._watch())
        try:
            done, _ = await asyncio.wait((work, watch), return_when=asyncio.FIRST_COMPLETED)
            if work in done and work.exception() is not None and self.server is not None:
                await asyncio.sleep(ALIVE_SECONDS)  # a server that has just died has a better reason than a connection
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

    async def _runs(self, left: dict[PassKey, int]) -> None:
        warm: set[int] = set()
        for key, turns in left.items():
            _, name, temperature, concurrency, number = key
            # A server that is still the same, warm, and knows none of the prompts.
            await self._same_server()
            if concurrency not in warm:
                await self._warm_up(self.plan.tasks.get(name) or next(iter(self.plan.tasks.values())), concurrency)
                warm.add(concurrency)
            await self.engine.flush()
            before = await self.engine.counters() if self.spec.num_steps else None

            title = f"{self.name} {name}" + (f" T={temperature:g}" if temperature else "") + f" c={concurrency}"
            title += f" round {number + 1}" if self.plan.rounds > 1 else ""
            self.clock = CpuClock(self.server.process.pid) if self.server else None
            with tqdm(total=turns, unit="answer", desc=title, smoothing=0.05) as bar:
                await self._run(key, bar)

            # Answers count if it was the same server to the end, and answered something.
            if before is not None:
                self._count(key, before, await self.engine.counters())
            await self._same_server(key)
            self._check_answers(key)

    async def _same_server(self, key: PassKey | None = None) -> None:
        """It must still be what it was; else what it answered last, in run `key`, is void."""
        identity = await self.engine.connect()
        change = None
        if self.version is not None and identity.engine != self.version:
            change = f"{' '.join(identity.engine)}, it was {' '.join(self.version)}"
        elif identity.num_steps is not None and identity.num_steps != self.spec.num_steps:
            change = f"a server with {identity.num_steps} drafts per step, not {self.spec.num_steps}"
        elif self.engine.native and self.model is not None and identity.model != self.model:
            change = f"model {identity.model}, it was {self.model}"
        if change is not None:
            self._changed(change, key)
        self.version = identity.engine
        if self.engine.native:
            self.model = identity.model

    def _changed(self, change: str, key: PassKey | None) -> None:
        if key is not None:
            self.part.write([{**pass_fields(key), "void": change}])
            self.part.sync()
        raise FastMTPError(
            f"{self.name}: the server at {self.engine.url} is now {change}; "
            + ("answers of its last run do not count; " if key else "")
            + "serve what it was and start again, or measure both in a folder of their own"
        )

    async def _warm_up(self, task: Task, concurrency: int) -> None:
        """Answers that are not kept: kernels are compiled and caches filled before anything is timed."""
        asked = [task.questions[i % len(task.questions)] for i in range(self.plan.warmup)]
        limit = min(WARM_UP_TOKENS, self.plan.sampling.max_new_tokens)

        async def one(question: Question) -> None:
            with suppress(RefusedError):  # reported when it is measured
                await self.engine.answer(_messages(question, []), 0.0, 0, limit)

        for start in range(0, len(asked), concurrency):
            await asyncio.gather(*(one(q) for q in asked[start : start + concurrency]))

    async def _run(self, key: PassKey, bar: Any) -> None:
        """`concurrency` conversations at a time; the first failure of the run cancels the others."""
        # What is left of every conversation: those that have ended, or were refused, are not asked again.
        answered: dict[str, list[Message]] = {}
        ended: set[str] = set()
        for r in self.records:
            if pass_key(r) == key and "counters" not in r:
                answered.setdefault(r["id"], []).append(_message(r))
                if "error" in r:
                    ended.add(r["id"])
        left = [
            question
            for question in self.plan.questions(key[1], key[3])
            if question.id not in ended and len(answered.get(question.id, ())) < len(question.turns)
        ]
        questions = iter(left)

        # Each worker takes the next conversation, and asks its turns one after another.
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

        await all_or_first_failure(worker() for _ in range(min(key[3], len(left))))

    async def _ask(self, key: PassKey, question: Question, history: list[Message], turn: int) -> Answer | None:
        named = {**pass_fields(key), "id": question.id, "turn": turn, "engine": self.engine.identity.engine}
        seed, limit = _seed(self.plan, question.id, turn), self.plan.sampling.max_new_tokens
        if key[1] == DISTRIBUTION:
            seed, limit = _seed(self.plan, f"{self.name} {question.id}", turn), min(limit, TOKENS)
        try:
            answer = await self.engine.answer(_messages(question, history), key[2], seed, limit)
        except RefusedError as error:
            self._keep({**named, "error": str(error)})
            return None
        except FastMTPError as error:
            raise FastMTPError(f"{run_title(key)}: {error}") from None
        if self.model is None:
            self.model = answer.model
        if answer.model != self.model:
            self._changed(f"model {answer.model}, it was {self.model}", key)
        cpu_seconds = self.clock.lap() if self.clock else None
        self._keep({**named, **asdict(answer), "cpu_seconds": cpu_seconds})
        return answer

    def _keep(self, record: Record) -> None:
        self.part.write([record])
        self.records.append(record)

    def _count(self, key: PassKey, before: list[int], after: list[int] | None) -> None:
        """vLLM's counters of this run as a histogram: steps that accepted 0, 1, .. drafts."""
        if after is None or len(after) < len(before):
            return
        reached = [a - b for a, b in zip(after, [*before, *[0] * len(after)], strict=False)] + [0]
        if min(reached) >= 0 and reached[0]:
            counts = [a - b for a, b in pairwise(reached)]
            if min(counts) < 0:
                raise FastMTPError(
                    f"{run_title(key)}: of {reached[0]} steps {reached[1:-1]} accepted the drafts of each depth, which "
                    "is not possible; its acceptance cannot be trusted"
                )
            self._keep({**pass_fields(key), "counters": counts})

    def _check_answers(self, key: PassKey) -> None:
        answers = [r for r in self.records if pass_key(r) == key and "counters" not in r]
        if all("error" in r for r in answers):
            self.part.write([{**pass_fields(key), "void": "nothing was answered"}])
            raise FastMTPError(f"{self.name}: refuses every request of {key[1]} ({answers[0]['error']})")
        if all(r.get("completion_tokens", 1) == 1 or not generated_text(r).strip() for r in answers):
            self.part.write([{**pass_fields(key), "void": "empty"}])
            raise FastMTPError(
                f"{self.name}: every answer to {key[1]} is empty; is {self.plan.model} the model that it serves?"
            )


def _message(record: Record) -> Message:
    """An answer as the next turn's history has it: as the server gave it, for the chat template to choose from. Where
    nobody parsed the text it is all content, in which templates of reasoning models look for `</think>` themselves."""
    message = {"role": "assistant", "content": record.get("text", "")}
    if record.get("reasoning_content"):
        message["reasoning_content"] = record["reasoning_content"]
    return message


def _messages(question: Question, history: list[Message]) -> list[Message]:
    """The conversation up to the next answer, with the model's answers so far."""
    messages = [{"role": "system", "content": question.system}] if question.system else []
    for turn, answer in zip(question.turns, [*history, None], strict=False):
        messages.append({"role": "user", "content": turn})
        if answer is not None:
            messages.append(answer)
    return messages


def _seed(plan: Plan, question: str, turn: int) -> int:
    """The same whoever asks first, and for every server whose name is not in `question`."""
    text = f"{plan.seed} {question} {turn}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=4).digest(), "big") >> 1
