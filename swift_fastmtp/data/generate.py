"""Answers from a model in this process, in batches: for small models; large ones belong on a server."""

from functools import partial
from typing import Any, NamedTuple

import torch
from transformers import LogitsProcessor, LogitsProcessorList

from ..checkpoint.finite import NotFiniteError, not_finite, output_matrix


class Answer(NamedTuple):
    token_ids: list[int]
    """With the end token, if the model produced one."""
    finish_reason: str
    """`stop` (an end token) or `length` (the token limit), as OpenAI-compatible servers name them."""


def end_token_ids(model: Any, tokenizer: Any) -> set[int]:
    """Every token that ends an answer: generation_config's, and the tokenizer's."""
    ids = model.generation_config.eos_token_id
    listed = ids if isinstance(ids, list) else [ids]
    return {i for i in (*listed, tokenizer.eos_token_id) if i is not None}


def padding_id(model: Any, tokenizer: Any) -> int:
    """What fills rows up to the same length. It is masked wherever it stands, so any id does that the model has.

    Tokenizers may have none, or one that was added without a row in the embedding.
    """
    pad = tokenizer.pad_token_id
    if pad is None or not 0 <= pad < model.config.vocab_size:
        return 0
    return int(pad)


class _Finite(LogitsProcessor):
    """Stops before a token is chosen from logits that are not finite."""

    def __init__(self, model: Any, mask_BT: torch.Tensor) -> None:
        self.model, self.mask_BT = model, mask_BT

    def __call__(self, ids_BT: torch.Tensor, logits_BV: torch.Tensor) -> torch.Tensor:
        # What was sampled out before is -inf; no model computes that.
        bad_B = not_finite(logits_BV.masked_fill(logits_BV == -float("inf"), 0))
        if bool(bad_B.any()):
            row = int(bad_B.nonzero()[0])
            # Padding stands before the prompt.
            length = int(self.mask_BT[row].sum()) + ids_BT.shape[1] - self.mask_BT.shape[1]
            raise NotFiniteError(f"the next token's logits are not finite: {self._source(ids_BT)}", row, length)
        return logits_BV

    def _source(self, ids_BT: torch.Tensor) -> str:
        new = self.mask_BT.new_ones(len(ids_BT), ids_BT.shape[1] - self.mask_BT.shape[1])
        mask_BT = torch.cat([self.mask_BT, new], 1)
        run = partial(self.model.model, input_ids=ids_BT, attention_mask=mask_BT, use_cache=False)
        if bool((not_finite(run().last_hidden_state) & mask_BT.bool()).any()):
            return str(self.model.source_of_bad_states(run, mask_BT.bool()).text)
        return output_matrix(self.model)


@torch.no_grad()
def generate(
    model: Any,
    tokenizer: Any,
    prompts: list[list[int]],
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    stop: bool = True,
) -> list[Answer]:
    """One answer per prompt; temperature 0 is greedy. Sampling uses torch's global generator.

    Without `stop`, exactly `max_new_tokens` tokens, whatever they are.

    Raises `NotFiniteError` where the model computes a NaN or an infinity; its row is the prompt's number.
    """
    width = max(map(len, prompts))
    pad = padding_id(model, tokenizer)
    ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts]).to(model.device)
    ends = end_token_ids(model, tokenizer) if stop else set()
    sampling: dict[str, Any] = {"do_sample": False, "temperature": None, "top_k": None, "top_p": None}
    if temperature > 0:
        sampling = {"do_sample": True, "temperature": temperature, "top_k": top_k, "top_p": top_p}
    output = model.generate(
        input_ids=ids.to(model.device),
        attention_mask=mask,
        max_new_tokens=max_new_tokens,
        eos_token_id=sorted(ends) or [model.config.vocab_size],  # no such token; None would mean the model's own
        pad_token_id=pad,
        logits_processor=LogitsProcessorList([_Finite(model, mask)]),
        **sampling,
    )
    answers = []
    for row in output[:, width:].tolist():
        end = next((i for i, token in enumerate(row) if token in ends), None)
        answers.append(Answer(row, "length") if end is None else Answer(row[: end + 1], "stop"))
    return answers
