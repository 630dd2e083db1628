"""Families other than MiMo through ms-swift: trained, resumed, exported; with the whole model, with LoRA."""

import re

import pytest
import torch
from helpers.models import (
    CARRIED,
    CHECKPOINTS,
    tensors_of,
)
from helpers.swift_runs import logged, sft_args, swift
from helpers.tiers import some_now
from safetensors.torch import load_file

from swift_fastmtp.checkpoint.checkpoint import Checkpoint
from swift_fastmtp.checkpoint.config_file import read_config
from swift_fastmtp.export.doctor import examine
from swift_fastmtp.families.table import match_family
from swift_fastmtp.model.loading import head_shapes

pytestmark = pytest.mark.engine


def run_args(base, rows, output_dir, **changes):
    return sft_args(base, rows, output_dir, **{"max_steps": 4, "save_steps": 2, **changes})


@pytest.mark.parametrize("name", some_now(CHECKPOINTS))
def test_swift_trains_resumes_and_exports(name, bases, rows, tmp_path, shown):
    """Started once and resumed half-way: the same weights; exported: the base with another MTP layer."""
    base, run, again, full = bases(name), tmp_path / "run", tmp_path / "again", tmp_path / "full"
    swift(*run_args(base, rows, run))
    assert len(logged(run)) == 4 and logged(run, "mtp_acc_3")
    swift(*run_args(base, rows, again), "--resume_from_checkpoint", run / "checkpoint-2")
    swift("export", "--adapters", again / "checkpoint-4", "--output_dir", full)
    want, got = (load_file(folder / "checkpoint-4/model.safetensors") for folder in (run, again))
    assert want.keys() == got.keys() == head_shapes(Checkpoint(base)).keys()
    assert all(torch.equal(want[n], got[n]) for n in want)
    before, after = tensors_of(base), tensors_of(full)
    assert before.keys() == after.keys()
    changed = {n for n in before if not torch.equal(before[n], after[n])}
    assert changed <= {n for n in want if not CARRIED.search(n)}
    assert {n for n in want if "_proj" in n and not n.endswith(".bias") and not CARRIED.search(n)} <= changed
    assert (full / "config.json").read_bytes() == (base / "config.json").read_bytes()
    shown("swift", read_config(base)["architectures"])


@pytest.mark.parametrize("name", some_now(["qwen3_next", "qwen3_5_vision", "ernie4_5_moe"], ["qwen3_5_vision"]))
def test_the_backbone_in_memory_stays_bit_identical_in_training(name, bases, rows, tmp_path):
    """Tuner type `full` saves the whole model, so its checkpoint shows what training did to every tensor."""
    base, whole = bases(name), tmp_path / "run/checkpoint-4"
    swift(*run_args(base, rows, tmp_path / "run", tuner_type="full"))
    swift("export", "--model", whole, "--output_dir", tmp_path / "full")
    family = match_family(read_config(base))
    before, after = tensors_of(base), tensors_of(whole)
    rest = {n for n in before if ".visual." not in n}
    assert rest == after.keys() and len(before) - len(rest) == (21 if "vision" in name else 0)
    assert all(torch.equal(before[n].float(), after[n].float()) for n in rest if not family.owns(n))
    assert any(not torch.equal(before[n].float(), after[n]) for n in rest if family.owns(n))
    assert examine(tmp_path / "full") == []
    full = tensors_of(tmp_path / "full")
    assert full.keys() == before.keys() and all(torch.equal(full[n], before[n]) for n in before if ".visual." in n)


@pytest.mark.matrix
def test_lora_is_for_dense_models(bases, rows, tmp_path):
    """With experts anywhere, peft turns the head's target regex into bare names that also match the backbone."""
    lora = {"tuner_type": "lora", "lora_rank": 4}
    for name in ("qwen3_next", "ernie4_5_moe"):
        failed = swift(*run_args(bases(name), rows, tmp_path / name, **lora), check=False)
        line = failed.stderr.splitlines()[-1]
        assert failed.returncode and "lora does not work with a mixture of experts" in line
        assert "use --tuner_type fastmtp" in line
    base = bases("qwen3_5_vision")
    swift(*run_args(base, rows, tmp_path / "run", **lora))
    swift("export", "--adapters", tmp_path / "run/checkpoint-4", "--output_dir", tmp_path / "full")
    before, after = tensors_of(base), tensors_of(tmp_path / "full")
    assert before.keys() == after.keys()
    changed = {n for n in before if not torch.equal(before[n], after[n])}
    assert changed and all(re.fullmatch(r"mtp\.(fc|.*_proj)\.weight", n) for n in changed)
