"""Rows as people have them, read into the one form that everything else in this package works on.

Training data comes in OpenAI's, ms-swift's, Alpaca's, ShareGPT's, TRL's and verl's forms. Each is read here, once, when
a row is read from its file; what comes out has

    messages               list of {"role": system | user | assistant | tool, "content": str, ...}
    tools                  list of objects, or no such key
    chat_template_kwargs   object, or no such key

and every other key as it was. What cannot be read says so (`UnreadableRowError`), because a part of a row that is
silently left out is a question that nobody asked. A row in this form is returned as it is.
"""

import json
from typing import Any

from . import inputs

Row = dict[str, Any]
Message = dict[str, Any]

ROLES = ("system", "user", "assistant", "tool")

_TOOL_CALL = "tool_call"
"""ms-swift's role of a call as a message of its own; it becomes part of the assistant's turn."""
_ROLE_NAMES = {
    **{role: role for role in ROLES},
    # OpenAI's newer name. Published templates do not know it: they drop the message, or raise.
    "developer": "system",
    "human": "user",
    "gpt": "assistant",
    "function": "tool",
    "tool_response": "tool",
    "function_response": "tool",
    "observation": "tool",
    "observations": "tool",
    _TOOL_CALL: _TOOL_CALL,
    "function_call": _TOOL_CALL,
}
_MEDIA = ("images", "videos", "audios", "image", "video", "audio")
_CONVERSATIONS = ("messages", "conversations", "conversation")
_QUESTIONS = ("prompt", "query", "instruction", "input")
_SYSTEMS = ("system", "system_prompt")
_ANSWERS = ("response", "output")
_TEXT_PARTS = ("text", "input_text", "output_text")

NO_MESSAGES = "needs `messages`, or `prompt`"
NO_ROLE = f"a message needs a `role` ({', '.join(ROLES)})"
NO_CONTENT = "a message needs a `content` string"
MEDIA = "has images, videos or audio, and this run is text only"
NOT_TEXT = "a message has a part that is not text, and this run is text only"
NO_TOOLS = "`tools` must be a list of JSON objects, or such a list as a string"
NO_TOOL_CALLS = "`tool_calls` must be a list of objects with a `function` that has a `name`"
NO_ARGUMENTS = "the `arguments` of a tool call must be a JSON object, or one as a string"
NO_CALL = "a `tool_call` message needs JSON with `name` and `arguments`"


class UnreadableRowError(Exception):
    """A row that cannot be used: `what` kind of fault, and `detail`, where in this row."""

    def __init__(self, what: str, detail: str = "") -> None:
        super().__init__(f"{what} ({detail})" if detail else what)
        self.what = what
        self.detail = detail


def normalize(value: Any) -> Row:
    """The row in the form above; `value`, any JSON value, is not changed.

    Raises `UnreadableRowError` if it holds no conversation, or one that cannot be read whole.
    """
    if not isinstance(value, dict):
        raise UnreadableRowError("a row must be a JSON object")
    row = dict(value)
    for key in _MEDIA:
        if _holds_something(row.get(key)):
            raise UnreadableRowError(MEDIA, f"`{key}`")
    source = _take_messages(row)
    messages = [_read_message(message, number) for number, message in enumerate(source)]
    row["messages"] = _with_calls_in_turns(messages)
    _read_tools(row)
    _read_chat_template_kwargs(row)
    return row


def _take_messages(row: Row) -> list[Any]:
    """The messages as they stand in the row, in whichever form. The keys that they are made of are taken out of it."""
    key = next((key for key in _CONVERSATIONS if row.get(key)), None)
    if key is not None:
        messages = row[key]
        if not isinstance(messages, list):
            raise UnreadableRowError(NO_MESSAGES, "" if key == "messages" else f"`{key}` is no list")
        if key != "messages":
            del row[key]
        return _with_system_of(row, messages)
    messages = [*_take_history(row), *_take_question(row)]
    for key in _SYSTEMS:
        if not isinstance(row.get(key), str | None):
            raise UnreadableRowError(f"`{key}` must be a string")
    return _take_answer(row, _with_system_of(row, messages))


def _take_question(row: Row) -> list[Any]:
    """ms-swift's `query`, Alpaca's `instruction` and `input`; a `prompt` may be a list of messages (TRL, verl)."""
    key = next((key for key in _QUESTIONS if row.get(key) is not None), None)
    question = None if key is None else row.pop(key)
    if key == "prompt" and isinstance(question, list) and question:
        return question
    if not isinstance(question, str):
        raise UnreadableRowError(NO_MESSAGES)
    if key == "instruction":
        more = row.pop("input", None)
        if not isinstance(more, str | None):
            raise UnreadableRowError("`input` must be a string")
        # Joined as ms-swift joins them.
        question = "\n".join(part for part in (question, more) if part)
    return [{"role": "user", "content": question}]


def _take_history(row: Row) -> list[Message]:
    """ms-swift's [[user, assistant], ...], which may be a string of it."""
    history = row.pop("history", None)
    messages: list[Message] = []
    if history is None or history == "":
        return messages
    if isinstance(history, str):
        history = _parsed(history)
    if not isinstance(history, list):
        raise UnreadableRowError("`history` must be a list of [user, assistant] pairs")
    for number, pair in enumerate(history):
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(text, str | None) for text in pair):
            raise UnreadableRowError("`history` must be a list of [user, assistant] pairs", f"pair {number}")
        for role, text in zip(("user", "assistant"), pair, strict=True):
            if text is not None:
                messages.append({"role": role, "content": text})
    return messages


def _take_answer(row: Row, messages: list[Any]) -> list[Any]:
    """With the answer beside the question, if there is one: ms-swift's `response`, Alpaca's `output`; or TRL's
    `completion`, a list of messages. Other keys (`answer`, `solution`, ..) are often a mere result, and stay."""
    completion = row.get("completion")
    if isinstance(completion, list) and completion and all(isinstance(m, dict) and "role" in m for m in completion):
        del row["completion"]
        return [*messages, *completion]
    key = next((key for key in _ANSWERS if isinstance(row.get(key), str) and row[key]), None)
    if key is None:
        return messages
    return [*messages, {"role": "assistant", "content": row.pop(key)}]


def _with_system_of(row: Row, messages: list[Any]) -> list[Any]:
    """With the system prompt that stands beside the messages before them, unless they begin with one, as ms-swift has
    it. Answers with token ids are from another run, and what they were asked with is in the messages."""
    if any(isinstance(m, dict) and "token_ids" in m for m in messages):
        return messages
    key = next((key for key in _SYSTEMS if isinstance(row.get(key), str)), None)
    first = messages[0] if isinstance(messages[0], dict) else {}
    if key is None or first.get("role", first.get("from")) in ("system", "developer"):
        return messages
    return [{"role": "system", "content": row.pop(key)}, *messages]


def _read_message(value: Any, number: int) -> Message:
    """One message in our form, but for calls that are messages of their own, whose content is a list of calls."""
    where = f"message {number}"
    if not isinstance(value, dict):
        raise UnreadableRowError(NO_ROLE, where)
    message = {key: field for key, field in value.items() if field is not None}
    if "role" not in message and "from" in message:  # ShareGPT
        message["role"] = message.pop("from")
        if "content" not in message and "value" in message:
            message["content"] = message.pop("value")
    role = message.get("role")
    role = _ROLE_NAMES.get(role) if isinstance(role, str) else None
    if role is None:
        raise UnreadableRowError(NO_ROLE, where)
    message["role"] = role
    # Of any role: templates look for these keys, not for who has them.
    _read_reasoning(message, where)
    _read_tool_calls(message, where)
    if not isinstance(message.get("tool_call_id", ""), str):
        raise UnreadableRowError("`tool_call_id` must be a string", where)
    is_call = role == _TOOL_CALL
    message["content"] = _calls_of(message.get("content"), where) if is_call else _content(message, where)
    return message


def _content(message: Message, where: str) -> str:
    content = message.get("content")
    if isinstance(content, str):
        return content
    says_otherwise = message.get("tool_calls") or "function_call" in message or message.get("reasoning_content")
    if content is None and message["role"] == "assistant" and says_otherwise:
        return ""
    if isinstance(content, list) and all(map(_is_part, content)):
        return "".join(_text_of(part, where) for part in content)
    if isinstance(content, dict | list) and message["role"] == "tool":
        return json.dumps(content, ensure_ascii=False)  # a result as it is, as ms-swift has it
    raise UnreadableRowError(NO_CONTENT, where)


def _is_part(value: Any) -> bool:
    """Whether a value is one part of a content, as OpenAI has it."""
    return isinstance(value, str) or (isinstance(value, dict) and bool({"type", "text"} & value.keys()))


def _text_of(part: Any, where: str) -> str:
    """The text of one part of a content that is a list of parts. Parts of one message are one text."""
    if isinstance(part, str):
        return part
    text = part.get("text")
    if part.get("type", "text") not in _TEXT_PARTS or not isinstance(text, str):
        raise UnreadableRowError(NOT_TEXT, f"{where}: type {part.get('type')!r:.40}")
    return text


def _read_reasoning(message: Message, where: str) -> None:
    """vLLM writes `reasoning`, SGLang and the published templates `reasoning_content`."""
    if "reasoning" in message:
        message.setdefault("reasoning_content", message.pop("reasoning"))
        message.pop("reasoning", None)
    if not isinstance(message.get("reasoning_content", ""), str):
        raise UnreadableRowError("`reasoning_content` must be a string", where)


def _read_tool_calls(message: Message, where: str) -> None:
    calls = message.get("tool_calls")
    if isinstance(calls, str) and calls.strip() not in ("", "null"):
        calls = _parsed(calls)
        if calls is None:
            raise UnreadableRowError(NO_TOOL_CALLS, where)
    if not calls:
        message.pop("tool_calls", None)
    elif isinstance(calls, list):
        message["tool_calls"] = [_call(call, where) for call in calls]
    else:
        raise UnreadableRowError(NO_TOOL_CALLS, where)
    if "function_call" in message:  # OpenAI's form before there were several
        message["function_call"] = _calls_of(message["function_call"], where)


def _call(value: Any, where: str) -> dict[str, Any]:
    """One of an assistant's `tool_calls`, with `function`."""
    if not isinstance(value, dict):
        raise UnreadableRowError(NO_TOOL_CALLS, where)
    call = {key: field for key, field in value.items() if field is not None}
    if "function" not in call:
        call["function"] = {key: call.pop(key) for key in ("name", "arguments") if key in call}
    function = call["function"]
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
        raise UnreadableRowError(NO_TOOL_CALLS, where)
    if not isinstance(call.get("id", ""), str):
        raise UnreadableRowError("the `id` of a tool call must be a string", where)
    if "type" not in call:
        call = {"type": "function", **call}
    arguments = function.get("arguments")
    call["function"] = {**function, "arguments": _arguments(arguments, f"{where}: {function['name'][:40]}")}
    return call


def _arguments(value: Any, where: str) -> Any:
    """The arguments as they are, an object or a string of one; none at all are an empty object."""
    if value is None or value == "":
        return "{}"
    if not isinstance(_parsed(value) if isinstance(value, str) else value, dict):
        raise UnreadableRowError(NO_ARGUMENTS, where)
    return value


def _calls_of(content: Any, where: str) -> list[dict[str, Any]]:
    """The calls in the content of a `tool_call` message: an object or a list of them, or a string of that."""
    value = _parsed(content) if isinstance(content, str) else content
    calls = value if isinstance(value, list) else [value]
    if not calls or not all(isinstance(call, dict) and isinstance(call.get("name"), str) for call in calls):
        raise UnreadableRowError(NO_CALL, where)
    return [_call({key: call.get(key) for key in ("name", "arguments")}, where) for call in calls]


def _with_calls_in_turns(messages: list[Message]) -> list[Message]:
    """Calls that are messages of their own become `tool_calls`: those that follow each other, or an assistant's text,
    are one turn. They have no ids, and their results follow in their order; both get ids of our making."""
    result: list[Message] = []
    unanswered: list[str] = []
    number = 0
    for message in messages:
        calls = message.pop("function_call", [])
        if message["role"] == _TOOL_CALL:
            calls = [*calls, *message.pop("content")]
        calls = [{"id": f"call_{i}", **call} for i, call in enumerate(calls, start=number)]
        number += len(calls)
        if message["role"] == _TOOL_CALL:
            if not result or result[-1]["role"] != "assistant":
                result.append({**message, "role": "assistant", "content": ""})
        else:
            result.append(message)
        if calls:
            result[-1]["tool_calls"] = [*result[-1].get("tool_calls", []), *calls]
            unanswered += [call["id"] for call in calls]
        elif message["role"] != "tool":
            unanswered = []
        elif unanswered and "tool_call_id" not in message:
            message["tool_call_id"] = unanswered.pop(0)
    return result


def _read_tools(row: Row) -> None:
    """A list of functions as engines want them. ms-swift and TRL also take it as a string, and one function bare."""
    tools = row.get("tools")
    if tools is None or tools == "":
        row.pop("tools", None)
        return
    if isinstance(tools, str):
        tools = _parsed(tools)
    if isinstance(tools, dict):
        tools = [tools]
    if not isinstance(tools, list):
        raise UnreadableRowError(NO_TOOLS)
    read = []
    for number, tool in enumerate(tools):
        tool = _parsed(tool) if isinstance(tool, str) else tool
        if not isinstance(tool, dict):
            raise UnreadableRowError(NO_TOOLS, f"tool {number}")
        is_bare = "function" not in tool and isinstance(tool.get("name"), str)
        if is_bare and tool.get("type", "function") == "function":
            function = {key: value for key, value in tool.items() if key != "type"}
            tool = {"type": "function", "function": function}
        read.append(tool)
    row["tools"] = read


def _read_chat_template_kwargs(row: Row) -> None:
    kwargs = row.get("chat_template_kwargs")
    if kwargs is None or kwargs == "":
        row.pop("chat_template_kwargs", None)
        return
    if isinstance(kwargs, str):
        kwargs = _parsed(kwargs)
    if not isinstance(kwargs, dict):
        raise UnreadableRowError("`chat_template_kwargs` must be a JSON object, or one as a string")
    row["chat_template_kwargs"] = kwargs


def _parsed(text: str) -> Any:
    """The value of a JSON string, or None if it is none."""
    try:
        return inputs.loads(text)
    except ValueError:
        return None


def _holds_something(value: Any) -> bool:
    """Whether there is an image, by its path or its bytes: columns of media are often empty, or a list of null."""
    items = value if isinstance(value, list) else [value]
    return any(isinstance(item, str | dict | list) and item for item in items)
