"""Knobs: parsed, validated, and named in the error."""

from dataclasses import fields
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swift_fastmtp.errors import FastMTPError
from swift_fastmtp.files.known_files import SETTINGS
from swift_fastmtp.method.config import FastMTPConfig, knob_names


@given(steps=st.integers(1, 12), beta=st.floats(0.01, 1.0))
def test_step_weights_sum_to_one_and_decay_by_beta(steps, beta):
    weights = FastMTPConfig(num_speculative_steps=steps, beta=beta).step_weights
    assert sum(weights) == pytest.approx(1.0)
    for a, b in pairwise(weights):
        assert b == pytest.approx(a * beta)


def test_the_papers_weights():
    assert FastMTPConfig().step_weights == pytest.approx([0.51, 0.31, 0.18], abs=0.005)


def test_environment_strings_are_parsed():
    env = {"FASTMTP_NUM_SPECULATIVE_STEPS": "5", "FASTMTP_BETA": "0.5", "FASTMTP_ROLLOUT": "paper", "PATH": "/bin"}
    assert FastMTPConfig.from_env(env) == FastMTPConfig(num_speculative_steps=5, beta=0.5, rollout="paper")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("bta", "0.5"),
        ("beta", "0"),
        ("beta", "1.5"),
        ("beta", "nan"),
        ("beta", "high"),
        ("num_speculative_steps", "0"),
        ("num_speculative_steps", "2.5"),
        ("num_speculative_steps", 2.5),
        ("num_speculative_steps", True),
        ("num_speculative_steps", None),
        ("num_speculative_steps", float("inf")),
        ("rollout", "Exact"),
        ("loss", "mse"),
        ("loss_chunk_size", -1),
        ("engine", "tgi"),
        ("temperature", 0),
        ("lk_eta", -1),
        ("hidden_cache_gb", "much"),
    ],
)
def test_bad_knobs_are_named(name, value):
    with pytest.raises(FastMTPError, match=f"fastmtp_{name}") as error:
        FastMTPConfig.from_mapping({name: value})
    assert "\n" not in str(error.value)


def test_knob_names_are_the_fields():
    assert "fastmtp_num_speculative_steps" in knob_names()
    assert FastMTPConfig.from_mapping(FastMTPConfig(beta=0.3).to_dict()).beta == 0.3


def test_files_are_checked_for_every_knob():
    """fastmtp.json's table stands below the knobs in the house, so it repeats their names and types."""
    for knob in fields(FastMTPConfig):
        right = {int: [2], float: [0.5, 1], str: ["x"]}[type(knob.default)]
        assert all(SETTINGS[knob.name].fits(value) for value in right), knob.name
        assert not any(SETTINGS[knob.name].fits(value) for value in ([], {}, True)), knob.name
