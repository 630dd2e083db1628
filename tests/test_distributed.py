"""Two CPU processes give the run of one process with twice the accumulation: DDP, and DeepSpeed ZeRO 0, 2 and 3.

The head is one module called K times, which is where ZeRO's hooks go wrong if anything checkpoints it.
"""

import json

import pytest
import torch
from helpers.paths import TINY
from helpers.swift_runs import logged, sft_args, swift
from safetensors.torch import load_file

pytestmark = pytest.mark.matrix

pytest.importorskip("deepspeed", reason="pip install swift_fastmtp[deepspeed]")


@pytest.fixture(scope="module")
def single(tmp_path_factory, rows):
    out = tmp_path_factory.mktemp("single") / "run"
    swift(*sft_args(TINY, rows, out, max_steps=3, save_steps=3, gradient_accumulation_steps=2))
    return out


@pytest.mark.parametrize("strategy", [None, "zero0", "zero2", "zero3"])
def test_two_processes_equal_one(strategy, single, rows, tmp_path):
    out = tmp_path / "run"
    swift(*sft_args(TINY, rows, out, max_steps=3, save_steps=3, deepspeed=strategy, use_cpu="true"), processes=2)
    assert logged(out) == pytest.approx(logged(single), rel=1e-5)
    assert logged(out, "mtp_tau") == pytest.approx(logged(single, "mtp_tau"), rel=1e-6)
    want = load_file(single / "checkpoint-3" / "model.safetensors")
    got = load_file(out / "checkpoint-3" / "model.safetensors")
    assert got.keys() == want.keys()
    for name in want:
        torch.testing.assert_close(got[name], want[name], atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("strategy", ["zero2", "zero3"])
def test_deepspeed_checkpoints_hold_only_the_head_and_resume(strategy, rows, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    common = {"max_steps": 4, "save_steps": 2, "deepspeed": strategy, "use_cpu": "true"}
    swift(*sft_args(TINY, rows, whole, **common), processes=2)
    head = sum(t.numel() for t in load_file(whole / "checkpoint-2" / "model.safetensors").values())
    state = sum(f.stat().st_size for f in (whole / "checkpoint-2" / "global_step2").iterdir())
    assert state < 4 * (head * 4) + 200_000  # fp32 master, two moments, weights; no backbone
    args = sft_args(TINY, rows, parts, **common)
    swift(*args, "--resume_from_checkpoint", whole / "checkpoint-2", processes=2)
    want = load_file(whole / "checkpoint-4" / "model.safetensors")
    got = load_file(parts / "checkpoint-4" / "model.safetensors")
    for name in want:
        assert torch.equal(got[name], want[name]), name
    states = [json.loads((d / "checkpoint-4" / "trainer_state.json").read_text()) for d in (whole, parts)]
    assert states[0]["log_history"][-1]["loss"] == states[1]["log_history"][-1]["loss"]
