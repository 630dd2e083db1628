"""Answers from servers that speak OpenAI's protocol: SGLang, vLLM, `swift deploy`.

A request is repeated, after a growing pause, for every failure that another try may fix: no connection, a stall,
status 408, 409, 425, 429 and 5xx, a body that is not what the protocol says. A request that the server refuses (400,
413, 422) is its row's fault and is not repeated; a wrong address, key or model name (401, 403, 404) stops the job.

What is a stall? An answer that is not streamed is silent until it is complete, which takes as long as the server is
slow. So silence alone ends no request: the server is asked whether it lives, and only one that does not say so has
stalled (`Server.in_time`).
"""

import asyncio
import itertools
import json
import socket
import time
import urllib.request
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar, cast
from urllib.parse import urlsplit

import httpx
import openai
import tenacity

from ..errors import FastMTPError
from ..redaction import authorization, redact, without_login
from .chat_template import RENDERED
from .conversation import Message, Reply
from .vllm_pages import check_sampled_drafts, draft_counts, version_of

T = TypeVar("T")

REPEATED = (408, 409, 425, 429)
REFUSED = (400, 413, 422)
LONGEST_PAUSE = 30.0  # seconds
FEWEST_ATTEMPTS = 3
"""A request is tried so often, however short `retry_seconds` is: one stall must not end a job."""

CONNECT_SECONDS = 60.0
PROBE_SECONDS = 30.0
"""For the answer to "are you alive?". SGLang's own check gives up after 20 s."""
PROBES = 3
"""So many in a row must fail before a server counts as stalled: a long prefill may keep one from its answer."""

SLOWEST_REQUEST = 1.0
SLOWEST_SERVER = 100.0
"""Tokens a second, of one request and of all together, of the slowest server that `longest_silence` waits for."""

Hear = Callable[[], None]
"""Called whenever a part of an answer has come."""


class RefusedError(Exception):
    """The server will not answer this conversation, however often it is asked. What it says may repeat our key, and is
    kept with the other records: the message holds no secret."""

    def __init__(self, message: str) -> None:
        super().__init__(redact(message))


class MalformedError(Exception):
    """A response that is not what the protocol says."""


class StalledError(Exception):
    """A server that neither answers nor lives, or one that lives and has lost the request."""


def longest_silence(timeout: float, max_new_tokens: int, concurrency: int) -> float:
    """Seconds after which a request counts as lost although its server lives.

    A server with few slots works off `concurrency` requests one after another, so the time grows with both: that of
    the longest answer at `SLOWEST_REQUEST`, or of all of them at `SLOWEST_SERVER`, whichever is more.
    """
    one = max_new_tokens / SLOWEST_REQUEST
    all_of_them = max_new_tokens * concurrency / SLOWEST_SERVER
    return timeout + max(one, all_of_them)


@dataclass
class Sampling:
    """How answers are drawn. Defaults: the paper's, Appendix A."""

    max_new_tokens: int = 4096
    temperature: float = 0.6
    """0 is greedy."""
    top_k: int = 20
    top_p: float = 0.95
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)


class Servers:
    """One model behind one or several addresses, used in turn.

    `timeout`: seconds of silence after which a server must show that it lives. `retry_seconds`: how long a request is
    repeated, counted from its first failure, before the job stops. `concurrency`: requests at a time, of all callers.
    """

    def __init__(
        self,
        base_urls: list[str],
        sampling: Sampling,
        served_model_name: str | None = None,
        api_key: str | None = None,
        timeout: float = 600.0,
        retry_seconds: float = 600.0,
        concurrency: int = 1,
    ) -> None:
        self.sampling = sampling
        self.retry_seconds = retry_seconds
        self.model = served_model_name
        for url in base_urls:
            check_address(url, "--base_url")
        self._urls = [without_login(url) for url in base_urls]
        self._servers = [Server(url, api_key, timeout) for url in base_urls]
        self._turn = itertools.cycle(self._servers)
        self._longest = longest_silence(timeout, sampling.max_new_tokens, concurrency)

    async def close(self) -> None:
        for server in self._servers:
            await server.close()

    async def find_model(self) -> str:
        """The name the servers give their model. Raises `FastMTPError` if they do not agree on one."""
        if self.model is None:
            names: set[str] = set()
            for server in self._servers:
                names |= await self._repeat(server.model_names)
            if len(names) != 1:
                listed = ", ".join(sorted(names)) or "none"
                raise FastMTPError(f"{self._urls[0]}: serves the models {listed}; choose with --served_model_name")
            self.model = names.pop()
        return self.model

    async def check_sampling(self) -> list[str]:
        """What may be wrong with answers that these servers sample, a line for each server of which it is not certain.

        Raises `FastMTPError` if it is certain.
        """
        doubts = []
        if self.sampling.temperature > 0:
            for server in self._servers:
                doubt = await server.check_sampling()
                if doubt is not None:
                    doubts.append(doubt)
        return doubts

    async def reply(
        self, messages: list[Message], tools: Any, seed: int, chat_template_kwargs: dict[str, Any] | None = None
    ) -> tuple[Reply, list[int] | int | None]:
        """The assistant's next turn, and the prompt as the server saw it: its token ids, their number, or None.

        Raises `RefusedError` if the server refuses the conversation, `FastMTPError` if the job cannot go on.
        """
        sampling = self.sampling
        extra: dict[str, Any] = {"return_token_ids": True, "return_details": True}  # SGLang's and vLLM's, swift's
        if sampling.temperature > 0:
            extra["top_k"] = sampling.top_k
        if chat_template_kwargs:
            extra["chat_template_kwargs"] = chat_template_kwargs
        if tools:
            extra["tools"] = tools

        async def ask(server: Server, _: Hear) -> tuple[Reply, list[int] | int | None]:
            answer = await server.client.chat.completions.create(
                model=self.model or "",
                messages=[for_server(m) for m in messages],  # type: ignore[misc]
                max_tokens=sampling.max_new_tokens,
                temperature=sampling.temperature,
                top_p=sampling.top_p if sampling.temperature > 0 else 1.0,
                seed=seed,
                extra_body=extra,
            )
            return _read(answer)

        return await self.ask_any(ask)

    async def ask_any(self, ask: Callable[["Server", Hear], Awaitable[T]], only: "Server | None" = None) -> T:
        """What `ask` gives of the server whose turn it is, or of `only`, asked again as `repeat` does it. Raises as
        `reply`."""

        async def ask_next() -> T:
            server = only or next(self._turn)
            return await server.in_time(partial(ask, server), self._longest)

        return await self._repeat(ask_next)

    async def ask_one(self, server: "Server", path: str) -> dict[str, Any]:
        """A page of one server. Raises as `reply`."""
        return await self._repeat(partial(server.get, path))

    @property
    def all(self) -> list["Server"]:
        """Each address."""
        return self._servers

    async def _repeat(self, ask: Callable[[], Awaitable[T]]) -> T:
        return await repeat(ask, self._urls, self.retry_seconds)


class Server:
    """One address: its client, and whether it lives.

    `url` may hold a login, `http://user:password@host`, which goes before `api_key`. `timeout`: seconds of silence
    after which it must show that it lives.
    """

    def __init__(self, url: str, api_key: str | None, timeout: float) -> None:
        self.url = _with_version(without_login(url))
        self.headers = {"Authorization": authorization(url, api_key)}
        self.timeout = timeout
        # The library itself repeats nothing: it does not know that half a JSON is worth another try.
        self.client = openai.AsyncOpenAI(
            base_url=self.url,
            api_key=api_key or "none",
            default_headers=self.headers,
            max_retries=0,
            http_client=cast(Any, _http_client(timeout)),  # openai 2 and 3 take it; 3's types name another library
        )
        self._probing = asyncio.Lock()
        self._probed_at = -float("inf")
        self._alive = False

    async def close(self) -> None:
        await self.client.close()

    async def model_names(self) -> set[str]:
        """The models that it serves. Raises `MalformedError`."""
        page = await asyncio.wait_for(self.client.models.list(), self.timeout)
        try:
            return {model.id for model in page.data}
        except (AttributeError, TypeError) as error:
            raise MalformedError(f"a list of models without {error}") from None

    async def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """An engine's own page, in front of the protocol's; its object. Raises as the protocol's client does."""
        return _object_of(await self.client.post(f"{self._root}{path}", cast_to=object, body=body))

    async def get(self, path: str) -> dict[str, Any]:
        """As `post`."""
        return _object_of(await self.client.get(f"{self._root}{path}", cast_to=object))

    async def in_time(self, ask: Callable[[Hear], Awaitable[T]], longest: float) -> T:
        """What `ask` gives.

        After each `timeout` seconds without a sign the server is probed. One that lives goes on, however slow it is,
        until its request has been silent for `longest` seconds.

        Args:
            ask: gets a function to call when a part of the answer comes.
            longest: seconds; see `longest_silence`.

        Raises `StalledError`.
        """
        spoke = time.monotonic()  # when the last part of the answer came

        def hear() -> None:
            nonlocal spoke
            spoke = time.monotonic()

        request = asyncio.ensure_future(ask(hear))
        probed = spoke
        try:
            while True:
                due = min(max(spoke, probed) + self.timeout, spoke + longest)
                await asyncio.wait({request}, timeout=max(due - time.monotonic(), 0.0))
                if request.done():
                    return request.result()
                now = time.monotonic()
                if now >= spoke + longest:
                    raise StalledError(f"lives, but has not answered for {now - spoke:.0f} s")
                if now < max(spoke, probed) + self.timeout:
                    continue  # a part has come meanwhile
                alive = await self._lives()
                if not alive and not request.done():
                    raise StalledError(
                        f"silent for {time.monotonic() - spoke:.0f} s, and it does not say that it lives"
                    )
                probed = time.monotonic()
        finally:
            request.cancel()
            await asyncio.gather(request, return_exceptions=True)

    async def _lives(self) -> bool:
        """Whether the server says that it lives. Requests that ask at the same time share the answer."""
        async with self._probing:
            fresh = min(5.0, self.timeout / 2)
            if time.monotonic() - self._probed_at > fresh:
                self._alive = await self._probe()
                self._probed_at = time.monotonic()
            return self._alive

    async def _probe(self) -> bool:
        for _ in range(PROBES):
            # SGLang's and vLLM's engines answer here themselves, not only the process in front of them.
            page = await self._page(f"{self._root}/health")
            if page is not None and not page.is_success and page.status_code < 500:  # there is no such page
                page = await self._page(f"{self.url}/models")
            if page is not None and page.status_code < 500:
                return True
        return False

    async def check_sampling(self) -> str | None:
        """What may be wrong with the answers that it samples, as far as its pages tell (`vllm_pages.py`).

        Raises `FastMTPError` if something certainly is.
        """
        about, metrics = await self._page(f"{self._root}/version"), await self._page(f"{self._root}/metrics")
        if about is None or metrics is None or not about.is_success or not metrics.is_success:
            return None
        try:
            version = version_of(about.json())
        except (ValueError, RecursionError):
            return None
        if version is None or draft_counts(metrics.text, self._root) is None:
            return None
        return check_sampled_drafts(version, self._root)

    @property
    def _root(self) -> str:
        """The address in front of the protocol's own."""
        return self.url.removesuffix("/v1")

    async def _page(self, url: str) -> httpx.Response | None:
        """A page, None if nobody answers."""
        limit = min(self.timeout, PROBE_SECONDS)
        try:
            async with httpx.AsyncClient(timeout=limit) as client:  # not behind the requests that wait
                return await asyncio.wait_for(client.get(url, headers=self.headers), limit)
        except (httpx.HTTPError, asyncio.TimeoutError):
            return None


def _object_of(answer: object) -> dict[str, Any]:
    if not isinstance(answer, dict):
        raise MalformedError(f"a page that holds {type(answer).__name__}, not an object")
    return answer


def _http_client(timeout: float) -> httpx.AsyncClient:
    """A client that waits for an answer without end: `Server.in_time` knows better when it is time to stop.

    The kernel asks whether the other machine is there while a request is silent: one that was switched off, or a load
    balancer that has forgotten the connection, would never say so.
    """
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=100)
    transport = None
    if not any(name != "no" for name in urllib.request.getproxies()):  # a transport of ours would go around them
        transport = httpx.AsyncHTTPTransport(limits=limits, socket_options=_keep_alive())
    wait = httpx.Timeout(None, connect=min(timeout, CONNECT_SECONDS))
    return httpx.AsyncClient(timeout=wait, limits=limits, transport=transport, follow_redirects=True)


def _keep_alive() -> list[tuple[int, int, int]]:
    """Socket options: after a minute of silence four questions, 30 s apart, then the connection is broken."""
    options = [(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)]
    for name, value in (("TCP_KEEPIDLE", 60), ("TCP_KEEPINTVL", 30), ("TCP_KEEPCNT", 4)):
        if hasattr(socket, name):  # not on every system
            options.append((socket.IPPROTO_TCP, getattr(socket, name), value))
    return options


async def all_or_first_failure(works: Iterable[Coroutine[Any, Any, None]]) -> None:
    """Run them side by side until all have ended. The first failure cancels the others and is raised."""
    tasks = [asyncio.create_task(work) for work in works]
    try:
        for done in asyncio.as_completed(tasks):
            await done
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def repeat(ask: Callable[[], Awaitable[T]], urls: list[str], retry_seconds: float) -> T:
    """What `ask` gives, asked again after every failure that another try may fix.

    It ends when `retry_seconds` have passed since the first failure, but not before `FEWEST_ATTEMPTS`.

    Raises `RefusedError` if the server refuses the request, `FastMTPError` if the job cannot go on.
    """
    first_failure: float | None = None
    attempts = 0

    def stop(state: tenacity.RetryCallState) -> bool:
        nonlocal first_failure, attempts
        attempts = state.attempt_number
        if first_failure is None:
            first_failure = time.monotonic()
        return attempts >= FEWEST_ATTEMPTS and time.monotonic() - first_failure >= retry_seconds

    started = time.monotonic()
    retrying = tenacity.AsyncRetrying(
        retry=tenacity.retry_if_exception(_worth_another_try),
        wait=_pause,
        stop=stop,
        reraise=True,
    )
    try:
        return await retrying(ask)
    except openai.APIStatusError as error:
        if error.status_code in REFUSED:
            raise RefusedError(_words(error)) from None
        raise FastMTPError(f"{urls[0]}: answers {error.status_code} ({_words(error)}){_how_to_fix(error)}") from None
    except Exception as error:
        if not _worth_another_try(error):
            raise
        what = _words(error) or type(error).__name__
        raise FastMTPError(
            f"{', '.join(urls)}: no usable answer in {attempts} attempts, {time.monotonic() - started:.0f} s ({what}); "
            "what is finished is kept, start again when the server is back"
        ) from None


def check_address(url: str, where: str) -> None:
    """Raises `FastMTPError`, naming `where` it stands, if `url` is no address of a server."""
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        good = False
    if not good or not url.isprintable() or " " in url:
        shown = "this" if "@" in url else repr(url[:300])  # a login that we cannot read is one
        raise FastMTPError(f"{where}: {shown} is no address, as http://host:30000 is")


def _with_version(url: str) -> str:
    url = url.rstrip("/")
    return url if url.endswith("/v1") else f"{url}/v1"


def for_server(message: Message) -> Message:
    """A message as servers read it: `arguments` of tool calls are text.

    For an earlier turn's reasoning newer vLLM looks under `reasoning` only (vLLM issue 38488), SGLang and older vLLM
    under `reasoning_content`; each leaves the other key alone.
    """
    sent = {k: message[k] for k in RENDERED if k in message}
    if sent.get("tool_calls"):
        sent["tool_calls"] = [_with_text_arguments(call) for call in sent["tool_calls"]]
    if "reasoning_content" in sent:
        sent["reasoning"] = sent["reasoning_content"]
    return sent


def _with_text_arguments(call: dict[str, Any]) -> dict[str, Any]:
    function = call["function"]
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        return call
    return {**call, "function": {**function, "arguments": json.dumps(arguments or {}, ensure_ascii=False)}}


def _read(answer: Any) -> tuple[Reply, list[int] | int | None]:
    """Raises `MalformedError`: proxies and dying servers send anything."""
    try:
        choice = answer.choices[0]
        content, reason = choice.message.content, choice.finish_reason
        ids = _extra(choice, "response_token_ids", "token_ids")  # SGLang; vLLM and swift
        prompt = _extra(choice, "prompt_token_ids") or _extra(answer, "prompt_token_ids")
        calls = [call.model_dump(exclude_none=True) for call in choice.message.tool_calls or []]
        reasoning = _extra(choice.message, "reasoning_content", "reasoning")
        if prompt is None and answer.usage is not None:
            prompt = answer.usage.prompt_tokens
    except (AttributeError, IndexError, TypeError) as error:
        raise MalformedError(f"a response without {error}") from None
    if not isinstance(content, str | None) or not isinstance(reason, str) or reason in ("abort", "error"):
        raise MalformedError(f"a response with finish reason {reason!r} and content {type(content).__name__}")
    for listed in (ids, prompt if isinstance(prompt, list) else None):
        if listed is not None and not all(isinstance(i, int) for i in listed):
            raise MalformedError("token ids that are no integers")
    return Reply(content or "", reason, ids, reasoning or None, calls or None), prompt


def _extra(value: Any, *names: str) -> Any:
    return next((v for name in names if (v := getattr(value, name, None)) is not None), None)


def _worth_another_try(error: BaseException) -> bool:
    if isinstance(error, openai.APIStatusError):
        return error.status_code in REPEATED or error.status_code >= 500
    broken = (json.JSONDecodeError, UnicodeDecodeError, openai.APIResponseValidationError, MalformedError, StalledError)
    return isinstance(error, (openai.APIConnectionError, asyncio.TimeoutError, *broken))


_growing = tenacity.wait_random_exponential(multiplier=0.25, max=LONGEST_PAUSE)


def _pause(state: tenacity.RetryCallState) -> float:
    """Seconds until the next try: what the server asks for, else random and growing."""
    error = state.outcome.exception() if state.outcome else None
    if isinstance(error, openai.APIStatusError):
        try:
            return min(max(float(error.response.headers["retry-after"]), 0.0), LONGEST_PAUSE)
        except (KeyError, ValueError):
            pass
    return _growing(state)


def _words(error: BaseException) -> str:
    # Redacted before it is cut: half of a key is not found any more.
    return redact(" ".join(str(error).split()))[:300]


_KEY = "; is the server's key in OPENAI_API_KEY, or given with --api_key?"


def _how_to_fix(error: openai.APIStatusError) -> str:
    return {
        401: _KEY,
        403: _KEY,
        404: "; is --base_url right, and --served_model_name?",
    }.get(error.status_code, "")
