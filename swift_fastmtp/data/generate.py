"""Answers from a model in this process, many at a time: for small models; large ones belong on a server.

Where an answer ends, the next prompt takes over its place at once (`model/slots.py`), so that no row of a batch is
computed for nothing while the longest answer goes on.
"""

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch

from ..checkpoint.finite import NotFiniteError, first_bad_module, not_finite, output_matrix
from ..model.slots import Slots, grouped_attention_in, prompt_cache

REFILL = 1 / 16
"""Share of slots without an answer at which prompts take them over: a few prompts cost a GPU as much as many do."""
EMPTY = 0.25
"""Share of slots without an answer at which they are dropped, when there are no more prompts to put into them."""


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


class Decoding(NamedTuple):
    """How tokens are chosen, and when an answer ends."""

    max_new_tokens: int
    temperature: float = 0.0
    """0 is greedy."""
    top_k: int = 0
    """0 is all."""
    top_p: float = 1.0
    ends: frozenset[int] = frozenset()
    """Without any, every answer has exactly `max_new_tokens` tokens."""


@dataclass
class Request:
    """A prompt, and the answer as far as it goes."""

    key: int
    """What the caller knows it by."""
    prompt: list[int]
    seed: int = 0
    """Of its own draws, so that it does not matter which other prompts are answered beside it."""
    token_ids: list[int] = field(default_factory=list)
    generator: torch.Generator = field(default_factory=torch.Generator)

    def __post_init__(self) -> None:
        self.generator.manual_seed(self.seed)

    def finish_reason(self, decoding: Decoding) -> str | None:
        """None while it goes on."""
        if self.token_ids and self.token_ids[-1] in decoding.ends:
            return "stop"
        return "length" if len(self.token_ids) == decoding.max_new_tokens else None


@torch.no_grad()
def answer_all(
    model: Any,
    tokenizer: Any,
    requests: deque[Request],
    decoding: Decoding,
    num_slots: int,
    count: Callable[[int], None] | None = None,
) -> Iterator[tuple[Request, Answer]]:
    """Each request with its answer, as soon as it has ended; `num_slots` of them are in work at a time.

    `requests` are taken from the left. Whoever gets an answer may append another: the next turn of a conversation.
    `count` is told at every step how many tokens it gave.

    Raises `NotFiniteError` where the model computes a NaN or an infinity; its row is the request's key.
    """
    batch = _Batch(model, padding_id(model, tokenizer), decoding)
    with grouped_attention_in(model):
        while True:
            free = num_slots if batch.slots is None else batch.running.count(None)
            if free < REFILL * len(batch.running) and batch.live:
                free = 0
            batch.begin([requests.popleft() for _ in range(min(free, len(requests)))])
            tokens = len(batch.live)
            if not tokens:
                return
            yield from batch.step()
            if count:
                count(tokens)


class _Batch:
    """The answers in work, a slot for each; a slot whose answer has ended is None until another takes it over."""

    def __init__(self, model: Any, pad: int, decoding: Decoding) -> None:
        self.model, self.pad, self.decoding = model, pad, decoding
        self.running: list[Request | None] = []
        self.slots: Slots | None = None
        self.logits_BV = torch.empty(0)

    @property
    def live(self) -> list[int]:
        return [slot for slot, request in enumerate(self.running) if request is not None]

    def begin(self, new: list[Request]) -> None:
        """Put requests into free slots; drop slots if too many stay free."""
        if new:
            prompts, lengths, logits_NV = _prefill(self.model, self.pad, [request.prompt for request in new])
            if self.slots is None:
                self.slots, self.running, self.logits_BV = Slots(prompts, lengths), list(new), logits_NV
                return
            free = [slot for slot, request in enumerate(self.running) if request is None]
            taken = free[: len(new)]
            self.slots.put(taken, prompts, lengths)
            self.logits_BV[taken] = logits_NV
            for slot, request in zip(taken, new, strict=True):
                self.running[slot] = request
        live = self.live
        if self.slots is not None and 0 < len(live) <= (1 - EMPTY) * len(self.running):
            self.slots.keep(live)
            self.logits_BV, self.running = self.logits_BV[live], [self.running[slot] for slot in live]

    def step(self) -> Iterator[tuple[Request, Answer]]:
        """One more token for each answer; those that end with it."""
        self._check_finite()
        tokens_B = self._choose()
        tokens = tokens_B.tolist()  # at once: every look at a GPU waits for it
        for slot in self.live:
            request: Any = self.running[slot]
            request.token_ids.append(tokens[slot])
            reason = request.finish_reason(self.decoding)
            if reason:
                self.running[slot] = None
                yield request, Answer(request.token_ids, reason)
        if self.live:
            self.logits_BV = _next_logits(self.model, self.slots, tokens_B)

    def _choose(self) -> torch.Tensor:
        """A token for each slot [B]: the most likely one, or one drawn with the request's own generator."""
        if self.decoding.temperature == 0:
            return self.logits_BV.argmax(-1)
        uniform = [float(torch.rand((), generator=r.generator)) if r else 0.0 for r in self.running]
        return draw(self.logits_BV, torch.tensor(uniform, device=self.logits_BV.device), self.decoding)

    def _check_finite(self) -> None:
        bad = not_finite(self.logits_BV).tolist()
        for slot in self.live:
            if bad[slot]:
                request: Any = self.running[slot]
                source = _source(self.model, request)
                token = len(request.prompt) + len(request.token_ids)
                raise NotFiniteError(f"the next token's logits are not finite: {source}", request.key, token)


def _prefill(model: Any, pad: int, prompts: list[list[int]]) -> tuple[Any, torch.Tensor, torch.Tensor]:
    """Cache, lengths [N] and next-token logits [N, V] of prompts."""
    width = max(map(len, prompts))
    ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts], device=model.device)
    lengths = torch.tensor([len(p) for p in prompts], device=model.device)
    column = torch.arange(width, device=model.device)
    positions = column - (width - lengths)[:, None]
    cache = prompt_cache(model.config)
    # As a slice, the last states would not be contiguous: `linear` copies the output matrix for each prompt then.
    last = column[-1:]
    output = model(
        input_ids=ids,
        attention_mask=(positions >= 0).long(),
        position_ids=positions.clamp(min=0),
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=last,
    )
    return cache, lengths, output.logits[:, -1]


def _next_logits(model: Any, slots: Any, tokens_B: torch.Tensor) -> torch.Tensor:
    """Next-token logits [B, V] after one more token in every slot."""
    output = model(
        input_ids=tokens_B[:, None],
        attention_mask=slots.mask(),
        position_ids=slots.lengths[:, None],
        past_key_values=slots.cache,
        use_cache=True,
    )
    return output.logits[:, -1]


def draw(logits_BV: torch.Tensor, uniform_B: torch.Tensor, decoding: Decoding) -> torch.Tensor:
    """Tokens [B] at numbers drawn evenly from [0, 1), by the distribution that transformers' warpers leave.

    Sorted once: the `top_k` most likely, of those the fewest that have `top_p` of the probability, then the first token
    at which the sum of probabilities exceeds the number drawn.
    """
    vocab_size = logits_BV.shape[-1]
    best_BK, ids_BK = (logits_BV.float() / decoding.temperature).topk(min(decoding.top_k or vocab_size, vocab_size))
    p_BK = best_BK.softmax(-1)
    sum_before_BK = p_BK.cumsum(-1) - p_BK
    p_BK = p_BK.masked_fill(sum_before_BK >= decoding.top_p, 0)
    sums_BK = p_BK.cumsum(-1)
    place_B = (sums_BK <= uniform_B[:, None] * sums_BK[:, -1:]).sum(-1)
    last_B = (p_BK > 0).sum(-1) - 1  # rounding must not choose what was cut off
    return ids_BK.gather(-1, torch.minimum(place_B, last_B)[:, None]).squeeze(-1)


def _source(model: Any, request: Request) -> str:
    """Where logits that are not finite come from."""
    ids = torch.tensor([request.prompt + request.token_ids], device=model.device)
    run = partial(model.model, input_ids=ids, use_cache=False)
    if bool(not_finite(run().last_hidden_state).any()):
        source_of = getattr(model, "source_of_bad_states", None) or partial(
            first_bad_module, model
        )  # transformers' own
        return str(source_of(run, torch.ones_like(ids).bool()).text)
    return output_matrix(model)


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
    """One answer per prompt, all at a time; temperature 0 is greedy. Seeds come from torch's global generator.

    Without `stop`, exactly `max_new_tokens` tokens, whatever they are.

    Raises `NotFiniteError` where the model computes a NaN or an infinity; its row is the prompt's number.
    """
    ends = frozenset(end_token_ids(model, tokenizer) if stop else ())
    seeds = torch.randint(2**62, (len(prompts),)).tolist()
    requests = deque(Request(i, prompt, seed) for i, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)))
    decoding = Decoding(max_new_tokens, temperature, top_k, top_p, ends)
    answers = {
        request.key: answer for request, answer in answer_all(model, tokenizer, requests, decoding, len(prompts))
    }
    return [answers[i] for i in range(len(prompts))]
