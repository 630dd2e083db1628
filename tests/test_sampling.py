"""Lossless at temperature > 0, and how much is accepted then, in every regime of drafts.

The verifier is a reference, as the CPU engine always verifies greedily: over 200,000 chains of a random language, what
it lets through has the target's distribution (chi-square at level 0.001), and it accepts as often as the package says.
"""

import json
from itertools import product

import pytest
import torch
from helpers.chains import STEPS as ROUND_STEPS
from helpers.chains import decode, drafted, language, ratios, verify
from helpers.reference import verify_sampled

from swift_fastmtp.method.chunked_losses import step_losses
from swift_fastmtp.method.config import FastMTPConfig
from swift_fastmtp.method.losses import plain_step_losses
from swift_fastmtp.method.metrics import expected_rounds
from swift_fastmtp.method.verification import (
    BLOCK,
    GREEDY,
    REJECTION,
    block_acceptance,
    regime_of,
    rejection_acceptance,
)

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


ACCEPTANCE = {"greedy": rejection_acceptance, "rejection": rejection_acceptance, "block": block_acceptance}


def tables(regime, vocab=VOCAB):
    """Target and draft [V, V]; greedy drafts are drawn from their argmax alone, whose ratio, 1 / p, is cut to 1."""
    target, draft = language(vocab, 0), language(vocab, 1)
    if regime == "greedy":
        draft = torch.nn.functional.one_hot(draft.argmax(-1), vocab).float()
    return target, draft


@pytest.mark.parametrize("regime", ACCEPTANCE)
def test_texts_have_the_targets_distribution_in_every_regime(regime):
    target, draft = tables(regime)
    generator = torch.Generator().manual_seed(2)
    start = torch.zeros(CHAINS, dtype=torch.long)
    drafts, q, p = drafted(target, draft, start, generator, STEPS)
    coins, last = torch.rand(CHAINS, STEPS, generator=generator), torch.rand(CHAINS, generator=generator)
    accepted, after = verify(drafts, q, p, coins, last, regime == "block")
    out = torch.zeros(CHAINS, STEPS + 1, dtype=torch.long)
    before = start
    for t in range(STEPS + 1):
        plain = draw(target, before, generator)  # what follows the round is sampled as usual
        out[:, t] = torch.where(accepted > t, drafts[:, min(t, STEPS - 1)], torch.where(accepted == t, after, plain))
        before = out[:, t]
    assert chi_square(out, target) < CRITICAL


@pytest.mark.parametrize("regime", ACCEPTANCE)
def test_acceptance_by_a_texts_ratios_is_that_of_served_rounds(regime):
    """Rounds and tokens of 2,000 texts of 12 tokens, each against what its own ratios foretell."""
    target, draft = tables(regime)
    texts, rounds = decode(target, draft, regime == "block", 2000, 12, 3)
    more_rounds, more_tokens = [], []
    for text, counts in zip(texts, rounds, strict=True):
        tokens, steps = expected_rounds(ACCEPTANCE[regime](ratios(target, draft, text, 12)), ROUND_STEPS)
        more_rounds.append(len(counts) - steps)
        more_tokens.append(sum(counts) + len(counts) - tokens)
    for difference in (torch.tensor(more_rounds), torch.tensor(more_tokens)):
        if regime == "greedy":  # a text tells its rounds
            assert not difference.any()
        else:
            assert difference.std() > 0.1
            assert difference.mean().abs() < 4 * difference.std() / len(texts) ** 0.5


def test_block_verification_is_foretold_exactly():
    """Against Algorithm 2 itself, summed over every chain of drafts that can be drawn."""
    target, draft = (table.double() / table.double().sum(-1, keepdim=True) for table in tables("block"))
    chains = torch.tensor(list(product(range(VOCAB), repeat=ROUND_STEPS)))
    before = torch.cat([torch.zeros(len(chains), 1, dtype=torch.long), chains], 1)
    q, p = draft[before[:, :-1], chains], target[before[:, :-1], chains]
    # Drafts drawn from q: i or more are accepted unless every coin from the i-th on says no.
    prefix, stays = torch.ones(len(chains), dtype=torch.float64), []
    for i in range(ROUND_STEPS):
        prefix = (prefix * p[:, i] / q[:, i]).clamp(max=1)
        chance = prefix
        if i < ROUND_STEPS - 1:
            left = (prefix[:, None] * target[chains[:, i]] - draft[chains[:, i]]).clamp(min=0).sum(-1)
            chance = torch.where(prefix < 1, left / (left + 1 - prefix), prefix)
        stays.append(1 - chance)
    refused = torch.stack(stays).flip(0).cumprod(0).flip(0)
    want = ((1 - refused) * q.prod(1)).sum(1)
    # Texts drawn from p.
    found = {}
    for name in ("rejection", "block"):
        at_least = ACCEPTANCE[name]((q / p).T).cumprod(0)
        found[name] = (at_least * p.prod(1)).sum(1)
    assert torch.allclose(found["block"], want, atol=1e-12, rtol=0)
    assert found["block"][0] == pytest.approx(float(found["rejection"][0]))
    assert (found["block"][1:] > found["rejection"][1:] + 0.01).all()


def test_a_token_that_cannot_be_drafted_ends_a_chain():
    ratio = torch.tensor([[2.0, 0.0], [0.0, 0.0], [3.0, 0.0]], dtype=torch.float64)
    for acceptance in (rejection_acceptance, block_acceptance):
        assert acceptance(ratio).cumprod(0).tolist() == [[1, 0], [0, 0], [0, 0]]


def test_a_command_says_its_regime():
    sglang = ["python", "-m", "sglang.launch_server", "--speculative-algorithm", "NEXTN"]
    assert regime_of(sglang) == GREEDY
    assert regime_of([*sglang, *REJECTION.sglang]) == REJECTION
    assert regime_of([*sglang, *REJECTION.sglang, *BLOCK.sglang]) == BLOCK
    for regime in (GREEDY, REJECTION, BLOCK):
        speculative = json.dumps({"method": "mtp", "num_speculative_tokens": 3, **regime.vllm})
        assert regime_of(["vllm", "serve", "m", "--speculative-config", speculative]) == regime
        assert regime_of(["vllm", "serve", "m", f"--speculative-config={speculative}"]) == regime
    assert regime_of(["vllm", "--speculative-config", '["num_speculative_tokens"]']) == GREEDY
