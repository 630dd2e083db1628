"""The benchmark's numbers: by hand, by their definitions, and their identities."""

import random
import statistics
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from swift_fastmtp.bench.from_records import summarize
from swift_fastmtp.method.metrics import (
    busy_seconds,
    conditional_rates,
    first_difference,
    macro_tau,
    macro_tau_of,
    marginal_rates,
    micro_tau,
    micro_tau_of,
    part_of_context,
    percentiles,
    speedup,
    steps_by_chunk,
    tau_by_context,
    tau_by_position,
    tau_interval,
    token_gaps,
)

STEPS = st.lists(st.integers(0, 5), min_size=1, max_size=40)
"""Drafts accepted in each verification step of an answer, K = 5."""


def histogram_of(steps, num_steps=5):
    return [steps.count(j) for j in range(num_steps + 1)]


def chunks_of(steps, cut=0):
    """What a server streams: the prefill's token, then accepted + 1 per step; the last loses `cut` tokens."""
    sizes = [1, *(a + 1 for a in steps)]
    sizes[-1] -= cut
    return sizes


def test_rates_by_hand():
    histogram = [2, 3, 0, 5]  # ten steps
    assert marginal_rates(histogram) == [0.8, 0.5, 0.5]
    assert conditional_rates(histogram) == [0.8, 5 / 8, 1.0]
    assert 1 + sum(marginal_rates(histogram)) == pytest.approx(micro_tau_of([(3 + 15, 10)]))
    assert marginal_rates([0, 0]) == conditional_rates([0, 0]) == [] and conditional_rates([4, 0, 0]) == [0, 0]


@given(st.lists(STEPS, min_size=1, max_size=5))
def test_rates_equal_their_definitions(answers):
    steps = [a for answer in answers for a in answer]
    marginal, conditional = (rates(histogram_of(steps)) for rates in (marginal_rates, conditional_rates))
    for k in range(1, 6):
        reached = [a for a in steps if a >= k - 1]
        assert marginal[k - 1] == pytest.approx(sum(a >= k for a in steps) / len(steps))
        assert conditional[k - 1] == pytest.approx(sum(a >= k for a in reached) / max(1, len(reached)))
    assert np.allclose(np.cumprod(conditional), marginal)
    assert all(a >= b for a, b in pairwise(marginal))
    counts = [(sum(a), len(a)) for a in answers]
    assert micro_tau_of(counts) == pytest.approx(1 + sum(marginal)) == pytest.approx(micro_tau(answers))
    taus = [1 + sum(a) / len(a) for a in answers]
    assert macro_tau_of(counts) == pytest.approx(sum(taus) / len(taus)) == pytest.approx(macro_tau(answers))
    assert min(taus) - 1e-9 <= micro_tau_of(counts) <= max(taus) + 1e-9


def test_tau_without_steps_is_unknown():
    assert micro_tau_of([]) is None and macro_tau_of([(0, 0)]) is None
    assert macro_tau_of([(0, 0), (4, 2)]) == 3.0


def test_the_references_tau_counts_the_first_token():
    """The paper's script divides completion tokens by steps: too high by one token per answer."""
    answers = [[3, 1], [0, 0, 2]]
    tokens = sum(1 + sum(a) + len(a) for a in answers)
    steps = sum(map(len, answers))
    assert tokens / steps - micro_tau(answers) == pytest.approx(len(answers) / steps)


@given(STEPS, st.data())
def test_steps_are_found_in_a_stream(steps, data):
    cut = data.draw(st.integers(0, steps[-1]))
    found = steps_by_chunk(chunks_of(steps, cut), sum(steps), len(steps))
    before = 1
    want = []
    for accepted in steps:
        want.append((before, accepted))
        before += accepted + 1
    assert found == want
    width = data.draw(st.integers(1, 50))
    parts = tau_by_position(found, width)
    assert sum(n for *_, n in parts) == len(steps)
    assert sum((tau - 1) * n for _, _, tau, n in parts) / len(steps) == pytest.approx(sum(steps) / len(steps))
    assert all(end == start + width and start % width == 0 for start, end, _, _ in parts)
    for start, end, tau, n in parts:
        inside = [a for p, a in want if start <= p < end]
        assert n == len(inside) and tau == pytest.approx(1 + sum(inside) / n)


@given(st.integers(0, 10**7))
def test_parts_of_the_context_double(tokens):
    start, end = part_of_context(tokens)
    assert start <= tokens < end
    assert end == 64 if start == 0 else end == 2 * start and start % 64 == 0


@given(st.lists(st.tuples(st.integers(0, 5000), st.integers(0, 3)), min_size=1))
def test_steps_by_context(steps):
    parts = tau_by_context(steps)
    assert [start for start, *_ in parts] == sorted({part_of_context(before)[0] for before, _ in steps})
    for start, end, tau, n in parts:
        inside = [a for before, a in steps if start <= before < end]
        assert n == len(inside) and tau == pytest.approx(1 + sum(inside) / n)


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(20, 40)), min_size=2, max_size=12))
def test_the_interval_of_tau_holds_tau(answers):
    accepted, steps = (sum(column) for column in zip(*answers, strict=True))
    low, high = tau_interval(answers)
    assert 1 <= low <= 1 + accepted / steps <= high
    # Answers that are alike tell tau exactly.
    assert tau_interval([answers[0]] * 4) == (pytest.approx(1 + answers[0][0] / answers[0][1]),) * 2


def test_the_interval_of_tau_is_the_answers_spread():
    """200 answers of 50 steps, normal: 1.96 standard errors, by the textbook; one answer tells none."""
    generator = random.Random(0)
    answers = [(round(generator.gauss(50, 10)), 50) for _ in range(200)]
    low, high = tau_interval(answers)
    taus = [1 + accepted / steps for accepted, steps in answers]
    assert (high - low) / 2 == pytest.approx(1.96 * statistics.stdev(taus) / 200**0.5, rel=0.1)
    assert tau_interval(answers[:1]) is None


def test_steps_that_came_together_are_not_guessed():
    assert steps_by_chunk([1, 3, 5], accepted=5, steps=3) is None  # two steps in one chunk
    assert steps_by_chunk([2, 3], accepted=2, steps=1) is None  # the first token with a step
    assert steps_by_chunk([1, 3, 3], accepted=3, steps=2) is None  # more arrived than was accepted
    assert steps_by_chunk([1], accepted=0, steps=0) is None


def test_gaps_and_percentiles_by_hand():
    assert token_gaps([1, 2, 1], [0.5, 0.2, 0.3]) == [0.1, 0.1, 0.3]
    assert percentiles([1, 2, 3, 4, 5]) == (3, pytest.approx(4.6), pytest.approx(4.96))
    assert percentiles([]) is None


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 9)), max_size=12))
def test_busy_seconds_are_a_union(spans):
    spans = [(a, a + n) for a, n in spans]
    assert busy_seconds(spans) == len({t for a, b in spans for t in range(a, b)})


def test_speedup_by_hand():
    base = [(100, 10.0), (50, 5.0)]
    assert speedup([base], [[(100, 5.0), (50, 2.5)]]) == (2.0, 2.0, 2.0)
    value, low, high = speedup([base], [[(100, 10.0), (50, 1.0)]])
    assert value == pytest.approx(15 / 11) and low == 1.0 and high == 5.0
    assert speedup([], []) is None and speedup([[]], [[]]) is None and speedup([[(0, 0.0)]], [[(1, 1.0)]]) is None


def test_the_interval_is_a_bootstrap_over_prompts():
    """Against one written out, and against what it promises: it holds the true ratio nineteen times in twenty."""
    rng = np.random.default_rng(1)
    base = np.stack([rng.integers(20, 200, 40), rng.uniform(1, 9, 40)], axis=1)
    other = np.stack([base[:, 0], base[:, 1] / rng.lognormal(0.5, 0.3, 40)], axis=1)
    value, low, high = speedup([base], [other], samples=4000)
    ratios, pick = [], random.Random(5)
    for _ in range(4000):
        draw = [pick.randrange(40) for _ in range(40)]
        b, o = base[draw].sum(0), other[draw].sum(0)
        ratios.append((o[0] / o[1]) / (b[0] / b[1]))
    assert (low, high) == pytest.approx(np.percentile(ratios, [2.5, 97.5]), rel=0.02)
    assert low < value < high
    assert speedup([base], [other], seed=3) == speedup([base], [other], seed=3)

    held = 0
    for _ in range(200):
        seconds = rng.uniform(1, 9, 60)
        noise = rng.lognormal(0, 0.2, 60)
        pairs = [[(100.0, s) for s in seconds]], [[(100.0, s / 2 * n) for s, n in zip(seconds, noise, strict=True)]]
        truth = 2 / np.exp(0.02)
        _, low, high = speedup(*pairs, samples=200)
        held += low <= truth <= high
    assert 178 <= held <= 199


def test_where_answers_differ():
    assert first_difference([1, 2], [1, 2]) is None and first_difference("ab", "ab") is None
    assert first_difference([1, 2, 3], [1, 4, 3]) == 1
    assert first_difference([1, 2], [1, 2, 3]) == 2 and first_difference([], [1]) == 0


def record(server, name, turn, tokens, seconds, steps=None, ids=None, start=0.0, **changes):
    accepted = None if steps is None else sum(steps)
    return {
        "server": server,
        "task": "t",
        "temperature": 0.0,
        "concurrency": 1,
        "id": name,
        "turn": turn,
        "engine": ["sglang", "0.5.23"],
        "text": "",
        "output_ids": ids or list(range(tokens)),
        "completion_tokens": tokens,
        "start": start,
        "latency": seconds + 0.5,
        "ttft": 0.5,
        "chunk_tokens": chunks_of(steps) if steps else [1] * tokens,
        "chunk_seconds": [0.5, *[0.1] * (len(steps) if steps else tokens - 1)],
        "steps": None if steps is None else len(steps),
        "accepted": accepted,
        "histogram": histogram_of(steps, 2) if steps else None,
        **changes,
    }


def plan():
    server = dict.fromkeys(("token_map", "token_map_size", "draft_model", "command"))
    task = dict.fromkeys(("title", "language", "source", "licence", "sha256"), "") | {"num_rows": 2}
    return {
        "provenance": {"started": "now"},
        "settings": {"max_new_tokens": 64, "seed": 0, "warmup": 0, "tasks": {"t": task}},
        "temperatures": [0.0],
        "concurrency": [1],
        "servers": {
            "base": {**server, "label": "B", "method": "baseline", "num_steps": 0, "model": "m"},
            "k2": {**server, "label": "V", "method": "vanilla", "num_steps": 2, "model": "m"},
        },
        "baseline": "base",
    }


def test_a_run_by_hand():
    records = [
        record("base", "a", 0, 9, 8.0),
        record("base", "b", 0, 5, 4.0, start=100.0),
        record("base", "b", 1, 5, 4.0, start=104.0),
        record("k2", "a", 0, 9, 4.0, steps=[2, 0, 2, 0], prompt_tokens=63),
        record("k2", "b", 0, 5, 2.0, steps=[1, 1], ids=[0, 1, 2, 9, 4], start=1.0, prompt_tokens=2047),
        record("k2", "b", 1, 5, 2.0, steps=[0, 2], ids=[9] * 5, start=7.0, prompt_tokens=4000),
        {**record("k2", "c", 0, 1, 1.0), "error": "too long"},
    ]
    base, run = summarize(records, plan()).runs
    assert (run.num_requests, run.num_failed, run.completion_tokens) == (4, 1, 19)
    assert run.histogram == [3, 2, 3] and run.marginal == [5 / 8, 3 / 8] and run.conditional == [5 / 8, 3 / 5]
    assert run.tau_micro == 1 + 8 / 8 and run.tau_macro == (2 + 2 + 2) / 3
    assert run.tokens_per_second == 19 / (4.5 + 2.5)  # "b" began while "a" ran
    # Half a second to the first token, and the time given above.
    assert run.tokens_per_second_per_request == 2.0 and base.tokens_per_second_per_request == 5 / 4.5
    assert run.speedup.value == pytest.approx((8.5 + 4.5 + 4.5) / (4.5 + 2.5 + 2.5))
    assert 9 / 5 - 1e-9 <= run.speedup.low <= run.speedup.value <= run.speedup.high <= 17 / 9 + 1e-9  # b's, a's
    assert run.ttft.p50 == 0.5 and base.itl.p50 == 0.1
    assert (run.lossless.compared, run.lossless.equal) == (2, 1)  # b's second turn has another history
    assert vars(run.lossless.first_divergence) == {"id": "b", "turn": 0, "token": 3}
    assert [(p.start, p.end, p.steps) for p in run.tau_by_position] == [(0, 16, 8)]
    assert [(p.start, p.end, p.steps) for p in run.tau_by_context] == [(64, 128, 4), (2048, 4096, 4)]
    assert base.tau_micro is None and base.histogram == [] and base.speedup is None and base.lossless is None


def test_order_of_requests_does_not_matter():
    records = [record("base", str(i), 0, 9, 1.0 + i, start=10.0 * i) for i in range(8)]
    records += [record("k2", str(i), 0, 9, 1.0, steps=[2, 0, 2, 0], start=10.0 * i) for i in range(8)]
    shuffled = random.Random(0).sample(records, len(records))
    assert summarize(shuffled, plan()) == summarize(records, plan())
