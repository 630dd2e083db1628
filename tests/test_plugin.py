"""The ms-swift plugin, through the real `swift` command."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from helpers.chat_templates import with_template
from helpers.paths import ROOT, TINY
from helpers.swift_runs import KEEP, ONE_CORE, logged, sft_args, swift
from safetensors.torch import load_file
from transformers import AutoTokenizer

import swift_fastmtp
from swift_fastmtp.checkpoint.checkpoint import Checkpoint
from swift_fastmtp.data.distill import distill
from swift_fastmtp.files.rows import read_rows
from swift_fastmtp.method.config import FastMTPConfig
from swift_fastmtp.model.loading import load_model
from swift_fastmtp.serving.flags import command
from swift_fastmtp.serving.launch import serve_flags
from swift_fastmtp.swift_plugin.resume import what_is_missing

pytestmark = pytest.mark.engine

PLUGIN = Path(swift_fastmtp.__file__).parent / "swift_plugin" / "plugin" / "fastmtp_plugin.py"
HEAD = "model.mtp_layers.0."


def weights(folder):
    found = Checkpoint(folder)
    return {name: found.read(name) for name in found.file_of}


def assert_only_the_head_changed(folder):
    """A full checkpoint: backbone, embedding and lm_head bit-identical to the base, the head not."""
    base, now = weights(TINY), weights(folder)
    assert base.keys() == now.keys()
    for name in base:
        assert base[name].dtype == now[name].dtype
        if not name.startswith(HEAD):
            assert torch.equal(base[name], now[name]), name
    assert any(not torch.equal(base[n], now[n]) for n in base if n.startswith(HEAD))


def test_plain_swift_sft_trains_and_logs(run):
    out, _ = run
    losses = logged(out)
    assert len(losses) == 6 and losses[-1] < losses[0]
    rows = [json.loads(line) for line in (out / "logging.jsonl").read_text().splitlines()]
    for prefix, row in (("", rows[0]), ("eval_", next(r for r in rows if "eval_loss" in r))):
        acc = [row[f"{prefix}mtp_acc_{k}"] for k in (1, 2, 3)]
        cond = [row[f"{prefix}mtp_cond_acc_{k}"] for k in (1, 2, 3)]
        assert 1 >= acc[0] >= acc[1] >= acc[2] >= 0
        assert acc[0] == cond[0]
        assert row[f"{prefix}mtp_tau"] == pytest.approx(1 + sum(acc), abs=1e-5)
        assert all(row[f"{prefix}mtp_loss_{k}"] > 0 for k in (1, 2, 3))
    step_losses = [rows[0][f"mtp_loss_{k}"] for k in (1, 2, 3)]
    weighted = (step_losses[0] + 0.6 * step_losses[1] + 0.36 * step_losses[2]) / 1.96
    assert rows[0]["loss"] == pytest.approx(weighted, rel=0.1)  # deeper steps have fewer rows, one shared divisor


def test_nothing_but_model_and_dataset(rows, tmp_path):
    """The shortest command, on a machine without a GPU; only the number of steps and the folder are added."""
    args = ["--model_type", "fastmtp", "--model", TINY, "--dataset", rows, "--max_steps", "2"]
    process = swift("sft", *args, "--output_dir", tmp_path)
    assert "modelscope_hub" not in process.stdout + process.stderr  # no hub is asked about a local folder
    (run,) = tmp_path.glob("v0-*")
    assert logged(run) and (run / "checkpoint-2" / "model.safetensors").exists()


def test_metrics_reach_tensorboard(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(next((run[0] / "runs").iterdir().__iter__()).parent))
    events.Reload()
    tags = events.Tags()["scalars"]
    assert {"train/mtp_tau", "train/mtp_cond_acc_3", "eval/mtp_tau", "eval/mtp_loss_2"} <= set(tags)


def test_best_checkpoint_by_tau(run):
    state = json.loads((run[0] / "checkpoint-6" / "trainer_state.json").read_text())
    taus = [row["eval_mtp_tau"] for row in state["log_history"] if "eval_mtp_tau" in row]
    assert state["best_metric"] == pytest.approx(max(taus))


def test_checkpoint_is_a_draft_folder_with_only_the_head(run):
    folder = run[0] / "checkpoint-6"
    tensors = load_file(folder / "model.safetensors")
    assert set(tensors) == {n for n in weights(TINY) if n.startswith(HEAD)} and len(tensors) == 16
    assert (folder / "config.json").read_bytes() == (TINY / "config.json").read_bytes()
    assert (folder / "configuration_mimo.py").exists() and (folder / "tokenizer.json").exists()
    settings = json.loads((folder / "fastmtp.json").read_text())
    assert settings["num_speculative_steps"] == 3 and settings["rollout"] == "exact"
    assert sum(f.stat().st_size for f in folder.iterdir()) < (TINY / "model.safetensors").stat().st_size


def test_killed_and_resumed_ends_with_the_same_weights(run, rows, tmp_path, shown):
    out = tmp_path / "run"
    args = sft_args(
        TINY, rows, out, val_dataset=f"{rows}#8", eval_steps=2, metric_for_best_model="mtp_tau", model_kwargs=KEEP
    )
    command = [str(Path(sys.executable).parent / "swift"), *args]
    environment = {**os.environ, **ONE_CORE}
    process = subprocess.Popen(
        command, env=environment, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.time() + 300
    while not (out / "checkpoint-2" / "trainer_state.json").exists():
        assert process.poll() is None and time.time() < deadline
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (out / "checkpoint-6").exists()
    swift(*args, "--resume_from_checkpoint", out / "checkpoint-2")
    want = load_file(run[0] / "checkpoint-6" / "model.safetensors")
    got = load_file(out / "checkpoint-6" / "model.safetensors")
    for name in want:
        assert torch.equal(got[name], want[name]), name
    shown("swift", ["MiMoForCausalLM"])


def test_a_finished_run_says_so_and_a_checkpoint_that_was_cut_off_is_refused(run, rows, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(run[0], out)
    extra = {"val_dataset": f"{rows}#8", "eval_steps": 2, "metric_for_best_model": "mtp_tau", "model_kwargs": KEEP}
    args = sft_args(TINY, rows, out, report_to="tensorboard", **extra)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    done = swift(*args, "--resume_from_checkpoint", out)
    assert "this run is finished, checkpoint-6 is its last" in done.stdout and "Train:" not in done.stderr
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before

    (out / "checkpoint-6" / "trainer_state.json").write_text("")
    refused = swift(*args, "--resume_from_checkpoint", out / "checkpoint-6", check=False)
    line = refused.stderr.strip().splitlines()[-1]
    assert refused.returncode == 1 and line.startswith("fastmtp: error: --resume_from_checkpoint"), refused.stderr
    assert "trainer_state.json is empty or cut off" in line and line.endswith(f"resume from {out / 'checkpoint-4'}")
    swift(*args, "--resume_from_checkpoint", out)
    want = load_file(run[0] / "checkpoint-6" / "model.safetensors")
    got = load_file(out / "checkpoint-6" / "model.safetensors")
    assert all(torch.equal(got[name], want[name]) for name in want)


@pytest.mark.parametrize(
    ("file", "keep", "why"),
    [
        ("trainer_state.json", 0, "empty or cut off"),
        ("trainer_state.json", None, "has no trainer_state.json"),
        ("model.safetensors", 1000, "model.safetensors is cut off"),
        ("model.safetensors", None, "no weights"),
        ("optimizer.pt", 1000, "optimizer.pt is cut off"),
        ("optimizer.pt", None, "no state of the optimizer"),
        ("rng_state.pth", 0, "rng_state.pth is cut off"),
    ],
)
def test_what_is_missing_of_a_checkpoint(file, keep, why, run, tmp_path):
    folder = tmp_path / "checkpoint-6"
    shutil.copytree(run[0] / "checkpoint-6", folder)
    assert what_is_missing(folder) is None
    if keep is None:
        (folder / file).unlink()
    else:
        os.truncate(folder / file, keep)
    assert why in what_is_missing(folder)


@pytest.mark.matrix
def test_explicit_plugin_without_autoload(run, rows, tmp_path):
    args = sft_args(TINY, rows, tmp_path / "run", max_steps=2, loss_type="fastmtp", tuner_type="fastmtp")
    off = {"SWIFT_FASTMTP_AUTOLOAD": "0"}
    swift(*args, "--external_plugins", PLUGIN, env=off)
    # Warm-up and decay depend on the number of steps, so only the first losses are comparable.
    assert logged(tmp_path / "run")[0] == logged(run[0])[0]
    failed = swift(*sft_args(TINY, rows, tmp_path / "no"), env=off, check=False)
    assert failed.returncode and "model_type: 'fastmtp' not in" in failed.stderr


def test_infer_from_a_checkpoint_needs_no_flags_and_gives_the_base_models_text(run, rows, tmp_path):
    result = tmp_path / "out.jsonl"
    common = ["--val_dataset", f"{rows}#2", "--max_new_tokens", "8", "--temperature", "0", "--stream", "false"]
    swift("infer", "--adapters", run[0] / "checkpoint-6", "--result_path", result, *common)
    answers = [json.loads(line)["response"] for line in result.read_text().splitlines()]
    plain = tmp_path / "plain.jsonl"
    swift("infer", "--model", TINY, "--model_type", "fastmtp", "--result_path", plain, *common)
    assert answers == [json.loads(line)["response"] for line in plain.read_text().splitlines()] and len(answers) == 2


def test_swift_export_writes_a_full_checkpoint(run, tmp_path, shown):
    out = tmp_path / "full"
    swift("export", "--adapters", run[0] / "checkpoint-6", "--output_dir", out)
    assert_only_the_head_changed(out)
    assert (out / "config.json").read_bytes() == (TINY / "config.json").read_bytes()
    tokenizer = out / "tokenizer.json"  # a copy, which may be edited; only weights are hard links
    assert tokenizer.read_bytes() == (TINY / "tokenizer.json").read_bytes()
    assert not tokenizer.samefile(TINY / "tokenizer.json")
    again = swift("export", "--adapters", run[0] / "checkpoint-6", "--output_dir", out, check=False)
    assert again.returncode and "already exists" in again.stderr
    shown("keys", ["MiMoForCausalLM"])


@pytest.mark.parametrize("tuner", ["full", "lora"])
def test_other_tuners_end_in_the_same_export(tuner, rows, tmp_path):
    out, export = tmp_path / "run", tmp_path / "full"
    flags = {"full": {}, "lora": {"lora_rank": 4}}[tuner]
    swift(*sft_args(TINY, rows, out, max_steps=2, tuner_type=tuner, **flags))
    assert logged(out)
    source = "--model" if tuner == "full" else "--adapters"
    swift("export", source, out / "checkpoint-2", "--output_dir", export)
    assert_only_the_head_changed(export)


def test_freeze_flags_of_full_are_the_users(rows, tmp_path):
    flags = {"tuner_type": "full", "freeze_parameters_ratio": 1, "trainable_parameters": "model.mtp_layers"}
    swift(*sft_args(TINY, rows, tmp_path / "run", max_steps=2, **flags))
    flags["trainable_parameters"] = "model.norm"
    failed = swift(*sft_args(TINY, rows, tmp_path / "bad", max_steps=2, **flags), check=False)
    assert failed.returncode and "model.norm.weight would be trained; only the MTP head may be" in failed.stderr


def test_bf16_keeps_an_fp32_copy_of_the_head(rows, tmp_path):
    swift(*sft_args(TINY, rows, tmp_path / "run", max_steps=2, torch_dtype="bfloat16", bf16="true", use_cpu="true"))
    tensors = load_file(tmp_path / "run" / "checkpoint-2" / "model.safetensors")
    assert {t.dtype for t in tensors.values()} == {torch.float32}
    optimizer = torch.load(tmp_path / "run" / "checkpoint-2" / "optimizer.pt", weights_only=True)
    assert {s["exp_avg"].dtype for s in optimizer["state"].values()} == {torch.float32}


def test_knobs_arrive(rows, tmp_path):
    knobs = json.dumps({"fastmtp_num_speculative_steps": 2, "fastmtp_rollout": "paper", "fastmtp_beta": 0.5})
    swift(*sft_args(TINY, rows, tmp_path / "run", max_steps=2, model_kwargs=knobs))
    settings = json.loads((tmp_path / "run" / "checkpoint-2" / "fastmtp.json").read_text())
    assert (settings["num_speculative_steps"], settings["rollout"], settings["beta"]) == (2, "paper", 0.5)
    assert logged(tmp_path / "run", "mtp_acc_2") and not logged(tmp_path / "run", "mtp_acc_3")


def test_padding_free_collator_gives_the_loss_of_the_padded_one(rows):
    """ms-swift's own collator packs rows with restarting positions; it asks for flash attention, so the model is
    called directly here."""
    from swift.model import get_model_processor
    from swift.template import get_template

    from swift_fastmtp.swift_plugin.register import register

    register()
    model, processor = get_model_processor(str(TINY), model_type="fastmtp", torch_dtype=torch.float32)
    losses = []
    for padding_free in (False, True):
        template = get_template(processor, padding_free=padding_free)
        template.set_mode("train")
        encoded = [
            template.encode(json.loads(line), return_length=True) for line in Path(rows).read_text().splitlines()[:5]
        ]
        batch = template.data_collator(encoded)
        packed = "attention_mask" not in batch and batch["position_ids"].shape[0] == 1
        assert packed == padding_free
        inputs = {k: v for k, v in batch.items() if k in ("input_ids", "attention_mask", "position_ids", "labels")}
        losses.append(model.eval()(**inputs).loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_swift_export_to_cached_dataset_and_train_on_it(rows, tmp_path):
    cache = tmp_path / "cache"
    swift("export", "--model", TINY, "--model_type", "fastmtp", "--dataset", rows, "--to_cached_dataset", "true",
          "--split_dataset_ratio", "0", "--output_dir", cache)  # fmt: skip
    args = sft_args(TINY, None, tmp_path / "run", max_steps=2, cached_dataset=cache / "train")
    swift(*args)
    assert logged(tmp_path / "run")


def test_self_distill_dataset_drops_truncated_answers(rows, tmp_path):
    lines = Path(rows).read_text().splitlines()
    mixed = tmp_path / "mixed.jsonl"
    mixed.write_text("\n".join([*lines[:8], *(x.replace('"stop"', '"length"') for x in lines[8:20])]) + "\n")
    done = swift(*sft_args(TINY, f"fastmtp-self-distill:{mixed}", tmp_path / "run", max_steps=2))
    assert "12 of 20 rows left out, without a finished answer" in done.stdout + done.stderr


@pytest.fixture(scope="module")
def distilled(tmp_path_factory):
    """A model whose template opens `<think>`; what `fastmtp distill` writes for it, with a row of two turns with
    reasoning, which becomes two examples; and what training on exactly these tokens, behind exactly the prompts that
    were asked, must log: the number of examples and the loss of step 1."""
    work = tmp_path_factory.mktemp("distilled")
    folder, path = with_template("thinking", work / "model"), work / "distilled.jsonl"
    distill(str(folder), str(ROOT / "examples/prompts/eval.jsonl"), str(path), max_new_tokens=48)
    ids = [400, 401, 6082]
    turn = {"role": "assistant", "content": "12", "reasoning_content": "3 by 4", "token_ids": ids}
    talk = [{"role": "user", "content": "3 x 4?"}, turn, {"role": "user", "content": "Really?"}, turn]
    asked = [
        "<|im_start|>user\n3 x 4?<|im_end|>\n<|im_start|>assistant\n<think>\n",
        "<|im_start|>user\n3 x 4?<|im_end|>\n<|im_start|>assistant\n12<|im_end|>\n"
        "<|im_start|>user\nReally?<|im_end|>\n<|im_start|>assistant\n<think>\n",
    ]
    model, tokenizer = load_model(folder, torch.float32), AutoTokenizer.from_pretrained(folder)
    model.fastmtp = FastMTPConfig()
    pairs = [(tokenizer.encode(text), ids) for text in asked]
    for row in read_rows(path):
        text = f"<|im_start|>user\n{row['messages'][0]['content']}<|im_end|>\n<|im_start|>assistant\n<think>\n"
        pairs.append((tokenizer.encode(text), row["messages"][1]["token_ids"]))
    with open(path, "a") as file:
        file.write(json.dumps({"messages": talk, "finish_reason": "stop"}) + "\n")
    loss = tokens = 0
    for prompt, answer in pairs:
        with torch.no_grad():
            labels = torch.tensor([[-100] * len(prompt) + answer])
            output = model(input_ids=torch.tensor([prompt + answer]), mtp_labels=labels)
        loss += output.step_loss[0].sum().item()
        tokens += output.trained[0].sum().item()
    assert len(pairs) > 8
    return folder, path, len(pairs), loss / tokens


@pytest.mark.parametrize(
    "way",
    [
        {"dataset_num_proc": 2, "dataloader_num_workers": 2},
        pytest.param({"streaming": "true", "dataloader_num_workers": 1}, marks=pytest.mark.matrix),
        pytest.param({"cached": True}, marks=pytest.mark.matrix),
    ],
    ids=lambda way: "-".join(way),
)
def test_distilled_rows_train_however_they_are_loaded(way, distilled, tmp_path):
    """By many workers, streamed, from a cached dataset: exactly what was asked and answered is trained on."""
    folder, path, examples, loss = distilled
    name = f"fastmtp-self-distill:{path}"
    if "cached" in way:
        options = ["--split_dataset_ratio", "0", "--output_dir", tmp_path / "cache", "--to_cached_dataset", "true"]
        swift("export", "--model", folder, "--model_type", "fastmtp", "--dataset", name, *options)
        name, way = None, {"cached_dataset": tmp_path / "cache" / "train"}
    one_batch = {"per_device_train_batch_size": examples, "max_steps": 1, "save_steps": 1, "max_length": 512}
    swift(*sft_args(folder, name, tmp_path / "run", **{**one_batch, **way}))
    assert logged(tmp_path / "run", "mtp_loss_1") == [pytest.approx(loss, rel=1e-4)]


def test_soft_loss_and_token_map(rows, tmp_path):
    """The other ways to train, at once: rates of the map while training, with and without it in evaluation."""
    torch.save(list(range(3000)), tmp_path / "map.pt")
    knobs = {"loss": "lk", "temperature": 0.6, "token_map": str(tmp_path / "map.pt")}
    kwargs = json.dumps({f"fastmtp_{name}": value for name, value in knobs.items()})
    args = sft_args(TINY, rows, tmp_path / "run", model_kwargs=kwargs, val_dataset=f"{rows}#8", eval_steps=6)
    swift(*args)
    log = [json.loads(line) for line in (tmp_path / "run" / "logging.jsonl").read_text().splitlines()]
    assert log[5]["mtp_accept_prob_1"] > log[0]["mtp_accept_prob_1"] and "mtp_full_tau" not in log[0]
    evaluation = next(row for row in log if "eval_loss" in row)
    assert evaluation["eval_mtp_full_acc_1"] >= evaluation["eval_mtp_acc_1"] > 0
    settings = json.loads((tmp_path / "run" / "checkpoint-6" / "fastmtp.json").read_text())
    assert {name: settings[name] for name in knobs} == knobs
    serve = command(serve_flags(tmp_path / "run" / "checkpoint-6", model=str(TINY)))
    assert serve[serve.index("--speculative-token-map") + 1] == knobs["token_map"]  # served as it was trained


@pytest.mark.matrix
def test_hidden_cache_gives_the_same_run_without_the_backbone(rows, tmp_path):
    """Two epochs with and without it: the same losses; two that start again, at once, compute and write not one hidden
    state."""
    changes = {"max_steps": 24, "save_steps": 24, "val_dataset": f"{rows}#8", "eval_steps": 12}
    swift(*sft_args(TINY, rows, tmp_path / "plain", **changes))
    knobs = json.dumps({"fastmtp_hidden_cache": str(tmp_path / "cache"), "fastmtp_hidden_cache_gb": 1})
    states = tmp_path / "cache" / "states-0.bin"

    def run(name):
        # An environment of its own: a process of its own, that others do not wait for.
        arguments = sft_args(TINY, rows, tmp_path / name, model_kwargs=knobs, **changes)
        swift(*arguments, env={"PYTHONUNBUFFERED": "1"})

    run("first")
    written = states.stat()
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(run, ["again", "at once"]))
    assert written.st_size == states.stat().st_size > 0 and written.st_mtime_ns == states.stat().st_mtime_ns
    for name in ("first", "again", "at once"):
        for key in ("loss", "eval_loss"):
            assert logged(tmp_path / name, key) == pytest.approx(logged(tmp_path / "plain", key), rel=1e-4)
