"""docs/heal.md, run as it stands: its commands, on small models of the layouts and faults that people publish."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.models import CHECKPOINTS, gptq
from helpers.paths import ROOT, TINY
from helpers.swift_runs import swift
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from swift_fastmtp.checkpoint.checkpoint import Checkpoint
from swift_fastmtp.checkpoint.config_file import read_config
from swift_fastmtp.checkpoint.refusals import find_family
from swift_fastmtp.model.head import import_class

pytestmark = pytest.mark.matrix

PAGE = (ROOT / "docs" / "heal.md").read_text(encoding="utf-8")
# What a small model on a CPU needs on top of the page's commands.
SMALL = {
    "swift": "--torch_dtype float32 --fp16 false --max_length 256 --max_steps 2 --per_device_train_batch_size 2 "
    "--gradient_accumulation_steps 1 --save_steps 2 --split_dataset_ratio 0 --dataloader_num_workers 0 "
    "--check_model false",
    "distill": "--max_new_tokens 16",
}


def commands(heading):
    """Of the page's section, in order."""
    section = PAGE.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    (block,) = re.findall(r"^```console\n(.*?)^```", section, re.S | re.M)
    return [shlex.split(line) for line in block.splitlines()]


def run(words, folder):
    """A command of the page in a folder: what it prints, and its exit status."""
    words = [str(folder / word) if word.startswith("my-") or word == "BASE" else word for word in words]
    if words[0] == "swift":
        words = [str(folder / word) if word.startswith("healing") else word for word in words]
        done = swift(*words[1:], *shlex.split(SMALL["swift"]))
        return done.stdout, done.returncode
    words += shlex.split(SMALL.get(words[1], ""))
    command = [sys.executable, "-m", "swift_fastmtp.cli", *words[1:]]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr, done.stderr
    return done.stdout + done.stderr, done.returncode


def run_all(heading, folder):
    """(verb, output, exit status) of each command of a section; those that write something must succeed."""
    results = []
    for words in commands(heading):
        output, status = run(words, folder)
        assert status == 0 or words[1] in ("inspect", "doctor"), f"{words}\n{output}"
        results.append((words[1], output, status))
    return results


def write_prompts(folder):
    rows = (ROOT / "examples" / "prompts" / "eval.jsonl").read_text(encoding="utf-8").splitlines()[:4]
    (folder / "my-prompts.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")


def save_through_transformers(base, target):
    family = find_family(read_config(base))
    vision = "vision_config" in read_config(base)
    cls = AutoModelForImageTextToText if vision else import_class(family.backbone)
    cls.from_pretrained(base, dtype=torch.bfloat16).save_pretrained(target)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copyfile(base / name, target / name)


@pytest.mark.parametrize("name", ["qwen3_5", "qwen3_5_moe_vision", "glm4_moe"])
def test_a_tune_that_lost_its_layer(name, tmp_path):
    base = CHECKPOINTS[name](tmp_path / "BASE")
    save_through_transformers(base, tmp_path / "my-tune")
    write_prompts(tmp_path)
    results = run_all("A tune that lost its layer", tmp_path)
    assert "lost its MTP layer" in results[0][1] or "this is the backbone of" in results[0][1]
    assert "0 errors" in results[-2][1] and "sglang" in results[-1][1]
    family = find_family(read_config(base))
    healed, grafted = Checkpoint(tmp_path / "my-tune-healed"), Checkpoint(tmp_path / "my-tune-mtp")
    changed = [n for n in healed.names if not torch.equal(healed.read(n), grafted.read(n))]
    assert changed and all(family.owns(name) for name in changed)


def test_a_quantized_model_without_its_layer(tmp_path):
    shutil.copytree(TINY, tmp_path / "BASE")
    gptq(TINY, tmp_path / "my-quantized")
    results = run_all("A quantized model without its layer", tmp_path)
    assert "it is quantized" in results[0][1] and results[0][2] == 1
    assert "0 errors, 0 warnings" in results[2][1]
    assert "unquant" in results[3][1] and '"method": "mtp"' in results[4][1]


def in_shards(base, folder, change):
    """A copy of a sharded checkpoint whose index `change` has edited: its weight_map."""
    shutil.copytree(base, folder)
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


def test_files_that_the_index_forgot(tmp_path):
    base = CHECKPOINTS["glm4_moe"](tmp_path / "plain")
    family = find_family(read_config(base))
    tensors = {name: Checkpoint(base).read(name) for name in Checkpoint(base).names}
    for path in base.glob("*.safetensors"):
        path.unlink()
    layer = {name for name in tensors if name.startswith(f"{family.names.prefix}.")}
    save_file({n: t for n, t in tensors.items() if n not in layer}, base / "model-1.safetensors")
    save_file({n: tensors[n] for n in layer}, base / "model-mtp-1.safetensors")
    index = {"metadata": {}, "weight_map": {n: "model-1.safetensors" for n in tensors if n not in layer}}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    Path(base).rename(tmp_path / "my-download")
    ((_, output, status),) = run_all("Files that the index forgot", tmp_path)
    assert status == 1 and "model-mtp-1.safetensors" in output and "not list" in output


def test_one_tensor_is_missing(tmp_path):
    """Qwen3.5 without `mtp.fc.weight`, as one tune was published."""
    base = CHECKPOINTS["qwen3_5"](tmp_path / "BASE")
    shutil.copytree(base, tmp_path / "my-broken")
    for path in (tmp_path / "my-broken").glob("*.safetensors"):
        tensors = load_file(path)
        if tensors.pop("mtp.fc.weight", None) is not None:
            save_file(tensors, path, metadata={"format": "pt"})
    results = run_all("One tensor is missing", tmp_path)
    assert results[0][2] == 1 and "mtp.fc.weight" in results[0][1]
    assert "0 errors" in results[2][1]


def test_a_layer_that_was_never_trained_for_this_model(tmp_path):
    """Random values in the tiny model's layer draft nothing; its base's own layer does."""
    shutil.copytree(TINY, tmp_path / "BASE")
    shutil.copytree(TINY, tmp_path / "my-tune-mtp")
    path = tmp_path / "my-tune-mtp" / "model.safetensors"
    tensors = load_file(path)
    for name, tensor in tensors.items():
        if "mtp" in name and tensor.ndim == 2:
            tensors[name] = (0.02 * torch.randn(tensor.shape)).to(tensor.dtype)
    save_file(tensors, path, metadata={"format": "pt"})
    results = run_all("A layer that was never trained for this model", tmp_path)
    assert results[0][2] == 1 and "no better than random weights" in results[0][1]
    assert "0 errors, 0 warnings" in results[2][1]
