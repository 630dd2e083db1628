"""The answer that a report begins with: exact sentences, and nothing that the intervals do not carry."""

import json
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.bench_results import results, run, server, table_1, table_2
from helpers.paths import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

from swift_fastmtp.bench.from_records import summarize
from swift_fastmtp.bench.results import SCHEMA, Results
from swift_fastmtp.files.schema import build
from swift_fastmtp.report.answer import answer_lines, answers
from swift_fastmtp.report.merge import load_results, merge

TITLES = {"t0": ("Chat", "en"), "t1": ("Math", "en"), "t2": ("Code", "en")}
ONE_ROUND = "Measured in one round: how much the machine changed meanwhile is not in the intervals."


def made(speedups, tasks=1, temperature=0.0, concurrency=1, rounds=3, **changes):
    """Results by hand: `speedups` is {(label, method, K): an interval, or one for each task}; `changes` of each run."""
    servers, runs = {"baseline": server("Plain", "baseline", 0)}, []
    names = list(TITLES)[:tasks]
    runs += [run("baseline", t, 1.0, 30.0, 30.0, 0, temperature, concurrency) for t in names]
    for (label, method, num_steps), ratios in speedups.items():
        name = f"{label}-k{num_steps}"
        servers[name] = server(label, method, num_steps)
        of_tasks = ratios if isinstance(ratios, list) else [ratios] * tasks
        for task, ratio in zip(names, of_tasks, strict=True):
            if ratio is None:
                continue
            value, low, high = ratio
            one = run(name, task, 1 + 0.6 * num_steps, 30.0 * value, 30.0, num_steps, temperature, concurrency)
            one |= {"speedup": {"value": value, "low": low, "high": high}, **changes}
            runs.append(one)
    whole = results(servers, runs, {t: TITLES[t] for t in names})
    whole["schema"] = SCHEMA
    whole["settings"]["rounds"] = rounds
    return whole


def of(*values):
    return answers(merge([(f"{i}.json", build(Results, value)) for i, value in enumerate(values)]))


def sentences(value):
    (part,) = of(value)
    return part.sentences


LOSSLESS = "Lossless: 80 of 80 answers equal the baseline's."


def test_one_server_on_one_task():
    assert sentences(made({("Tuned", "tuned", 2): (1.5, 1.4, 1.6)})) == [
        "Fastest: Tuned with K = 2, 1.50× the baseline's speed (95 % interval 1.40 to 1.60), on Chat.",
        LOSSLESS,
    ]


def test_an_interval_that_holds_one_is_no_speedup():
    lines = sentences(made({("Tuned", "tuned", 2): (1.04, 0.95, 1.14)}))
    assert lines == [
        "No server can be told from the baseline to be faster. The best, Tuned with K = 2, has 1.04× the baseline's "
        "speed (95 % interval 0.95 to 1.14), on Chat.",
        LOSSLESS,
    ]
    # As it is shown: 1.004 is written 1.00.
    assert sentences(made({("Tuned", "tuned", 2): (1.04, 1.004, 1.14)}))[0].startswith("No server can be told")


def test_do_not_draft_here():
    slow = {("Tuned", "tuned", 2): (0.9, 0.85, 0.95), ("Tuned", "tuned", 3): (0.8, 0.75, 0.84)}
    assert sentences(made(slow, tasks=2)) == [
        "Do not draft here: each server is slower than the baseline. The best, Tuned with K = 2, has 0.90× the "
        "baseline's speed (95 % interval 0.86 to 0.94), mean of 2 tasks.",
        "It is slower than the baseline on each of these tasks.",
        "Lossless: 320 of 320 answers equal the baseline's.",
    ]
    assert sentences(made({("Tuned", "tuned", 2): (0.9, 0.85, 0.95)}))[0] == (
        "Do not draft here: Tuned with K = 2 is slower than the baseline, 0.90× the baseline's speed (95 % interval "
        "0.85 to 0.95), on Chat."
    )


def test_tasks_on_which_the_fastest_is_not():
    value = made(
        {
            ("Tuned", "tuned", 2): [(2.0, 1.9, 2.1), (1.2, 1.1, 1.3), (0.8, 0.7, 0.9)],
            ("Other", "tuned", 2): [(1.1, 1.0, 1.2), (1.5, 1.4, 1.6), (0.85, 0.8, 0.95)],
        },
        tasks=3,
        rounds=1,
    )
    assert sentences(value) == [
        "Fastest: Tuned with K = 2, 1.33× the baseline's speed (95 % interval 1.28 to 1.39), mean of 3 tasks.",
        ONE_ROUND,
        "It is slower than the baseline on Code (0.80× [0.70, 0.90]).",
        "On Math, Other with K = 2 is faster: 1.50× [1.40, 1.60] against 1.20× [1.10, 1.30].",
        "Others were measured faster, but within the intervals, on Code.",
        "Lossless: 480 of 480 answers equal the baseline's.",
        "Do not draft on Code: every server that drafts is slower there.",
    ]


def test_faster_on_some_tasks_only():
    lines = sentences(made({("Tuned", "tuned", 2): [(1.6, 1.5, 1.7), (0.5, 0.2, 0.9), (0.9, 0.7, 1.1)]}, tasks=3))
    assert lines[:4] == [
        "No server can be told from the baseline to be faster. The best, Tuned with K = 2, has 1.00× the baseline's "
        "speed (95 % interval 0.88 to 1.15), mean of 3 tasks.",
        "It is faster than the baseline on Chat (1.60× [1.50, 1.70]).",
        "It is slower than the baseline on Math (0.50× [0.20, 0.90]).",
        "It cannot be told from the baseline on Code.",
    ]


def test_a_surer_server_goes_before_a_faster_guess():
    lines = sentences(made({("Sure", "tuned", 1): (1.2, 1.1, 1.3), ("Guess", "tuned", 1): (1.4, 0.8, 2.0)}))
    assert lines[0].startswith("Fastest: Sure with K = 1, 1.20×")
    assert (
        lines[1]
        == "Not told apart from Sure with K = 1, as the intervals overlap: Guess with K = 1 (1.40× [0.80, 2.00])."
    )


def test_how_many_drafts():
    fast, slow, alike = (1.8, 1.7, 1.9), (1.4, 1.3, 1.5), (1.75, 1.6, 1.85)
    assert sentences(made({("T", "tuned", 2): fast, ("T", "tuned", 3): slow}))[-1] == (
        "K = 2: more drafts are slower, K = 3 (1.40× [1.30, 1.50])."
    )
    assert sentences(made({("T", "tuned", 1): slow, ("T", "tuned", 3): fast}))[-1] == (
        "K = 3 is the fastest of T and the most that was measured: measure K = 4."
    )
    undecided = sentences(made({("T", "tuned", 2): fast, ("T", "tuned", 3): alike}))
    assert not any(line.startswith("K = ") for line in undecided)
    value = made({("T", "tuned", 3): fast}, histogram=[400, 400, 180, 20])
    assert sentences(value)[-1] == "Draft 3 of T with K = 3 adds 0.02 to a τ of 1.82: measure K = 2 too."
    value["servers"]["T-k3"]["schedule"] = {"1": 3, "8": 1}
    assert sentences(value)[-1] == LOSSLESS


@pytest.mark.parametrize(
    ("command", "concurrency", "reason"),
    [
        (["--dtype", "float32"], 1,
         "In float32 and one request at a time that is not expected: look at the first difference."),
        (["--dtype", "float32", "--dtype", "bfloat16"], 1,
         "Likely reason: near-ties of 16-bit numbers, which fall differently; a run in float32 shows whether it is."),
        (["--dtype=float32"], 8,
         "Likely reason: in batches of another size an engine rounds differently, so near-ties fall differently."),
    ],
)  # fmt: skip
def test_answers_that_differ_and_why(command, concurrency, reason):
    broken = {"compared": 80, "equal": 78, "first_divergence": {"id": "q3", "turn": 0, "token": 17}}
    value = made({("T", "tuned", 2): (1.8, 1.7, 1.9)}, concurrency=concurrency, lossless=broken)
    for one in value["servers"].values():
        one["command"] = command
    assert sentences(value)[-2:] == [
        "Not every answer is the baseline's: 78 of 80 are. Different: 2 of T with K = 2.",
        reason,
    ]


def test_above_temperature_0():
    value = made({("T", "tuned", 2): (1.8, 1.7, 1.9)}, temperature=0.6)
    assert sentences(value)[1:] == [
        "Lossless was not tested here: `fastmtp bench --distribution_samples` compares how answers are drawn."
    ]
    test = {"server": "T-k2", "temperature": 0.6, "prompts": 3, "samples": 200, "tokens": 8, "p": 0.2, "p_holm": 0.4}
    value["distributions"] = [test]
    assert sentences(value)[1:] == [
        "Lossless as far as 3 × 200 answers tell: drawn as the baseline's are, p = 0.4 or more."
    ]
    test["p_holm"] = 0.002
    assert sentences(value)[1:] == ["Not lossless: answers of T are drawn from another distribution, p = 0.002."]


def test_a_head_that_is_worse_than_the_shipped_one():
    value = made({("Shipped", "vanilla", 2): (1.4, 1.3, 1.5), ("T", "tuned", 2): (1.6, 1.55, 1.7)}, tasks=2)
    taus = {"Shipped-k2": [(2.0, 1.9, 2.1), (2.0, 1.9, 2.1)], "T-k2": [(2.3, 2.2, 2.4), (1.7, 1.6, 1.8)]}
    for one in value["runs"]:
        if one["server"] in taus:
            interval = taus[one["server"]][one["task"] == "t1"]
            one["tau_interval"] = dict(zip(("value", "low", "high"), interval, strict=True))
    worse = (
        "The head of T is worse than the shipped one on Math (τ 1.70 [1.60, 1.80] against 2.00 [1.90, 2.10]), K = 2."
    )
    assert sentences(value)[-1] == worse
    # Not where drafts come from fewer tokens, nor where the intervals meet.
    value["servers"]["T-k2"] |= {"token_map": "en", "method": "tuned+map"}
    assert worse not in sentences(value)
    value["servers"]["T-k2"] |= {"token_map": None, "method": "tuned"}
    value["runs"][-1]["tau_interval"]["high"] = 1.9
    assert not any("worse" in line for line in sentences(value))


def test_no_baseline_a_baseline_alone_and_no_server_with_all_tasks():
    value = made({("T", "tuned", 2): (1.8, 1.7, 1.9)}, speedup=None, lossless=None)
    value["runs"] = [one for one in value["runs"] if one["server"] != "baseline"]
    value["baseline"] = None
    assert sentences(value) == [
        "How much faster drafting is cannot be told: there is no baseline beside these runs. Highest speed: T with "
        "K = 2, 54.0 token/s.",
        "Whether the answers are the baseline's was not measured.",
    ]
    assert sentences(made({})) == ["Only the baseline was measured: there is nothing to compare it with."]
    apart = {("A", "tuned", 2): [(1.8, 1.7, 1.9), None], ("B", "tuned", 2): [None, (0.8, 0.7, 0.9)]}
    assert sentences(made(apart, tasks=2)) == [
        "No server was compared with the baseline on every task, so there is no fastest one of all.",
        "Chat: A with K = 2, 1.80× [1.70, 1.90].",
        "Math: B with K = 2, 0.80× [0.70, 0.90], slower than the baseline.",
        "Lossless: 160 of 160 answers equal the baseline's.",
        "Do not draft on Math: every server that drafts is slower there.",
    ]


def test_each_load_has_its_own_answer():
    lines = answer_lines(of(table_1((1, 16))))
    assert lines[:3] == [
        "Greedy, one request at a time:",
        "  Fastest: Self-data FT + FR with K = 3, 2.03× the baseline's speed (95 % interval 2.02 to 2.05), mean of "
        "7 tasks.",
        f"  {ONE_ROUND}",
    ]
    assert lines[lines.index("Greedy, 16 requests at a time:") + 1] == (
        "  Fastest: Self-data FT + FR with K = 3, 1.39× the baseline's speed of one request (95 % interval 1.38 to "
        "1.41), mean of 7 tasks."
    )


def test_maps_of_one_task_each():
    lines = sentences(table_2())
    assert lines[0].startswith("Fastest: FastMTP with K = 3, 1.76×")
    assert (
        "On ZH., FastMTP + FR (zh-16384) with K = 3 is faster: 1.99× [1.95, 2.04] against 1.72× [1.68, 1.77]." in lines
    )


def test_labels_of_anybody_stay_in_their_line():
    value = made({("a\nb\x1b[31m", "tuned", 2): (1.5, 1.4, 1.6)})
    assert sentences(value)[0].startswith("Fastest: a b [31m with K = 2, 1.50×")


REAL = {
    "paper/ablation/results.json": [
        "Fastest: Self-data FT with K = 2, 1.20× the baseline's speed (95 % interval 1.13 to 1.26), mean of 7 tasks.",
        ONE_ROUND,
        "It cannot be told from the baseline on MT., Code, RAG, QA and Summ.",
        "Others were measured faster, but within the intervals, on MT., QA and Summ.",
        "Not told apart from Self-data FT with K = 2, as the intervals overlap: Fixed-data FT with K = 3 "
        "(1.10× [1.04, 1.16]).",
        "Lossless: 896 of 896 answers equal the baseline's.",
        "K = 2: more drafts are slower, K = 3 (0.96× [0.88, 1.04]), K = 5 (1.00× [0.91, 1.10]) and K = 7 "
        "(0.96× [0.87, 1.06]).",
    ],
    "smollm2_clock.json": [
        "Fastest: Drafting with K = 2, 1.22× the baseline's speed (95 % interval 1.01 to 1.50), on english.",
        "Not told apart from Drafting with K = 2, as the intervals overlap: Drafting with K = 1 (1.20× [1.01, 1.55]).",
        "Not every answer is the baseline's: 15 of 36 are. Different: 12 of Drafting with K = 1 and 9 of Drafting "
        "with K = 2.",
        "Likely reason: near-ties of 16-bit numbers, which fall differently; a run in float32 shows whether it is.",
    ],
}


@pytest.mark.parametrize("name", REAL)
def test_of_real_runs(name):
    (part,) = answers(load_results([ROOT / "docs/results" / name]))
    assert part.sentences == REAL[name]


SPEEDUP = st.tuples(st.floats(0.3, 3), st.floats(0, 0.8), st.floats(0, 0.8)).map(
    lambda of: (of[0], max(0.0, of[0] - of[1]), of[0] + of[2])
)
SERVERS = st.dictionaries(
    st.tuples(st.sampled_from(["A", "B", "C"]), st.sampled_from(["vanilla", "tuned"]), st.integers(1, 3)),
    st.lists(st.none() | SPEEDUP, min_size=2, max_size=2),
    min_size=1,
    max_size=5,
)


@settings(deadline=None)
@given(SERVERS, st.randoms(use_true_random=False))
def test_nothing_is_claimed_that_an_interval_does_not_carry(speedups, rng: random.Random):
    one_of_each = {(label, num_steps): key for key in speedups for label, _, num_steps in [key]}
    value = made({key: speedups[key] for key in one_of_each.values()}, tasks=2)
    lines = sentences(value)
    for line in lines:
        if line.startswith("Fastest: "):
            low = float(re.search(r"interval ([\d.]+) to", line)[1])
            assert low > 1
        if line.startswith("Do not draft here") or "it is slower" in line:
            assert float(re.search(r"interval [\d.]+ to ([\d.]+)\)", line)[1]) < 1
        if match := re.match(r"It is (faster|slower) than the baseline on (?!each)", line):
            for low, high in re.findall(r"\[([\d.]+), ([\d.]+)\]", line):
                assert float(low) > 1 if match[1] == "faster" else float(high) < 1
        if match := re.search(r"is faster: \S+ \[([\d.]+), \S+ against \S+ \[\S+ ([\d.]+)\]", line):
            assert float(match[1]) > float(match[2])
        if match := re.match(r"Do not draft on (.+): every", line):
            titles = match[1].split(" and ")
            known = [r for r in value["runs"] if r["speedup"] and TITLES[r["task"]][0] in titles]
            assert known and all(r["speedup"]["high"] < 1 for r in known)

    # The order in which a plan names its servers, and in which they were measured, is nothing to the answer.
    names = list(value["servers"])
    rng.shuffle(names)
    rng.shuffle(value["runs"])
    value["servers"] = {name: value["servers"][name] for name in names}
    assert sentences(value) == lines


def test_tau_has_an_interval_over_conversations():
    """Of what `fastmtp bench` keeps: rounds and turns of one question are one prompt."""
    counts = {"a": (4, 4), "b": (8, 4), "c": (6, 4), "d": (2, 4)}
    task = dict.fromkeys(("title", "language", "source", "licence", "sha256"), "") | {"num_rows": 4}
    plan = {
        "provenance": {},
        "settings": {"max_new_tokens": 8, "seed": 0, "warmup": 0, "tasks": {"t": task}},
        "temperatures": [0.0],
        "concurrency": [1],
        "servers": {"s": server("S", "tuned", 2)},
        "baseline": None,
    }
    record = {"server": "s", "task": "t", "temperature": 0.0, "concurrency": 1, "completion_tokens": 8, "start": 0.0,
              "latency": 1.0, "histogram": None, "chunk_tokens": [], "chunk_seconds": [], "ttft": None,
              "output_ids": [1], "text": ""}  # fmt: skip

    def interval(rounds, turns=1):
        records = [
            {**record, "id": name, "turn": turn, "round": i, "accepted": accepted, "steps": steps}
            for i in range(rounds)
            for name, (accepted, steps) in counts.items()
            for turn in range(turns)
        ]
        (summary,) = summarize(records, plan).runs
        return summary.tau_interval

    once = interval(1)
    assert once.value == pytest.approx(1 + 20 / 16) and 1 < once.low < once.value < once.high
    for more in (interval(3), interval(1, turns=2)):
        assert (more.low, more.high) == pytest.approx((once.low, once.high))
    counts = {"a": (4, 4)}
    assert interval(1) is None


def test_the_command_begins_with_it(tmp_path):
    path = tmp_path / "results.json"
    path.write_text(json.dumps(table_2()), encoding="utf-8")
    command = Path(sys.executable).with_name("fastmtp")
    done = subprocess.run(
        [command, "report", path, "--output_dir", tmp_path / "out"], capture_output=True, text=True, check=True
    )
    lines = done.stdout.splitlines()
    assert lines[:-1] == sentences(table_2())
    assert lines[-1] == f"{tmp_path / 'out'}: report.html, report.md, plots"
    text = (tmp_path / "out/report.md").read_text(encoding="utf-8")
    assert text.split("\n\n")[1].splitlines() == [f"* {line}" for line in lines[:-1]]
