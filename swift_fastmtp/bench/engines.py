"""One server as the benchmark sees it: what it is, what it answers and when, and which drafts it accepted.

SGLang is asked at its native `/generate`, streamed, with token ids that the model folder's own chat template made:
only there do tokens, times and acceptance come together. Any other server is asked at `/v1/chat/completions`; vLLM
tells its acceptance in sums at `/metrics`, the others do not tell.
"""

import re
import time
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, cast

import httpx
import openai

from ..data.chat_template import RenderError, check_chat_template, encode_prompt
from ..data.client import Hear, MalformedError, RefusedError, Sampling, Server, for_server, longest_silence, repeat
from ..data.conversation import Message, is_complete
from ..data.vllm_pages import draft_counts, version_of
from ..errors import FastMTPError
from ..files.schema import Amount, Count, ListOf, Positive, build
from ..files.show import show
from ..redaction import redact_words, without_login
from .results import MAX_STEPS


@dataclass(frozen=True)
class SpecFields:
    """What a version of SGLang calls its counts in an answer's `meta_info` (`tokenizer_manager.py`)."""

    since: tuple[int, ...]
    steps: str
    accepted: str
    histogram: str


# Newest first. Read from 0.5.12, 0.5.15, 0.5.19, 0.5.23; and from 0.5.9.
SGLANG_FIELDS = (
    SpecFields((0, 5, 12), "spec_verify_ct", "spec_num_correct_drafts", "spec_correct_drafts_histogram"),
    SpecFields((0,), "spec_verify_ct", "spec_accept_token_num", "spec_accept_histogram"),
)


@dataclass
class Identity:
    """What a server says that it is."""

    engine: tuple[str, str]
    """Name and version."""
    model: str
    """As it answers under now; changes when other weights are loaded."""
    model_path: str
    num_steps: int | None = None
    """K; None if it does not say."""
    token_map: str | None = None
    draft_model: str | None = None
    command: list[str] | None = None


@dataclass
class Answer:
    """One assistant turn."""

    text: str
    """The message's content: all of the text if the server does not take the reasoning out of it."""
    output_ids: ListOf[Count] | None
    completion_tokens: Positive
    prompt_tokens: Count | None
    finish_reason: str
    start: Amount
    """Unix time of the request."""
    latency: Amount
    """Seconds from the request to the last chunk with a token; to the last of the stream if sizes are not known."""
    ttft: Amount | None
    """Seconds from the request to the first chunk; at `/v1/chat/completions` to the first with a token or text."""
    model: str
    """Under what the server answered."""
    chunk_tokens: ListOf[Positive] = field(default_factory=list)
    chunk_seconds: ListOf[Amount] = field(default_factory=list)
    """New tokens of each chunk, and the seconds since the one before (or the request)."""
    steps: Count | None = None
    accepted: Count | None = None
    histogram: ListOf[Count] | None = None
    """Verification steps, drafts they accepted, and how many steps accepted 0, 1, .. of them."""
    reasoning_content: str | None = None
    """The reasoning, from a server that has a parser for it."""


class Engine:
    """A server at an address. Use `connect`.

    `timeout`: seconds of silence after which it must show that it lives. `retry_seconds`: how long a request is
    repeated, counted from its first failure, before the run stops. `concurrency`: requests at a time.
    """

    def __init__(
        self,
        url: str,
        tokenizer: Any,
        sampling: Sampling,
        served_model_name: str | None = None,
        api_key: str | None = None,
        timeout: float = 600.0,
        retry_seconds: float = 60.0,
        concurrency: int = 1,
    ) -> None:
        self.url = without_login(url).rstrip("/").removesuffix("/v1")
        self.tokenizer = tokenizer
        self.sampling = sampling
        self.identity = Identity(("", ""), "", "")
        self._name = served_model_name
        self._timeout, self._retry_seconds, self._concurrency = timeout, retry_seconds, concurrency
        self._server = Server(url.rstrip("/").removesuffix("/v1"), api_key, timeout)
        self._http = httpx.AsyncClient(timeout=30, headers=self._server.headers)

    async def connect(self) -> Identity:
        """Ask the server what it is. Raises `FastMTPError` if nothing usable answers."""
        self.identity = await self._repeat(self._ask_identity)
        if self.native:
            check_chat_template(self.tokenizer, self.tokenizer.name_or_path)
        return self.identity

    async def close(self) -> None:
        await self._server.close()
        await self._http.aclose()

    @property
    def native(self) -> bool:
        return self.identity.engine[0] == "sglang"

    async def _repeat(self, ask: Any) -> Any:
        return await repeat(ask, [self.url], self._retry_seconds)

    async def _get(self, path: str) -> Any:
        """JSON, or None if there is no such page."""
        try:
            answer = await self._http.get(f"{self.url}{path}")
            return answer.json() if answer.status_code == 200 else None
        except httpx.HTTPError as error:
            raise MalformedError(f"no connection ({type(error).__name__} {error})".rstrip()) from None
        except (ValueError, RecursionError):
            return None

    async def _ask_identity(self) -> Identity:
        info = await self._get("/server_info") or await self._get("/get_server_info")
        model = await self._get("/model_info") or await self._get("/get_model_info")
        if isinstance(info, dict) and isinstance(model, dict) and "model_path" in model and "version" in info:
            path = str(model["model_path"])
            return Identity(
                ("sglang", str(info["version"])),
                _sglang_model(path, model.get("weight_version")),
                path,
                self._num_steps(info) if info.get("speculative_algorithm") else 0,
                _text(info.get("speculative_token_map")),
                _text(info.get("speculative_draft_model_path")),
                redact_words(info["launch_command"].split()) if isinstance(info.get("launch_command"), str) else None,
            )
        if self._name is None:
            names = await self._server.model_names()
            if len(names) != 1:
                listed = ", ".join(sorted(names)) or "none"
                raise FastMTPError(f"{self.url}: serves the models {listed}; choose with --served_model_name")
            self._name = names.pop()
        version = version_of(await self._get("/version"))
        if version is None:
            return Identity(("openai", "unknown"), self._name, self._name)
        counted = await self.counters()
        steps = len(counted) - 1 if counted else None
        return Identity(("vllm", version), self._name, self._name, steps)

    def _num_steps(self, info: dict[str, Any]) -> int:
        steps = info.get("speculative_num_steps") or 0
        if not isinstance(steps, int) or isinstance(steps, bool) or not 0 <= steps <= MAX_STEPS:
            raise FastMTPError(f"{self.url}: says that it makes {show(steps)} drafts per step, which is not possible")
        return steps

    async def flush(self) -> None:
        """Forget cached prefixes, so that every run prefills. SGLang only; vLLM has no such page by default."""
        if self.native:

            async def ask() -> None:
                try:
                    answer = await self._http.post(f"{self.url}/flush_cache")
                except httpx.HTTPError as error:
                    raise MalformedError(f"no connection ({type(error).__name__})") from None
                if answer.status_code != 200:  # it still runs a request that was cut off
                    raise MalformedError(f"/flush_cache answers {answer.status_code}")

            await self._repeat(ask)

    async def counters(self) -> list[int] | None:
        """vLLM's sums so far: [drafting steps, accepted at position 1, 2, ..]; None where there are none.

        Raises `FastMTPError` if one is no count.
        """
        if self.native:
            return None
        try:
            text = (await self._http.get(f"{self.url}/metrics")).text
        except httpx.HTTPError:
            return None
        return draft_counts(text, self.url)

    async def answer(
        self, messages: list[Message], temperature: float, seed: int, max_new_tokens: int | None = None
    ) -> Answer:
        """The next turn of the assistant.

        Raises `RefusedError` if the server refuses the conversation, `FastMTPError` if the run cannot go on.
        """
        limit = max_new_tokens or self.sampling.max_new_tokens
        ids = self._encode(messages) if self.native else []

        async def ask(hear: Hear) -> Answer:
            try:
                if self.native:
                    response = await self._generate(ids, temperature, seed, limit, hear)
                else:
                    response = await self._chat(messages, temperature, seed, limit, hear)
            except (openai.APIStatusError, openai.APIConnectionError, FastMTPError):
                raise
            except openai.APIError as error:  # an error inside of a stream
                if getattr(error, "body", None) and dict(error.body).get("code") in (400, 413, 422):  # type: ignore
                    raise RefusedError(str(error)) from None
                raise MalformedError(str(error)) from None
            except httpx.HTTPError as error:
                raise MalformedError(f"the connection broke ({type(error).__name__})") from None
            except (KeyError, TypeError, AttributeError, IndexError, ValueError, RecursionError) as error:
                raise MalformedError(f"an answer without {error}") from None
            if not 0 < response.completion_tokens <= limit:
                raise MalformedError(f"an answer of {response.completion_tokens} tokens")
            if response.finish_reason != "length" and not is_complete(response.finish_reason):
                raise MalformedError(f"an answer that ended with {response.finish_reason!r}")
            try:
                return build(Answer, asdict(response))
            except FastMTPError as error:
                raise MalformedError(f"an answer with a wrong {error}") from None

        longest = longest_silence(self._timeout, limit, self._concurrency)
        answer = await self._repeat(partial(self._server.in_time, ask, longest))
        assert isinstance(answer, Answer)
        return answer

    def _encode(self, messages: list[Message]) -> list[int]:
        """Raises `RefusedError` where the template does not render such a conversation: other servers, which render it
        themselves, refuse it then."""
        try:
            return encode_prompt(self.tokenizer, messages, None, self.sampling.chat_template_kwargs)
        except RenderError as error:
            raise RefusedError(str(error)) from None

    async def _generate(self, ids: list[int], temperature: float, seed: int, limit: int, hear: Hear) -> Answer:
        sampling: dict[str, Any] = {"temperature": temperature, "max_new_tokens": limit}
        if temperature > 0:
            sampling |= {"top_k": self.sampling.top_k, "top_p": self.sampling.top_p, "sampling_seed": seed}
        watch = _Watch()
        stream = await self._server.client.post(
            f"{self.url}/generate",
            body={"input_ids": ids, "sampling_params": sampling, "stream": True},
            cast_to=object,
            stream=True,
            stream_cls=openai.AsyncStream[object],
        )
        text, output, meta = "", list[int](), dict[str, Any]()
        async for chunk in stream:
            watch.tick()
            hear()
            assert isinstance(chunk, dict)
            meta, new = chunk["meta_info"], chunk["output_ids"]
            whole = len(new) == int(meta["completion_tokens"])  # else only what is new (--incremental-streaming-output)
            text, output = (chunk["text"], list(new)) if whole else (text + chunk["text"], output + list(new))
            watch.count(len(output))
        if not meta:
            raise MalformedError("an empty response")
        if not meta["finish_reason"]:
            raise MalformedError("an answer that was cut off")
        if not all(isinstance(i, int) for i in output) or not isinstance(text, str):
            raise MalformedError("tokens that are no integers")
        answer = watch.answer(text, len(output), str(meta["finish_reason"]["type"]), self.identity.model)
        answer.output_ids = output
        answer.prompt_tokens = meta.get("prompt_tokens")
        if "weight_version" in meta:
            answer.model = _sglang_model(self.identity.model_path, meta["weight_version"])
        answer.steps, answer.accepted, answer.histogram = self._spec(meta)
        return answer

    def _spec(self, meta: dict[str, Any]) -> tuple[int | None, int | None, list[int] | None]:
        """Acceptance out of `meta_info`. A server with drafts that does not tell it cannot be measured."""
        if not self.identity.num_steps:
            return None, None, None
        version = self.identity.engine[1]
        names = next(f for f in SGLANG_FIELDS if _version(version) >= f.since)
        if meta["completion_tokens"] == 1 and names.steps not in meta:  # the prefill's token was the last
            return 0, 0, [0]
        wanted = (names.steps, names.accepted)
        missing = [name for name in wanted if type(meta.get(name)) is not int]
        if missing:
            like = ", ".join(sorted(k for k in meta if k.startswith("spec_"))) or "nothing that begins with spec_"
            raise FastMTPError(
                f"{self.url}: drafts, but its answers do not tell {', '.join(missing)}, as SGLang {version} should "
                f"(they have {like}); use another version, or add its names to SGLANG_FIELDS in bench/engines.py"
            )
        return self._counts(meta[names.steps], meta[names.accepted], meta.get(names.histogram))

    def _counts(self, steps: int, accepted: int, histogram: Any) -> tuple[int, int, list[int] | None]:
        """What a server says of one answer. Raises `FastMTPError` if it cannot be."""
        most = self.identity.num_steps or MAX_STEPS
        if steps < 0 or not 0 <= accepted <= steps * most:
            raise FastMTPError(
                f"{self.url}: {show(accepted)} drafts accepted in {show(steps)} steps of {most} drafts is not "
                "possible; its acceptance cannot be trusted"
            )
        if histogram is not None and not _is_histogram(histogram, accepted, steps):
            raise FastMTPError(
                f"{self.url}: its histogram {str(histogram)[:100]} is not that of {accepted} drafts accepted in "
                f"{steps} steps; its acceptance cannot be trusted"
            )
        return steps, accepted, histogram

    async def _chat(self, messages: list[Message], temperature: float, seed: int, limit: int, hear: Hear) -> Answer:
        # SGLang refuses it in a stream, should it stand behind something that hides what it is.
        extra: dict[str, Any] = {"return_token_ids": True} if self.identity.engine[0] == "vllm" else {}
        if temperature > 0:
            extra["top_k"] = self.sampling.top_k
        if self.sampling.chat_template_kwargs:
            extra["chat_template_kwargs"] = self.sampling.chat_template_kwargs
        watch = _Watch()
        stream = await self._server.client.chat.completions.create(
            model=self._name or "",
            messages=cast(Any, [for_server(message) for message in messages]),
            max_tokens=limit,
            temperature=temperature,
            top_p=self.sampling.top_p if temperature > 0 else 1.0,
            seed=seed,
            stream=True,
            stream_options={"include_usage": True},
            extra_body=extra,
        )
        text, reasoning, output, usage, reason, model = "", "", list[int](), None, None, ""
        metrics: dict[str, Any] = {}
        async for chunk in stream:
            watch.tick()
            hear()
            usage, model = chunk.usage or usage, chunk.model or model
            metrics = getattr(chunk, "metrics", None) or metrics
            for choice in chunk.choices or ():
                text += choice.delta.content or ""
                # SGLang's name, and vLLM's; versions of vLLM that have both say the same under both.
                names = ("reasoning_content", "reasoning")
                reasoning += next((part for name in names if (part := getattr(choice.delta, name, None))), "")
                output += getattr(choice, "token_ids", None) or []
                reason = choice.finish_reason or reason
                if output:
                    watch.count(len(output))
                elif text or reasoning:
                    watch.count(0)
        if usage is None:
            raise MalformedError("an answer without usage")
        answer = watch.answer(text, int(usage.completion_tokens), str(reason), str(model))
        if output:
            answer.output_ids = output
        else:
            answer.chunk_tokens, answer.chunk_seconds = [], []  # chunks of unknown size tell nothing about tokens
        answer.prompt_tokens = usage.prompt_tokens
        answer.reasoning_content = reasoning or None
        # vLLM with --per-request-spec-decode-metrics (`entrypoints/generate/base/protocol.py`).
        if spec := metrics.get("speculative_decoding"):
            steps, accepted = spec["num_spec_steps"], spec["num_accepted_draft_tokens"]
            answer.steps, answer.accepted, answer.histogram = self._counts(
                steps, accepted, spec["acceptance_histogram"]
            )
        return answer


class _Watch:
    """When the chunks of one answer came."""

    def __init__(self) -> None:
        self.start = time.time()
        self.begin = self.now = self.last = time.perf_counter()
        self.first: float | None = None
        self.tokens: list[int] = []
        self.seconds: list[float] = []
        self.total = 0

    def tick(self) -> None:
        self.now = time.perf_counter()

    def count(self, total: int) -> None:
        """There are now `total` tokens. A chunk without a new one is no chunk."""
        if self.first is None:
            self.first = self.now - self.begin
        if total > self.total:
            self.tokens.append(total - self.total)
            self.seconds.append(round(self.now - self.last, 6))
            self.total, self.last = total, self.now

    def answer(self, text: str, tokens: int, reason: str, model: str) -> Answer:
        end = self.last if self.tokens else self.now
        return Answer(
            text, None, tokens, None, reason, self.start, end - self.begin, self.first, model, self.tokens, self.seconds
        )


def _is_histogram(value: Any, accepted: int, steps: int) -> bool:
    if not isinstance(value, list) or not all(type(n) is int and n >= 0 for n in value):
        return False
    return sum(value) == steps and sum(j * n for j, n in enumerate(value)) == accepted


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _sglang_model(path: str, weights: Any) -> str:
    return path if weights in (None, "default") else f"{path} (weights {weights})"


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(x) for x in re.findall(r"\d+", text)[:3])
