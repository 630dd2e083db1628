"""The forms in which people have rows, read into the one that everything here works with.

That form is OpenAI's: `messages`, each with a `role` of `ROLES`, a `content` string and, of the assistant, perhaps
`reasoning_content` and `tool_calls`; beside them perhaps `tools`, a list, and `chat_template_kwargs`, an object. Also
read: ms-swift's agent roles and `query` / `response` / `history` / `system`, alpaca's `instruction` / `input` /
`output`, ShareGPT's `conversations`, TRL's and verl's `prompt` as a list, content in text parts, JSON in strings.

A row that stands for something that this package cannot ask (images, say) is refused by name: asking a part of it would
train the head on what nobody asks.
"""

import json
from typing import Any

Row = dict[str, Any]
Message = dict[str, Any]

ROLES = ("system", "user", "assistant", "tool")
_OTHER_ROLES = {
    "developer": "system",  # as SGLang maps it; published templates know no such role
    "human": "user",
    "gpt": "assistant",
    "bot": "assistant",
    "function": "tool",
    "tool_response": "tool",
    "function_response": "tool",
    "observation": "tool",
    "observations": "tool",
    "function_call": "tool_call",
}
_MEDIA = ("images", "image", "videos", "video", "audios", "audio")
_TEXT_PARTS = ("text", "input_text", "output_text")


class BadRow(Exception):  # noqa: N818 (what is caught is a row, not an error of ours)
    """A row that cannot be used: `what` kind of fault it has, and the `detail` of this row."""

    def __init__(self, what: str, detail: str = "") -> None:
        super().__init__(what, detail)
        self.what = what
        self.detail = detail


def normalize(row: Any) -> None:
    """Bring a row into the one form, in place; one that is in it stays as it is. Keys that say nothing here stay too.

    Raises `BadRow`.
    """
    if not isinstance(row, dict):
        raise BadRow("a row must be a JSON object")
    for key in _MEDIA:
        if row.get(key):
            raise BadRow(f"has `{key}`, and only text is asked and trained on")
    row["messages"] = _messages(row)
    _normalize_tools(row)
    kwargs = _parsed(row.get("chat_template_kwargs"), "chat_template_kwargs")
    if kwargs is not None and not isinstance(kwargs, dict):
        raise BadRow("`chat_template_kwargs` must be a JSON object")
    if "chat_template_kwargs" in row:
        row["chat_template_kwargs"] = kwargs


def _messages(row: Row) -> list[Message]:
    """The conversation of a row, from whichever keys hold it."""
    found = row.get("messages")
    for key in ("conversations", "conversation"):
        found = found or row.pop(key, None)
    if not found and isinstance(row.get("prompt"), list):
        found = row["prompt"]
    messages = _parsed(found, "messages") if found else _from_texts(row)
    if not isinstance(messages, list) or not messages:
        raise BadRow("needs `messages`, or `prompt`")
    messages = [_with_standard_keys(message, number) for number, message in enumerate(messages)]
    system = row.pop("system", None)
    row.pop("history", None)
    if isinstance(system, str) and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system})
    messages = _with_tool_calls(messages)
    for number, message in enumerate(messages):
        _check(message, number)
    return messages


def _from_texts(row: Row) -> list[Message]:
    """A conversation from `system`, `history`, the question and its answer, each a text of its own (ms-swift's
    ResponsePreprocessor, alpaca)."""
    question = row.get("prompt", row.get("query"))
    answer = row.get("response")
    if question is None and isinstance(row.get("instruction"), str):
        given = row.get("input")
        question = row["instruction"] + (f"\n{given}" if isinstance(given, str) and given else "")
        answer = row.get("output", answer)
    if not isinstance(question, str):
        return []
    messages = []
    for turn in _parsed(row.get("history"), "history") or []:
        if not isinstance(turn, list) or len(turn) != 2 or not all(isinstance(text, str) for text in turn):
            raise BadRow("`history` must be a list of [question, answer]", f"{turn!r:.60}")
        messages += [{"role": "user", "content": turn[0]}, {"role": "assistant", "content": turn[1]}]
    messages.append({"role": "user", "content": question})
    if isinstance(answer, str):
        messages.append({"role": "assistant", "content": answer})
    return messages


def _with_standard_keys(message: Any, number: int) -> Message:
    """A message under our keys and roles, its content as one text."""
    if isinstance(message, dict) and "role" not in message and "from" in message:  # ShareGPT
        message = {**message, "role": message["from"], "content": message.get("value")}
        del message["from"]
        message.pop("value", None)
    role = message.get("role") if isinstance(message, dict) else None
    role = _OTHER_ROLES.get(role, role) if isinstance(role, str) else None
    if role not in (*ROLES, "tool_call"):
        raise BadRow(f"a message needs a `role` ({', '.join(ROLES)})", f"message {number}")
    message = {**message, "role": role, "content": _text(message.get("content"), number)}
    if "reasoning" in message:  # vLLM's key
        reasoning = message.pop("reasoning")
        message.setdefault("reasoning_content", reasoning)
    return message


def _text(content: Any, number: int) -> Any:
    """A content in parts as one text; anything else as it is."""
    if not isinstance(content, list):
        return content
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in _TEXT_PARTS or not isinstance(part.get("text"), str):
            named = f"`{kind}`" if isinstance(kind, str) else f"{part!r:.40}"
            raise BadRow(f"a content has a part {named}, and only text is asked and trained on", f"message {number}")
        texts.append(part["text"])
    return "".join(texts)


def _with_tool_calls(messages: list[Message]) -> list[Message]:
    """ms-swift's messages of the role `tool_call` as calls of an assistant's message, and the results that follow with
    the ids of their calls."""
    made: list[Message] = []
    waiting: list[str] = []  # ids of such calls whose results have not come
    for number, message in enumerate(messages):
        if message["role"] == "tool_call":
            last = made[-1] if made else None
            if last is None or last["role"] != "assistant":
                last = {"role": "assistant", "content": ""}
                made.append(last)
            call_id = f"call_{number}"
            last["tool_calls"] = [*last.get("tool_calls", []), _call(message["content"], call_id, number)]
            waiting.append(call_id)
            continue
        if message["role"] == "tool" and waiting and "tool_call_id" not in message:
            message = {**message, "tool_call_id": waiting.pop(0)}
        elif message["role"] != "tool":
            waiting = []
        made.append(message)
    return made


def _call(content: Any, call_id: str, number: int) -> dict[str, Any]:
    call = _parsed(content, "content")
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        raise BadRow('a `tool_call` needs a content {"name": ..., "arguments": {...}}', f"message {number}")
    function = {"name": call["name"], "arguments": call.get("arguments", call.get("parameters", {}))}
    return {"id": call_id, "type": "function", "function": function}


def _check(message: Message, number: int) -> None:
    where = f"message {number}"
    if message["content"] is None and message["role"] == "assistant" and message.get("tool_calls"):
        message["content"] = ""
    if not isinstance(message["content"], str):
        raise BadRow("a message needs a `content` string", where)
    reasoning = message.get("reasoning_content")
    if reasoning is not None and not isinstance(reasoning, str):
        raise BadRow("`reasoning_content` must be a text", where)
    call_id = message.get("tool_call_id")
    if call_id is not None and not isinstance(call_id, str):
        raise BadRow("`tool_call_id` must be a text", where)
    calls = message.get("tool_calls")
    if calls is None:
        return
    if not isinstance(calls, list):
        raise BadRow("`tool_calls` must be a list", where)
    message["tool_calls"] = [_checked_call(call, where) for call in calls]


def _checked_call(call: Any, where: str) -> dict[str, Any]:
    """A call as OpenAI has it: {"id", "type", "function": {"name", "arguments"}}, arguments as text or object."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise BadRow("a tool call needs the `name` of its function", where)
    arguments = function.get("arguments")
    parsed = _parsed(arguments, "arguments", where) if arguments not in (None, "") else {}
    if not isinstance(parsed, dict):
        raise BadRow("`arguments` of a tool call must be a JSON object", where)
    if call.get("id") is not None and not isinstance(call["id"], str):
        raise BadRow("the `id` of a tool call must be a text", where)
    if "function" in call:
        return dict(call)
    return {"type": "function", "function": dict(call)}


def _normalize_tools(row: Row) -> None:
    """`tools` as a list of {"type", "function"}; without the key where there are none."""
    tools = _parsed(row.get("tools"), "tools")
    if not tools:
        row.pop("tools", None)
        return
    if isinstance(tools, dict):
        tools = [tools]
    if not isinstance(tools, list):
        raise BadRow("`tools` must be a list of functions")
    checked = []
    for tool in tools:
        tool = _parsed(tool, "tools")
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise BadRow("each of `tools` needs the `name` of its function", f"{tool!r:.60}")
        checked.append(tool if "function" in tool else {"type": "function", "function": tool})
    row["tools"] = checked


def _parsed(value: Any, key: str, where: str = "") -> Any:
    """The value of JSON that is written in a string."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value) if value.strip() else None
    except (ValueError, RecursionError) as error:
        raise BadRow(f"`{key}` is a text that is not JSON", where or f"{error}") from None
