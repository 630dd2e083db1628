"""The GPU's kernels give the plain form's numbers, under Triton's interpreter; where there is a GPU, on it."""

import importlib
import os
import subprocess
import sys

import pytest
import torch
from helpers.loss_cases import case
from helpers.paths import ROOT

from swift_fastmtp.method import chunked_losses, frozen_head
from swift_fastmtp.method.chunked_losses import step_losses
from swift_fastmtp.method.config import LOSSES, FastMTPConfig

pytest.importorskip("triton", reason="pip install swift_fastmtp[dev]")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def fused(monkeypatch):
    """The kernels' module, compiled for what this machine has, with blocks small enough to loop."""
    if DEVICE == "cpu":
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    module = importlib.reload(importlib.import_module("swift_fastmtp.method.frozen_head_triton"))
    monkeypatch.setattr(module, "_BLOCK", 16)
    return module.FusedHead


def results(monkeypatch, head, inputs, config):
    outputs, weight, targets, valid, hidden, rows = (x.to(DEVICE) for x in inputs)
    monkeypatch.setattr(chunked_losses, "_head_type", lambda _: head)
    g = outputs.clone().requires_grad_()
    loss, match, accept_prob = step_losses(g, weight, targets, valid, config, hidden, rows)
    loss.sum().backward()
    return loss.detach(), match, accept_prob, g.grad


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize(("vocab", "chunk"), [(2, 3), (16, 1000), (45, 4)])
def test_equals_the_plain_form_in_float32(monkeypatch, fused, loss, temperature, vocab, chunk):
    config = FastMTPConfig(loss=loss, temperature=temperature, loss_chunk_size=chunk)
    inputs = case(3, 9, 13, 6, vocab, 0, torch.float32)
    want = results(monkeypatch, frozen_head.FrozenHead, inputs, config)
    got = results(monkeypatch, fused, inputs, config)
    assert torch.equal(got[1], want[1])
    for a, b in zip((got[0], got[3]), (want[0], want[3]), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    if want[2] is not None:
        torch.testing.assert_close(got[2], want[2], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("loss", LOSSES)
def test_half_precision_logits_are_rounded_as_in_the_plain_form(monkeypatch, fused, loss):
    """bf16 logits, bf16 gradient: both forms round them once; sums are float32 in both."""
    config = FastMTPConfig(loss=loss)
    inputs = tuple(x.bfloat16() if x.is_floating_point() else x for x in case(3, 9, 13, 6, 45, 0))
    want = results(monkeypatch, frozen_head.FrozenHead, inputs, config)
    got = results(monkeypatch, fused, inputs, config)
    torch.testing.assert_close(got[0], want[0], atol=2e-3, rtol=2e-3)
    torch.testing.assert_close(got[3].float(), want[3].float(), atol=2e-2, rtol=2e-2)


def test_only_gpu_tensors_take_the_kernels():
    assert chunked_losses._head_type(torch.empty(2, 2)) is frozen_head.FrozenHead


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from swift_fastmtp.method import frozen_head_triton as module

POINTERS = {"place_ptr": "*i64", "best_ptr": "*i64", "teacher_log_z_ptr": "*fp32", "log_z_ptr": "*fp32"}
POINTERS |= {"entropy_ptr": "*fp32", "loss_ptr": "*fp32", "accept_prob_ptr": "*fp32"}
NUMBERS = {"width": "i32", "scale": "fp32", "eta": "fp32"}
for dtype in ("bf16", "fp32"):
    for kernel, flag in ((module._softmax, "WRITE"), (module._soft_loss, "LK")):
        types = {"logits": f"*{dtype}", "teacher": f"*{dtype}", flag: "constexpr", "BLOCK": "constexpr"}
        types |= POINTERS | NUMBERS
        signature = {name: types[name] for name in kernel.arg_names}
        for value in (True, False):
            source = ASTSource(kernel, signature, {flag: value, "BLOCK": module._BLOCK})
            assert "cubin" in triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm
print("compiled")
"""


@pytest.mark.matrix
def test_the_kernels_compile_for_gpus(tmp_path):
    """The interpreter forgives what the compiler does not."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", COMPILE]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=env)
    assert done.stdout.strip() == "compiled", done.stderr[-3000:]
