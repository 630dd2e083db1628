"""The benchmarks run, and what ours is measured against computes the same gradients."""

import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from helpers.benchmarks import load
from helpers.keep import save_through_transformers
from helpers.models import random_mimo
from helpers.paths import ROOT, TINY
from safetensors.torch import load_file

from swift_fastmtp.files.provenance import git_revision
from swift_fastmtp.method.config import FastMTPConfig

EVAL = ROOT / "examples/prompts/eval.jsonl"
TRAIN = ROOT / "examples/prompts/train.jsonl"


def test_the_reference_step_has_the_gradients_of_the_paper_rollout():
    step = load("training/reference_step.py")
    ids = torch.randint(0, 97, (2, 21))
    labels = ids.masked_fill(torch.arange(21) < 5, -100)
    model = random_mimo(0)
    model.train()
    model.fastmtp = FastMTPConfig(rollout="paper", loss="ce")
    ours = model(input_ids=ids, labels=labels).loss
    want = torch.autograd.grad(ours, list(model.head_parameters().values()))
    step.prepare(model)
    assert model.model.layers[0].gradient_checkpointing and model.model.layers[0].training
    runs = []
    model.model.layers[0].self_attn.register_forward_hook(lambda *_: runs.append(1))
    loss = step.reference_loss(model, ids, labels)
    loss.backward()
    assert len(runs) == 2  # computed again for a backward pass through the frozen layers
    torch.testing.assert_close(loss, ours, atol=1e-5, rtol=1e-5)
    for gradient, parameter in zip(want, model.head_parameters().values(), strict=True):
        torch.testing.assert_close(parameter.grad, gradient, atol=1e-5, rtol=1e-4)


def test_training_benchmark(monkeypatch, tmp_path, capsys):
    step = load("training/step.py")
    monkeypatch.setattr(step, "SHAPES", {"small": {**step.SHAPES["small"], "hidden_size": 32, "intermediate_size": 48}})
    monkeypatch.setattr(step, "VOCAB", {"small": 300})
    monkeypatch.setattr(step, "MAP", {"small": 50})
    output = tmp_path / "step"
    options = ["--layers", "1", "--length", "24", "--repeats", "1", "--no_memory", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", ["step.py", *options])
    step.main()
    seconds = json.loads(output.with_suffix(".json").read_text())["seconds"]
    assert set(step.OURS) | {"reference", "floor"} <= set(seconds) and all(s > 0 for s in seconds.values())
    assert "| reference |" in output.with_suffix(".md").read_text()


def test_a_step_beside_speculators(monkeypatch, tmp_path):
    """In small; that both have the same loss and gradients, the benchmark itself asserts."""
    bench = load("peers/speculators_step.py")
    pytest.importorskip("speculators", reason=f"speculators is not installed: {bench.INSTALL}")
    output = tmp_path / "speculators"
    options = ["--hidden", "128", "--length", "48", "--map", "300", "--rounds", "1", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", ["speculators_step.py", *options])
    threads = torch.get_num_threads()
    try:
        bench.main()
    finally:
        torch.set_num_threads(threads)
    record = json.loads(output.with_suffix(".json").read_text())
    assert set(record["cpu_seconds"]) == {bench.PEER, *bench.OURS, *bench.FLOORS}
    assert record["same_objective"]["gradient_difference"] < 1e-5
    assert all(size > 0 for size in record["extra_bytes"].values())
    assert "| exact, kl (default) |" in output.with_suffix(".md").read_text()


@pytest.mark.skipif(git_revision() is None, reason="compares revisions of a git checkout")
def test_startup_benchmark(monkeypatch, tmp_path):
    startup = load("startup.py")
    output = tmp_path / "startup"
    options = ["--before", "HEAD", "--repeats", "1", "--only", "clean --help", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", ["startup.py", *options])
    startup.main()
    seconds = json.loads(output.with_suffix(".json").read_text())["seconds"]["clean --help"]
    assert seconds["before"] > 0 and seconds["after"] > 0
    assert "| `clean --help` |" in output.with_suffix(".md").read_text()


@pytest.mark.matrix
def test_the_gpu_script_runs_its_parts_in_small_on_a_cpu(tmp_path):
    environment = {**os.environ, "DEVICE": "cpu", "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""}
    script = ["bash", str(ROOT / "benchmarks/gpu/run.sh"), str(tmp_path)]
    done = subprocess.run(script, env=environment, capture_output=True, text=True, check=False, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [line.split(":")[0] for line in done.stdout.splitlines()[-3:]] == ["kernels", "attention", "step"]
    cases = json.loads((tmp_path / "attention.json").read_text())["cases"]
    assert cases and all(case["sound"] for case in cases)
    assert json.loads((tmp_path / "training_step.json").read_text())["seconds"]["reference"] > 0


@pytest.mark.matrix
def test_adapters_benchmark(monkeypatch, tmp_path):
    """In small; started again, nothing is trained again."""
    benchmark = load("adapters/measure.py")
    output = tmp_path / "adapters"
    sizes = ["--prompts", "10", "--questions", "3", "--answer_tokens", "8", "--adapter_steps", "2", "--steps", "2"]
    monkeypatch.setattr(sys, "argv", ["measure.py", "--work", str(tmp_path), "--output", str(output), *sizes])
    benchmark.main()
    tables = json.loads(output.with_suffix(".json").read_text())["tables"]
    assert {name: len(table) for name, table in tables.items()} == {"base": 1, "capitals": 3, "chinese": 3}
    monkeypatch.setattr(benchmark.Study, "load", None)
    benchmark.main()
    assert json.loads(output.with_suffix(".json").read_text())["tables"] == tables


def test_generation_benchmark(monkeypatch, tmp_path, capsys):
    """In small, all three ways: transformers' own too."""
    benchmark = load("data/generation.py")
    output = tmp_path / "generation.json"
    options = ["--rows", "5", "--batch_size", "2", "--max_new_tokens", "8", "--rounds", "1", "--output", str(output)]
    inputs = ["--model", str(TINY), "--prompts", str(EVAL)]
    monkeypatch.setattr(sys, "argv", ["generation.py", *inputs, *options])
    threads = torch.get_num_threads()
    try:
        benchmark.main()
    finally:
        torch.set_num_threads(threads)
    rounds = json.loads(output.read_text())["rounds"]
    assert set(rounds) == {"fixed batches", "continuous batching", "slots"}
    assert all(5 <= r["tokens"] <= 40 for (r,) in rounds.values())
    assert "slots / fixed batches" in capsys.readouterr().out


def study_command(work):
    """Of benchmarks/smollm2/study.py, in small, on the tiny model."""
    original = work.parent / "original.jsonl"
    asked, answered = ({"role": role, "content": "Why is water wet?"} for role in ("user", "assistant"))
    original.write_text(json.dumps({"messages": [asked, answered]}) + "\n")
    command = [sys.executable, str(ROOT / "benchmarks/smollm2/study.py"), "--model", str(TINY), "--work", str(work)]
    command += ["--prompts", str(TRAIN), "--questions", str(EVAL), "--original", str(original), "--map", "1024"]
    command += ["--parts", "1", "--part", "8", "--fit_rows", "8", "--train_tokens", "16", "--answer_tokens", "16"]
    command += ["--maps", "512", "--temperatures", "0.6", "--vanilla_steps", "6", "--steps", "4", "--save_every", "2"]
    return [*command, "--arms", "control", "exact_kl", "--long_steps", "4", "--curve_every", "2"]


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """The folder of a study that nothing disturbed."""
    work = tmp_path_factory.mktemp("study") / "undisturbed"
    subprocess.run(study_command(work), check=True, stdout=subprocess.DEVNULL)
    return work


@pytest.mark.matrix
def test_the_study_goes_on_after_a_kill(study, tmp_path):
    """Killed between two saved states of a run, it ends with the undisturbed tables."""
    command = study_command(tmp_path / "killed")
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if line.startswith("vanilla: step 4"):
                process.kill()
    assert process.returncode == -signal.SIGKILL
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    table = (tmp_path / "killed" / "study.md").read_text()
    assert table == (study / "study.md").read_text()
    names = {line.split("|")[1].strip() for line in table.splitlines() if line.startswith("|")}
    assert {"exact_kl-0", "head after 2 steps"} <= names


@pytest.mark.matrix
def test_heads_beside_the_quantized_model(study, tmp_path):
    """The study's head on a rounded model, beside one that was trained on this model's states."""
    command = [sys.executable, str(ROOT / "benchmarks/smollm2/quantized.py"), "--study", str(study)]
    command += ["--work", str(tmp_path), "--forms", "int3", "--num_questions", "2", "--answer_tokens", "8"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    found = json.loads((tmp_path / "quantized.json").read_text())["forms"]["int3"]
    assert found["state_error"] > 0.01 and 0 < found["same_token"] <= 1
    assert [*found["heads"]] == ["vanilla", "full-0", "quantized-0"]
    # The same start, rows and steps, and other states: another head, whether or not so few tokens show it.
    full, quantized = (
        load_file(folder / "model.safetensors")
        for folder in (study / "heads/exact_kl-0", tmp_path / "int3/heads/quantized-0")
    )
    assert full.keys() == quantized.keys()
    assert any(not torch.equal(full[name], quantized[name]) for name in full)
    assert "quantized-0" in (tmp_path / "quantized.md").read_text()


@pytest.mark.matrix
def test_the_studys_heads_are_served_and_timed(study):
    """Plain and drafting by a real SGLang, in turns: the same tokens, and every round counted."""
    command = [sys.executable, str(ROOT / "benchmarks/smollm2/clock.py"), "--work", str(study)]
    command += ["--questions", str(EVAL), "--heads", "exact_kl-0", "--map", "1024", "--num_steps", "2"]
    subprocess.run([*command, "--num_questions", "2", "--max_new_tokens", "12", "--rounds", "2"], check=True)
    results = json.loads((study / "clock-float32" / "bench" / "results.json").read_text())
    drafting = [run for run in results["runs"] if run["server"] != "plain"]
    assert len(drafting) == 2
    for run in drafting:
        assert run["lossless"]["equal"] == run["lossless"]["compared"] == 4
        assert run["tau_micro"] > 1.2


@pytest.mark.matrix
def test_hidden_states_from_a_server(installed, rows, monkeypatch, tmp_path):
    """In small, without training: bytes take less of the wire than lists, and both fill a cache."""
    bench = load("data/hidden.py")
    output = tmp_path / "hidden"
    options = ["--wide", "256", "--dataset", str(rows), "--plugin", str(installed[1]), "--output", str(output)]
    monkeypatch.setattr(sys, "argv", ["hidden.py", *options, "--rows", "4", "--rounds", "1", "--concurrency", "2"])
    bench.main()
    record = json.loads(output.with_suffix(".json").read_text())
    wire = record["wire_bytes_per_token"]
    assert wire["bytes"] < 256 * 4 * 4 / 3 + 100 and wire["lists"] > 3 * wire["bytes"]
    assert record["disk_bytes_per_token"] < 256 * 4 + 32
    assert [line["way"] for line in record["rounds"]] == [*bench.WAYS]
    assert "| bytes " in output.with_suffix(".md").read_text()


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The tiny model as its owner fine-tunes it: transformers knows its backbone only."""
    folder = save_through_transformers(TINY, tmp_path_factory.mktemp("plain") / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(TINY / name, folder / name)
    return folder


@pytest.mark.matrix
def test_the_studys_heads_are_served_and_timed_by_vllm(study, plain):
    """Beside the plain model, in SGLang's graph: the same tokens, and every round counted."""
    command = [sys.executable, str(ROOT / "benchmarks/smollm2/clock.py"), "--work", str(study), "--engine", "vllm"]
    command += ["--questions", str(EVAL), "--heads", "exact_kl-0", "--model", str(plain), "--num_steps", "2"]
    subprocess.run([*command, "--num_questions", "2", "--max_new_tokens", "12", "--rounds", "1"], check=True)
    results = json.loads((study / "clock-vllm-float32" / "bench" / "results.json").read_text())
    (run,) = (run for run in results["runs"] if run["server"] != "plain")
    assert run["lossless"]["equal"] == run["lossless"]["compared"] == 2
    assert run["tau_micro"] > 1.2


def drift_command(plain, work):
    """Of benchmarks/smollm2/drift.py, in small: half of the rows to tune on, half to heal on."""
    original = work.parent / "original.jsonl"
    rows = []
    for number in range(16):
        asked = {"role": "user", "content": f"What is {number} and {number}?"}
        answered = {"role": "assistant", "content": f"Together they are {2 * number}, as everybody knows who counts."}
        rows.append(json.dumps({"messages": [asked, answered]}) + "\n")
    original.write_text("".join(rows))
    command = [sys.executable, str(ROOT / "benchmarks/smollm2/drift.py"), "--work", str(work), "--study", "none"]
    command += ["--model", str(plain), "--head", str(TINY), "--map", "0", "--original", str(original)]
    command += ["--prompts", str(TRAIN), "--questions", str(EVAL), "--every", "10", "--tune_rows", "8", "--part", "4"]
    command += ["--answer_tokens", "24", "--steps", "4", "--curve_every", "2"]
    return [*command, "--drifts", "none:0:0", "tuned:12:3e-3"]


@pytest.mark.matrix
def test_a_drifted_backbone_is_healed_and_goes_on_after_a_kill(plain, tmp_path):
    """The tuning learns and changes text, the table has every head, and a killed run ends as the undisturbed one."""
    command = drift_command(plain, tmp_path / "undisturbed")
    subprocess.run([*command, "--data", "original", "own"], check=True, stdout=subprocess.DEVNULL)
    killed = [*drift_command(plain, tmp_path / "killed"), "--data", "original"]
    with subprocess.Popen(killed, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if line.startswith("healed_original: step 2"):
                process.kill()
    assert process.returncode == -signal.SIGKILL
    subprocess.run(killed, check=True, stdout=subprocess.DEVNULL)
    records = [json.loads((tmp_path / name / "drift.json").read_text()) for name in ("undisturbed", "killed")]
    for model, again in zip(*(record["models"] for record in records), strict=True):
        names = [head["name"] for head in model["heads"]]
        own = ["healed_own after 2 steps", "healed_own"]
        assert names == ["as it was", "healed_original after 2 steps", "healed_original", *own]
        assert [head["greedy"] for head in model["heads"][:3]] == [head["greedy"] for head in again["heads"]]
    none, tuned = records[0]["models"]
    assert tuned["tuning"]["loss_after"] < tuned["tuning"]["loss_before"]
    assert none["answers_changed"]["changed"] == 0 < tuned["answers_changed"]["changed"]
    assert (tmp_path / "undisturbed" / "drift.md").read_text().count("healed_own") == 4
