"""`fastmtp compare`: a regression is one exactly where the numbers say so, and nothing is silently left out."""

import copy
import json

import pytest
from helpers.bench_results import table_1, table_2

from swift_fastmtp.errors import FastMTPError
from swift_fastmtp.report.compare import HEADER, compare, text


@pytest.fixture
def judge(tmp_path):
    def run(a, b, **limits):
        for name, value in (("a.json", a), ("b.json", b)):
            (tmp_path / name).write_text(json.dumps(value), encoding="utf-8")
        return compare(tmp_path / "a.json", tmp_path / "b.json", **limits)

    return run


def find(value, server, task):
    return next(r for r in value["runs"] if (r["server"], r["task"]) == (server, task))


def test_nothing_changed(judge):
    found = judge(table_1(), table_1())
    assert found.regressions == found.remarks == []
    assert len(found.rows) == 13 * 7 and all(len(row) == len(HEADER) for row in found.rows)
    assert text(found).startswith("B is not worse than A, within the limits, in all 91 runs.\nserver ")
    assert text(found).endswith("91 runs compared, 0 regressions")


@pytest.mark.parametrize(
    ("field", "kept", "lost", "message"),
    [
        ("tau_micro", 0.98, 0.979, "τ fell by 2.1%, from 2.690 to 2.634"),
        ("tokens_per_second_per_request", 0.95, 0.949, "token/s of one request fell by 5.1%, from 56.33 to 53.46"),
        ("tokens_per_second", 0.95, 0.949, "token/s of the run fell by 5.1%, from 54.08 to 51.32"),
    ],
)
def test_a_drop_of_the_limit_is_allowed_and_more_is_not(judge, field, kept, lost, message):
    a = table_2()
    for factor, regressions in ((1.5, 0), (1.0, 0), (kept, 0), (lost, 1)):
        b = copy.deepcopy(a)
        find(b, "tuned-k3", "mt_bench")[field] *= factor
        assert len(judge(a, b).regressions) == regressions
    assert judge(a, b).regressions == [f"tuned-k3 on mt_bench (temperature 0, concurrency 1): {message}"]
    assert judge(a, b, max_tau_drop=0.1, max_speed_drop=0.1).regressions == []
    assert sum(row[-1] == "WORSE" for row in judge(a, b).rows) == 1
    assert text(judge(a, b)).startswith("B is worse than A in 1 of 10 runs.\nWORSE: tuned-k3 on mt_bench")


def test_lost_losslessness(judge):
    a, b = table_2(), table_2()
    broken = {"compared": 80, "equal": 78, "first_divergence": {"id": "q3", "turn": 0, "token": 17}}
    find(b, "tuned-k3", "c_eval")["lossless"] = broken
    assert judge(a, b).regressions == [
        "tuned-k3 on c_eval (temperature 0, concurrency 1): answers equal to the baseline's fell from 80/80 to 78/80, "
        "first at request q3, turn 0, token 17"
    ]
    assert judge(a, b, max_equal_drop=0.025).regressions == []
    assert judge(b, a).regressions == []  # fixed


def test_more_failures_are_worse(judge):
    a, b = table_2(), table_2()
    find(b, "baseline", "c_eval")["num_failed"] = 2
    assert [r.split(": ")[1] for r in judge(a, b).regressions] == ["failed requests rose from 0 to 2"]


def test_what_only_one_file_has_is_named(judge):
    a, b = table_2(), table_2()
    b["runs"] = [r for r in b["runs"] if r["server"] != "tuned-k3-zh-8192"]
    b["runs"].append({**find(a, "tuned-k3", "mt_bench"), "concurrency": 4})
    find(b, "tuned-k3", "mt_bench").update(tau_micro=None, lossless=None)
    b["provenance"]["engine"]["version"] = "0.5.24"
    b["settings"]["tasks"]["c_eval"]["sha256"] = "0" * 64
    found = judge(a, b)
    assert found.regressions == []
    assert found.remarks == [
        "A and B differ in engine (sglang 0.5.23, sglang 0.5.24)",
        "A and B differ in the prompts of c_eval",
        "only in A: tuned-k3-zh-8192 on c_eval (temperature 0, concurrency 1)",
        "only in B: tuned-k3 on mt_bench (temperature 0, concurrency 4)",
        "only in A: τ of tuned-k3 on mt_bench (temperature 0, concurrency 1)",
        "only in A: losslessness of tuned-k3 on mt_bench (temperature 0, concurrency 1)",
    ]
    assert all(f"note: {remark}" in text(found) for remark in found.remarks)


def test_the_row_of_a_run(judge):
    a, b = table_2(), table_2()
    find(b, "tuned-k3", "mt_bench").update(tau_micro=2.825, tokens_per_second_per_request=50.7, lossless=None)
    row = next(r for r in judge(a, b).rows if r[:2] == ["tuned-k3", "mt_bench"])
    assert row == ["tuned-k3", "mt_bench", "0", "1", "2.690", "2.825", "+5.0%", "56.33", "50.70", "-10.0%",
                   "54.08", "54.08", "+0.0%", "80/80", "–", "WORSE"]  # fmt: skip
    base = next(r for r in judge(a, b).rows if r[:2] == ["baseline", "mt_bench"])
    assert base[4:7] == ["1.000", "1.000", "+0.0%"] and base[-3:] == ["–", "–", ""]


def test_bad_input_is_one_line(judge, tmp_path):
    a, b = table_2(), table_2()
    for r in b["runs"]:
        r["temperature"] = 0.6
    with pytest.raises(FastMTPError, match=r"no run .* in common"):
        judge(a, b)
    for name in ("max_tau_drop", "max_speed_drop", "max_equal_drop"):
        for value in (-0.1, 1.0, float("nan")):
            with pytest.raises(FastMTPError, match=f"--{name}"):
                judge(a, a, **{name: value})
    with pytest.raises(FastMTPError, match=r"none\.json"):
        compare(tmp_path / "none.json", tmp_path / "a.json")
