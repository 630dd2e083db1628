"""Lossless at temperature > 0: speculative sampling has exactly the target's distribution.

Shown on the reference verifier (the CPU engine always verifies greedily): 200,000 chains over a random three-token
language, chi-square at level 0.001; and a verifier that accepts too much must fail the same test.
"""

import pytest
import torch
from helpers.reference import verify_sampled

VOCAB, STEPS, CHAINS = 5, 2, 200_000
# 0.999 quantile of chi-square with VOCAB ** 3 - 1 = 124 degrees of freedom.
CRITICAL = 178.0


def language(seed):
    """Random next-token table [V, V]: the distribution after each token."""
    return torch.rand(VOCAB, VOCAB, generator=torch.Generator().manual_seed(seed)).pow(2).add(0.05)


def draw(table, token, generator):
    return torch.multinomial(table[token], 1, generator=generator).squeeze(1)


def three_tokens(target, draft, generator, verify):
    """The first three tokens that speculative decoding with K = 2 writes after token 0."""
    start = torch.zeros(CHAINS, dtype=torch.long)
    first = draw(draft, start, generator)
    drafts = torch.stack([first, draw(draft, first, generator)], 1)
    q = torch.stack([draft[start], draft[first]], 1)
    p = torch.stack([target[start], target[first], target[drafts[:, 1]]], 1)
    accepted, bonus = verify(drafts, q, p, generator)
    out = torch.zeros(CHAINS, 3, dtype=torch.long)
    last = start
    for t in range(3):
        plain = draw(target, last, generator)  # what follows the round is sampled as usual
        out[:, t] = torch.where(accepted > t, drafts[:, min(t, STEPS - 1)], torch.where(accepted == t, bonus, plain))
        last = out[:, t]
    return out


def chi_square(out, target):
    index = (out * torch.tensor([VOCAB**2, VOCAB, 1])).sum(1)
    seen = torch.bincount(index, minlength=VOCAB**3).double()
    want = (target[0][:, None, None] * target[:, :, None] * target[None, :, :]).double().flatten() * CHAINS
    return float(((seen - want) ** 2 / want).sum())


def accept_too_much(drafts, q, p, generator):
    accepted, bonus = verify_sampled(drafts, q * 0.8, p, generator)
    return accepted, bonus


@pytest.mark.parametrize("draft_kind", ["sampled", "greedy"])
def test_the_written_text_has_the_targets_distribution(draft_kind):
    target, draft = (t / t.sum(-1, keepdim=True) for t in (language(0), language(1)))
    if draft_kind == "greedy":  # what SGLang's chain drafts: always the likeliest token
        draft = torch.nn.functional.one_hot(draft.argmax(-1), VOCAB).float()
    generator = torch.Generator().manual_seed(2)
    assert chi_square(three_tokens(target, draft, generator, verify_sampled), target) < CRITICAL


def test_a_wrong_verifier_is_noticed():
    target, draft = (t / t.sum(-1, keepdim=True) for t in (language(0), language(1)))
    out = three_tokens(target, draft, torch.Generator().manual_seed(2), accept_too_much)
    assert chi_square(out, target) > 2 * CRITICAL
