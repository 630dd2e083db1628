"""How a row keeps the prompts that its answers were generated behind.

Every message that a model generated has `token_ids`, what it answered, and `prompt_token_ids`, what it was asked with.
The prompt of a later turn mostly begins with prompt and answer of the turn before: then `prompt_shared` says how many
tokens it has from there, and `prompt_token_ids` holds the others. So a row of many turns grows with its conversation,
not with the square of it.
"""

from typing import Any

from ..errors import FastMTPError

Message = dict[str, Any]


def shorten(asked: list[int], previous: list[int]) -> Message:
    """The keys that keep the prompt `asked`; `previous` is the prompt and answer of the generated turn before it."""
    shared = common(asked, previous)
    if not shared:
        return {"prompt_token_ids": asked}
    return {"prompt_shared": shared, "prompt_token_ids": asked[shared:]}


def asked_ids(message: Message, previous: list[int]) -> list[int] | None:
    """The whole prompt of a message, from the keys of `shorten`; None where the row does not keep it.

    Raises `FastMTPError` if the keys are not what `shorten` writes, or do not go on from `previous`.
    """
    new = ids_of(message, "prompt_token_ids")
    if new is None:
        return None
    shared = message.get("prompt_shared", 0)
    if type(shared) is not int or not 0 <= shared <= len(previous):
        raise FastMTPError(
            f"prompt_shared is {shared!r}, but the turn before it has {len(previous)} tokens: messages of the row were "
            "removed or changed; distill it again, or remove its prompt_token_ids"
        )
    return previous[:shared] + new


def ids_of(message: Message, key: str) -> list[int] | None:
    """Token ids that a message keeps, or None. Raises `FastMTPError` if they are no ids."""
    ids = message.get(key)
    if ids is None:
        return None
    if not isinstance(ids, list) or not all(type(i) is int and 0 <= i < 2**31 for i in ids):
        raise FastMTPError(f"{key} must be a list of whole numbers from 0 to 2**31 - 1; distill the row again")
    return ids


def common(a: list[int], b: list[int]) -> int:
    """How many tokens two sequences have in common from their start."""
    shorter = min(len(a), len(b))
    if a[:shorter] == b[:shorter]:
        return shorter
    return next(i for i in range(shorter) if a[i] != b[i])
