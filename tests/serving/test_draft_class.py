"""SGLang's own draft classes load what we export, and draft what we trained, in fp32.

The class alone, over a chain of K steps, with the exact rollout's hidden states and logits, of which a whole server
shows no more than the tokens they lead to.
"""

import os
import subprocess
from functools import partial

import pytest
import torch
from helpers.engine import SERVING, engine_python, engine_version
from helpers.models import CHECKPOINTS, SERVED, quantized, random_glm_5_2, save_checkpoint
from helpers.paths import ROOT
from safetensors.torch import load_file, save_file

from swift_fastmtp.bench.servers import free_port
from swift_fastmtp.checkpoint.checkpoint import Checkpoint
from swift_fastmtp.checkpoint.config_file import read_config
from swift_fastmtp.checkpoint.fp8 import dequantize
from swift_fastmtp.checkpoint.fp8_config import SCALE, Blocks
from swift_fastmtp.checkpoint.mtp_tensors import read_head
from swift_fastmtp.export.folders import export_draft, export_full
from swift_fastmtp.families.table import match_family
from swift_fastmtp.method.config import FastMTPConfig
from swift_fastmtp.method.rollout import segment_ids
from swift_fastmtp.model.loading import head_shapes, load_head, load_model
from swift_fastmtp.swift_plugin.tuner import FastMTPTuner

pytestmark = pytest.mark.matrix

# Name → what makes a checkpoint.
JOBS = {**CHECKPOINTS, "glm_5_2": partial(save_checkpoint, random_glm_5_2)}
TRIED = "0.5.23"
BASE, STEPS = 9, 4


def run_draft_class(*files):
    """draft_class.py in the engine's environment."""
    environment = {**os.environ, "PYTHONPATH": str(SERVING / "stand_in"), "OMP_NUM_THREADS": "1"}
    environment["PORT"] = str(free_port())
    command = [engine_python(), "-W", "ignore", ROOT / "tests/helpers/draft_class.py", *files]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done


def prepare(name, job):
    """A job of draft_class.py, and what the trainer makes of it: hidden and logits of the chain, hidden of the text."""
    base = JOBS[name](job / "base")
    model = load_model(base, torch.float32)
    model.fastmtp, model.model_dir = FastMTPConfig(num_speculative_steps=STEPS), base
    for parameter in model.head_parameters().values():
        parameter.data += 0.05 * torch.randn_like(parameter)
    FastMTPTuner.save_pretrained(model, str(job / "checkpoint"))
    export_draft(job / "checkpoint", job / "draft")
    export_full(job / "checkpoint", job / "full")
    load_head(
        model, read_head(Checkpoint(job / "draft"), model.family, head_shapes(Checkpoint(base)))
    )  # as exported: in bfloat16

    ids, positions = torch.randint(0, 6000, (1, BASE + STEPS + 1)), torch.arange(BASE + STEPS + 1)[None]
    hidden = model.backbone_states(ids, None, positions, segment_ids(positions))
    with torch.no_grad():
        chain = model.draft_states(hidden, ids, positions, segment_ids(positions))[:, BASE]
    shared = {"embed": model.model.embed_tokens.weight, "lm_head": model.lm_head.weight.clone()}
    given = {"ids": ids[0], "hidden": hidden[0, : BASE + 1].contiguous(), **shared}
    save_file(given, job / "in.safetensors")
    want = {"hidden": chain, "logits": chain @ model.lm_head.weight.T}
    if name in SERVED and not model.family.recurrent_backbone:  # whose backbones run with no more than a list of keys
        (job / "backbone").touch()
        want["backbone"] = given["hidden"]
    return want


def test_the_engines_class_drafts_what_we_trained(tmp_path, shown):
    """In one process: most of the time is SGLang's import."""
    if engine_version() != TRIED:
        pytest.skip(f"draft_class.py was tried with SGLang {TRIED} only")
    want = {}
    for name in JOBS:
        (tmp_path / name).mkdir()
        want[name] = prepare(name, tmp_path / name)
    done = run_draft_class(*(tmp_path / name for name in JOBS))
    for name, pairs in want.items():
        architectures = read_config(tmp_path / name / "base")["architectures"]
        served_as = match_family({"architectures": architectures, "num_hidden_layers": 2}).engines.draft_class
        loaded = f"{name}: {served_as}, unfilled [], other in full []"
        assert loaded in done.stdout.splitlines()
        got = load_file(tmp_path / name / "out.safetensors")
        assert got.keys() == pairs.keys()
        for kind, tensor in pairs.items():
            message = partial("{}, {}: {}".format, name, kind)
            torch.testing.assert_close(got[kind], tensor, atol=5e-6, rtol=0, msg=message)
        shown("draft class", architectures)


def test_the_engines_class_loads_a_head_in_fp8_blocks(tmp_path):
    """What the class multiplies with, weights times scales, is what our reader reads. No CPU has its FP8 kernels."""
    if engine_version() != TRIED:
        pytest.skip(f"draft_class.py was tried with SGLang {TRIED} only")
    plain, blocks = ("norm", "embed", "lm_head", "conv", "fc.", "mlp.gate.", "shared_expert_gate"), Blocks((8, 32))
    base = quantized(CHECKPOINTS["qwen3_next"](tmp_path / "plain"), tmp_path / "base", blocks.size, plain)
    model = load_model(base, torch.bfloat16)
    model.fastmtp, model.model_dir = FastMTPConfig(), base
    for parameter in model.head_parameters().values():
        parameter.data += 0.05 * torch.randn_like(parameter)
    FastMTPTuner.save_pretrained(model, str(tmp_path / "checkpoint"))
    export_draft(tmp_path / "checkpoint", tmp_path / "draft")
    done = run_draft_class(tmp_path / "draft", tmp_path / "out.safetensors")
    assert "Qwen3NextForCausalLMMTP" in done.stdout
    got = load_file(tmp_path / "out.safetensors")
    want = {
        n.removeprefix("mtp."): t
        for n, t in read_head(Checkpoint(tmp_path / "draft"), model.family, head_shapes(Checkpoint(base))).items()
    }
    want.update(
        {f"model.{n}": want.pop(n) for n in [*want] if n.startswith("layers.")}
        | {"model.norm.weight": want.pop("norm.weight")}
    )
    layer = "model.layers.0."

    def joined(path, names):
        return torch.cat([want.pop(f"{path}{n}.weight") for n in names])

    want[f"{layer}qkv_proj.weight"] = joined(f"{layer}self_attn.", ["q_proj", "k_proj", "v_proj"])
    for n in ("o_proj", "q_norm", "k_norm"):
        want[f"{layer}{n}.weight"] = want.pop(f"{layer}self_attn.{n}.weight")
    pair = ["gate_proj", "up_proj"]
    want[f"{layer}mlp.shared_expert.gate_up_proj.weight"] = joined(f"{layer}mlp.shared_expert.", pair)
    experts = [f"{layer}mlp.experts.{e}." for e in range(4)]
    want[f"{layer}mlp.experts.w13_weight"] = torch.stack([joined(e, pair) for e in experts])
    want[f"{layer}mlp.experts.w2_weight"] = torch.stack([joined(e, ["down_proj"]) for e in experts])
    scales = {n for n in got if n.endswith(SCALE)}
    assert got.keys() - scales - {f"{layer}attn.k_scale", f"{layer}attn.v_scale"} == want.keys() and len(scales) == 6
    for name, tensor in want.items():
        if name + SCALE in scales:
            assert torch.equal(dequantize(got[name], got[name + SCALE], blocks), tensor), name
        else:
            assert torch.equal(got[name].float(), tensor.float()), name
