"""Duplicates: the fast path against a plain comparison of all pairs, and what users rely on."""

import itertools
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from helpers.paths import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

from swift_fastmtp.data.near_duplicates import WINDOW, ExactDuplicates, NearDuplicates, prompt_and_answer
from swift_fastmtp.data.shingles import jaccard, runs, units

PROMPTS = [
    json.loads(line)["messages"][-1]["content"]
    for line in (ROOT / "examples/prompts/train.jsonl").read_text(encoding="utf-8").splitlines()
]
ZH = [p for p in PROMPTS if ord(max(p)) > 0x3000]
EN = [p for p in PROMPTS if p.isascii()]


def row(prompt, answer=""):
    return {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]}


def text(rng, sentences, count):
    return " ".join(sentences[i] for i in rng.integers(0, len(sentences), count))


def edited(rng, value, share, sentences):
    """The text with a share of its units replaced by units of other texts."""
    words = units(value)
    pool = units(text(rng, sentences, 40))
    for at in np.nonzero(rng.random(len(words)) < share)[0]:
        words[at] = pool[rng.integers(len(pool))]
    return ("" if sentences is ZH else " ").join(words)


def clusters_of(rows, of="row", similarity=0.7, ngram=5, folder=None):
    near = NearDuplicates(of, similarity, ngram, folder)
    for r in rows:
        near.add(r)
    return {copy: first for copy, first, _ in near.clusters()}


def plain_clusters(rows, of="row", similarity=0.7, ngram=5):
    """The definition: sets of tuples, all pairs, connected components, first row kept."""

    def grams(value):
        words = units(value)
        n = min(ngram, len(words))
        return {tuple(words[i : i + n]) for i in range(len(words) - n + 1)} if words else set()

    sides = [[grams(value) for value in prompt_and_answer(r)][: 2 if of == "row" else 1] for r in rows]
    first = list(range(len(rows)))
    for a, b in itertools.combinations(range(len(rows)), 2):
        if all(len(x & y) >= similarity * len(x | y) for x, y in zip(sides[a], sides[b], strict=True)):
            low, high = sorted((first[a], first[b]))
            first = [low if f == high else f for f in first]
    return {i: f for i, f in enumerate(first) if i != f}


def corpus(seed, count=120):
    """Rows with near and far copies of either side, in English and Chinese."""
    rng = np.random.default_rng(seed)
    rows = []
    while len(rows) < count:
        sentences = (EN, ZH)[rng.integers(2)]
        prompt, answer = text(rng, sentences, 6), text(rng, sentences, 9)
        rows.append(row(prompt, answer))
        for _ in range(rng.integers(0, 4)):
            a, b = rng.choice([0.0, 0.0, 0.01, 0.03, 0.06, 0.5], 2)
            rows.append(row(edited(rng, prompt, a, sentences), edited(rng, answer, b, sentences)))
    return [rows[i] for i in rng.permutation(len(rows))]


@pytest.mark.parametrize("of", ["row", "prompt"])
@pytest.mark.parametrize("similarity", [0.5, 0.7, 0.9])
def test_equals_comparing_all_pairs(of, similarity, tmp_path):
    missed = total = 0
    for seed in range(3):
        rows = corpus(seed)
        want, got = plain_clusters(rows, of, similarity), clusters_of(rows, of, similarity, folder=tmp_path)
        total += len(want)
        missed += len(set(want) - set(got))
        assert set(got) <= set(want)  # compared exactly: nothing is removed that should not be
    assert total >= 40 and missed <= 0.03 * total, (missed, total)


def test_the_order_of_rows_does_not_change_the_clusters(tmp_path):
    rows = corpus(7)

    def members(order):
        first = clusters_of([rows[i] for i in order], folder=tmp_path)
        groups = {}
        for place, number in enumerate(order):
            groups.setdefault(first.get(place, place), set()).add(number)
        assert all(order[root] == min(group, key=order.index) for root, group in groups.items())
        return sorted(map(sorted, groups.values()))

    want = members(list(range(len(rows))))
    for seed in range(3):
        assert members(np.random.default_rng(seed).permutation(len(rows)).tolist()) == want


def test_several_answers_to_a_long_prompt_stay(tmp_path):
    rng = np.random.default_rng(0)
    passage = text(rng, EN, 80)
    answers = [row(passage, text(rng, EN, 3)) for _ in range(8)]
    assert clusters_of(answers, folder=tmp_path) == {}
    assert clusters_of(answers, "prompt", folder=tmp_path) == dict.fromkeys(range(1, 8), 0)
    assert clusters_of([*answers, answers[3]], folder=tmp_path) == {8: 3}


def test_equal_short_answers_to_different_questions_stay(tmp_path):
    assert clusters_of([row(prompt, "Yes.") for prompt in dict.fromkeys(EN[:300])], folder=tmp_path) == {}


def test_numbers_and_operators_make_other_questions(tmp_path):
    """Also datatrove's default, every number to 0, would take these for one."""
    questions = ["What is 12 + 30?", "What is 12 - 30?", "What is 15 + 31?", "计算 12×3", "计算 12×4"]
    assert clusters_of([row(q) for q in questions], "prompt", folder=tmp_path) == {}


def test_a_large_group_of_copies_and_of_look_alikes(tmp_path):
    """More rows than the window with one key: equal ones become one cluster, a shared frame does not."""
    rng = np.random.default_rng(3)
    frame = text(rng, EN, 60)
    copies = [row(frame, "The answer is the same every time, as it should be.")] * (5 * WINDOW)
    assert clusters_of(copies, folder=tmp_path) == dict.fromkeys(range(1, 5 * WINDOW), 0)
    others = [row(f"{frame} {text(rng, EN, 1)}", text(rng, EN, 4)) for _ in range(5 * WINDOW)]
    assert clusters_of(others, folder=tmp_path) == plain_clusters(others)


def test_exact_duplicates_are_of_text_and_tools():
    exact = ExactDuplicates("row")
    assert exact(row("a b", "c"), "f:1") is None
    assert exact(row("a  b\n", "c"), "f:2") == "the same row as f:1"
    assert exact(row("a b", "d"), "f:3") is None
    assert exact({**row("a b", "c"), "tools": [{"name": "t"}]}, "f:4") is None
    exact = ExactDuplicates("prompt")
    assert exact(row("a b", "c"), "f:1") is None
    assert exact(row("a b", "d"), "f:2") == "the same prompt as f:1"


def test_units():
    assert units("Hello, World_1!") == ["hello", "world_1", "!"]
    assert units("计算 x＋1，好吗？") == ["计", "算", "x", "+", "1", "好", "吗"]
    assert units("日本のカナ abc中文") == [*"日本のカナ", "abc", *"中文"]
    assert units("👍 ……") == units("👍   ......") == ["👍", "......"] and units(" ") == []


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=60), st.text(max_size=60), st.integers(1, 14))
def test_runs_hash_tuples_of_units(a, b, n):
    """Equal runs have equal hashes, and as many different ones as there are."""
    words = [units(a), units(b)]
    grams = [tuple(w[i : i + min(n, len(w))]) for w in words if w for i in range(len(w) - min(n, len(w)) + 1)]
    hashes = [h for w in words for h in runs(w, n).tolist()]
    assert len(set(zip(grams, hashes, strict=True))) == len(set(grams)) == len(set(hashes))


@given(st.sets(st.integers(0, 30)), st.sets(st.integers(0, 30)))
def test_jaccard(a, b):
    want = len(a & b) / len(a | b) if a | b else 1.0
    assert jaccard(np.array(sorted(a), np.uint32), np.array(sorted(b), np.uint32)) == want


def test_hashes_are_the_same_in_every_process():
    code = "from swift_fastmtp.data.shingles import *; print(runs(units('the same 中文 everywhere'), 3).tolist())"
    for seed in "01":
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
        assert done.stdout.strip() == str(runs(units("the same 中文 everywhere"), 3).tolist())


def test_the_same_signatures_on_datatrove(tmp_path):
    """examples/dedup_with_datatrove.py, where datatrove is installed: nothing is lost, and the copies are removed."""
    pytest.importorskip("datatrove", reason="datatrove is not installed")
    rows = [r for r in corpus(1) if min(map(len, prompt_and_answer(r))) > 40]
    (tmp_path / "in").mkdir()
    for name, part in (("a", rows), ("b", rows[:30])):
        lines = (json.dumps(r, ensure_ascii=False) + "\n" for r in part)
        (tmp_path / "in" / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    command = [
        sys.executable,
        "examples/dedup_with_datatrove.py",
        "--input",
        tmp_path / "in",
        "--output",
        tmp_path / "out",
    ]
    subprocess.run([*command, "--tasks", "2", "--workers", "1"], check=True, capture_output=True, cwd=ROOT)

    def read(name):
        return [json.loads(x) for f in sorted((tmp_path / "out" / name).iterdir()) for x in f.open(encoding="utf-8")]

    kept, removed = read("kept"), read("removed")
    assert sorted(map(json.dumps, kept + removed)) == sorted(map(json.dumps, rows + rows[:30]))
    assert not [r for r in rows[:30] if kept.count(r) > 1]
    assert len(kept) <= len(rows) - 0.7 * len(plain_clusters(rows, similarity=0.9, ngram=3))
