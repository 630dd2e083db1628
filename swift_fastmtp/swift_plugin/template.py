"""Template type `fastmtp`: the chat template of the model's own folder, which is what engines render.

Rows reach it as token ids (`rendering.py` makes them of every dataset), in ms-swift's own form: a message whose
content is a list of ids. So all that ms-swift does with rows goes on working: `--max_length`, truncation, packing,
streaming, cached datasets, workers. Nothing is rendered a second time, and nothing is merged, stripped or added.
"""

from typing import Any

from swift.template import Template, TemplateMeta

from ..data.chat_template import encode, encode_prompt
from ..data.examples import Example, Part, training_examples
from ..errors import FastMTPError

TEMPLATE = "fastmtp"
BASE_STRATEGIES = ("default", "last_round", "all")
"""`--loss_scale`: which tokens are trained on; ms-swift's other ones look for texts of its own templates."""


def example_messages(example: Example) -> list[dict[str, Any]]:
    """An example as ms-swift carries it: the asked parts as the user's ids, the answered ones as the assistant's."""
    messages: list[dict[str, Any]] = []
    for part in example.parts:
        role = "assistant" if part.trained else "user"
        messages.append({"role": role, "content": part.ids})
    return messages


def example_of(messages: list[dict[str, Any]]) -> Example | None:
    """What `example_messages` was given; None for messages of text."""
    if not messages or not all(isinstance(m["content"], list) for m in messages):
        return None
    return Example([Part(m["content"], m["role"] == "assistant") for m in messages])


class FolderTemplate(Template):
    """ms-swift's interface to the folder's chat template."""

    def _preprocess_inputs(self, inputs: Any) -> None:
        """Nothing: tools are rendered by the chat template, and there are no images."""

    def _encode(self, inputs: Any) -> dict[str, Any]:
        """`input_ids` and, in training, `labels` of one row.

        Raises `FastMTPError` for a row of text that makes several examples, or none: `rendering.py` makes them.
        """
        if not self.use_chat_template:  # `swift pt`: text without a conversation
            encoded: dict[str, Any] = super()._encode(inputs)
            return encoded
        if not self.is_training:
            return {"input_ids": self._prompt(inputs)}
        example = example_of(inputs.messages) or self._only_example(inputs)
        labels = example.ids if self.loss_scale.base_strategy == "all" else example.labels
        labels[0] = -100
        return {"input_ids": example.ids, "labels": labels}

    def _only_example(self, inputs: Any) -> Example:
        examples = training_examples(self.tokenizer, self._row(inputs))
        if len(examples) != 1:
            raise FastMTPError(
                f"a row makes {len(examples)} training examples, its turns being asked behind different histories; "
                "give it to `swift sft --dataset`, which makes an example of each"
            )
        return examples[0]

    def _prompt(self, inputs: Any) -> list[int]:
        row = self._row(inputs)
        messages = [m for m in row["messages"] if m["content"] is not None]  # None: where the answer is to stand
        asked = encode_prompt(self.tokenizer, messages, row["tools"], row["chat_template_kwargs"])
        return asked + encode(self.tokenizer, self.response_prefix or "")

    def _row(self, inputs: Any) -> dict[str, Any]:
        """ms-swift's inputs as a row; it takes the system message out of them."""
        system = self.template_meta.default_system if inputs.system is None else inputs.system
        first = [] if system is None else [{"role": "system", "content": system}]
        return {
            "messages": [*first, *inputs.messages],
            "tools": inputs.tools,
            "chat_template_kwargs": inputs.chat_template_kwargs,
        }


# The fields describe a template of ms-swift's own kind, which this one is not; `swift infer` ends answers at
# `suffix`, beside the end tokens of generation_config.json.
META = TemplateMeta(
    TEMPLATE,
    prefix=[],
    prompt=["{{QUERY}}"],
    chat_sep=[],
    suffix=[["eos_token_id"]],
    system_prefix=["{{SYSTEM}}"],
    template_cls=FolderTemplate,
)
