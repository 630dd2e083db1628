"""A run is compared with the head that it began with (`method/comparison.py`)."""

import random

import pytest

from swift_fastmtp.errors import FastMTPError
from swift_fastmtp.export.folders import export_full
from swift_fastmtp.files.staging import write_json
from swift_fastmtp.method.comparison import compare, refusal


def rows(count, rate, seed):
    """`row_counts` of rows of 20 tokens, K = 1."""
    rng = random.Random(seed)
    return [[[sum(rng.random() < rate for _ in range(20))], [20]] for _ in range(count)]


def test_worse_is_an_interval_below_zero():
    change = compare(rows(60, 0.7, 1), rows(60, 0.5, 2))
    assert change.worse and not change.better and change.high < 0
    assert compare(rows(60, 0.5, 2), rows(60, 0.7, 1)).better


def test_noise_of_few_rows_is_no_verdict():
    change = compare(rows(3, 0.6, 1), rows(3, 0.5, 2))
    assert not change.worse and not change.better
    assert not compare([[[20], [20]]], [[[0], [20]]]).worse


def test_other_rows_are_not_compared():
    assert compare(rows(4, 0.5, 1), rows(5, 0.5, 1)) is None
    assert compare([], rows(5, 0.5, 1)) is None


def test_a_marked_checkpoint_is_not_exported(tmp_path):
    change = compare(rows(60, 0.7, 1), rows(60, 0.5, 2))
    compared = {"step": 4, "loss": "ce", "validation": change.to_dict()}
    assert "hard labels" in refusal(compared)
    assert refusal({"instead_of": compared}) is None
    write_json({"compared": compared, "base_model": "examples/tiny-mimo"}, tmp_path / "fastmtp.json")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FastMTPError, match=r"worse than the head its run began with.*--even_if_worse"):
        export_full(tmp_path, tmp_path / "out", "examples/tiny-mimo")
