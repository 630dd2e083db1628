"""Lossless at temperature > 0, and how much is accepted then: the acceptance probability that training logs.

The verifier is a reference, as the CPU engine always verifies greedily: over 200,000 chains of a random language, what
it lets through has the target's distribution (chi-square at level 0.001), and it accepts as often as the package says.
"""

import pytest
import torch
from helpers.reference import verify_sampled

from swift_fastmtp.method.chunked_losses import step_losses
from swift_fastmtp.method.config import FastMTPConfig
from swift_fastmtp.method.losses import plain_step_losses

VOCAB, STEPS, CHAINS = 5, 2, 200_000
# 0.999 quantile of chi-square with VOCAB ** 3 - 1 = 124 degrees of freedom.
CRITICAL = 178.0


def logits(seed):
    """Random logits [V, V] of the token that follows each token."""
    return torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(seed))


def draw(table, token, generator):
    return torch.multinomial(table[token], 1, generator=generator).squeeze(1)


def three_tokens(target, draft, generator):
    """The first three tokens that speculative decoding with K = 2 writes after token 0; drafts, and how many held."""
    start = torch.zeros(CHAINS, dtype=torch.long)
    first = draw(draft, start, generator)
    drafts = torch.stack([first, draw(draft, first, generator)], 1)
    q = torch.stack([draft[start], draft[first]], 1)
    p = torch.stack([target[start], target[first], target[drafts[:, 1]]], 1)
    accepted, bonus = verify_sampled(drafts, q, p, generator)
    out = torch.zeros(CHAINS, 3, dtype=torch.long)
    last = start
    for t in range(3):
        plain = draw(target, last, generator)  # what follows the round is sampled as usual
        out[:, t] = torch.where(accepted > t, drafts[:, min(t, STEPS - 1)], torch.where(accepted == t, bonus, plain))
        last = out[:, t]
    return out, drafts, accepted


def chi_square(out, target):
    index = (out * torch.tensor([VOCAB**2, VOCAB, 1])).sum(1)
    seen = torch.bincount(index, minlength=VOCAB**3).double()
    want = (target[0][:, None, None] * target[:, :, None] * target[None, :, :]).double().flatten() * CHAINS
    return float(((seen - want) ** 2 / want).sum())


def acceptance(losses, draft_VV, target_VV, temperature):
    """The package's probability that a draft behind each token is accepted, [V]: the output matrix is the identity."""
    config = FastMTPConfig(num_speculative_steps=1, loss="kl", temperature=temperature)
    rows, every = torch.arange(VOCAB), torch.ones(1, VOCAB, dtype=torch.bool)
    hidden = torch.cat([torch.zeros(1, VOCAB), target_VV])  # step 1 of a row has the row behind as its teacher
    return losses(draft_VV[None], torch.eye(VOCAB), rows[None], every, config, hidden, rows).accept_prob[0]


@pytest.mark.parametrize("losses", [step_losses, plain_step_losses])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_sampled_drafts_are_accepted_as_often_as_the_logged_probability_says(temperature, losses):
    target, draft = ((logits(seed) / temperature).softmax(-1) for seed in (0, 1))
    out, drafts, accepted = three_tokens(target, draft, torch.Generator().manual_seed(2))
    assert chi_square(out, target) < CRITICAL
    want = acceptance(losses, logits(1), logits(0), temperature)
    assert want.max() - want.min() > 0.1  # so that one cannot be taken for another
    assert float((accepted >= 1).float().mean()) == pytest.approx(float(want[0]), abs=0.005)
    for token in range(VOCAB):
        reached = accepted[(accepted >= 1) & (drafts[:, 0] == token)]
        assert float((reached == 2).float().mean()) == pytest.approx(float(want[token]), abs=2 / len(reached) ** 0.5)
