"""`fastmtp inspect --gpus`: its arithmetic against torch's own count, its memory against a real optimizer, what was
measured, and the paper; its answers for a folder that holds config.json alone."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from helpers.broken_models import broken_model, lose_mtp
from helpers.models import RANDOM
from helpers.paths import ROOT, TINY
from helpers.published import PUBLISHED, published
from helpers.swift_runs import sft_args, swift
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode

from swift_fastmtp.checkpoint.checkpoint import Checkpoint
from swift_fastmtp.errors import FastMTPError
from swift_fastmtp.families.mimo import MiMoConfig
from swift_fastmtp.families.table import FAMILIES
from swift_fastmtp.method.config import FastMTPConfig
from swift_fastmtp.model.modeling import build_class
from swift_fastmtp.simulate.gpus import GPUS, read_gpus
from swift_fastmtp.simulate.model_numbers import numbers_of, read_numbers
from swift_fastmtp.simulate.training_cost import (
    ROOM,
    Workload,
    memory,
    operations,
    state_bytes,
    working_bytes,
)
from swift_fastmtp.simulate.training_plan import DIVIDED, RECIPES, SERVER, WHOLE, plan, recipe


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A function from a name on the hub to a folder with its config.json."""
    root, made = tmp_path_factory.mktemp("published"), {}
    return lambda name: made.get(name) or made.setdefault(name, published(name, root / name))


@pytest.fixture(scope="module")
def mimo(folder):
    return read_numbers(Checkpoint(folder("XiaomiMiMo/MiMo-7B-RL")))


def command(*words):
    return subprocess.run(
        [sys.executable, "-m", "swift_fastmtp.cli", "inspect", *map(str, words)],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_the_papers_numbers_of_parameters(mimo):
    """Section 3.1: "210.8M parameters" of "7,833.4M total parameters"."""
    assert round(mimo.mtp / 1e5) == 2108 and round((mimo.frozen + mimo.mtp) / 1e5) == 78334
    assert mimo.embedding == mimo.lm_head == 151_680 * 4096


@pytest.mark.parametrize(
    ("name", "billions", "of_mtp"),
    [
        ("Qwen/Qwen3-Next-80B-A3B-Instruct", 80, 1.65),
        ("Qwen/Qwen3.5-35B-A3B", 35, 0.84),
        ("zai-org/GLM-4.5-Air", 106, 2.3),
        ("zai-org/GLM-4.7-Flash", 30, 0.64),
        ("deepseek-ai/DeepSeek-V3", 682, 11.6),  # as published: 671B, and 11.5B of the MTP module
    ],
)
def test_parameters_of_published_models(name, billions, of_mtp, folder):
    found = read_numbers(Checkpoint(folder(name)))
    assert (found.frozen + found.mtp) / 1e9 == pytest.approx(billions, rel=0.03)
    assert found.mtp / 1e9 == pytest.approx(of_mtp, rel=0.01)


def test_arithmetic_of_mimo_by_hand(mimo):
    """A row of 1024 tokens: half of them is the average context, 4 operations for each of 32 heads' 128 elements."""
    layer = 4096 * (2 * 4096 + 2 * 1024) + 3 * 4096 * 11008
    attention = 4 * 512 * 4096
    entry, mlp = 2 * 4096 * 4096 + 4096 * (2 * 4096 + 2 * 1024), 3 * 4096 * 11008
    found = operations(mimo, Workload(tokens_per_row=1024, answer_share=1.0, loss="ce"))
    assert found.backbone == 36 * (2 * layer + attention)
    assert found.mtp == 3 * (6 * (entry + mlp) + 3 * attention)
    assert found.lm_head == 3 * 4 * 151_680 * 4096
    soft = operations(mimo, Workload(answer_share=0.5, loss="kl", draft_ids=32_768))
    assert soft.lm_head == 0.5 * 14 * 32_768 * 4096


# Loss and rollout; where all rows are computed at every step, torch counts the same to the last product.
@pytest.mark.parametrize(("loss", "rollout", "within"), [("kl", "exact", 0.005), ("ce", "paper", 0)])
@pytest.mark.parametrize(("family", "experts"), [("mimo", 1), ("glm4_moe", 2)])
def test_torch_counts_the_same(family, experts, loss, rollout, within):
    """Matrix products of a real forward and backward. torch's counter knows no flash attention of a CPU."""
    T = 256
    model = RANDOM[family](vocab=1024)
    model.freeze_backbone()
    model.train()
    model.set_experts_implementation("eager")  # nor does it know grouped products
    model.fastmtp = FastMTPConfig(loss=loss, rollout=rollout)
    ids = torch.randint(0, 1024, (1, T))
    labels = ids.masked_fill(torch.arange(T) < T // 4, -100)
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=labels).loss.backward()
    counted = counter.get_total_flops() / T
    work = Workload(tokens_per_row=T, answer_share=0.75, loss=loss, rollout=rollout)
    found = operations(replace(numbers_of(model, experts), attention_width=0), work)
    rows_at_the_end = 0.02 if family == "mimo" and rollout == "exact" else within
    assert found.backbone + found.head == pytest.approx(counted, rel=max(within, rows_at_the_end))


def test_memory_of_a_real_optimizer():
    """Weights, gradients and AdamW's moments of one step, as the tuner has them: the head in float32, the rest not."""
    model = RANDOM["mimo"](width=64, vocab=512, dtype=torch.bfloat16)
    model.freeze_backbone()
    for parameter in model.head_parameters().values():
        parameter.data = parameter.data.float()
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    ids = torch.randint(0, 512, (2, 64))
    with torch.autocast("cpu", torch.bfloat16):
        model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    found = numbers_of(model, 1)
    parts = state_bytes(found.mtp, found.frozen, "one process", 1)

    def size(tensors):
        return sum(t.numel() * t.element_size() for t in tensors)

    assert size(p for p in model.parameters() if not p.requires_grad) == parts["frozen"]
    assert size(trained) == 4 * found.mtp == parts["head, fp32 and bf16"] * 4 / 6
    assert size(p.grad for p in trained) == parts["gradients"]
    moments = [t for state in optimizer.state.values() for t in state.values() if t.dim()]
    assert size(moments) == parts["AdamW"]


@pytest.mark.matrix
@pytest.mark.parametrize("stage", ["ZeRO-2", "ZeRO-3"])
def test_two_processes_keep_what_is_predicted(stage, rows, tmp_path):
    """What each of two real DeepSpeed ranks saves of its optimizer: the copy in float32 and the two moments."""
    pytest.importorskip("deepspeed")
    out = tmp_path / "run"
    strategy = stage.lower().replace("-", "")
    swift(*sft_args(TINY, rows, out, max_steps=1, save_steps=1, deepspeed=strategy, use_cpu="true"), processes=2)
    head = sum(t.numel() for t in load_file(out / "checkpoint-1/model.safetensors").values())
    predicted = state_bytes(head, 0, stage, 2)["AdamW"] + 4 * head / 2
    files = list((out / "checkpoint-1/global_step1").glob("*optim_states.pt"))
    assert len(files) == 2
    for file in files:
        assert file.stat().st_size == pytest.approx(predicted, rel=0.05)


def test_memory_of_a_step_as_measured():
    """docs/results/training_step.json: how memory above the model grows with the tokens of a step, and with K, in
    float32; predicted for it, the number that autograd keeps has 4 bytes."""
    stored = json.loads((ROOT / "docs/results/training_step.json").read_text())
    grown = {name: value["bytes"] for name, value in stored["growth_4_layers"].items()}
    keys = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    config = MiMoConfig(vocab_size=19_200, num_hidden_layers=4, head_dim=128, **{k: stored["shape"][k] for k in keys})
    with torch.device("meta"):
        model = numbers_of(build_class(FAMILIES[0])(config), 1)

    def predicted(tokens, steps):
        work = Workload(max_length=tokens, num_speculative_steps=steps)
        return working_bytes(model, work, "one process")["activations"] * 4 / 3

    by_length = grown["length 4096 exact, ce"] - grown["length 1024 exact, ce"]
    by_length /= predicted(4096, 3) - predicted(1024, 3)
    by_steps = grown["steps 5 exact, ce"] - grown["steps 1 exact, ce"]
    by_steps /= predicted(512, 5) - predicted(512, 1)
    assert 0.7 < by_length < 1.1 and 0.7 < by_steps < 1.2


def test_the_papers_run_takes_less_than_a_day(folder):
    """Section 3.1: "less than 1 day on a single H20 server", 389.4K rows, three epochs; how long they are it does not
    say, and at the default 1,024 tokens and share of the peak it comes out at that."""
    found = plan(folder("XiaomiMiMo/MiMo-7B-RL"), "8xH20", Workload(rollout="paper", loss="ce"))
    whole = found.ways[0]
    assert found.take == WHOLE and whole.stage == "ZeRO-2" and whole.fits
    assert 12 < whole.hours < 24 and whole.peak < 30e9
    assert found.stages.keys() == {"DDP", "ZeRO-0", "ZeRO-2", "ZeRO-3"}
    assert found.stages["ZeRO-3"] < found.stages["ZeRO-2"] < found.stages["ZeRO-0"]


def test_hours_follow_from_arithmetic(mimo, folder):
    """Twice the share of the peak is half the hours; rows, epochs and GPUs count as one would think."""
    base = plan(folder("XiaomiMiMo/MiMo-7B-RL"), "8xH20", Workload()).ways[0]
    work = Workload(peak_share=0.7, rows=2 * 389_400)
    assert plan(folder("XiaomiMiMo/MiMo-7B-RL"), "8xH20", work).ways[0].hours == pytest.approx(base.hours)
    one = plan(folder("XiaomiMiMo/MiMo-7B-RL"), "H20", Workload()).ways[0]
    assert one.hours == pytest.approx(8 * base.hours)
    counted = operations(mimo, Workload())
    assert base.tokens_per_second == pytest.approx(8 * 148e12 * 0.35 / (counted.backbone + counted.head))


def test_which_way(folder):
    """The first of the ways that fits; where none is on the GPUs alone, how many would do."""
    for name, gpus, way in (
        ("zai-org/GLM-4.5-Air", "8xH20", DIVIDED),
        ("Qwen/Qwen3-Next-80B-A3B-Instruct", "8xH20", DIVIDED),
        ("Qwen/Qwen3.5-35B-A3B", "8xH100", DIVIDED),
        ("Qwen/Qwen3.5-9B", "1xH100", WHOLE),
        ("deepseek-ai/DeepSeek-V3", "8xH200", SERVER),
    ):
        found = plan(folder(name), gpus, Workload())
        assert found.take == way, (name, gpus, found.take)
        assert all(w.fits == (w.peak <= ROOM * found.gpu_memory) for w in found.ways if w.name != SERVER)
    large = plan(folder("deepseek-ai/DeepSeek-V3"), "8xH20", Workload())
    assert [w.name for w in large.ways[:2] if w.fits] == []
    assert large.notes or large.take == SERVER


def test_fp8_is_trained_in_bfloat16_and_served_as_it_is(folder):
    found = read_numbers(Checkpoint(folder("deepseek-ai/DeepSeek-V3")))
    assert found.stored == pytest.approx(found.frozen + found.mtp)
    assert memory(found, Workload(), "ZeRO-3", 8)["frozen"] == 2 * found.frozen / 8


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_recipe_that_is_named_is_there(name, folder):
    family = next(f for f in FAMILIES if f.name == PUBLISHED[name][0])
    for way in ("one process", "ZeRO-2", "ZeRO-3", SERVER):
        assert recipe(family, way)
    assert all((ROOT / "recipes" / row.file).is_file() for row in RECIPES)


def test_names_of_gpus():
    assert read_gpus("8xH20") == (8, "h20") and read_gpus("RTX 4090") == (1, "rtx4090")
    assert read_gpus("4x4090") == (4, "rtx4090") and read_gpus("h100") == (1, "h100")
    for text, part in (("0xH20", "8xH20"), ("8xB9000", "no GPU that is known"), ("eight", "known"), ("", "8xH20")):
        with pytest.raises(FastMTPError, match=part):
            read_gpus(text)
    assert all(min(gpu.memory, gpu.bandwidth, gpu.operations, gpu.link) > 0 for gpu in GPUS.values())


def test_the_command(folder):
    done = command(TINY, "--gpus", "8xH20", "--rows", 1000)
    assert done.returncode == 0, done.stderr
    for part in ("family", "trainable here yes", "8xH20", "take this", "ZeRO-3", "recipes/mimo_7b_rl_8xh20.yaml"):
        assert part in " ".join(done.stdout.split()), part
    found = json.loads(command(folder("XiaomiMiMo/MiMo-7B-RL"), "--gpus", "H100", "--json").stdout)
    assert found["training"]["take"] == WHOLE and found["training"]["work"]["rows"] == 389_400
    assert found["training"]["ways"][0]["peak"] == sum(found["training"]["ways"][0]["memory"].values())


def test_what_cannot_be_trained_gets_no_plan(tmp_path):
    """The inspection says why, as without `--gpus`."""
    folder = broken_model(tmp_path, lose_mtp)
    done = command(folder, "--gpus", "8xH20")
    assert done.returncode == 1 and "lost its MTP layer" in done.stdout and "take this" not in done.stdout
    assert "training" not in json.loads(command(folder, "--gpus", "8xH20", "--json").stdout)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--gpus", "8xH21"), "--gpus 8xH21: is no GPU that is known"),
        (("--gpus", "H20", "--epochs", "0"), "--epochs 0: must be at least 1"),
        (("--gpus", "H20", "--peak_share", "1.5"), "--peak_share 1.5: must be above 0"),
        (("--rows", "100"), "--rows is about training; name the machine too"),
    ],
)
def test_what_is_refused(words, message):
    done = command(TINY, *words)
    assert done.returncode == 1 and message in done.stderr and done.stderr.count("\n") == 1
    assert done.stdout == ""
