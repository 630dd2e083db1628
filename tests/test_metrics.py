"""Rates and tau equal their definitions, counted row by row."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from swift_fastmtp.method.metrics import (
    count_acceptance,
    counts_by_context,
    expected_rounds,
    macro_tau,
    micro_tau,
    part_of_context,
    row_counts,
    tau_of_rows,
    taus_of_context,
    text_counts,
    verify_rounds,
)
from swift_fastmtp.method.rollout import places


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


@settings(deadline=None)
@given(seed=st.integers(0, 999), steps=st.integers(1, 4))
def test_counts_by_context_equal_a_loop(seed, steps):
    """Several documents in a row, of lengths on both sides of where parts begin."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 200, (2, 4), generator=generator)
    width = int(lengths.sum(1).max()) + 3
    segments = torch.full((2, width), -1)
    place = torch.zeros(2, width, dtype=torch.long)
    for b in range(2):
        start = 0
        for number, length in enumerate(lengths[b].tolist()):
            segments[b, start : start + length] = number
            place[b, start : start + length] = torch.arange(length)
            start += length
    inside = segments >= 0
    assert torch.equal(places(segments)[inside], place[inside])

    match = torch.rand(steps, 2, width, generator=generator) < 0.6
    valid = (torch.rand(steps, 2, width, generator=generator) < 0.8) & inside
    base = (torch.rand(2, width, generator=generator) < 0.7) & inside
    parts = {}
    for b, i in base.nonzero().tolist():
        part = parts.setdefault(part_of_context(int(place[b, i]) + 2), [[0] * steps, [0] * steps])
        for k in range(steps):
            if valid[: k + 1, b, i].all():
                part[0][k] += bool(match[: k + 1, b, i].all())
                part[1][k] += 1
    want = [
        (*part, pytest.approx(tau_of_rows([counts])), counts[1][0])
        for part, counts in sorted(parts.items())
        if counts[1][0]
    ]
    halves = [counts_by_context(match[:, b : b + 1], valid[:, b : b + 1], base[b], places(segments)[b]) for b in (0, 1)]
    counts = counts_by_context(match, valid, base, places(segments))
    assert torch.equal(halves[0] + halves[1], counts)
    assert taus_of_context(counts) == want
    assert torch.equal(counts.sum(0), row_counts(match, valid, base).sum(0))


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
