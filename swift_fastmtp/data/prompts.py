"""Prompt files: JSONL in ms-swift's formats, checked row by row."""

import json
from pathlib import Path
from typing import Any

from ..errors import FastMTPError

_ROLES = ("system", "user", "assistant", "tool")


def read_rows(path: str | Path) -> list[dict[str, Any]]:
    """Rows of a JSONL file, each with `messages` (a bare `prompt` or `query` becomes one user message).

    Raises `FastMTPError` naming file and line of the first bad row, or if there is no row.
    """
    rows = []
    try:
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    rows.append(_row(line, f"{path}:{number}"))
    except (OSError, UnicodeDecodeError) as error:
        raise FastMTPError(f"{path}: cannot be read ({error})") from None
    if not rows:
        raise FastMTPError(f"{path}: holds no rows")
    return rows


def _row(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise FastMTPError(f"{where}: not JSON ({error})") from None
    if not isinstance(row, dict):
        raise FastMTPError(f"{where}: a row must be a JSON object")
    text = row.get("prompt", row.get("query"))
    messages = row.get("messages") or ([{"role": "user", "content": text}] if isinstance(text, str) else None)
    if not isinstance(messages, list) or not messages:
        raise FastMTPError(f"{where}: needs `messages`, or `prompt`")
    for message in messages:
        ok = isinstance(message, dict) and message.get("role") in _ROLES and isinstance(message.get("content"), str)
        if not ok:
            raise FastMTPError(f"{where}: a message needs a `role` ({', '.join(_ROLES)}) and a `content` string")
    return {**row, "messages": messages}


def without_answer(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The conversation up to where the assistant is to speak."""
    end = len(messages)
    while end and messages[end - 1]["role"] == "assistant":
        end -= 1
    return messages[:end]


def encode_prompt(tokenizer: Any, messages: list[dict[str, Any]]) -> list[int]:
    """Token ids of a conversation, ready for the assistant to speak, by the tokenizer's own chat template."""
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
    return ids
