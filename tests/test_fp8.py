"""Checkpoints in FP8 blocks: the arithmetic, a dequantized model, and what training and export write."""

import json
import shutil

import pytest
import torch
from helpers.models import CHECKPOINTS, for_each_row, quantized, tensors_of
from helpers.paths import TINY
from helpers.swift_runs import logged, sft_args, swift
from helpers.tiers import some_now
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from swift_fastmtp.checkpoint.checkpoint import Checkpoint
from swift_fastmtp.checkpoint.fp8 import DTYPE, dequantize, quantize, requantize
from swift_fastmtp.checkpoint.fp8_config import SCALE, Blocks, read_blocks
from swift_fastmtp.checkpoint.mtp_tensors import read_head, read_plain
from swift_fastmtp.errors import FastMTPError
from swift_fastmtp.export.doctor import examine
from swift_fastmtp.export.folders import export_draft, export_full
from swift_fastmtp.export.graft import graft
from swift_fastmtp.export.inspection import inspect_model
from swift_fastmtp.method.config import FastMTPConfig
from swift_fastmtp.model.head import join_experts
from swift_fastmtp.model.loading import head_shapes, keeps_float32, load_head, load_model
from swift_fastmtp.serving.flags import command
from swift_fastmtp.serving.launch import serve_flags
from swift_fastmtp.simulate.simulate import simulate
from swift_fastmtp.swift_plugin.tuner import FastMTPTuner

# Name → block size, and what stays plain: what published checkpoints of the family leave out.
KINDS = for_each_row(
    "KINDS of tests/test_fp8.py",
    {
        "mimo": ((128, 128), ("norm", "embed_tokens", "lm_head", "input_proj")),
        "qwen3_next": ((24, 20), ("norm", "embed", "lm_head", "conv", "fc.", "mlp.gate.", "expert_gate")),
        "qwen3_5": ((16, 32), ("norm", "embed", "conv", "mtp.fc")),
        "qwen3_5_vision": ((16, 24), ("norm", "embed", "lm_head", "conv", "mtp.fc", "visual")),
        "qwen3_5_moe": ((24, 20), ("norm", "embed", "lm_head", "conv", "mtp.fc", "mlp.gate.", "expert_gate")),
        "qwen3_moe": ((16, 24), ("norm", "embed", "lm_head", "mtp.fc", "mlp.gate.")),
        "ernie4_5_moe": ((16, 24), ("norm", "embed", "lm_head", "linear_proj", "mlp.gate.", "moe_statics")),
        "glm4_moe": ((16, 24), ("norm", "embed", "head.", "eh_proj", "mlp.gate.")),
        "glm4_moe_lite": ((16, 24), ("norm", "embed", "head.", "eh_proj", "mlp.gate.")),
        "deepseek_v3": ((16, 24), ("norm", "embed", "head.", "eh_proj", "mlp.gate.")),
        "deepseek_v32": ((16, 24), ("norm", "embed", "head.", "eh_proj", "mlp.gate.", "weights_proj")),
        "glm_moe_dsa": ((16, 24), ("norm", "embed", "head.", "eh_proj", "mlp.gate.", "weights_proj")),
        "longcat_flash": ((16, 24), ("norm", "embed", "lm_head", "router")),
    },
    but=["bailing_moe_v2"],
)
tiny = st.sampled_from([0.0, 1e-45, 1e-38, 1e-30, 1e-4, 1.0, 1e30, 3e38])


@pytest.fixture(scope="module", params=some_now(KINDS))
def base(request, tmp_path_factory):
    size, plain = KINDS[request.param]
    folder = tmp_path_factory.mktemp("fp8")
    source = TINY if request.param == "mimo" else CHECKPOINTS[request.param](folder / "plain")
    return quantized(source, folder / request.param, size, plain, power_of_two=request.param == "qwen3_5")


def same_bytes(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@settings(max_examples=200, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 9)),
    flat=st.booleans(),
    size=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    magnitudes=st.lists(tiny, min_size=1, max_size=4),
    power_of_two=st.booleans(),
    scale_dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 99),
)
def test_error_bound_and_no_nan(shape, flat, size, magnitudes, power_of_two, scale_dtype, seed):
    torch.manual_seed(seed)
    shape, blocks = shape[flat:], Blocks(size, power_of_two)
    x = torch.randn(shape).clamp(-1, 1) * torch.tensor(magnitudes)[torch.randint(len(magnitudes), shape)]
    weight, scale = quantize(x, blocks, scale_dtype)
    assert weight.dtype == DTYPE and scale.dtype == scale_dtype and scale.shape == blocks.grid(x.shape)
    got = dequantize(weight, scale, blocks)
    assert got.isfinite().all() and scale.isfinite().all() and (scale > 0).all()
    for index in torch.cartesian_prod(*(torch.arange(n) for n in shape)).tolist():  # the reference: value by value
        *lead, i, j = index
        s = float(scale[(*lead, i // size[0], j // size[1])])
        value, back = float(x[tuple(index)]), float(got[tuple(index)])
        assert back == pytest.approx(float(weight[tuple(index)].float()) * s, rel=1e-6, abs=1e-44)
        assert abs(value - back) <= max(abs(value) / 16, s / 1024) * 1.001 + 1e-44
    if power_of_two:
        assert (torch.frexp(scale.float())[0] == 0.5).all()
    again = requantize(got.to(torch.bfloat16) if min(magnitudes) > 1e-30 else got, weight, scale, blocks)
    assert same_bytes(again[0], weight) and same_bytes(again[1], scale)


def test_requantising_keeps_the_blocks_that_did_not_move():
    x, blocks = torch.randn(20, 12), Blocks((8, 8))
    weight, scale = quantize(x, blocks)
    trained = dequantize(weight, scale, blocks)
    trained[9, 9] *= 100
    new, new_scale = requantize(trained, weight, scale, blocks)
    moved = torch.zeros(20, 12, dtype=torch.bool)
    moved[8:16, 8:] = True
    assert torch.equal(new.float()[~moved], weight.float()[~moved])
    assert (new_scale != scale).tolist() == [[False, False], [False, True], [False, False]]
    error = (dequantize(new, new_scale, blocks) - trained).abs()
    assert (error <= torch.maximum(trained.abs() / 16, new_scale.max() / 1024) * 1.001).all()


def test_the_loaded_model_is_the_dequantised_one(base):
    """Backbone and head, through transformers' loader and through our reader, ragged edges and experts included."""
    model = load_model(base, torch.float32)
    weights = Checkpoint(base)
    names = [
        n for n in weights.file_of if not n.endswith(SCALE) and ".visual." not in n and not model.family.is_copy(n)
    ]
    want = join_experts({n: read_plain(weights, n) for n in names})
    renamed = (("model.language_model.", "model."), (".mlp.moe_statics.", ".mlp.gate.moe_statics."))  # by transformers
    for theirs, ours in renamed:
        want = {n.replace(theirs, ours): t for n, t in want.items()}
    want.pop("lm_head.weight", None) if model.config.tie_word_embeddings else None
    buffers = {n: b for n, b in model.named_buffers() if n in want}  # by which routers of DeepSeek's kind choose
    got = {**dict(model.named_parameters()), **buffers}
    assert got.keys() == want.keys() and sum(t.dtype == DTYPE for t in tensors_of(base).values()) > 10
    assert all(torch.equal(p, want[n].float()) for n, p in got.items())
    head = read_head(Checkpoint(base), model.family, head_shapes(Checkpoint(base)))
    load_head(model, head)
    assert all(torch.equal(p, want[n].float()) for n, p in model.head_parameters().items())
    assert not hasattr(model.config, "quantization_config")  # trainers refuse a model that says it is quantized
    assert inspect_model(base).trainable and inspect_model(base).quantization == "fp8"


def test_from_training_to_what_is_served(base, tmp_path, shown):
    """A step, the checkpoint, both exports: plain while it trains, in the base's own form when it is served."""
    model = load_model(base, torch.bfloat16)
    model.fastmtp, model.model_dir = FastMTPConfig(), base
    model.freeze_backbone()
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    ids = torch.randint(0, 6000, (2, 16))
    model.train()
    model(input_ids=ids, labels=ids).loss.backward()
    torch.optim.SGD(model.head_parameters().values(), lr=0.05).step()
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)
    FastMTPTuner.save_pretrained(model, str(tmp_path / "checkpoint"))
    checkpoint = load_file(tmp_path / "checkpoint/model.safetensors")
    assert "quantization_config" not in json.loads((tmp_path / "checkpoint/config.json").read_text())
    trained = {n for n in checkpoint if ".indexer." not in n and not keeps_float32(model.family, n)}
    assert {checkpoint[n].dtype for n in trained} == {torch.bfloat16}
    export_full(tmp_path / "checkpoint", tmp_path / "full")
    export_draft(tmp_path / "checkpoint", tmp_path / "draft")
    before, full, draft = tensors_of(base), tensors_of(tmp_path / "full"), tensors_of(tmp_path / "draft")
    assert full.keys() == before.keys()
    blocks = read_blocks(json.loads((base / "config.json").read_text()))
    moved = 0
    for name, old in before.items():
        new, weight = full[name], name.removesuffix(SCALE)
        assert new.dtype == old.dtype and new.shape == old.shape
        if weight not in checkpoint:
            assert same_bytes(new, old)
        elif name + SCALE in before:
            want = requantize(checkpoint[name], old, before[name + SCALE], blocks)
            assert same_bytes(new, want[0]) and same_bytes(full[name + SCALE], want[1])
            moved += not same_bytes(new, old)
        elif name == weight:
            assert torch.equal(new, checkpoint[name].to(old.dtype))
    assert moved > 3
    assert draft.keys() == {n for n in before if n.removesuffix(SCALE) in checkpoint}
    assert all(same_bytes(t, full[n]) for n, t in draft.items())
    for folder in ("full", "draft"):
        assert (tmp_path / folder / "config.json").read_bytes() == (base / "config.json").read_bytes()
    for folder in ("checkpoint", "full", "draft"):
        assert {f.why for f in examine(tmp_path / folder)} <= {model.family.engines.sglang_gap}
    assert "unquant" in command(serve_flags(tmp_path / "checkpoint"))
    assert "unquant" not in command(serve_flags(tmp_path / "draft"))
    served = read_head(Checkpoint(tmp_path / "draft"), model.family, head_shapes(Checkpoint(base)))
    for name, tensor in served.items():  # what an engine computes with is near what was trained
        torch.testing.assert_close(tensor, checkpoint[name].to(tensor.dtype), rtol=1 / 8, atol=2e-3)
    shown("FP8 base", json.loads((base / "config.json").read_text())["architectures"])


def test_graft_takes_a_layer_from_an_fp8_model(tmp_path):
    donor = quantized(TINY, tmp_path / "donor", plain=KINDS["mimo"][1])
    graft(TINY, tmp_path / "out", donor, overwrite=True)
    weights, got = Checkpoint(donor), tensors_of(tmp_path / "out")
    assert all(torch.equal(got[n], read_plain(weights, n).bfloat16()) for n in got if ".mtp_layers." in n)
    assert not any(n.endswith(SCALE) for n in got)


def test_joined_experts_in_fp8_are_refused(tmp_path):
    """transformers would leave the backbone's in FP8, with a warning, and fail in the first step."""
    plain = ("norm", "embed", "lm_head", "conv", "mtp.fc", "mlp.gate.", "expert_gate", "visual")
    source = CHECKPOINTS["qwen3_5_moe_vision"](tmp_path / "plain")
    with pytest.raises(FastMTPError, match=r"experts\.\w+_proj is in FP8, joined, .* one tensor per expert"):
        load_model(quantized(source, tmp_path / "model", (16, 24), plain), torch.float32)


def test_a_quantised_projection_is_found(tmp_path):
    """SGLang's three classes have `nn.Linear` there."""
    folder = quantized(TINY, tmp_path / "model")
    assert ["input_proj.weight is FP8" in f.what for f in examine(folder)] == [True]


UP = "model.mtp_layers.0.mlp.up_proj.weight"
BROKEN = {
    "no config": (None, None, "of which config.json says nothing"),
    "no scale": (UP + SCALE, lambda t: None, f"without {UP + SCALE}"),
    "other grid": (UP + SCALE, lambda t: t[:2], "has scales [2, 2]"),
    "scale of bytes": (UP + SCALE, lambda t: t.to(torch.uint8), "of torch.uint8"),
    "NaN scale": (UP + SCALE, lambda t: t * float("nan"), f"{UP} holds NaN"),
    "plain beside a scale": (UP, lambda t: t.bfloat16(), f"bfloat16 beside {UP + SCALE}"),
    "stray scale": ("model.mtp_layers.0.gone" + SCALE, lambda t: torch.ones(1), "unexpected MTP tensor"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_checkpoints_are_one_line(case, tmp_path):
    folder = quantized(TINY, tmp_path / "model", plain=KINDS["mimo"][1])
    name, change, message = BROKEN[case]
    tensors = load_file(folder / "model.safetensors")
    if name:
        tensors[name] = change(tensors.get(name))
        save_file({n: t for n, t in tensors.items() if t is not None}, folder / "model.safetensors")
    else:
        shutil.copyfile(TINY / "config.json", folder / "config.json")
    with pytest.raises(FastMTPError) as error:
        load_model(folder, torch.float32)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert any(f.level == "error" for f in examine(folder))


@pytest.mark.engine
def test_swift_trains_resumes_and_exports(tmp_path, rows):
    base = quantized(TINY, tmp_path / "base", plain=KINDS["mimo"][1])
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    common = {"max_steps": 2, "save_steps": 1}
    swift(*sft_args(base, rows, whole, **common))
    resumed = sft_args(base, rows, parts, **common)
    swift(*resumed, "--resume_from_checkpoint", whole / "checkpoint-1")
    want, got = (load_file(d / "checkpoint-2/model.safetensors") for d in (whole, parts))
    assert all(same_bytes(got[n], t) for n, t in want.items()) and logged(whole)[-1] == logged(parts)[-1]
    assert {t.dtype for t in want.values()} == {torch.float32}
    swift("export", "--adapters", whole / "checkpoint-2", "--output_dir", tmp_path / "full")
    assert examine(tmp_path / "full") == []
    before, after = tensors_of(base), tensors_of(tmp_path / "full")
    moved = {n for n in before if not same_bytes(before[n], after[n])}
    assert after.keys() == before.keys() and len(moved) > 16 and all(n.startswith("model.mtp_layers.") for n in moved)
    with open(rows) as file, open(tmp_path / "few.jsonl", "w") as few:
        few.writelines(file.readlines()[:2])
    heads = simulate(str(tmp_path / "full"), [str(tmp_path / "full")], str(tmp_path / "few.jsonl"), answers="given")
    assert heads[0].tau_micro == heads[1].tau_micro and heads[0].tau_micro[-1] > 1  # as served: quantized again
