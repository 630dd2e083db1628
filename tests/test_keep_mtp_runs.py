"""MTP layers kept by the real `swift`: trained in full, with LoRA, by DPO, merged; resumed, and healed afterwards."""

import json
import shutil

import pytest
import torch
from helpers.keep import assert_kept, hashes_of, save_through_transformers, stock_args, stock_mimo
from helpers.models import tensors_of
from helpers.paths import TINY
from helpers.swift_runs import logged, sft_args, swift
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from swift_fastmtp.checkpoint.checkpoint import Checkpoint
from swift_fastmtp.export.doctor import examine
from swift_fastmtp.export.inspection import inspect_model, text
from swift_fastmtp.swift_plugin.compat_swift import PLUGIN_FILE
from swift_fastmtp.swift_plugin.keep_asked import KEEP

pytestmark = pytest.mark.matrix
NAMES = ("mimo", "qwen3_next")


@pytest.fixture(scope="module")
def stock(bases, tmp_path_factory):
    """A function from a name to a base that stock ms-swift loads without code of the folder."""
    mimo = stock_mimo(tmp_path_factory.mktemp("stock") / "mimo")
    return lambda name: mimo if name == "mimo" else bases(name)


def kept_lines(done):
    """What the run says of keeping; a progress bar may stand before a line."""
    lines = [
        line.rpartition(f"{KEEP}: ")[2] for line in (done.stdout + done.stderr).splitlines() if f"{KEEP}: " in line
    ]
    return [line for line in lines if "go into every full checkpoint" not in line]


def assert_whole(folder, base):
    """The layer is kept, the backbone is not the base's, and transformers misses nothing."""
    assert_kept(folder, base)
    assert examine(folder) == []
    assert "1 by tensors, config.json: 1" in text(inspect_model(folder))
    family = Checkpoint(base).family
    before, after = tensors_of(base), tensors_of(folder)
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[n], after[n]) for n in before if not family.owns(n))
    loaded, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["mismatched_keys"]
    assert loaded.config.model_type == Checkpoint(base).config["model_type"]


def heal(folder, rows, output_dir):
    """`swift sft --model_type fastmtp` starts from it, and the healed layer goes into it."""
    swift(*sft_args(folder, rows, output_dir / "healed", max_steps=2))
    assert logged(output_dir / "healed", "mtp_acc_3")
    swift("export", "--adapters", output_dir / "healed/checkpoint-2", "--output_dir", output_dir / "full")
    assert examine(output_dir / "full") == []


@pytest.mark.parametrize("only_model", ["false", "true"])
@pytest.mark.parametrize("name", NAMES)
def test_full_training(name, only_model, stock, rows, tmp_path):
    """Two saves of which one is kept; then the layer is healed."""
    base, run = stock(name), tmp_path / "run"
    before = hashes_of(base)
    done = swift(*stock_args(name, base, rows, run, save_total_limit=1, save_only_model=only_model))
    assert [path.name for path in sorted(run.glob("checkpoint-*"))] == ["checkpoint-4"]
    assert_whole(run / "checkpoint-4", base)
    lines = kept_lines(done)
    assert len(lines) == 2 and all("are kept in model-mtp.safetensors, byte for byte" in line for line in lines)
    assert str(run / "checkpoint-4") in lines[1] and str(base) in lines[1]
    assert hashes_of(base) == before
    if only_model == "true":
        heal(run / "checkpoint-4", rows, tmp_path)


def test_a_resumed_run_ends_with_the_same_weights(stock, rows, tmp_path):
    base, run, again = stock("mimo"), tmp_path / "run", tmp_path / "again"
    swift(*stock_args("mimo", base, rows, run))
    swift(*stock_args("mimo", base, rows, again), "--resume_from_checkpoint", run / "checkpoint-2")
    assert hashes_of(run / "checkpoint-4") == hashes_of(again / "checkpoint-4")
    # Into the folder of a run that went on further.
    swift(*stock_args("mimo", base, rows, run), "--resume_from_checkpoint", run / "checkpoint-2")
    assert hashes_of(run / "checkpoint-4") == hashes_of(again / "checkpoint-4")
    # From the weights of a checkpoint, which then is the base: it has the layer.
    only = {"resume_only_model": "true", "resume_from_checkpoint": run / "checkpoint-4"}
    swift(*stock_args("mimo", base, rows, tmp_path / "more", **only))
    for folder in (run / "checkpoint-4", again / "checkpoint-4", *(tmp_path / "more").glob("checkpoint-*")):
        assert_whole(folder, base)


@pytest.mark.parametrize("name", NAMES)
def test_lora_is_merged_with_the_layer(name, stock, rows, tmp_path):
    """Asked for once, in training; the adapter's own checkpoints stay as they are."""
    base, run, merged = stock(name), tmp_path / "run", tmp_path / "merged"
    # Of experts peft takes parameters, and those need another dropout.
    done = swift(*stock_args(name, base, rows, run, tuner_type="lora", target_modules="q_proj"))
    (line,) = kept_lines(done)
    assert "hold an adapter only and stay as they are" in line
    assert not list(run.rglob("*mtp*"))
    done = swift("export", "--adapters", run / "checkpoint-4", "--merge_lora", "true", "--output_dir", merged)
    (line,) = kept_lines(done)
    assert f"of {base} are kept in model-mtp.safetensors" in line
    assert_whole(merged, base)
    heal(merged, rows, tmp_path)
    # What is typed goes before it.
    off = ["--model_kwargs", json.dumps({KEEP: False})]
    without = tmp_path / "without"
    swift("export", "--adapters", run / "checkpoint-4", "--merge_lora", "true", "--output_dir", without, *off)
    assert not inspect_model(without).trainable


def test_the_merge_alone_is_asked(stock, rows, tmp_path):
    """The adapter is one that was trained without."""
    base, run, merged = stock("mimo"), tmp_path / "run", tmp_path / "merged"
    done = swift(*stock_args("mimo", base, rows, run, tuner_type="lora", callbacks=None))
    assert kept_lines(done) == []
    asked = ["--merge_lora", "true", "--model_kwargs", json.dumps({KEEP: True})]
    swift("export", "--adapters", run / "checkpoint-4", *asked, "--output_dir", merged)
    assert_whole(merged, base)


def test_a_merge_that_cannot_keep_it_is_one_line(stock, rows, tmp_path):
    """Known before the merge: the base's layer has got other names since."""
    base, run = shutil.copytree(stock("mimo"), tmp_path / "base"), tmp_path / "run"
    swift(*stock_args("mimo", base, rows, run, tuner_type="lora"))
    tensors = load_file(base / "model.safetensors")
    tensors = {n.replace("model.mtp_layers", "model.language_model.mtp_layers"): t for n, t in tensors.items()}
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    words = ["export", "--adapters", run / "checkpoint-4", "--merge_lora", "true", "--output_dir", tmp_path / "merged"]
    failed = swift(*words, check=False)
    assert failed.returncode == 1 and not (tmp_path / "merged").exists()
    line = failed.stderr.splitlines()[-1]
    assert line.startswith(f"fastmtp: error: {base}: 16 tensors of the MTP layer are named model.language_model.")
    assert "so they cannot be kept" in line


@pytest.mark.parametrize("tuner", ["full", "lora"])
def test_dpo(tuner, stock, rows, tmp_path):
    """`swift rlhf`; and the plugin named by hand, where Python starts without it."""
    base, run, pairs = stock("mimo"), tmp_path / "run", tmp_path / "pairs.jsonl"
    with open(pairs, "w", encoding="utf-8") as file:
        for line in rows.read_text(encoding="utf-8").splitlines():
            messages = json.loads(line)["messages"]
            file.write(json.dumps({"messages": messages, "rejected_response": "x = y + 1;"}) + "\n")
    _, *words = stock_args("mimo", base, pairs, run, tuner_type=tuner)
    by_hand = ["--external_plugins", PLUGIN_FILE] if tuner == "full" else []
    off = {"SWIFT_FASTMTP_AUTOLOAD": "0"} if tuner == "full" else None
    swift("rlhf", "--rlhf_type", "dpo", *words, *by_hand, env=off)
    folder = run / "checkpoint-4"
    if tuner == "lora":
        folder = tmp_path / "merged"
        swift("export", "--adapters", run / "checkpoint-4", "--merge_lora", "true", "--output_dir", folder)
    assert_whole(folder, base)


def test_two_processes_write_once(stock, rows, tmp_path):
    base, run = stock("mimo"), tmp_path / "run"
    done = swift(*stock_args("mimo", base, rows, run, per_device_train_batch_size=2), processes=2)
    assert len(kept_lines(done)) == 2
    assert_whole(run / "checkpoint-2", base)
    assert_whole(run / "checkpoint-4", base)


def test_nothing_happens_where_there_is_nothing_to_keep(rows, tmp_path):
    base = save_through_transformers(TINY, tmp_path / "base")
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copyfile(TINY / name, base / name)
    done = swift(*stock_args("qwen2", base, rows, tmp_path / "run"))
    (line,) = kept_lines(done)
    assert line == f"{base} has no MTP layer that this package knows; there is nothing to keep"
    checkpoint = tmp_path / "run/checkpoint-4"
    assert (checkpoint / "model.safetensors").exists() and not (checkpoint / "model.safetensors.index.json").exists()
