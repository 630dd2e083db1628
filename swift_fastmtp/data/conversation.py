"""Conversations: where the assistant is to speak, and the tokens the model sees there."""

from typing import Any


def without_answer(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The conversation up to where the assistant is to speak."""
    end = len(messages)
    while end and messages[end - 1]["role"] == "assistant":
        end -= 1
    return messages[:end]


def encode_prompt(tokenizer: Any, messages: list[dict[str, Any]], tools: Any = None) -> list[int]:
    """Token ids of a conversation, ready for the assistant to speak, by the tokenizer's own chat template."""
    text = tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=True)
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
    return ids
