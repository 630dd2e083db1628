"""SGLang's own draft classes load what we export, and draft what we trained, in fp32.

For families whose server does not run on a CPU (linear attention, mixtures of experts): the class alone, over a chain
of K steps, with the exact rollout's hidden states and logits.
"""

import os
import subprocess

import pytest
import torch
from conftest import free_port
from engine import HERE, engine_python, engine_version
from models import CHECKPOINTS
from safetensors.torch import load_file, save_file

from swift_fastmtp.checkpoints import read_head
from swift_fastmtp.config import FastMTPConfig
from swift_fastmtp.export.folders import export_draft, export_full
from swift_fastmtp.modeling import head_shapes, load_head, load_model
from swift_fastmtp.rollout import segment_ids
from swift_fastmtp.swift_plugin.tuner import FastMTPTuner

CLASSES = {"qwen3_next": "Qwen3NextForCausalLMMTP", "ernie4_5_moe": "Ernie4_5_MoeForCausalLMMTP"}
TRIED = "0.5.23"
BASE, STEPS = 9, 4


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_the_engines_class_drafts_what_we_trained(name, tmp_path):
    if engine_version() != TRIED:
        pytest.skip(f"draft_class.py was tried with SGLang {TRIED} only")
    base = CHECKPOINTS[name](tmp_path / "base")
    model = load_model(base, torch.float32)
    model.fastmtp, model.model_dir = FastMTPConfig(num_speculative_steps=STEPS), base
    for parameter in model.head_parameters().values():
        parameter.data += 0.05 * torch.randn_like(parameter)
    FastMTPTuner.save_pretrained(model, str(tmp_path / "checkpoint"))
    export_draft(tmp_path / "checkpoint", tmp_path / "draft")
    export_full(tmp_path / "checkpoint", tmp_path / "full")
    load_head(model, read_head(tmp_path / "draft", model.family, head_shapes(base)))  # as exported: in bfloat16

    ids, positions = torch.randint(0, 6000, (1, BASE + STEPS + 1)), torch.arange(BASE + STEPS + 1)[None]
    hidden = model.backbone_states(ids, None, positions, segment_ids(positions))
    with torch.no_grad():
        want = model.draft_states(hidden, ids, positions, segment_ids(positions))[:, BASE]
    shared = {"embed": model.model.embed_tokens.weight, "lm_head": model.lm_head.weight.clone()}
    given = {"ids": ids[0], "hidden": hidden[0, : BASE + 1].contiguous(), **shared}
    save_file(given, tmp_path / "in.safetensors")
    environment = {**os.environ, "PYTHONPATH": str(HERE / "stand_in"), "PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
    command = [engine_python(), "-W", "ignore", HERE / "draft_class.py", tmp_path / "draft"]
    done = subprocess.run(
        [*command, tmp_path / "full", tmp_path / "in.safetensors", tmp_path / "out.safetensors"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert f"{CLASSES.get(name, 'Qwen3_5ForCausalLMMTP')}\nunfilled: []\nof the full folder: alike" in done.stdout
    got = load_file(tmp_path / "out.safetensors")
    assert got["unfilled"] == 0
    torch.testing.assert_close(got["hidden"], want, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(got["logits"], want @ model.lm_head.weight.T, atol=2e-5, rtol=1e-5)
