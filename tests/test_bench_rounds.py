"""Servers take turns: the order, what it is worth on a machine that drifts, the interval's two levels, CPU time."""

import json
import math
import random
import sys
from itertools import groupby
from pathlib import Path

import numpy as np
import pytest
import yaml
from helpers.bench_results import table_2
from helpers.fake_engine import FakeEngine
from helpers.paths import ROOT, TINY
from hypothesis import given, settings
from hypothesis import strategies as st

from swift_fastmtp.bench.bench import bench
from swift_fastmtp.bench.cpu_time import CpuClock
from swift_fastmtp.bench.from_records import summarize
from swift_fastmtp.bench.order import plan_passes, plan_runs
from swift_fastmtp.bench.plan import make_plan
from swift_fastmtp.bench.records import read_records
from swift_fastmtp.bench.results import pass_fields, read_results
from swift_fastmtp.bench.summary import table, warnings
from swift_fastmtp.errors import FastMTPError
from swift_fastmtp.method.metrics import speedup
from swift_fastmtp.report import tables
from swift_fastmtp.report.compare import Limits, compare_results
from swift_fastmtp.report.merge import load_results, notes

FAKE = ROOT / "tests/helpers/fake_engine.py"
ASKED = {"model": str(TINY), "num_questions": 2, "max_new_tokens": 10, "warmup": 1, "retry_seconds": 1}
TURNS = 3
"""Of the two questions."""


def plan(servers=("base", "other"), rounds=3, together=True, tasks=("t",), temperatures=(0.0,), concurrency=(1,)):
    """A `plan.json`."""
    server = dict.fromkeys(("token_map", "token_map_size", "draft_model", "command"))
    server |= {"label": "S", "method": "baseline", "num_steps": 0, "model": "m"}
    task = dict.fromkeys(("title", "language", "source", "licence", "sha256"), "") | {"num_rows": 2}
    many = {"rounds": rounds, "together": together} if rounds > 1 else {}
    return {
        "provenance": {"started": "now"},
        "settings": {"max_new_tokens": 64, "seed": 0, "warmup": 0, "tasks": dict.fromkeys(tasks, task), **many},
        "temperatures": list(temperatures),
        "concurrency": list(concurrency),
        "servers": dict.fromkeys(servers, server),
        "baseline": servers[0] if servers else None,
    }


PLANS = st.builds(
    plan,
    servers=st.sampled_from([("a",), ("a", "b"), ("a", "b", "c", "d")]),
    rounds=st.integers(1, 5),
    together=st.booleans(),
    tasks=st.sampled_from([("t",), ("t", "u", "v")]),
    temperatures=st.sampled_from([(0.0,), (0.0, 0.7)]),
    concurrency=st.sampled_from([(1,), (1, 8)]),
)


@given(PLANS)
def test_everything_is_measured_once_in_each_round(plan):
    passes = plan_passes(plan)
    rounds, together = plan["settings"].get("rounds", 1), plan["settings"].get("together", False)
    assert len(passes) == len(set(passes))
    for run in plan_runs(plan):
        numbers = [key[4] for key in passes if key[:4] == run]
        times = rounds if together or rounds == 1 or run[0] == plan["baseline"] else rounds - 1
        assert numbers == list(range(times))  # in this order, none left out
    assert {key[:4] for key in passes} == set(plan_runs(plan))
    if rounds == 1:
        assert [key[:4] for key in passes] == plan_runs(plan)


@given(PLANS)
def test_servers_take_turns(plan):
    passes = plan_passes(plan)
    place = {key: i for i, key in enumerate(passes)}
    rounds, servers = plan["settings"].get("rounds", 1), list(plan["servers"])
    others = [run for run in plan_runs(plan) if run[0] != plan["baseline"]]
    if rounds == 1:
        return
    if plan["settings"]["together"]:
        # Run by run, one server right after the other, and the other way round in the next round.
        for _, same in groupby(passes, key=lambda key: key[1:]):
            turn = [key[0] for key in same]
            assert turn == (servers if passes[place[(turn[0], *_)]][4] % 2 == 0 else servers[::-1])
    else:
        # The baseline before and behind everything that is compared with it, and no server started twice in a row.
        for run in others:
            for number in range(rounds - 1):
                before, behind = ((plan["baseline"], *run[1:], n) for n in (number, number + 1))
                assert place[before] < place[(*run, number)] < place[behind]
        turns = [server for server, _ in groupby(passes, key=lambda key: key[0])]
        assert len(servers) == 1 or len(turns) == len(servers) * (rounds - 1) + 1


# A machine with a clock of its own.

QUESTIONS = 20


def measured(plan, truth, slowness, seed=0, noise=0.03):
    """Records of a plan on a machine that is `slowness(t)` times as slow at t = 0 (the beginning) .. 1 (the end).

    The other server is `truth` times as fast as the baseline.
    """
    rng = np.random.default_rng(seed)
    seconds = rng.uniform(1, 9, QUESTIONS)
    passes = plan_passes(plan)
    records, now, end = [], 0.0, len(passes) * seconds.sum()
    for key in passes:
        for question, alone in enumerate(seconds):
            latency = alone * slowness(now / end) * rng.lognormal(0, noise)
            latency /= truth if key[0] != plan["baseline"] else 1
            records.append(answer(key, question, latency, now))
            now += latency
    return records


def answer(key, question, latency, start=0.0, **changes):
    return {
        **pass_fields(key),
        **{"id": f"q{question}", "turn": 0, "engine": ["sglang", "0.5.23"], "text": "", "output_ids": [1, 2]},
        **{"completion_tokens": 100, "start": start, "latency": latency, "ttft": 0.1, "chunk_tokens": []},
        **{"chunk_seconds": [], "steps": None, "accepted": None, "histogram": None, **changes},
    }


MACHINES = {
    "slows down to half": lambda t: 1 + t,
    "becomes twice as fast": lambda t: 2 - t,
    "slows down at once": lambda t: 2 if t > 0.37 else 1,
}
ORDERS = {"together": {"rounds": 3, "together": True}, "one at a time": {"rounds": 2, "together": False}}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("machine", MACHINES)
def test_a_machine_that_drifts(machine, order):
    """One after the other the ratio is wrong and the interval does not know; in turns it holds the true one."""
    for seed in range(3):
        for truth in (1.0, 1.8):
            before, now = plan(rounds=1), plan(**ORDERS[order])
            old = summarize(measured(before, truth, MACHINES[machine], seed), before)
            new = summarize(measured(now, truth, MACHINES[machine], seed), now)
            assert not old.runs[1].speedup.low <= truth <= old.runs[1].speedup.high
            assert new.runs[1].speedup.low <= truth <= new.runs[1].speedup.high
            assert old.runs[1].num_requests == QUESTIONS
            error = [abs(math.log(results.runs[1].speedup.value / truth)) for results in (old, new)]
            assert error[1] < 0.7 * error[0]
            (warning,) = warnings(new)
            assert warning.startswith("warning: the machine drifted: base on t, T=0, 1 at once gave ")
            assert "drifted" not in "".join(warnings(old))  # it could not know


@pytest.mark.parametrize("order", ORDERS)
def test_a_quiet_machine(order):
    """Rounds that are alike tell no drift, and the interval is about that of one round."""
    one, several = plan(rounds=1), plan(**ORDERS[order])
    narrow = summarize(measured(one, 1.8, lambda t: 1.0), one).runs[1].speedup
    results = summarize(measured(several, 1.8, lambda t: 1.0), several)
    wide = results.runs[1].speedup
    assert warnings(results) == [] and wide.low <= 1.8 <= wide.high
    # Two rounds of the baseline cannot show that the machine was quiet as well as three of both.
    assert wide.high - wide.low < (2 if order == "together" else 6) * (narrow.high - narrow.low)


# The interval.


def totals(rng, rounds, truth, of_round, prompts=30):
    """[rounds][prompts] of (tokens, seconds) of two servers; `of_round` is the spread between passes."""
    alone = rng.uniform(1, 9, prompts)
    servers = []
    for factor in (1.0, truth):
        passes = np.exp(rng.normal(0, of_round, (rounds, 1)))
        seconds = alone * passes * rng.lognormal(0, 0.05, (rounds, prompts)) / factor
        servers.append(np.stack([np.full_like(seconds, 100.0), seconds], axis=-1).tolist())
    return servers


@pytest.mark.parametrize("paired", [True, False])
def test_two_levels_against_one_written_out(paired):
    rng = np.random.default_rng(3)
    base, other = totals(rng, 4, 2.0, 0.1)
    value, low, high = speedup(base, other, samples=4000, paired=paired)
    pick, ratios = random.Random(1), []
    student = 3.182 if paired else 2.447

    def speed(server, rounds, prompts):
        chosen = [server[r][p] for r in rounds for p in prompts]
        return sum(tokens for tokens, _ in chosen) / sum(seconds for _, seconds in chosen)

    for _ in range(4000):
        prompts = [pick.randrange(30) for _ in range(30)]
        rounds = [pick.randrange(4) for _ in range(3)]
        others = rounds if paired else [pick.randrange(4) for _ in range(3)]
        of_prompts = speed(other, range(4), prompts) / speed(base, range(4), prompts)
        of_rounds = speed(other, others, range(30)) / speed(base, rounds, range(30))
        ratios.append(of_prompts * (of_rounds / value) ** (student / 1.96))
    assert (low, high) == pytest.approx(np.percentile(ratios, [2.5, 97.5]), rel=0.02)
    assert value == pytest.approx(speed(other, range(4), range(30)) / speed(base, range(4), range(30)))


@given(st.integers(1, 5), st.floats(0.1, 10), st.booleans(), st.integers(0, 100))
@settings(max_examples=25, deadline=None)
def test_what_holds_of_every_interval(rounds, factor, paired, seed):
    base, other = totals(np.random.default_rng(seed), rounds, 1.5, 0.1, prompts=6)
    value, low, high = speedup(base, other, samples=200, paired=paired)
    assert low <= high
    faster = [[(tokens, seconds / factor) for tokens, seconds in prompts] for prompts in other]
    assert speedup(base, faster, samples=200, paired=paired) == pytest.approx(
        (value * factor, low * factor, high * factor)
    )
    # Rounds that are all alike add nothing to the interval of one.
    same = [base[0]] * rounds, [other[0]] * rounds
    assert speedup(*same, samples=200, paired=paired) == pytest.approx(speedup(base[:1], other[:1], samples=200))
    # The order of rounds does not matter to the value.
    assert speedup(base[::-1], other[::-1], samples=200, paired=paired)[0] == pytest.approx(value)


@pytest.mark.parametrize(
    ("rounds", "of_other", "paired", "least"),
    [(2, 2, True, 170), (3, 3, True, 174), (5, 5, True, 178), (2, 1, False, 162), (3, 2, False, 174)],
)
def test_the_interval_holds_the_truth(rounds, of_other, paired, least):
    """About nineteen times in twenty, also where rounds differ by more than prompts; prompts alone do not know it.

    Where the other server was measured once (A B A) nothing shows how much its own speed varies: a little less often.
    """
    rng = np.random.default_rng(rounds)
    held = only_prompts = 0
    for _ in range(200):
        base, other = totals(rng, rounds, 2.0, 0.1)
        _, low, high = speedup(base, other[:of_other], samples=100, paired=paired)
        held += low <= 2.0 <= high
        _, low, high = speedup(base[:1], other[:1], samples=100)
        only_prompts += low <= 2.0 <= high
    assert held >= least and only_prompts < 60


def test_a_machine_that_slept_through_a_round():
    """The interval is as good as infinite, and can be written."""
    base = [[(100.0, 4.0), (100.0, 5.0)], [(100.0, 4.0), (100.0, 1e7)]]
    _, low, high = speedup(base, [base[0]], paired=False)
    assert 0 <= low < 1e-3 and high == 1e6


# The benchmark itself.


def lines(folder):
    return [json.loads(line) for line in (Path(folder) / "requests.jsonl").read_text().splitlines()]


def named(record):
    return tuple(record[k] for k in ("server", "task", "temperature", "concurrency", "round", "id", "turn"))


def turns_of(records):
    return [(server, number) for (server, number), _ in groupby(records, key=lambda r: (r["server"], r["round"]))]


def test_running_servers_are_measured_in_turn(tmp_path):
    with FakeEngine() as base, FakeEngine(num_steps=2) as other:
        urls = [f"baseline={base.url}", f"vanilla={other.url}"]
        results = bench(str(tmp_path), base_urls=urls, concurrency=[1, 2], **ASKED)
        assert other.flushed == 6
    assert results == read_results(tmp_path / "results.json")
    assert (results.settings.rounds, results.settings.together) == (3, True)
    for level in (1, 2):
        records = [r for r in lines(tmp_path) if r["concurrency"] == level]
        turn = [("baseline", 0), ("vanilla", 0), ("vanilla", 1), ("baseline", 1), ("baseline", 2), ("vanilla", 2)]
        assert turns_of(records) == turn
        assert len({named(r) for r in records}) == len(records) == 6 * TURNS
    for run in results.runs:
        assert run.num_requests == 3 * TURNS and len(run.round_speeds) == 3 and run.cpu is None
    lossless = results.runs[2].lossless
    assert lossless.compared == lossless.equal == 3 * TURNS
    assert "CPU" not in table(results) and tables.cpu_table(load_results([tmp_path / "results.json"])) is None


def test_one_round_that_differs_is_noticed(tmp_path):
    """Every round's text is compared with the baseline's."""
    passes = plan_passes(plan())
    records = [answer(key, q, 1.0) for key in passes for q in range(2)]
    changed = next(r for r in records if (r["server"], r["round"], r["id"]) == ("other", 1, "q1"))
    changed["output_ids"] = [1, 3]
    lossless = summarize(records, plan()).runs[1].lossless
    assert (lossless.compared, lossless.equal) == (6, 5) and lossless.first_divergence.id == "q1"


def test_turns_that_were_refused_in_one_round_are_compared_in_none():
    keep = plan()
    records = [answer(key, q, 1.0 + q) for key in plan_passes(keep) for q in range(2)]
    refused = next(r for r in records if (r["server"], r["round"], r["id"]) == ("base", 2, "q1"))
    refused["error"] = "too long"
    base, other = summarize(records, keep).runs
    assert base.round_speeds == [100.0] * 3 and base.num_failed == 1
    assert other.speedup.value == 1.0 and other.round_speeds == [pytest.approx(200 / 3)] * 3


def managed(tmp_path, base=(), other=(), **changes):
    command = [sys.executable, str(FAKE)]
    servers = {
        "base": {"method": "baseline", "command": [*command, *base]},
        "other": {"method": "baseline", "command": [*command, *other]},
    }
    path = tmp_path / "plan.yaml"
    path.write_text(yaml.safe_dump({**ASKED, "servers": servers, **changes}))
    return str(path)


def starts(folder, name):
    return (folder / "logs" / f"{name}.log").read_text().count("$ ")


def test_started_servers_are_up_one_at_a_time(tmp_path):
    results = bench(str(tmp_path / "out"), plan=managed(tmp_path))
    assert turns_of(lines(tmp_path / "out")) == [("base", 0), ("other", 0), ("base", 1)]
    assert (starts(tmp_path / "out", "base"), starts(tmp_path / "out", "other")) == (2, 1)
    assert [len(run.round_speeds) for run in results.runs] == [2, 1] and results.runs[1].lossless.compared == TURNS


def test_started_servers_are_up_together_if_the_plan_says_so(tmp_path):
    bench(str(tmp_path / "out"), plan=managed(tmp_path, together=True))
    assert [server for server, _ in turns_of(lines(tmp_path / "out"))] == [
        "base",
        "other",
        "other",
        "base",
        "base",
        "other",
    ]
    assert (starts(tmp_path / "out", "base"), starts(tmp_path / "out", "other")) == (1, 1)


@pytest.mark.parametrize("together", [True, False])
def test_what_was_stopped_goes_on_in_its_round(together, tmp_path):
    whole = bench(str(tmp_path / "whole"), plan=managed(tmp_path, together=together))
    out = tmp_path / "out"
    path = managed(tmp_path, other=("--die_after", "6" if together else "3"), together=together)
    stops = 0
    for _ in range(10):
        try:
            results = bench(str(out), plan=path)
            break
        except FastMTPError as error:
            assert "the fake card fell out" in str(error)
            stops += 1
    assert stops >= 1
    assert sorted(map(named, lines(out))) == sorted(map(named, lines(tmp_path / "whole")))
    assert turns_of(lines(out)) == turns_of(lines(tmp_path / "whole"))
    pairs = zip(results.runs, whole.runs, strict=True)
    assert all((a.num_requests, a.lossless) == (b.num_requests, b.lossless) for a, b in pairs)


def test_cpu_time_of_servers_that_were_started(tmp_path):
    """It is the servers' own, of the answers that are measured: neither waiting nor the neighbour's is in it."""
    base, other = ("--burn", "0.03"), ("--burn", "0.06", "--pause", "0.05")
    results = bench(str(tmp_path / "out"), plan=managed(tmp_path, base, other, together=True, num_questions=4))
    costs = [
        sum(r["cpu_seconds"] for r in lines(tmp_path / "out") if r["server"] == name) for name in ("base", "other")
    ]
    answers = results.runs[0].num_requests
    assert 0.03 * answers <= costs[0] < 0.05 * answers and 0.06 * answers <= costs[1] < 0.08 * answers
    ratio = results.runs[1].cpu.ratio
    assert ratio.value == pytest.approx(costs[0] / costs[1]) and ratio.low <= ratio.value <= ratio.high
    assert results.runs[0].cpu.ratio is None
    assert results.runs[0].cpu.tokens_per_second == results.runs[0].completion_tokens / costs[0]
    assert "CPU speedup" in table(results)
    (row,) = tables.cpu_table(load_results([tmp_path / "out/results.json"])).rows[1:]
    assert row[-1] == f"{ratio.value:.2f}× [{ratio.low:.2f}, {ratio.high:.2f}]"


def test_cpu_time_that_is_not_known_of_all_answers_is_not_told():
    keep = plan(rounds=1)
    records = [answer(key, q, 1.0, cpu_seconds=0.5) for key in plan_passes(keep) for q in range(2)]
    assert summarize(records, keep).runs[1].cpu.ratio.value == 1.0
    records[0]["cpu_seconds"] = None
    base, other = summarize(records, keep).runs
    assert base.cpu is None and other.cpu.ratio is None and other.cpu.tokens_per_second == 200.0


def test_a_process_without_children_has_no_cpu_time():
    assert CpuClock(2**22 + 1).lap() is None


def test_a_round_that_is_void_leaves_the_others(tmp_path):
    passes = plan_passes(plan())[:4]
    records = [answer(key, 0, 1.0, prompt_tokens=1, finish_reason="stop", model="m") for key in passes]
    written = [*records, {**pass_fields(passes[3]), "void": "another model"}]
    kept = read_records([json.dumps(r).encode() for r in written], tmp_path / "r", set(passes))
    assert kept == records[:3]
    with pytest.raises(FastMTPError, match="of a run or round that plan"):
        read_records([json.dumps({**records[0], "round": 7}).encode()], tmp_path / "r", set(passes))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rounds": 0}, "rounds: must be greater than or equal to 1, not 0"),
        ({"rounds": 11}, "rounds: must be less than or equal to 10, not 11"),
        ({"together": "perhaps"}, "together: must be"),
    ],
)
def test_mistakes(change, message):
    with pytest.raises(FastMTPError) as error:
        make_plan({"model": str(TINY), "servers": {"base": {}}, **change})
    assert message in str(error.value)


def test_what_is_measured_without_being_asked():
    """Three rounds of servers that run, the baseline twice where they are started, one round of a single server."""
    two = {"a": {"base_url": "http://a"}, "b": {"base_url": "http://b"}}
    plans = [
        make_plan({"model": str(TINY), "servers": servers}) for servers in (two, {"a": two["a"]}, {**two, "c": {}})
    ]
    assert [(made.rounds, made.together) for made in plans] == [(3, True), (1, True), (2, False)]
    # A folder of one round is recorded as before there were several.
    assert "rounds" not in plans[1].record()["settings"] and "rounds" in plans[0].record()["settings"]


def test_a_folder_of_an_older_version_is_gone_on_with(tmp_path):
    """Its lines know nothing of rounds and CPU time."""
    with FakeEngine() as base, FakeEngine(num_steps=2) as other:
        urls = [f"baseline={base.url}", f"vanilla={other.url}"]
        whole = bench(str(tmp_path), base_urls=urls, **ASKED, rounds=1)
        older = [{k: v for k, v in r.items() if k not in ("round", "cpu_seconds")} for r in lines(tmp_path)]
        (tmp_path / "requests.jsonl").write_text("".join(json.dumps(r) + "\n" for r in older[:4]))
        asked = base.asked
        results = bench(str(tmp_path), base_urls=urls, **ASKED, rounds=1)
        assert base.asked == asked  # its three were there
    assert [run.num_requests for run in results.runs] == [run.num_requests for run in whole.runs] == [TURNS] * 2
    assert results.runs[1].lossless == whole.runs[1].lossless


@pytest.mark.parametrize("path", sorted((ROOT / "docs/results").rglob("results.json")), ids=lambda p: p.parent.name)
def test_older_results_are_read(path):
    merged = load_results([path])
    assert merged.files[0][1].schema == "swift_fastmtp.bench/1" and all(run.round_speeds == [] for run in merged.runs)
    assert not any("drifted" in note for note in notes(merged))


def test_a_drift_is_repeated_wherever_the_numbers_are_shown(tmp_path):
    """In the report, the card (both by `notes`) and a comparison; a little noise is none."""
    value = table_2()
    base = next(run for run in value["runs"] if run["server"] == "baseline")
    for speeds, drifted in (([31.0, 30.0], False), ([31.0, 29.0, 20.0], True)):
        base["round_speeds"] = speeds
        path = tmp_path / f"{drifted}.json"
        path.write_text(json.dumps(value))
        merged = load_results([path])
        sentence = (
            "he machine drifted: baseline on c_eval, T=0, 1 at once gave 31.0, 29.0, 20.0 token/s in its rounds, a"
        )
        assert any(note.startswith(f"T{sentence}") for note in notes(merged)) == drifted
        remarks = compare_results(merged, merged, Limits(0.02, 0.05, 0.0)).remarks
        assert [remark.startswith(f"{name}: t{sentence}") for name, remark in zip("AB", remarks, strict=False)] == (
            [True, True] if drifted else []
        )
