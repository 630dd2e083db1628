"""Self-distillation (paper 2.4): the model's responses to your prompts, as training rows.

Each row keeps what ms-swift's inference drops: why the answer ended, its exact token ids, reasoning and tool calls.
Conversations of several turns are answered turn by turn on the model's own history. Every answer has its own seed and
is on disk when it is finished (`jobs.py`), so that a job may be killed, started again and shared.
"""

import asyncio
import hashlib
import json
import time
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import asdict
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal

import torch
from tqdm import tqdm

from .. import __version__
from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.finite import NotFiniteError
from ..errors import FastMTPError
from ..files.copies import file_hash
from ..files.jobs import Job, Key, Part, take_away_merged
from ..files.rows import BadRows, Row, iter_rows
from ..files.staging import try_output, write_json
from ..model.backbone_lora import check_lora, lora_hash
from ..model.loading import load_to_answer
from .chat_template import RenderError, check_chat_template, encode_prompt, load_tokenizer, same_prompt
from .client import RefusedError, Sampling, Servers, all_or_first_failure
from .conversation import Conversation, Reply
from .examples import difference
from .generate import Decoding, Request, answer_all, end_token_ids

GROUP = 4
"""Groups of conversations that are generated together, in process, are so many times `batch_size`: more lose more when
they are cut off, fewer leave more slots empty at their end."""
SECONDS_TO_SHOW = 2.0
"""Between two looks of the progress line while no row ends."""


def distill(  # noqa: PLR0913
    model_dir: str,
    prompts: str | list[str],
    output: str,
    *,
    base_urls: list[str] | None = None,
    served_model_name: str | None = None,
    api_key: str | None = None,
    concurrency: int = 128,
    timeout: float = 600.0,
    retry_seconds: float = 600.0,
    batch_size: int = 32,
    max_new_tokens: int = 4096,
    temperature: float = 0.6,
    top_k: int = 20,
    top_p: float = 0.95,
    chat_template_kwargs: dict[str, Any] | None = None,
    num_answers: int = 1,
    seed: int = 0,
    shard: str = "0/1",
    on_bad_row: Literal["stop", "skip"] = "stop",
    torch_dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    prompt_names: dict[str, str] | None = None,
    backbone_lora: str | None = None,
) -> bool:
    """Write `output` (JSONL): prompts with the model's answers in `messages`, each with what it was asked with
    (`prompt_token_ids`, see `prompt_ids.py`), what it answered (`token_ids`) and `finish_reason`.

    Args:
        model_dir: checkpoint folder, also of a model without an MTP layer; with servers only its tokenizer is read
        prompts: JSONL (.gz, .xz) or Parquet; on the command line also hf:NAME and swift:NAME
        output: JSONL to write; an unfinished one is continued
        base_urls: servers of the model (SGLang, vLLM, swift deploy); default: in process
        served_model_name: the servers' name of the model; default: the only one they have
        api_key: default, on the command line, where others on the machine do not see it: $OPENAI_API_KEY
        concurrency: conversations at a time, on servers
        timeout: seconds of silence until a server must show that it lives
        retry_seconds: a request is repeated so long after its first failure
        batch_size: conversations at a time, in process; where one ends, the next begins
        max_new_tokens: paper: 4096
        temperature: paper: 0.6; 0 is greedy
        top_k: paper: 20
        top_p: paper: 0.95
        chat_template_kwargs: JSON, as {"enable_thinking": false}; a row's own go before them
        num_answers: answers to every prompt, each with its own seed
        seed: from which each answer has its own
        shard: i/n, this worker's share of one job
        on_bad_row: skipped rows are in the report
        torch_dtype: in process; default: float32, on a GPU the model's
        prompt_names: what a file's rows are of, if it is a copy
        backbone_lora: in process: folder of a LoRA adapter that the model is served with; servers have a name for it

    Returns whether the output is complete; it is not while other shards are missing.

    Raises `FastMTPError` if `output` exists, a row is bad, the job was started with other settings, the folder has no
    chat template, the server's is another, no server answers, one cannot sample with drafts, or the model computes a
    NaN or an infinity.
    """
    # What can be wrong with the command, the files or the folder is found before the first answer.
    take_away_merged(output)
    try_output(output)
    sampling = Sampling(max_new_tokens, temperature, top_k, top_p, chat_template_kwargs or {})
    number, of = _shard(shard)
    positive = {"max_new_tokens": max_new_tokens, "num_answers": num_answers, "concurrency": concurrency}
    for name, value in {**positive, "batch_size": batch_size, "timeout": timeout}.items():
        if value <= 0:
            raise FastMTPError(f"--{name} {value}: must be above 0")
    files = [prompts] if isinstance(prompts, str) else prompts
    source = Source(files, on_bad_row, prompt_names)
    if not source.count:
        raise FastMTPError(f"{', '.join(files)}: holds no rows")
    if backbone_lora and base_urls:
        raise FastMTPError(
            "--backbone_lora is for answers in process; of a server, name its adapter: --served_model_name"
        )
    if backbone_lora:
        check_lora(backbone_lora)
    tokenizer = load_tokenizer(model_dir)
    check_chat_template(tokenizer, model_dir)
    model = None if base_urls else _load(model_dir, torch_dtype, backbone_lora)
    # What the answers depend on: a job that goes on must have been begun with the same.
    settings: dict[str, Any] = {
        "prompts": [file_hash(f) for f in files],
        **asdict(sampling),
        "num_answers": num_answers,
        "seed": seed,
    }
    if model is not None:
        settings |= {"batch_size": batch_size, "model": Checkpoint(model_dir).fingerprint, "dtype": str(model.dtype)}
    if backbone_lora:
        settings["backbone_lora"] = lora_hash(backbone_lora)
    job = Job(output, settings)
    # This shard's answers, without those that an earlier run has written.
    keys = [(row, sample) for row in range(number, source.count, of) for sample in range(num_answers)]
    with job.part(number, of) as part:
        done = job.finished()
        left = [key for key in keys if key not in done]
        with tqdm(total=len(keys), initial=len(keys) - len(left), unit="row", desc="distill", smoothing=0.05) as bar:
            worker = Worker(source, sampling, tokenizer, num_answers, seed, part, bar)
            if base_urls:
                servers = Servers(base_urls, sampling, served_model_name, api_key, timeout, retry_seconds, concurrency)
                asyncio.run(worker.from_servers(servers, left, concurrency))
            else:
                worker.in_process(model, keys, set(left), batch_size)

    def report(rows: Path, refused: list[Row]) -> None:
        # Not a setting of the job: whoever was stopped by a row goes on without it.
        _report(rows, output, {**settings, "on_bad_row": on_bad_row}, source, refused)

    # The last shard to finish puts all of them together.
    refused = job.merge(source.count * num_answers, report)
    if refused is None:
        if job.missing:
            print(f"shard {shard} is finished; {job.missing} answers of other shards are missing in {job.folder}")
        else:
            print(f"shard {shard} is finished; another worker has written {output}")
        return not job.missing
    return True


def _load(model_dir: str, torch_dtype: str | None, backbone_lora: str | None) -> Any:
    """The model in this process, on a GPU where there is one."""
    if torch_dtype:
        dtype = getattr(torch, torch_dtype)
    elif torch.cuda.is_available():
        checkpoint = Checkpoint(model_dir)
        stored = checkpoint.value("dtype") or checkpoint.value("torch_dtype")
        dtype = getattr(torch, str(stored).removeprefix("torch."), torch.bfloat16)
    else:
        dtype = torch.float32
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return load_to_answer(model_dir, dtype, device, backbone_lora)


class Source:
    """Rows of the prompt files, checked once before anything is generated, then read again as they are needed."""

    def __init__(self, files: list[str], on_bad_row: str, names: dict[str, str] | None = None) -> None:
        self.files = files
        self.names = {file: name for file, name in (names or {}).items() if file != name}
        self.on_bad_row = on_bad_row
        self.bad = BadRows(on_bad_row)
        self.count = sum(1 for _ in self._rows(self.bad))

    def _rows(self, bad: BadRows) -> Iterator[tuple[str, Row]]:
        for file in self.files:
            for where, row in iter_rows(file, bad, unique_ids=True, name=self.names.get(file)):
                if Conversation(row["messages"]).answerable:
                    yield where, row
                else:
                    bad.add(where, "no user message for the assistant to answer")

    def rows(self, numbers: list[int]) -> Iterator[tuple[int, str, Row]]:
        """The rows with these numbers (ascending), and where they stand."""
        wanted = iter(numbers)
        number = next(wanted, None)
        for i, (where, row) in enumerate(self._rows(BadRows(self.on_bad_row))):
            if i == number:
                yield i, where, row
                number = next(wanted, None)


class Worker:
    """Answers the conversations of one shard."""

    def __init__(
        self, source: Source, sampling: Sampling, tokenizer: Any, num_answers: int, seed: int, part: Part, bar: Any
    ) -> None:
        self.source = source
        self.sampling = sampling
        self.tokenizer = tokenizer
        self.num_answers = num_answers
        self.seed = seed
        self.part = part
        self.bar = bar
        self.tokens = 0
        self.shown = 0.0
        self.unchecked = False

    def conversations(self, keys: list[Key]) -> Iterator[tuple[Key, str, Row]]:
        samples: dict[int, list[int]] = {}
        for number, sample in keys:
            samples.setdefault(number, []).append(sample)
        for number, where, row in self.source.rows(list(samples)):
            for answer in samples[number]:
                yield (number, answer), where, row

    def finish(self, done: list[tuple[Key, Row, Conversation]]) -> None:
        """Write finished conversations and say so."""
        records = []
        for key, row, conversation in done:
            kept = {k: v for k, v in row.items() if k not in ("messages", "prompt", "query", "response")}
            if kwargs := self.template_kwargs(row):
                kept["chat_template_kwargs"] = kwargs
            if self.num_answers > 1:
                kept["sample"] = key[1]
            if conversation.ended_early:
                kept["ended_early"] = True
            kept |= {"messages": conversation.messages, "finish_reason": conversation.finish_reason}
            records.append({"key": key, "row": kept})
        self.part.write(records)
        self.bar.update(len(records))

    def _count(self, tokens: int) -> None:
        """Tokens that have come just now. Long answers take long: the line moves with their tokens."""
        self.tokens += tokens
        speed = self.tokens / max(self.bar.format_dict["elapsed"], 1e-9)
        self.bar.set_postfix_str(f"{self.tokens} tokens, {speed:.0f} tok/s", refresh=False)
        if time.monotonic() - self.shown > SECONDS_TO_SHOW:
            self.bar.refresh()
            self.shown = time.monotonic()

    def in_process(self, model: Any, keys: list[Key], left: set[Key], num_slots: int) -> None:
        """Groups of conversations, each as if it were a job of its own.

        Which conversations are computed side by side changes the last digits of what is computed. So a group that was
        cut off is generated again from its start, the same; within a group, a slot is never empty.
        """
        size = num_slots * GROUP
        groups = [keys[start : start + size] for start in range(0, len(keys), size)]
        groups = [group for group in groups if not left.isdisjoint(group)]
        stream = self.conversations(list(chain.from_iterable(groups)))
        for group in groups:
            self._answer_group(model, list(islice(stream, len(group))), left, num_slots)

    def _answer_group(self, model: Any, group: list[tuple[Key, str, Row]], left: set[Key], num_slots: int) -> None:
        sampling = self.sampling
        ends = end_token_ids(model, self.tokenizer)
        limits = (sampling.max_new_tokens, sampling.temperature, sampling.top_k, sampling.top_p)
        conversations = [Conversation(row["messages"]) for _, _, row in group]
        turns: Counter[int] = Counter()
        waiting: deque[Request] = deque()

        def ask(number: int) -> None:
            """The next turn of a conversation; the end of one that has none, or that the template cannot render."""
            key, where, row = group[number]
            try:
                if conversations[number].waiting:
                    prompt = self.encode(row, conversations[number])
                    waiting.append(Request(number, prompt, self._seed(key, turns[number])))
                elif key in left:
                    self.finish([(key, row, conversations[number])])
            except RenderError as error:
                if key in left:
                    self.refuse(key, where, error)

        for number in range(len(group)):
            ask(number)
        # The first prompts are computed side by side, padded to the longest of them.
        waiting = deque(sorted(waiting, key=lambda request: len(request.prompt)))
        decoding = Decoding(*limits, frozenset(ends))
        try:
            for request, answer in answer_all(model, self.tokenizer, waiting, decoding, num_slots, self._count):
                ids = answer.token_ids[:-1] if answer.token_ids[-1] in ends else answer.token_ids
                reply = Reply(self.tokenizer.decode(ids), answer.finish_reason, answer.token_ids)
                conversations[request.key].add(reply, request.prompt)
                turns[request.key] += 1
                ask(request.key)
        except NotFiniteError as error:
            raise error.of(group[error.row][1]) from None

    async def from_servers(self, servers: Servers, keys: list[Key], concurrency: int) -> None:
        """`concurrency` conversations at a time; the first failure of the job cancels the others."""
        if not keys:
            return
        stream = self.conversations(keys)
        try:
            await servers.find_model()
            for doubt in await servers.check_sampling():
                self.bar.write(doubt)
            await all_or_first_failure(self._answer_all(servers, stream) for _ in range(min(concurrency, len(keys))))
        finally:
            await servers.close()

    async def _answer_all(self, servers: Servers, stream: Iterator[tuple[Key, str, Row]]) -> None:
        for key, where, row in stream:
            conversation = Conversation(row["messages"])
            kwargs = self.template_kwargs(row)
            turn = 0
            try:
                while conversation.waiting:
                    rendered = self.encode(row, conversation)
                    seed = self._seed(key, turn)
                    reply, seen = await servers.reply(conversation.messages, row.get("tools"), seed, kwargs)
                    conversation.add(reply, self._asked(seen, rendered, row, where))
                    turn += 1
            except (RefusedError, RenderError) as error:
                self.refuse(key, where, error)
            else:
                self._count(sum(len(m.get("token_ids") or ()) for m in conversation.messages))
                self.finish([(key, row, conversation)])

    def refuse(self, key: Key, where: str, error: Exception) -> None:
        """A row that cannot be asked: it stops the job, or is counted and left out."""
        what = f"the server refuses it ({error})" if isinstance(error, RefusedError) else str(error)
        if self.source.on_bad_row == "stop":
            raise FastMTPError(f"{where}: {what}; --on_bad_row skip goes on")
        self.part.write([{"key": key, "refused": f"{where}: {what}"}])
        self.bar.update(1)

    def template_kwargs(self, row: Row) -> dict[str, Any]:
        """For the chat template: the command's, and before them the row's own."""
        return {**self.sampling.chat_template_kwargs, **(row.get("chat_template_kwargs") or {})}

    def _seed(self, key: Key, turn: int) -> int:
        """A seed for every answer, the same whoever asks for it and when."""
        text = f"{self.seed} {key[0]} {key[1]} {turn}".encode()
        return int.from_bytes(hashlib.blake2b(text, digest_size=4).digest(), "big") >> 1

    def encode(self, row: Row, conversation: Conversation) -> list[int]:
        """The prompt of the next turn. Raises `RenderError`."""
        return encode_prompt(self.tokenizer, conversation.messages, row.get("tools"), self.template_kwargs(row))

    def _asked(self, seen: list[int] | int | None, rendered: list[int], row: Row, where: str) -> list[int]:
        """The prompt that the server answered: its own word where it gives one, else what we render.

        It must be what the model folder's chat template renders: that is what the head will draft behind.
        """
        if seen is None:
            if not self.unchecked:
                self.bar.write("the server tells neither token ids nor their number: its chat template is not checked")
            self.unchecked = True
            return rendered
        if isinstance(seen, int):
            if seen == len(rendered) or row.get("tools"):  # a server may write out null fields of tools
                return rendered
            what = f"{seen} tokens, {len(rendered)} with the chat template of --model"
        elif same_prompt(self.tokenizer, seen, rendered, row.get("tools")):
            return seen
        else:
            other = difference(self.tokenizer, seen, rendered)
            what = (
                f"token {other.token} differs: {other.kept!r}, and with the chat template of --model {other.rendered!r}"
            )
        raise FastMTPError(
            f"{where}: the server saw another prompt than the chat template of --model renders ({what}); serve the "
            "model with the chat template of its own folder (no --chat-template, no default system prompt), or give "
            "--model the folder that is served"
        )


def _shard(text: str) -> tuple[int, int]:
    try:
        number, of = map(int, text.split("/"))
        if 0 <= number < of:
            return number, of
    except ValueError:
        pass
    raise FastMTPError(f"--shard {text}: must be i/n with 0 <= i < n, as 0/4, 1/4, 2/4, 3/4")


def _report(answers: Path, output: str, settings: dict[str, Any], source: Source, refused: list[Row]) -> None:
    """Counts of what came out and what did not, beside the output. `answers`: its rows, where they are now."""
    reasons: Counter[str] = Counter()
    rows = tokens = early = 0
    with open(answers, encoding="utf-8") as file:
        for row in map(json.loads, file):
            rows += 1
            reasons[row["finish_reason"]] += 1
            early += row.get("ended_early", False)
            tokens += sum(len(m.get("token_ids") or ()) for m in row["messages"])
    report = {
        "version": __version__,
        "settings": settings,
        "rows": rows,
        "answer_tokens": tokens,
        "finish_reasons": dict(reasons.most_common()),
        "conversations_ended_early": early,
        "bad_rows": source.bad.report(),
        "refused_rows": {"count": len(refused), "rows": [r["refused"] for r in refused]},
    }
    write_json(report, Path(f"{output}.report.json"))
    left_out = source.bad.total + len(refused)
    print(f"{output}: {rows} rows, {tokens} answer tokens; " + ", ".join(f"{n} {r}" for r, n in reasons.most_common()))
    if left_out:
        print(f"{left_out} prompt rows left out; why and which: {output}.report.json")
