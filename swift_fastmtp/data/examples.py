"""What a row is trained on: the ids that the model was asked with, and the ids that it answered with.

`fastmtp distill` keeps both. A row that has neither, plain `messages`, is rendered with the model folder's chat
template, which is what an engine would ask. So what is trained is what is served, whichever way a row was made.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

from ..errors import FastMTPError
from .chat_template import answer_ids, encode_prompt, same_prompt
from .conversation import Message, is_complete
from .prompt_ids import asked_ids, common, ids_of

Row = dict[str, Any]


class Part(NamedTuple):
    """Consecutive tokens of an example."""

    ids: list[int]
    trained: bool
    """Whether the model generated them, so that they are trained on."""


class Example(NamedTuple):
    """A sequence that is trained on: what was asked and what was answered, in turns."""

    parts: list[Part]

    @property
    def ids(self) -> list[int]:
        return [i for part in self.parts for i in part.ids]

    @property
    def labels(self) -> list[int]:
        """The ids, -100 where they are not trained on (as ms-swift and transformers have it, unshifted)."""
        return [i if part.trained else -100 for part in self.parts for i in part.ids]


class Turn(NamedTuple):
    """One answer of the assistant."""

    asked: list[int]
    """The whole prompt behind which it was generated, ready for the assistant to speak."""
    answered: list[int]
    """With the token that ends the turn."""
    trained: bool


def training_examples(tokenizer: Any, row: Row, default_kwargs: dict[str, Any] | None = None) -> list[Example]:
    """The examples of a row: few where they can be joined, none where there is no answer that can be trained on.

    A turn whose prompt goes on from the turn before it, to a token, is joined with it. Chat templates often render the
    history otherwise than it was generated (reasoning is left out, text is encoded again): such a turn is an example of
    its own, behind the prompt that it was really asked with.

    `default_kwargs`: for the chat template, where the row has none of its own. Raises `RenderError` if the row cannot
    be rendered, `FastMTPError` if its ids are none.
    """
    examples: list[Example] = []
    sequence: list[int] = []  # of the last example
    for turn in turns(tokenizer, row, default_kwargs):
        goes_on = bool(examples) and turn.asked[: len(sequence)] == sequence
        if not goes_on:
            examples.append(Example([]))
            sequence = []
        if new := turn.asked[len(sequence) :]:
            examples[-1].parts.append(Part(new, False))
        examples[-1].parts.append(Part(turn.answered, turn.trained))
        sequence = turn.asked + turn.answered
    return [example for example in map(_without_untrained_end, examples) if example.parts]


def turns(
    tokenizer: Any, row: Row, default_kwargs: dict[str, Any] | None = None, trainable_only: bool = True
) -> Iterator[Turn]:
    """The answers of a row, the trainable ones unless told otherwise. Arguments and errors as `training_examples`."""
    messages = with_finish_reason(row)
    kwargs = {**(default_kwargs or {}), **(row.get("chat_template_kwargs") or {})}
    tools = row.get("tools")
    previous: list[int] = []
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        if trainable_only and not trainable(message):
            continue
        asked = asked_ids(message, previous)
        if asked is None:
            asked = encode_prompt(tokenizer, messages[:number], tools, kwargs)
        answered = ids_of(message, "token_ids")
        previous = asked + (answered or [])
        if answered is None:
            answered = answer_ids(tokenizer, messages[: number + 1], tools, kwargs)
        if answered:
            yield Turn(asked, answered, message.get("loss") is not False)


def with_finish_reason(row: Row) -> list[Message]:
    """The messages of a row, of which the last one has the row's finish reason."""
    messages = [dict(message) for message in row["messages"]]
    if messages and messages[-1]["role"] == "assistant" and row.get("finish_reason") is not None:
        messages[-1]["finish_reason"] = row["finish_reason"]
    return messages


def trainable(message: Message) -> bool:
    """Whether the model's answer is known to the token.

    An answer that was cut off is as good as its `token_ids`: the model's own, without an end. As text it is not: the
    chat template would write an end behind it, and its last word may be half of one.
    """
    reason = message.get("finish_reason")
    if message.get("token_ids"):
        return True
    return bool(message["content"] or message.get("tool_calls")) and (reason is None or is_complete(reason))


def check_vocabulary(example: Example, size: int) -> None:
    """Raises `FastMTPError` for ids that the model does not have: the row is of another model."""
    largest = max(max(part.ids, default=0) for part in example.parts)
    if largest >= size:
        raise FastMTPError(f"holds token id {largest}, the model has {size}: the row was made with another model")


def check_row_ids(row: Row, vocab_size: int) -> None:
    """Raises `FastMTPError` for ids of a row, asked or answered, finished or not, that the model does not have."""
    for number, message in enumerate(row["messages"]):
        for key in ("token_ids", "prompt_token_ids"):
            ids = ids_of(message, key) or []
            if ids and max(ids) >= vocab_size:
                raise FastMTPError(
                    f"message {number}: {key} holds id {max(ids)}, the model has {vocab_size}: the row was made with "
                    "another model"
                )


class Difference(NamedTuple):
    """Two renderings of one prompt, around the first token in which they differ."""

    token: int
    kept: str
    rendered: str


def rendered_otherwise(tokenizer: Any, row: Row, default_kwargs: dict[str, Any] | None = None) -> Difference | None:
    """Where the folder's chat template renders a prompt of the row otherwise than the row says it was asked.

    None if all are the same, or the row keeps no prompts. Raises as `training_examples`.
    """
    messages = with_finish_reason(row)
    kwargs = {**(default_kwargs or {}), **(row.get("chat_template_kwargs") or {})}
    previous: list[int] = []
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        asked = asked_ids(message, previous)
        if asked is None:
            continue
        rendered = encode_prompt(tokenizer, messages[:number], row.get("tools"), kwargs)
        if not same_prompt(tokenizer, asked, rendered, row.get("tools")):
            return difference(tokenizer, asked, rendered)
        previous = asked + (ids_of(message, "token_ids") or [])
    return None


def difference(tokenizer: Any, kept: list[int], rendered: list[int]) -> Difference:
    """The first place where two prompts differ, with a little text on both sides."""
    at = common(kept, rendered)
    near = slice(max(at - 8, 0), at + 12)
    return Difference(at, tokenizer.decode(kept[near]), tokenizer.decode(rendered[near]))


def _without_untrained_end(example: Example) -> Example:
    """What follows the last trained token would only cost time."""
    parts = list(example.parts)
    while parts and not parts[-1].trained:
        parts.pop()
    return Example(parts)
