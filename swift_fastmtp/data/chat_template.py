"""The chat template of a model's folder: what engines render, hence what a model is asked with.

Everything that asks a model or trains on an answer of it renders here: `distill`, `simulate`, `bench` and `swift sft`.
ms-swift has templates of its own; they are not used, because a head that is trained behind another prompt than the one
it is served behind follows hidden states that never occur.
"""

import re
from functools import lru_cache
from pathlib import Path
from typing import Any

from ..checkpoint.checkpoint import Checkpoint
from ..errors import FastMTPError, detail
from ..files import inputs

Message = dict[str, Any]

RENDERED = ("role", "content", "name", "reasoning_content", "tool_calls", "tool_call_id")
"""Keys of a message that a template may read; the others are about how it was made."""


_RESERVED = {
    *("conversation", "messages", "tools", "chat_template", "add_generation_prompt"),
    *("continue_final_message", "tokenize", "padding", "truncation", "max_length", "return_tensors", "return_dict"),
    *("return_assistant_tokens_mask", "tokenizer_kwargs", "processor_kwargs"),
}
"""Arguments of transformers' `apply_chat_template`: with them a row could bring a template of its own, a program."""


class RenderError(FastMTPError):
    """The template refuses a conversation, or fails on it: the row's fault, which a caller may skip."""


def load_tokenizer(model_dir: str) -> Any:
    """The tokenizer of a model folder; no code of the folder runs.

    Raises `FastMTPError` if there is none, or none without such code, or config.json cannot be built.
    """
    from transformers import AutoTokenizer

    from ..model import config as model_config  # makes model types known that transformers lacks
    from ..model.compat_transformers import needs_folder_code

    inputs.check_folder(model_dir)
    try:
        return AutoTokenizer.from_pretrained(model_dir, trust_remote_code=False)
    except BaseException as error:  # transformers and tokenizers raise what they like; Rust's panic is no Exception
        if isinstance(error, KeyboardInterrupt | SystemExit | GeneratorExit):
            raise
        if (Path(model_dir) / "config.json").is_file():
            # config.json is read for the tokenizer too: says so if the fault is there
            model_config.load_config(Checkpoint(model_dir))
        if needs_folder_code(error):
            raise FastMTPError(
                f"--model {model_dir}: tokenizer_config.json names Python code of the folder (auto_map), and this "
                "package runs none; save it as a tokenizer.json (transformers' `PreTrainedTokenizerFast`)"
            ) from None
        raise FastMTPError(f"--model {model_dir}: holds no tokenizer ({detail(error)})") from None


def check_chat_template(tokenizer: Any, model_dir: str | Path) -> None:
    """Raises `FastMTPError` where the folder has no chat template, without which nothing can be asked."""
    if tokenizer.chat_template:
        return
    what = f"--model {model_dir}: has no chat template (chat_template.jinja, or in tokenizer_config.json)"
    encoders = sorted(path.name for path in Path(model_dir).glob("encoding/encoding_*.py"))
    if encoders:
        # DeepSeek-V3.2 and later: engines have copies of this code, we do not run code from a model folder.
        raise FastMTPError(
            f"{what}; it ships Python code instead (encoding/{encoders[0]}), which is not run: write a "
            "chat_template.jinja that renders the same into the folder, and serve with it too"
        )
    raise FastMTPError(f"{what}; take the folder of the chat model, or put its chat_template.jinja there")


def render(
    tokenizer: Any,
    messages: list[Message],
    tools: list[Any] | None = None,
    chat_template_kwargs: dict[str, Any] | None = None,
    add_generation_prompt: bool = True,
) -> str:
    """The text of a conversation by the tokenizer's own chat template, as engines render it.

    `add_generation_prompt`: with what opens the assistant's turn. Raises `RenderError` if the template refuses the
    conversation or fails on it, or where the kwargs are not for the template but for what renders it.
    """
    if reserved := sorted(_RESERVED & (chat_template_kwargs or {}).keys()):
        raise RenderError(f"chat_template_kwargs must not hold {reserved[0]}, which is no variable of a chat template")
    try:
        text: str = tokenizer.apply_chat_template(
            [for_template(message) for message in messages],
            tools=tools or None,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            **(chat_template_kwargs or {}),
        )
    except Exception as error:  # noqa: BLE001 (a template is a program: it raises what it likes)
        raise RenderError(f"the model's chat template cannot render this conversation ({detail(error, 200)})") from None
    return text


def encode_prompt(
    tokenizer: Any,
    messages: list[Message],
    tools: list[Any] | None = None,
    chat_template_kwargs: dict[str, Any] | None = None,
) -> list[int]:
    """Token ids of a conversation, ready for the assistant to speak. Raises `RenderError`."""
    return encode(tokenizer, render(tokenizer, messages, tools, chat_template_kwargs))


def encode(tokenizer: Any, text: str) -> list[int]:
    """Token ids of rendered text, in which special tokens are already written out."""
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
    return ids


def for_template(message: Message) -> Message:
    """A message as templates take it: `arguments` of tool calls parsed, as SGLang (`entrypoints/openai/utils.py`) and
    vLLM (`entrypoints/chat_utils.py`) parse them before they render."""
    kept = {key: message[key] for key in RENDERED if message.get(key) is not None}
    if kept.get("tool_calls"):
        kept["tool_calls"] = [_with_parsed_arguments(call) for call in kept["tool_calls"]]
    kept.setdefault("content", "")
    return kept


def _with_parsed_arguments(call: Any) -> Any:
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = inputs.loads(function["arguments"] or "{}")
    except ValueError as error:
        name = function.get("name")
        raise RenderError(f"the arguments of the call of {name} are not JSON ({error})") from None
    parsed = {**function, "arguments": arguments}
    return {**call, "function": parsed} if "function" in call else parsed


_NULL_FIELD = re.compile(r', "[^"]*": null|"[^"]*": null, ')


def same_prompt(tokenizer: Any, seen: list[int], ours: list[int], tools: list[Any] | None = None) -> bool:
    """Whether a server was asked with the prompt that we render, to a token.

    But for null fields in the schemas of tools: SGLang fills those in that a tool leaves out (0.5.23
    `entrypoints/openai/protocol.py`, `Tool`: `"defer_loading": null`) before it renders them.
    """
    if seen == ours:
        return True
    if not tools:
        return False
    seen_text, our_text = (_NULL_FIELD.sub("", tokenizer.decode(ids)) for ids in (seen, ours))
    return seen_text == our_text


def answer_ids(
    tokenizer: Any,
    messages: list[Message],
    tools: list[Any] | None = None,
    chat_template_kwargs: dict[str, Any] | None = None,
) -> list[int]:
    """Token ids of the last message, the assistant's, as a model would have generated them behind the prompt of the
    messages before it: reasoning, content and tool calls as the template writes them, and the token that ends the turn.

    Raises `RenderError`, also where the template writes the turn in a way that nothing tells how to continue a prompt.
    """
    *before, answer = messages
    prompt = render(tokenizer, before, tools, chat_template_kwargs)
    whole = render(tokenizer, messages, tools, chat_template_kwargs, add_generation_prompt=False)
    text = whole[len(prompt) :] if whole.startswith(prompt) else _generated_text(prompt, answer)

    # Most templates write the token that ends a turn, and perhaps a line end, which the model does not generate.
    ids = encode(tokenizer, text.rstrip())
    if ids and ids[-1] in special_ids(tokenizer):
        return ids
    end = end_of_turn(tokenizer, "tool" if answer.get("tool_calls") else "user")
    return encode(tokenizer, text) + ([] if end is None else [end])


def _generated_text(prompt: str, answer: Message) -> str:
    """An answer for templates that write a turn otherwise than behind their own generation prompt (DeepSeek-V3.1 opens
    `<think>` and keeps no reasoning): the plain form that reasoning models generate."""
    if answer.get("tool_calls"):
        raise RenderError("the model's chat template writes tool calls otherwise than behind its generation prompt")
    reasoning = str(answer.get("reasoning_content") or "")
    content = str(answer["content"])
    opened = prompt.rstrip().endswith("<think>")
    if opened and "</think>" not in content:
        return f"{reasoning}</think>{content}"
    if reasoning and not opened:
        return f"<think>{reasoning}</think>{content}"
    return content


@lru_cache(maxsize=8)
def special_ids(tokenizer: Any) -> frozenset[int]:
    """Tokens that a tokenizer calls special, which `<think>` and `<tool_call>` are not."""
    added = tokenizer.added_tokens_decoder.items()
    return frozenset(number for number, token in added if token.special) | frozenset(tokenizer.all_special_ids)


@lru_cache(maxsize=32)
def end_of_turn(tokenizer: Any, followed_by: str = "user") -> int | None:
    """The token that ends an answer: what the template writes behind it, or, as GLM's, the role of whoever speaks
    next: `<|user|>`, or `<|observation|>` behind a tool call.

    `followed_by`: the role of the next message. None if nothing tells.
    """
    asked: Message = {"role": "user", "content": "a"}
    answer: Message = {"role": "assistant", "content": "b"}
    if followed_by == "tool":
        function = {"name": "f", "arguments": {}}
        answer["tool_calls"] = [{"id": "call_0", "type": "function", "function": function}]
    following: Message = {"role": followed_by, "content": "c", "tool_call_id": "call_0"}
    try:
        before = render(tokenizer, [asked, answer], add_generation_prompt=False)
        after = render(tokenizer, [asked, answer, following], add_generation_prompt=False)
    except RenderError:
        return end_of_turn(tokenizer) if followed_by == "tool" else tokenizer.eos_token_id
    written = encode(tokenizer, before.rstrip())
    if written and written[-1] in special_ids(tokenizer):
        return written[-1]
    following_ids = encode(tokenizer, after[len(before) :]) if after.startswith(before) else []
    if following_ids and following_ids[0] in special_ids(tokenizer):
        return following_ids[0]
    return end_of_turn(tokenizer) if followed_by == "tool" else tokenizer.eos_token_id
