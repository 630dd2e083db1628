"""Rates and tau equal their definitions, counted row by row."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from swift_fastmtp.method.metrics import (
    count_acceptance,
    expected_rounds,
    macro_tau,
    micro_tau,
    text_counts,
    verify_rounds,
)


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


accepted = arrays(bool, st.tuples(st.integers(1, 4), st.integers(2, 12)))


@given(accepted, st.data())
def test_expected_rounds_of_sure_drafts_are_the_rounds(match, data):
    match, depth = torch.from_numpy(match), data.draw(st.integers(1, len(match)))
    rounds = verify_rounds(match, depth)
    assert expected_rounds(match, depth) == (sum(rounds) + len(rounds), len(rounds))


@given(st.integers(0, 10_000), st.integers(1, 3), st.integers(2, 6))
def test_expected_rounds_are_the_mean_over_all_outcomes(seed, depth, length):
    """Against every combination of accepted and refused drafts, weighted by its probability."""
    chance = torch.rand(depth, length, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

    def walk(t):
        if t >= length - 1:
            return 0.0, 0.0
        tokens = steps = 0.0
        for c in range(depth + 1):
            stop = 1 - chance[c, t] if c < depth else 1.0
            weight = float(chance[:c, t].prod() * stop)
            more_tokens, more_steps = walk(t + c + 1)
            tokens += weight * (c + 1 + more_tokens)
            steps += weight * (1 + more_steps)
        return tokens, steps

    assert expected_rounds(chance, depth) == pytest.approx(walk(0))


@given(accepted)
def test_counts_of_texts_are_those_of_a_batch(match):
    match = torch.from_numpy(match)
    K, A = match.shape
    inside = torch.arange(A)[None] + torch.arange(1, K + 1)[:, None] < A
    want = count_acceptance((match & inside)[:, None], inside[:, None], torch.ones(1, A, dtype=torch.bool))
    found = text_counts([match])
    for name in ("eligible", "reached", "accepted"):
        assert getattr(found, name).tolist() == getattr(want, name).tolist()
