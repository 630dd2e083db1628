"""Models larger than the memory: layers that pass through it from disk, and ZeRO-3 without a whole model on any rank.

The head's loss and gradients are those of a plain load, bit for bit.
"""

import importlib
import json
import os
import subprocess
import sys

import pytest
import torch
from helpers.models import CHECKPOINTS, quantized
from helpers.paths import ROOT, TINY
from helpers.swift_runs import logged, sft_args, swift
from helpers.tiers import some_now

from swift_fastmtp.bench.servers import free_port
from swift_fastmtp.checkpoint.checkpoint import Checkpoint
from swift_fastmtp.checkpoint.config_file import read_config
from swift_fastmtp.errors import FastMTPError
from swift_fastmtp.method.config import FastMTPConfig
from swift_fastmtp.model import placement
from swift_fastmtp.model.loading import model_class

# LongCat's here has one layer, which fits.
KINDS = ("mimo", "mimo, FP8", "qwen3_next, FP8", *(name for name in CHECKPOINTS if name != "longcat_flash"))
PLAIN = ("norm", "embed", "lm_head", "conv", "fc.", "input_proj", "mlp.gate.", "expert_gate")


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("huge")
    made = {name: make(folder / name) for name, make in CHECKPOINTS.items()}
    return {
        "mimo": TINY,
        "mimo, FP8": quantized(TINY, folder / "mimo-fp8", (100, 64), PLAIN),
        "qwen3_next, FP8": quantized(made["qwen3_next"], folder / "qwen3_next-fp8", (24, 20), PLAIN),
        **made,
    }


def least_memory(cls, config):
    """Room for what must stay, and for one layer and a half."""
    with torch.device("meta"):
        model = cls(config)
    names = [n for n, _, moves in placement.pieces(model, set(model._no_split_modules)) if moves]
    layer = max(placement.size(model.get_submodule(n), torch.float32) for n in names)
    rest = sum(p.numel() * 4 for n, p in model.named_parameters() if not n.startswith(tuple(f"{x}." for x in names)))
    return rest + 18 * sum(p.numel() for p in model.head_parameters().values()) + layer * 3 // 2


def loss_and_gradients(model):
    model.fastmtp = FastMTPConfig()
    model.freeze_backbone()
    model.train()
    ids = torch.randint(0, 6000, (2, 24), generator=torch.Generator().manual_seed(0))
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return {"loss": loss.detach(), **{n: p.grad for n, p in model.head_parameters().items()}}


@pytest.mark.parametrize("kind", some_now(KINDS, ["mimo", "mimo, FP8", "qwen3_next", "deepseek_v3"]))
def test_layers_from_disk_give_the_same_head(kind, bases, shown):
    cls = model_class(Checkpoint(bases[kind]))
    memory = {"cpu": least_memory(cls, cls.config_class.from_pretrained(bases[kind]))}
    model = cls.from_pretrained(bases[kind], dtype=torch.float32, device_map="auto", max_memory=memory)
    offloaded = {n for n, p in model.named_parameters() if p.device.type == "meta"}
    assert "disk" in model.hf_device_map.values() and all(".layers." in n for n in offloaded)
    assert not offloaded & model.head_parameters().keys()
    want = loss_and_gradients(cls.from_pretrained(bases[kind], dtype=torch.float32, device_map="auto"))
    got = loss_and_gradients(model)
    assert all(torch.equal(got[n], t) for n, t in want.items())
    assert model.to("cpu") is model  # trainers do this
    shown("layers on disk", read_config(bases[kind])["architectures"])


def test_layers_fill_devices_in_order(bases):
    cls = model_class(Checkpoint(TINY))
    config = cls.config_class.from_pretrained(TINY)
    least, layer = least_memory(cls, config), 1575680
    small = {0: least, 1: layer, "cpu": 2 * layer - 1}
    found = placement.device_map(cls, config, torch.float32, small)
    assert [found[f"model.layers.{i}"] for i in range(4)] == [1, "cpu", "disk", "disk"]
    assert {d for n, d in found.items() if "model.layers" not in n} == {0}
    assert placement.device_map(cls, config, torch.float32, {0: least + 5 * layer, "cpu": 0}) == {"": 0}
    with pytest.raises(FastMTPError, match="raise --max_memory"):
        placement.device_map(cls, config, torch.float32, {"cpu": layer})


BAD_MAPS = {
    "model.mtp_layers.0 on disk": {"model.embed_tokens": "cpu", "lm_head": "cpu", "model": "disk"},
    "lm_head on cpu": {"model": 0, "lm_head": "cpu"},
    "model.embed_tokens on disk": {"": "cpu", "model.embed_tokens": "disk"},
}


@pytest.mark.parametrize("message", BAD_MAPS)
def test_maps_that_offload_what_trains(message):
    with pytest.raises(FastMTPError, match=message):
        model_class(Checkpoint(TINY)).from_pretrained(TINY, device_map=BAD_MAPS[message])


@pytest.mark.engine
def test_swift_trains_with_layers_on_disk(run, rows, tmp_path):
    cls = model_class(Checkpoint(TINY))
    least = least_memory(cls, cls.config_class.from_pretrained(TINY))
    memory = {"device_map": "auto", "max_memory": f'{{"cpu": {least}}}'}
    done = swift(*sft_args(TINY, rows, tmp_path / "run", max_steps=1, save_steps=1, **memory))
    assert "'model.layers.3': 'disk'" in done.stdout + done.stderr
    assert logged(tmp_path / "run")[0] == logged(run[0])[0]


def test_the_measured_page_is_the_results(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks" / "training")
    results = ROOT / "docs" / "results" / "loading_memory.json"
    page = importlib.import_module("loading").page(json.loads(results.read_text()))
    assert page == results.with_suffix(".md").read_text(encoding="utf-8")


RANK = """
import os, sys, torch
os.environ["DS_ACCELERATOR"] = "cpu"
import deepspeed
deepspeed.init_distributed("gloo")
from transformers.integrations import HfDeepSpeedConfig
from swift_fastmtp.checkpoint.checkpoint import Checkpoint
from swift_fastmtp.model.head import split_experts
from swift_fastmtp.model.loading import model_class
cls = model_class(Checkpoint(sys.argv[1]))
want = dict(cls.from_pretrained(sys.argv[1], dtype=torch.float32).named_parameters())
keep = HfDeepSpeedConfig({"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}})
model = cls.from_pretrained(sys.argv[1], dtype=torch.float32)
assert all(p.numel() == 0 and p.ds_tensor.numel() <= p.ds_numel // 2 + 1 for p in model.parameters())
with deepspeed.zero.GatheredParameters(list(model.parameters())):
    assert all(torch.equal(p, want.pop(n)) for n, p in model.named_parameters())
assert not want and not hasattr(model.config, "quantization_config"), want.keys()
print("EQUAL", flush=True)
os._exit(0)  # gloo may abort at the interpreter's end
"""


@pytest.mark.matrix
def test_zero3_partitions_while_it_reads(bases):
    """Experts are joined and FP8 is dequantized for one parameter at a time, on rank 0."""
    pytest.importorskip("deepspeed", reason="pip install swift_fastmtp[deepspeed]")
    common = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    common |= {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, bases["qwen3_next, FP8"]],
            env={**common, "RANK": str(i), "LOCAL_RANK": str(i), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i in range(2)
    ]
    for rank in ranks:
        output, _ = rank.communicate(timeout=570)  # the first run on a machine builds an extension
        assert rank.returncode == 0 and "EQUAL" in output, output[-4000:]
