"""Answers from servers that speak OpenAI's protocol: SGLang, vLLM, `swift deploy`.

A request is repeated, after a growing pause, for every failure that another try may mend: no connection, a stall,
status 408, 409, 425, 429 and 5xx, a body that is not what the protocol says. A request that the server refuses (400,
413, 422) is its row's fault and is not repeated; a wrong address, key or model name (401, 403, 404) stops the job.
"""

import asyncio
import itertools
import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import openai
import tenacity

from ..errors import FastMTPError
from .conversation import Message, Reply

T = TypeVar("T")

REPEATED = (408, 409, 425, 429)
REFUSED = (400, 413, 422)
LONGEST_PAUSE = 30.0  # seconds


class RefusedError(Exception):
    """The server will not answer this conversation, however often it is asked."""


class MalformedError(Exception):
    """A response that is not what the protocol says."""


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

    `timeout`: seconds for one answer. `retry_seconds`: how long a request is repeated before the job stops.
    """

    def __init__(
        self,
        base_urls: list[str],
        sampling: Sampling,
        served_model_name: str | None = None,
        api_key: str | None = None,
        timeout: float = 600.0,
        retry_seconds: float = 600.0,
    ) -> None:
        self.sampling = sampling
        self.timeout = timeout
        self.retry_seconds = retry_seconds
        self.model = served_model_name
        self._urls = base_urls
        self._clients = [open_client(url, api_key, timeout) for url in base_urls]
        self._turn = itertools.cycle(range(len(base_urls)))

    async def close(self) -> None:
        for client in self._clients:
            await client.close()

    async def find_model(self) -> str:
        """The name the servers give their model. Raises `FastMTPError` if they do not agree on one."""
        if self.model is None:
            names: set[str] = set()
            for client in self._clients:
                names |= await self._repeat(partial(model_names, client))
            if len(names) != 1:
                listed = ", ".join(sorted(names)) or "none"
                raise FastMTPError(f"{self._urls[0]}: serves the models {listed}; choose with --served_model_name")
            self.model = names.pop()
        return self.model

    async def reply(self, messages: list[Message], tools: Any, seed: int) -> tuple[Reply, list[int] | int | None]:
        """The assistant's next turn, and the prompt as the server saw it: its token ids, their number, or None.

        Raises `RefusedError` if the server refuses the conversation, `FastMTPError` if the job cannot go on.
        """
        sampling = self.sampling
        extra: dict[str, Any] = {"return_token_ids": True, "return_details": True}  # SGLang's and vLLM's, swift's
        if sampling.temperature > 0:
            extra["top_k"] = sampling.top_k
        if sampling.chat_template_kwargs:
            extra["chat_template_kwargs"] = sampling.chat_template_kwargs
        if tools:
            extra["tools"] = tools

        async def ask() -> tuple[Reply, list[int] | int | None]:
            answer = await self._clients[next(self._turn)].chat.completions.create(
                model=self.model or "",
                messages=[for_server(m) for m in messages],  # type: ignore[misc]
                max_tokens=sampling.max_new_tokens,
                temperature=sampling.temperature,
                top_p=sampling.top_p if sampling.temperature > 0 else 1.0,
                seed=seed,
                extra_body=extra,
            )
            return _read(answer)

        return await self._repeat(ask)

    async def _repeat(self, ask: Callable[[], Awaitable[T]]) -> T:
        return await repeat(ask, self._urls, self.timeout, self.retry_seconds)


def open_client(url: str, api_key: str | None, timeout: float) -> openai.AsyncOpenAI:
    """A client of one server, for `repeat`: the library itself repeats nothing, it does not know that half a JSON is
    worth another try."""
    return openai.AsyncOpenAI(
        base_url=_with_version(url),
        api_key=api_key or "none",
        max_retries=0,
        timeout=timeout,
    )


async def repeat(ask: Callable[[], Awaitable[T]], urls: list[str], timeout: float, retry_seconds: float) -> T:
    """What `ask` gives, asked again after every failure that another try may mend, for `retry_seconds`.

    Raises `RefusedError` if the server refuses the request, `FastMTPError` if the job cannot go on.
    """
    retrying = tenacity.AsyncRetrying(
        retry=tenacity.retry_if_exception(_worth_another_try),
        wait=_pause,
        stop=tenacity.stop_after_delay(retry_seconds),
        reraise=True,
    )

    async def in_time() -> T:
        return await asyncio.wait_for(ask(), timeout)

    try:
        return await retrying(in_time)
    except openai.APIStatusError as error:
        if error.status_code in REFUSED:
            raise RefusedError(_words(error)) from None
        raise FastMTPError(f"{urls[0]}: answers {error.status_code} ({_words(error)}){_mend(error)}") from None
    except Exception as error:
        if not _worth_another_try(error):
            raise
        what = _words(error) or type(error).__name__
        raise FastMTPError(
            f"{', '.join(urls)}: no usable answer for {retry_seconds:.0f} s ({what}); what is finished "
            "is kept, start again when the server is back"
        ) from None


async def model_names(client: openai.AsyncOpenAI) -> set[str]:
    """The models of a server. Raises `MalformedError`."""
    page = await client.models.list()
    try:
        return {model.id for model in page.data}
    except (AttributeError, TypeError) as error:
        raise MalformedError(f"a list of models without {error}") from None


def _with_version(url: str) -> str:
    url = url.rstrip("/")
    return url if url.endswith("/v1") else f"{url}/v1"


def for_server(message: Message) -> Message:
    """A message as servers read it. For an earlier turn's reasoning newer vLLM looks under `reasoning` only (vLLM issue
    38488), SGLang and older vLLM under `reasoning_content`; each leaves the other key alone."""
    sent = {k: v for k, v in message.items() if k not in ("token_ids", "finish_reason")}
    if "reasoning_content" in sent:
        sent["reasoning"] = sent["reasoning_content"]
    return sent


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
    broken = (json.JSONDecodeError, UnicodeDecodeError, openai.APIResponseValidationError, MalformedError)
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
    return " ".join(str(error).split())[:300]


def _mend(error: openai.APIStatusError) -> str:
    return {
        401: "; name the key with --api_key or OPENAI_API_KEY",
        403: "; name the key with --api_key or OPENAI_API_KEY",
        404: "; is --base_url right, and --served_model_name?",
    }.get(error.status_code, "")
