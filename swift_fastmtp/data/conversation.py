"""Conversations: where the assistant is to speak, the tokens the model sees there, and what it said."""

import json
from dataclasses import dataclass
from typing import Any

from ..errors import FastMTPError

Message = dict[str, Any]

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

    def add(self, reply: Reply) -> None:
        """The assistant's turn; afterwards `waiting` says whether there is another."""
        said = self._turn()
        self.messages.append(reply.message())
        self.finish_reason = reply.finish_reason
        self._next += len(said)
        results = 0
        while self._next + results < len(self._source) and self._source[self._next + results]["role"] == "tool":
            results += 1
        asked = _called(said)
        called = _called([self.messages[-1]])
        if not is_complete(reply.finish_reason) or self._next == len(self._source):
            self.waiting = False
            self.ended_early = self._next < len(self._source)
        elif results != len(called) or (asked and [n for n, _ in asked] != [n for n, _ in called]):
            self.waiting, self.ended_early = False, True
        else:
            start = len(self.messages)
            self._copy()
            for message, (_, call_id) in zip(self.messages[start : start + results], called, strict=True):
                if call_id is not None:
                    message["tool_call_id"] = call_id

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


def said(message: Message) -> str:
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


def load_tokenizer(model_dir: str) -> Any:
    """The tokenizer of a model folder. Raises `FastMTPError` if there is none."""
    from transformers import AutoTokenizer

    from .. import modeling  # noqa: F401 (makes `mimo` known to transformers)

    try:
        return AutoTokenizer.from_pretrained(model_dir, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise FastMTPError(f"--model {model_dir}: holds no tokenizer ({str(error).splitlines()[0]})") from None


def encode_prompt(
    tokenizer: Any, messages: list[Message], tools: Any = None, chat_template_kwargs: dict[str, Any] | None = None
) -> list[int]:
    """Token ids of a conversation, ready for the assistant to speak, by the tokenizer's own chat template."""
    text = tokenizer.apply_chat_template(
        messages, tools=tools, tokenize=False, add_generation_prompt=True, **(chat_template_kwargs or {})
    )
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
    return ids


def training_conversations(messages: list[Message], finish_reason: str | None = None) -> list[list[Message]]:
    """What to train on, for ms-swift: conversations whose answers are the tokens that the model generated.

    A list of ids as `content` is taken by ms-swift's templates as it is. A turn at the end that was cut off is left
    out. Where the model reasoned, chat templates leave reasoning out of the history: a turn was generated behind
    another prompt than the whole conversation, so each is a conversation of its own, trained on its last turn only.
    """
    messages = [{k: v for k, v in m.items() if v is not None} for m in messages]
    if messages and messages[-1]["role"] == "assistant" and finish_reason is not None:
        messages[-1]["finish_reason"] = finish_reason
    while messages and not _trainable(messages[-1]):
        messages.pop()
    turns = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    if not any("reasoning_content" in messages[i] or "<think>" in messages[i]["content"] for i in turns):
        return [[_exact(m) for m in messages]] if turns else []
    return [[*(_history(m) for m in messages[:i]), _exact(messages[i])] for i in turns if _trainable(messages[i])]


def _trainable(message: Message) -> bool:
    complete = is_complete(message.get("finish_reason", "stop"))
    return message["role"] == "assistant" and complete and bool(message["content"] or message.get("token_ids"))


def _exact(message: Message) -> Message:
    if message["role"] != "assistant":
        return {k: message[k] for k in ("role", "content", "name") if k in message}
    if message.get("token_ids"):
        return {"role": "assistant", "content": message["token_ids"]}
    reasoning = message.get("reasoning_content")
    content = f"<think>\n{reasoning}\n</think>\n\n{message['content']}" if reasoning else message["content"]
    return {"role": "assistant", "content": content, **{k: message[k] for k in ("tool_calls", "loss") if k in message}}


def _history(message: Message) -> Message:
    said = _exact({k: v for k, v in message.items() if k != "token_ids"})
    return {**said, "loss": False} if message["role"] == "assistant" else said
