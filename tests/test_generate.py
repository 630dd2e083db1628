"""Answers generated in this process: slots that are taken over, against one conversation at a time."""

from collections import deque
from types import SimpleNamespace

import pytest
import torch
from helpers.models import RANDOM
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LogitsProcessorList, TopKLogitsWarper, TopPLogitsWarper

from swift_fastmtp.data.generate import Decoding, Request, _prefill, answer_all, draw

NO_PADDING = SimpleNamespace(pad_token_id=None)
MIMO = RANDOM["mimo"](1)


def requests_of(lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    prompts = [torch.randint(0, 97, (n,), generator=generator).tolist() for n in lengths]
    return deque(Request(i, prompt, seed=i) for i, prompt in enumerate(prompts))


def answers(model, requests, decoding, num_slots):
    found = {r.key: answer.token_ids for r, answer in answer_all(model, NO_PADDING, requests, decoding, num_slots)}
    return [found[key] for key in sorted(found)]


@pytest.mark.parametrize("kind", RANDOM)
def test_slots_that_are_taken_over_answer_as_transformers_does(kind):
    """In every family: float64, so that nothing hangs on rounding. Three end early, the seventh prompt is the longest.

    Sparse attention looks at everything here: which of several keys with the score 0 it leaves out depends on padding.
    """
    sizes = {"top": 64} if kind in ("deepseek_v32", "glm_moe_dsa") else {}
    model = RANDOM[kind](3, **sizes).double()
    lengths = [5, 3, 9, 4, 2, 6, 23, 7, 5]
    want = []
    for request in requests_of(lengths):
        ids = torch.tensor([request.prompt])
        whole = {"attention_mask": torch.ones_like(ids), "pad_token_id": 0, "eos_token_id": [98]}
        output = model.generate(ids, max_new_tokens=12, do_sample=False, **whole)
        want.append(output[0, len(request.prompt) :].tolist())
    # What three of them would say third ends an answer.
    ends = frozenset(want[i][2] for i in (0, 4, 5))
    cut = [next((w[: n + 1] for n, token in enumerate(w) if token in ends), w) for w in want]
    assert min(map(len, cut)) < 4 and max(map(len, cut)) > 4
    assert answers(model, requests_of(lengths), Decoding(12, ends=ends), num_slots=3) == cut


class Products(TorchDispatchMode):
    """Which matrix products gave results of a width."""

    def __init__(self, width):
        super().__init__()
        self.width, self.names = width, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.shape[-1:] == (self.width,) and "mm" in str(func):
            self.names.append(str(func))
        return out


def test_many_prompts_are_one_product_with_the_output_matrix():
    """A batch of products, which torch makes of states that do not lie side by side, copies the matrix for each in
    bfloat16."""
    model = RANDOM["mimo"](1).requires_grad_(False)
    with torch.no_grad(), Products(model.config.vocab_size) as products:
        _prefill(model, 0, [request.prompt for request in requests_of([5, 3, 9])])
    assert products.names == ["aten.mm.default"]


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=8), st.integers(1, 9), st.integers(0, 99))
def test_an_answers_draws_are_its_own(lengths, num_slots, seed):
    model = MIMO
    decoding = Decoding(8, temperature=1.0, top_k=30, top_p=0.9, ends=frozenset(range(12)))
    together = answers(model, requests_of(lengths, seed), decoding, num_slots)
    alone = [answers(model, deque([request]), decoding, 1)[0] for request in requests_of(lengths, seed)]
    assert together == alone


def test_whoever_gets_an_answer_may_ask_again():
    requests = requests_of([4, 4, 4])
    asked = []
    for request, answer in answer_all(MIMO, NO_PADDING, requests, Decoding(3), 2):
        asked.append((request.key, len(request.prompt)))
        if len(request.prompt) < 12:
            requests.append(Request(request.key, request.prompt + answer.token_ids))
    assert sorted(asked) == sorted((key, n) for key in range(3) for n in (4, 7, 10, 13))


@settings(max_examples=30, deadline=None)
@given(
    st.integers(0, 999),
    st.sampled_from([0.3, 1.0, 2.0]),
    st.sampled_from([0, 1, 3, 50]),
    st.sampled_from([0.01, 0.5, 0.9, 1.0]),
)
def test_tokens_are_drawn_as_transformers_warpers_leave_them(seed, temperature, top_k, top_p):
    """At evenly spaced numbers each token comes as often as its probability says."""
    logits = torch.randn(11, generator=torch.Generator().manual_seed(seed)) * 2
    warpers = LogitsProcessorList()
    if top_k:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        warpers.append(TopPLogitsWarper(top_p))
    want = warpers(None, logits[None] / temperature).softmax(-1)[0]
    uniform = torch.arange(4000) / 4000
    tokens = draw(logits.expand(4000, -1), uniform, Decoding(1, temperature, top_k, top_p))
    share = torch.bincount(tokens, minlength=11) / 4000
    assert (share - want).abs().max() < 1e-3
    assert not bool(share[want == 0].any())
