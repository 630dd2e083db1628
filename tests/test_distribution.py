"""Do sampled answers of two servers have the same distribution?"""

import json
import random

import pytest
from helpers.fake_engine import FakeEngine, drawn
from helpers.paths import TINY

from swift_fastmtp.bench.bench import bench
from swift_fastmtp.bench.distribution import PROMPTS, TOKENS, compare_distributions
from swift_fastmtp.bench.from_records import summarize
from swift_fastmtp.bench.results import read_results
from swift_fastmtp.errors import FastMTPError
from swift_fastmtp.method import same_distribution as method
from swift_fastmtp.method.same_distribution import LEVEL, holm, prefix_distance, same_distribution
from swift_fastmtp.report.merge import load_results, notes
from swift_fastmtp.report.tables import distribution_table


def answers(seed, count, wrong=0.0, prompt=(1,)):
    return [drawn(prompt, 5, f"{seed}/{number}", wrong) for number in range(count)]


def test_the_statistic_by_hand():
    """Prefixes a: 3 and 1 of 4 answers, ab: 2 and 1, b: 1 and 3, bc: 0 and 1."""
    one, other = ["ab", "ab", "a", "b"], ["ab", "b", "b", "bc"]
    assert prefix_distance(one, other) == pytest.approx(0.5**2 + 0.25**2 + 0.5**2 + 0.25**2)
    assert prefix_distance(one, one) == 0


def test_the_statistic_is_the_discrepancy_of_common_prefixes():
    one, other = answers(0, 11), answers(1, 7, 0.5)

    def common(x, y):
        return next((place for place, (a, b) in enumerate(zip(x, y, strict=True)) if a != b), len(x))

    def kernel(xs, ys):
        return sum(common(x, y) for x in xs for y in ys) / len(xs) / len(ys)

    want = kernel(one, one) + kernel(other, other) - 2 * kernel(one, other)
    assert prefix_distance(one, other) == pytest.approx(want)


def test_every_deal_has_the_statistic_of_its_answers(monkeypatch):
    """The counted deals, against the definition on the answers of each."""
    monkeypatch.setattr(method, "PERMUTATIONS", 20)
    one, other = answers(0, 11), answers(1, 7)
    deals = []

    class Generator:
        def shuffle(self, is_one):
            random.Random(len(deals)).shuffle(order := list(range(18)))
            is_one[:] = [place in order[:11] for place in range(18)]
            deals.append(list(is_one))

    values = method._dealt(one, other, Generator())
    both = [*one, *other]
    for value, is_one in zip(values, deals, strict=True):
        halves = [[x for x, mine in zip(both, is_one, strict=True) if mine == half] for half in (True, False)]
        assert value == pytest.approx(prefix_distance(*halves))


def test_the_level_holds_and_a_wrong_verifier_is_seen(monkeypatch):
    monkeypatch.setattr(method, "PERMUTATIONS", 200)
    rejected = sum(same_distribution([(answers(f"{n}a", 20), answers(f"{n}b", 30))]) < 0.1 for n in range(200))
    assert 8 <= rejected <= 34  # 20 of 200; 3 standard deviations are 13
    monkeypatch.setattr(method, "PERMUTATIONS", 2000)
    two = [(answers(f"{n}a", 200, 0, (n,)), answers(f"{n}b", 200, 0.25, (n,))) for n in range(PROMPTS)]
    assert same_distribution(two) < LEVEL


def test_holm():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.6, 0.7]) == [1.0, 1.0] and holm([]) == []


def test_prompts_that_one_refuses_and_servers_without_ids():
    base = [("p", [1, 2], "ab"), ("p", [1], "a"), ("q", [3], "c")]
    own = [("p", [1, 2], "ab"), ("p", [1], "a")]
    (one,) = compare_distributions({("base", 1.0): base, ("own", 1.0): own, ("own", 0.5): own}, "base", 8)
    assert (one.prompts, one.samples, one.p) == (1, 2, 1.0) and not one.differs
    texts = [("p", None, "ab"), ("p", None, "a")]
    assert compare_distributions({("base", 1.0): base, ("own", 1.0): texts}, "base", 8)[0].p == 1.0
    assert compare_distributions({("base", 1.0): base[:2], ("own", 1.0): base[2:]}, "base", 8) == []


ASKED = {"model": str(TINY), "num_questions": 3, "max_new_tokens": 12, "rounds": 2, "warmup": 1, "concurrency": [16]}
SAMPLES = 30


def measure(servers, folder, **changes):
    urls = [f"{name}={server.url}" for name, server in servers.items()]
    asked = {**ASKED, "temperatures": [0.0, 1.0], "distribution_samples": SAMPLES, **changes}
    return bench(str(folder), base_urls=urls, **asked)


def test_a_benchmark_finds_the_server_whose_verifier_is_wrong(tmp_path, capsys):
    with FakeEngine() as base, FakeEngine(num_steps=2) as right, FakeEngine(num_steps=2) as wrong:
        base.wrong = right.wrong = 0.0
        wrong.wrong = 0.8
        servers = {"baseline": base, "tuned": right, "vanilla": wrong}
        results = measure(servers, tmp_path / "run")
        # Killed before its last answers, it asks for these and no others, with the same seeds.
        lines = (tmp_path / "run/requests.jsonl").read_text().splitlines(keepends=True)
        (tmp_path / "run/requests.jsonl").write_text("".join(lines[:-10]))
        asked = wrong.asked
        assert measure(servers, tmp_path / "run").distributions == results.distributions
        assert wrong.asked == asked + 10 + ASKED["warmup"]
    found = {one.server: one for one in results.distributions}
    assert not found["tuned"].differs and found["vanilla"].differs
    assert {(one.temperature, one.prompts, one.samples, one.tokens) for one in found.values()} == {
        (1.0, PROMPTS, SAMPLES, TOKENS)
    }
    printed = capsys.readouterr().out
    assert (
        f"tuned, T=1: distribution: same as the baseline's, p = {found['tuned'].p_holm:.2g}, 3 x 30 samples" in printed
    )
    assert "vanilla, T=1: distribution: differs from the baseline's, p = 0.001, 3 x 30 samples of 8 tokens" in printed

    # Kept line by line, in one round, each server with seeds of its own; in no run's numbers.
    records = [json.loads(line) for line in (tmp_path / "run/requests.jsonl").read_text().splitlines()]
    sampled = [r for r in records if r["task"] == "distribution"]
    assert len(sampled) == 3 * PROMPTS * SAMPLES and all(len(r["output_ids"]) == TOKENS for r in sampled)
    by_place = {(r["server"], r["id"]): r["output_ids"] for r in sampled}
    assert any(by_place["baseline", name] != by_place["tuned", name] for _, name in by_place)
    assert {run.task for run in results.runs} == {"smoke"} and len(results.runs) == 6
    plan = json.loads((tmp_path / "run/plan.json").read_text())
    again = summarize(records[::-1], plan)
    assert again.distributions == results.distributions
    assert results.distributions == read_results(tmp_path / "run/results.json").distributions

    # What a reader sees.
    merged = load_results([tmp_path / "run/results.json"])
    table = distribution_table(merged)
    assert [row[3] for row in table.rows] == ["same as the baseline's", "differs from the baseline's"]
    assert [note for note in notes(merged) if "distribution of its answers differs" in note]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"temperatures": [0.0]}, "at temperature 0 nothing is sampled"),
        ({"tasks": ["distribution=FILE"]}, "rename the task"),
        ({"distribution_samples": 10**6}, "distribution_samples"),
    ],
)
def test_what_cannot_be_tested_is_refused(changes, message, tmp_path):
    if "tasks" in changes:
        (tmp_path / "file.jsonl").write_text('{"prompt": "x"}\n')
        changes = {"tasks": [f"distribution={tmp_path / 'file.jsonl'}"]}
    with FakeEngine() as base, FakeEngine(num_steps=2) as right, pytest.raises(FastMTPError, match=message):
        measure({"baseline": base, "tuned": right}, tmp_path / "run", **changes)


def test_without_a_baseline_nothing_is_asked(tmp_path):
    with FakeEngine(num_steps=2) as right, pytest.raises(FastMTPError, match="needs a server and a baseline"):
        measure({"tuned": right}, tmp_path / "run")
    assert right.asked == 0
