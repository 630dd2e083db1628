"""Rates and tau equal their definitions, counted row by row."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from swift_fastmtp.evaluation.metrics import count_acceptance, macro_tau, micro_tau, verify_rounds


@settings(deadline=None)
@given(seed=st.integers(0, 999), steps=st.integers(1, 5), length=st.integers(1, 12))
def test_counts_equal_a_loop(seed, steps, length):
    generator = torch.Generator().manual_seed(seed)
    match = torch.rand(steps, 2, length, generator=generator) < 0.6
    valid = torch.rand(steps, 2, length, generator=generator) < 0.8
    base = torch.rand(2, length, generator=generator) < 0.7
    counts = count_acceptance(match & valid, valid, base)
    for k in range(steps):
        eligible = reached = accepted = 0
        for b in range(2):
            for i in range(length):
                if base[b, i] and valid[: k + 1, b, i].all():
                    eligible += 1
                    reached += bool(match[:k, b, i].all())
                    accepted += bool(match[: k + 1, b, i].all())
        assert (int(counts.eligible[k]), int(counts.reached[k]), int(counts.accepted[k])) == (
            eligible,
            reached,
            accepted,
        )
    assert counts.tau == 1 + sum(counts.marginal)


@given(seed=st.integers(0, 999), steps=st.integers(1, 5), length=st.integers(1, 30))
def test_rounds_equal_a_greedy_server_token_by_token(seed, steps, length):
    match = torch.rand(steps, length, generator=torch.Generator().manual_seed(seed)) < 0.6
    want, t = [], 0
    while t < length - 1:
        accepted = 0
        while accepted < steps and match[accepted, t]:
            accepted += 1
        want.append(accepted)
        t += 1 + accepted
    assert verify_rounds(match, steps) == want


def test_tau_micro_and_macro():
    rounds = [[3, 3], [0, 0, 0, 0]]
    assert micro_tau(rounds) == (6 + 6) / 6
    assert macro_tau(rounds) == (4 + 1) / 2
    assert micro_tau([[]]) == 0 and macro_tau([[]]) == 0


def test_no_draft_accepted_is_tau_one():
    assert verify_rounds(torch.zeros(3, 5, dtype=torch.bool), 3) == [0, 0, 0, 0]
    assert micro_tau([[0, 0, 0, 0]]) == 1.0
