"""Conversations: where the assistant is to speak, and what it answered."""

import json
from dataclasses import dataclass
from typing import Any

from .prompt_ids import Message as Message
from .prompt_ids import shorten

COMPLETE = (
    *("stop", "tool_calls", "function_call"),  # OpenAI
    *("eos_token", "stop_sequence"),  # Hugging Face's TGI
    *("end_turn", "tool_use"),  # Anthropic, with `stop_sequence`
    *("eos", "complete"),  # older servers
)
"""Finish reasons of an answer that the model itself ended."""


def is_complete(reason: Any) -> bool:
    """Whether an answer with this finish reason was ended by the model, and not cut off; case does not matter."""
    return isinstance(reason, str) and reason.lower() in COMPLETE


@dataclass
class Reply:
    """One answer of the model."""

    content: str
    finish_reason: str
    """`stop`, `tool_calls`, `length` (the token limit) or what else a server says."""
    token_ids: list[int] | None = None
    """As generated, with the end token if the model produced one; None if the server does not tell."""
    reasoning_content: str | None = None
    tool_calls: list[dict[str, Any]] | None = None

    def message(self) -> Message:
        fields = ("content", "reasoning_content", "tool_calls", "token_ids", "finish_reason")
        return {"role": "assistant", **{k: v for k in fields if (v := getattr(self, k)) is not None}}


class Conversation:
    """A source conversation, answered turn by turn on the model's own history.

    Users', system and tool messages come from the source; every turn of the assistant is the model's. It ends where the
    source ends, where an answer was cut off, and where the source goes on with results of tools that the model's own
    turn did not call.
    """

    def __init__(self, source: list[Message]) -> None:
        self._source = source
        self._next = 0
        self._generated: list[int] = []  # prompt and answer of the last turn that the model generated
        self.messages: list[Message] = []
        self.finish_reason = ""
        self.waiting = True
        """Whether the assistant is to speak after `messages`."""
        self.ended_early = False
        self._copy()

    @property
    def answerable(self) -> bool:
        """Whether anybody said anything that an answer could be about."""
        return any(m["role"] in ("user", "tool") for m in self.messages)

    def add(self, reply: Reply, asked: list[int] | None = None) -> None:
        """The assistant's turn; afterwards `waiting` says whether there is another.

        `asked`: token ids of the prompt that it was generated behind, kept with it.
        """
        replaced = self._turn()
        message = reply.message()
        if asked is not None:
            message |= shorten(asked, self._generated)
            self._generated = asked + (reply.token_ids or [])
        self.messages.append(message)
        self.finish_reason = reply.finish_reason
        self._next += len(replaced)

        # The source may go on with results of tools: they answer the model's calls only if those are the source's.
        results = self._results()
        expected, called = _called(replaced), _called([message])
        same_names = [name for name, _ in expected] == [name for name, _ in called]
        if not is_complete(reply.finish_reason) or self._next == len(self._source):
            self.waiting = False
            self.ended_early = self._next < len(self._source)
        elif len(results) != len(called) or (expected and not same_names):
            self.waiting, self.ended_early = False, True
        else:
            for result, (_, call_id) in zip(_in_order(results, expected), called, strict=True):
                answer = dict(result)
                if call_id is not None:
                    answer["tool_call_id"] = call_id
                self.messages.append(answer)
            self._next += len(results)
            self._copy()

    def _results(self) -> list[Message]:
        """The results of tools that the source goes on with."""
        end = self._next
        while end < len(self._source) and self._source[end]["role"] == "tool":
            end += 1
        return self._source[self._next : end]

    def _turn(self) -> list[Message]:
        end = self._next
        while end < len(self._source) and self._source[end]["role"] == "assistant":
            end += 1
        return self._source[self._next : end]

    def _copy(self) -> None:
        while self._next < len(self._source) and self._source[self._next]["role"] != "assistant":
            self.messages.append(dict(self._source[self._next]))
            self._next += 1


def _called(messages: list[Message]) -> list[tuple[str, str | None]]:
    """(function name, call id) of every tool call in some assistant messages."""
    calls = [call for m in messages for call in m.get("tool_calls") or []]
    return [(call.get("function", call).get("name", ""), call.get("id")) for call in calls]


def _in_order(results: list[Message], calls: list[tuple[str, str | None]]) -> list[Message]:
    """Results in the order of the calls that they belong to, by `tool_call_id`; as they stand where ids do not tell."""
    ids = [call_id for _, call_id in calls]
    named = [result.get("tool_call_id") for result in results]
    if None in ids or len(set(ids)) < len(ids) or set(ids) != set(named) or len(ids) != len(named):
        return results
    return [results[named.index(call_id)] for call_id in ids]


def message_text(message: Message) -> str:
    """All that an assistant's message says: reasoning, content and tool calls."""
    calls = ""
    if message.get("tool_calls"):
        calls = json.dumps([_readable(call) for call in message["tool_calls"]], ensure_ascii=False)
    return "\n".join(str(part) for part in (message.get("reasoning_content"), message["content"], calls) if part)


def _readable(call: dict[str, Any]) -> dict[str, Any]:
    """A call whose arguments are an object: as the model writes them, also where a server made them a string."""
    function = call.get("function")
    arguments = function.get("arguments") if isinstance(function, dict) else None
    if not isinstance(function, dict) or not isinstance(arguments, str):
        return call
    try:
        return {**call, "function": {**function, "arguments": json.loads(arguments)}}
    except (ValueError, RecursionError):
        return call


def without_answer(messages: list[Message]) -> list[Message]:
    """The conversation up to where the assistant is to speak last."""
    end = len(messages)
    while end and messages[end - 1]["role"] == "assistant":
        end -= 1
    return messages[:end]
