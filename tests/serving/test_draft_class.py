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

CLASSES = {
    "qwen3_next": "Qwen3NextForCausalLMMTP",
    "qwen3_moe": "Qwen3MoeForCausalLMMTP",
    "ernie4_5_moe": "Ernie4_5_MoeForCausalLMMTP",
    "glm4_moe": "Glm4MoeForCausalLMNextN",
    "deepseek_v3": "DeepseekV3ForCausalLMNextN",
    "glm4_moe_lite": "Glm4MoeLiteForCausalLMNextN",
}
TRIED = "0.5.23"
BASE, STEPS = 9, 4


def prepare(name, job):
    """A job of draft_class.py, and what the trainer makes of it: (hidden, logits) of the chain."""
    base = CHECKPOINTS[name](job / "base")
    model = load_model(base, torch.float32)
    model.fastmtp, model.model_dir = FastMTPConfig(num_speculative_steps=STEPS), base
    for parameter in model.head_parameters().values():
        parameter.data += 0.05 * torch.randn_like(parameter)
    FastMTPTuner.save_pretrained(model, str(job / "checkpoint"))
    export_draft(job / "checkpoint", job / "draft")
    export_full(job / "checkpoint", job / "full")
    load_head(model, read_head(job / "draft", model.family, head_shapes(base)))  # as exported: in bfloat16

    ids, positions = torch.randint(0, 6000, (1, BASE + STEPS + 1)), torch.arange(BASE + STEPS + 1)[None]
    hidden = model.backbone_states(ids, None, positions, segment_ids(positions))
    with torch.no_grad():
        want = model.draft_states(hidden, ids, positions, segment_ids(positions))[:, BASE]
    shared = {"embed": model.model.embed_tokens.weight, "lm_head": model.lm_head.weight.clone()}
    given = {"ids": ids[0], "hidden": hidden[0, : BASE + 1].contiguous(), **shared}
    save_file(given, job / "in.safetensors")
    return want, want @ model.lm_head.weight.T


def test_the_engines_class_drafts_what_we_trained(tmp_path):
    """In one process: most of the time is SGLang's import."""
    if engine_version() != TRIED:
        pytest.skip(f"draft_class.py was tried with SGLang {TRIED} only")
    want = {}
    for name in CHECKPOINTS:
        (tmp_path / name).mkdir()
        want[name] = prepare(name, tmp_path / name)
    environment = {**os.environ, "PYTHONPATH": str(HERE / "stand_in"), "PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
    command = [engine_python(), "-W", "ignore", HERE / "draft_class.py", *(tmp_path / name for name in CHECKPOINTS)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    for name, (hidden, logits) in want.items():
        loaded = f"{name}: {CLASSES.get(name, 'Qwen3_5ForCausalLMMTP')}, unfilled [], other in full []"
        assert loaded in done.stdout.splitlines()
        got = load_file(tmp_path / name / "out.safetensors")
        torch.testing.assert_close(got["hidden"], hidden, atol=2e-5, rtol=1e-5, msg=lambda text, name=name: name + text)
        torch.testing.assert_close(got["logits"], logits, atol=2e-5, rtol=1e-5, msg=lambda text, name=name: name + text)
