"""`fastmtp mix`: shares, budgets, repeats and splits, whatever the rows are; and the errors."""

import gzip
import json
import signal
import subprocess
import sys
import time
from collections import Counter

import numpy as np
import pyarrow.parquet
import pytest
import yaml
from helpers.mix_rows import CATEGORIES, PLENTY, answered, rows_of, write
from helpers.paths import ROOT, TINY
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from swift_fastmtp.data.mix import held_out, mix, parse_tokens, prompt_text, take
from swift_fastmtp.data.mix_groups import Groups, read_groups
from swift_fastmtp.errors import FastMTPError
from swift_fastmtp.files.copies import file_hash
from swift_fastmtp.files.rows import read_rows


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.integers(0, 10_000),
    st.integers(1, 3),
    st.sampled_from([0.0, 0.02, 0.2]),
    st.floats(0.05, 1.0),
    st.integers(0, 3),
)
def test_what_holds_for_every_mix(tmp_path_factory, seed, max_repeat, val_ratio, part, copies):
    folder = tmp_path_factory.mktemp("mix")
    rows = rows_of(PLENTY, seed)
    for i in range(copies * 20):  # the same prompt again, with another answer
        rows.append(answered(10_000 + i, "math", 9, prompt=f"  Question {300 + i}"))
    path = write(folder / "rows.jsonl", rows)
    mix([path], str(folder / "whole"), max_repeat=max_repeat, val_ratio=val_ratio, seed=seed)
    largest = json.loads((folder / "whole" / "report.json").read_text())["tokens_aimed_at"]
    budget = max(int(largest * part), 2000)
    mix([path], str(folder / "part"), tokens=budget, max_repeat=max_repeat, val_ratio=val_ratio, seed=seed)
    original = {json.dumps(row) for row in rows}
    for name, total in (("whole", largest), ("part", budget)):
        train = read_rows(folder / name / "train.jsonl")
        val = read_rows(folder / name / "val.jsonl") if val_ratio else []
        assert {json.dumps(row) for row in [*train, *val]} <= original
        assert not {prompt_text(row) for row in train} & {prompt_text(row) for row in val}
        assert max(Counter(row["id"] for row in train).values()) <= max_repeat
        assert max(Counter(row["id"] for row in val).values(), default=1) == 1
        tokens = Counter()
        for row in train:
            tokens[row["source"]] += len(row["messages"][-1]["token_ids"])
        for group, share in Groups().shares.items():
            assert abs(tokens[group] - share * total) <= 60  # within one row
        assert {row["source"] for row in val} == (set(PLENTY) if val_ratio else set())


@given(st.lists(st.integers(1, 50), min_size=1, max_size=30), st.floats(0, 4))
def test_taking_is_whole_passes_and_the_closest_front(tokens, passes):
    """Against trying every front."""
    target = passes * sum(tokens)
    taken = take(np.array(tokens), target)
    assert set(np.diff(taken).tolist()) <= {0, -1}
    whole = int(target // sum(tokens))
    best = min(abs(whole * sum(tokens) + sum(tokens[:n]) - target) for n in range(len(tokens) + 1))
    assert abs(float((taken * np.array(tokens)).sum()) - target) == pytest.approx(best, abs=1e-6)


def test_validation_prompts_stay_when_inputs_are_added():
    rng = np.random.default_rng(0)
    prompts = rng.integers(0, 2**64, 4000, dtype=np.uint64)
    groups, languages = rng.integers(0, 3, 4000), rng.integers(0, 2, 4000)
    few = held_out(prompts[:2000], groups[:2000], languages[:2000], 0.05)
    many = held_out(prompts, groups, languages, 0.05)
    assert (few == many[:2000]).all() and 0.03 < many.mean() < 0.07


def held_out_plainly(prompts, groups, languages, ratio):
    """What `held_out` says, stratum by stratum."""
    held = prompts < np.uint64(ratio * 2**64)
    smallest = []
    for stratum in set(zip(groups.tolist(), languages.tolist(), strict=True)):
        inside = (groups == stratum[0]) & (languages == stratum[1])
        if not held[inside].any() and len(np.unique(prompts[inside])) > 1:
            smallest.append(prompts[inside].min())
    return held | np.isin(prompts, np.array(smallest, dtype=np.uint64))


hashes = st.integers(0, 2**64 - 1) | st.integers(0, 9) | st.integers(2**64 - 9, 2**64 - 1)


@settings(max_examples=300, deadline=None)
@given(
    rows=st.lists(st.tuples(hashes, st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=60),
    ratio=st.sampled_from([0.001, 0.1, 0.5]),
)
def test_held_out_equals_its_plain_form(rows, ratio):
    prompts = np.array([row[0] for row in rows], dtype=np.uint64)
    groups, languages = (np.array([row[i] for row in rows], dtype=np.int64) for i in (1, 2))
    want = held_out_plainly(prompts, groups, languages, ratio)
    assert np.array_equal(held_out(prompts, groups, languages, ratio), want)


def test_held_out_takes_no_time_for_each_group_and_language():
    """300,000 rows of 30,000 groups and languages: a pass over all rows for each of them takes 10 s or more."""
    rng = np.random.default_rng(0)
    prompts = rng.integers(2**32, 2**64, 300_000, dtype=np.uint64)
    groups, languages = rng.integers(0, 300, 300_000), rng.integers(0, 100, 300_000)
    start = time.process_time()
    held = held_out(prompts, groups, languages, 1e-12)
    assert time.process_time() - start < 3
    sizes = Counter(zip(groups.tolist(), languages.tolist(), strict=True))
    assert held.sum() == sum(size > 1 for size in sizes.values())


def test_same_rows_and_seed_give_the_same_bytes_in_any_order_and_format(tmp_path):
    rows = rows_of(PLENTY)
    a, b = write(tmp_path / "a.jsonl", rows[:300]), write(tmp_path / "b.jsonl", rows[300:])
    packed = tmp_path / "a.jsonl.gz"
    packed.write_bytes(gzip.compress((tmp_path / "a.jsonl").read_bytes()))
    for name, inputs, seed in (("1", [a, b], 5), ("2", [b, str(packed)], 5), ("3", [a, b], 6)):
        mix(inputs, str(tmp_path / name), seed=seed, val_ratio=0.05)
    for file in ("train.jsonl", "val.jsonl"):
        one, two, three = ((tmp_path / n / file).read_bytes() for n in "123")
        assert one == two != three
    manifest = json.loads((tmp_path / "1" / "manifest.json").read_text())
    assert [i["sha256"] for i in manifest["inputs"]] == [file_hash(a), file_hash(b)]
    for output in manifest["outputs"]:
        assert output["sha256"] == file_hash(tmp_path / "1" / output["file"])
    assert (tmp_path / "1" / "lengths.png").read_bytes()[:4] == b"\x89PNG"


def test_an_input_can_be_assigned_and_all_tokens_counted(tmp_path):
    rows = rows_of({"general": 100})
    inputs = [write(tmp_path / "a.jsonl", rows[:50]), f"math={write(tmp_path / 'b.jsonl', rows[50:])}"]
    mix(inputs, str(tmp_path / "out"), shares=["general=0.5", "math=0.5"], count="all", val_ratio=0)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert {g: round(e["train"]["share"], 1) for g, e in report["groups"].items()} == {"general": 0.5, "math": 0.5}
    assert not (tmp_path / "out" / "val.jsonl").exists()


def test_the_papers_recipe_is_the_default():
    assert read_groups(str(ROOT / "recipes/data/paper_mix.yaml"), None) == Groups()


def test_rows_without_answers_or_text_are_bad(tmp_path):
    rows = rows_of(PLENTY)
    bad = {"messages": [{"role": "user", "content": "no answer"}]}
    path = write(tmp_path / "a.jsonl", [*rows[:3], bad, *rows[3:]])
    with pytest.raises(FastMTPError, match=r"a\.jsonl:4: has no answer to count"):
        mix([path], str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    mix([path], str(tmp_path / "out"), on_bad_row="skip")
    assert (
        json.loads((tmp_path / "out" / "report.json").read_text())["bad_rows"]["has no answer to count"]["count"] == 1
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shares": ["general=0.5", "math=0.4"]}, r"--shares: sum to 0.9, not 1"),
        ({"shares": ["general=x"]}, r"--shares general=x: must be name=number"),
        ({"shares": ["general=0.5", "poetry=0.5"]}, r"'poetry' has a share of 0.5 but no training rows"),
        ({"tokens": 10**9}, r"group 'zh' has \d+ tokens.*raise --max_repeat to \d+, lower --tokens to \d+, or change"),
        ({"tokens": 7}, r"its share of 7 tokens, [\d.]+, is not half a row; raise --tokens"),
        ({"max_repeat": 0}, r"--max_repeat 0: must be at least 1"),
        ({"val_ratio": 0.9}, r"--val_ratio 0.9: must be from 0 to 0.5"),
        ({"inputs": ["math=missing.jsonl"]}, r"missing.jsonl: cannot be read"),
        ({"inputs": ["poems={path}"]}, r"group 'poems' has no share"),
        ({"inputs": ["{path}", "{path}"]}, r"a file is named twice"),
        ({"config": "{tmp}/typo.yaml"}, r"typo.yaml: unknown key 'share'"),
        ({"config": "{tmp}/broken.yaml"}, r"broken.yaml: cannot be read as YAML"),
    ],
)
def test_errors_name_the_option_and_the_mend(changes, message, tmp_path):
    path = write(tmp_path / "a.jsonl", rows_of({"general": 90, "math": 30, "code": 30, "zh": 20}))
    (tmp_path / "typo.yaml").write_text(yaml.safe_dump({"share": {"a": 1.0}}))
    (tmp_path / "broken.yaml").write_text("shares: [")
    fill = {"path": path, "tmp": tmp_path}
    changes = {
        k: [x.format(**fill) for x in v] if k == "inputs" else v.format(**fill) if k == "config" else v
        for k, v in changes.items()
    }
    with pytest.raises(FastMTPError, match=message):
        mix(**{"inputs": [path], "output_dir": str(tmp_path / "out"), **changes})
    assert not (tmp_path / "out").exists() and not [p for p in tmp_path.iterdir() if p.name.endswith(".tmp")]


@pytest.mark.parametrize(("text", "number"), [("200M", 200_000_000), ("1.5B", 1_500_000_000), ("3k", 3000), ("17", 17)])
def test_budgets_are_numbers_with_a_unit(text, number):
    assert parse_tokens(text) == number


@pytest.mark.parametrize("text", ["", "M", "infM", "nanB", "lots", "1.5", "1e400B"])
def test_other_budgets_are_refused(text):
    with pytest.raises(ValueError):
        parse_tokens(text)


def test_parquet_gives_the_same_bytes_as_jsonl(tmp_path):
    rows = rows_of(PLENTY)
    path = write(tmp_path / "a.jsonl", rows)
    packed = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), packed)
    mix([path], str(tmp_path / "1"), val_ratio=0.05)
    mix([str(packed)], str(tmp_path / "2"), val_ratio=0.05)
    for file in ("train.jsonl", "val.jsonl"):
        assert (tmp_path / "1" / file).read_bytes() == (tmp_path / "2" / file).read_bytes()


def test_prompts_can_be_mixed_before_they_are_answered(tmp_path):
    inputs = [str(ROOT / "examples" / "prompts" / f"{name}.jsonl") for name in ("train", "eval")]
    shares = ["general=0.5", "zh=0.3", "code=0.2"]
    mix(inputs, str(tmp_path / "out"), shares=shares, count="all", max_repeat=2, val_ratio=0.05)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    trained = {group: round(entry["train"]["share"], 2) for group, entry in report["groups"].items()}
    assert trained == {"general": 0.5, "zh": 0.3, "code": 0.2}
    assert set(report["sources"]) == {"train.jsonl", "eval.jsonl"}


def test_the_report_adds_up_whatever_the_number_of_sources(tmp_path):
    """Against plain sums over the files that were written."""
    rows = rows_of({g: 10 * n for g, n in PLENTY.items()})
    for row in rows[1000:]:
        row["source"] = f"https://example.org/{row['id']}"
    out = tmp_path / "out"
    mix([write(tmp_path / "a.jsonl", [*rows, *rows[:5]])], str(out), max_repeat=3, val_ratio=0.05)
    report = json.loads((out / "report.json").read_text())
    others = f"({len({row['source'] for row in rows}) - 100} other sources)"
    assert report["identical_rows"] == 5 and len(report["sources"]) == 101 and others in report["sources"]
    for name in ("train", "val"):
        written = read_rows(out / f"{name}.jsonl")
        total = sum(len(row["messages"][-1]["token_ids"]) for row in written)
        for group, entry in report["groups"].items():
            of_group = [row for row in written if (row["category"], row["language"]) == CATEGORIES[group]]
            tokens = sum(len(row["messages"][-1]["token_ids"]) for row in of_group)
            assert (entry[name]["rows"], entry[name]["answer_tokens"]) == (len(of_group), tokens)
            assert entry[name]["all_tokens"] == tokens + len(of_group)
            assert entry[name]["share"] == pytest.approx(tokens / total)
        times = Counter(s if (s := row["source"]) in report["sources"] else others for row in written)
        assert {s: e[name]["rows"] for s, e in report["sources"].items() if e[name]["rows"]} == times


@pytest.mark.matrix
def test_kill_9_leaves_nothing_half_written(tmp_path):
    path = write(tmp_path / "rows.jsonl", rows_of({g: 20 * n for g, n in PLENTY.items()}))
    out = tmp_path / "out"
    code = f"from swift_fastmtp.data.mix import mix; mix([{path!r}], {str(out)!r})"
    for wait in (0.1, 0.3, 0.6):
        process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        while process.poll() is None and not list(tmp_path.glob(".out.*")):
            time.sleep(0.005)
        time.sleep(wait)
        process.send_signal(signal.SIGKILL)
        if process.wait() != 0:
            assert not out.exists()
    if not out.exists():
        mix([path], str(out))
    mix([path], str(tmp_path / "quiet"))
    assert (out / "train.jsonl").read_bytes() == (tmp_path / "quiet" / "train.jsonl").read_bytes()


def test_a_tokenizer_counts_where_there_are_no_token_ids(tmp_path):
    rows = rows_of(PLENTY)
    for row in rows:
        for message in row["messages"]:
            message.pop("token_ids")
    path = write(tmp_path / "a.jsonl", rows)
    for name, model in (("counted", str(TINY)), ("estimated", None)):
        mix([path], str(tmp_path / name), model=model)
        how = json.loads((tmp_path / name / "report.json").read_text())["messages_whose_tokens_come_from"]
        assert set(how) == {"tokenizer" if model else "estimate"}
