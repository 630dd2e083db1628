"""Bad input through the real commands: one line that names the thing and the fix, a non-zero exit, nothing left."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.broken_models import MODELS, assert_one_line, broken_model
from helpers.paths import TINY
from helpers.swift_runs import sft_args, swift, write_rows
from helpers.tiers import some_now


@pytest.mark.parametrize("case", MODELS)
def test_broken_models_in_process(case, tmp_path):
    """Every kind, without the cost of a subprocess; the next test shows two of them through `swift`."""
    from swift_fastmtp.errors import FastMTPError
    from swift_fastmtp.model.loading import load_model

    (change, config), message = MODELS[case]
    with pytest.raises(FastMTPError) as error:
        load_model(broken_model(tmp_path, change, **config), torch.float32)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.engine
@pytest.mark.parametrize("case", some_now(["no MTP layer", "two layers"], ["no MTP layer"]))
def test_broken_models_through_swift(case, rows, tmp_path):
    (change, config), message = MODELS[case]
    model = broken_model(tmp_path, change, **config)
    assert_one_line(swift(*sft_args(model, rows, tmp_path / "run"), check=False), message)


ARGUMENTS = {
    "unknown knob": ({"model_kwargs": '{"fastmtp_bta": 0.5}'}, "unknown knob 'fastmtp_bta'"),
    "knob without prefix": ({"model_kwargs": '{"beta": 0.5}'}, "unknown knob 'beta'"),
    "impossible knob": ({"model_kwargs": '{"fastmtp_beta": 2}'}, "fastmtp_beta: 2.0 is not possible"),
    "packing": ({"packing": "true"}, "--packing needs an attention that keeps documents apart"),
    "sequence parallel": ({"sequence_parallel_size": 2}, "--sequence_parallel_size 2 does not work"),
    "liger": ({"use_liger_kernel": "true"}, "--use_liger_kernel True does not work"),
    "unknown loss": ({"model_kwargs": '{"fastmtp_loss": "mse"}'}, "it must be one of ce, kl, lk"),
    "tuner": ({"tuner_type": "adalora"}, "--tuner_type adalora is not supported"),
}


@pytest.mark.engine
@pytest.mark.parametrize("case", some_now(ARGUMENTS, ["unknown knob", "packing", "tuner"]))
def test_arguments_before_anything_is_loaded(case, rows, tmp_path):
    changes, message = ARGUMENTS[case]
    process = swift(*sft_args(TINY, rows, tmp_path / "run", **changes), check=False)
    assert_one_line(process, message)
    assert "Loading model" not in process.stdout + process.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.engine
def test_no_row_left(tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", 6)
    rows.write_text(rows.read_text().replace('"stop"', '"length"').replace('"token_ids"', '"other_ids"'))
    process = swift(*sft_args(TINY, f"fastmtp-self-distill:{rows}", tmp_path / "run"), check=False)
    assert_one_line(process, "no row is left; every answer is empty, or was truncated")
    kept = write_rows(tmp_path / "kept.jsonl", 6)
    process = swift(*sft_args(TINY, kept, tmp_path / "run", max_length=8), check=False)
    assert_one_line(process, "no training row is left; rows longer than --max_length 8 are dropped")


@pytest.mark.matrix
def test_a_save_that_fails_half_way(rows, tmp_path):
    """By a file-size limit, as a full disk would: the line says which it was, and nothing half-written stays."""
    args = sft_args(TINY, rows, tmp_path / "run", max_steps=2)
    code = (
        "import resource, sys; from swift.pipelines import sft_main; sys.argv[0] = 'swift'\n"
        "from swift_fastmtp.checkpoint import mtp_tensors; save = mtp_tensors.save_file\n"
        "def limited(*a, **k):\n"
        "    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY)); save(*a, **k)\n"
        "mtp_tensors.save_file = limited; sft_main()"
    )
    process = subprocess.run([sys.executable, "-c", code, *args[1:]], capture_output=True, text=True, check=False)
    assert process.returncode == 1, process.stderr[-2000:]
    assert "model.safetensors: cannot be written" in process.stderr
    assert "ulimit -f" in process.stderr and "free space" not in process.stderr
    assert not list((tmp_path / "run").rglob("model.safetensors"))
    assert not list((tmp_path / "run").rglob("*.tmp"))


@pytest.mark.matrix
def test_out_of_memory(rows, tmp_path):
    """An address-space limit stands in for the full memory: the buffers of the loss cannot be allocated."""
    args = sft_args(TINY, rows, tmp_path / "run", max_steps=2, per_device_train_batch_size=48)
    code = (
        "import resource, sys; from swift.pipelines import sft_main; sys.argv[0] = 'swift'\n"
        "from swift_fastmtp.model import modeling; losses = modeling.step_losses\n"
        "def limited(*a):\n"
        "    pages = int(open('/proc/self/statm').read().split()[0])\n"
        "    unlimited = resource.getrlimit(resource.RLIMIT_AS)\n"
        "    resource.setrlimit(resource.RLIMIT_AS, (pages * 4096 + 2**20, unlimited[1]))\n"
        "    try: return losses(*a)\n"
        "    finally: resource.setrlimit(resource.RLIMIT_AS, unlimited)\n"
        "modeling.step_losses = limited; sft_main()"
    )
    process = subprocess.run([sys.executable, "-c", code, *args[1:]], capture_output=True, text=True, check=False)
    assert_one_line(process, "lower --per_device_train_batch_size (now 48), --max_length (now 256)")


CACHE = {
    "without consent": (
        {},
        {},
        "3000 tokens take 0.002 GB; allow that with fastmtp_hidden_cache_gb 0.0024",
    ),
    "no room": ({"hidden_cache_gb": 1e9}, {"lengths": [10**12]}, "GB free"),
}


@pytest.mark.parametrize("case", CACHE)
def test_hidden_cache_is_not_written_without_consent_and_room(case, tmp_path):
    from types import SimpleNamespace

    from datasets import Dataset

    from swift_fastmtp.errors import FastMTPError
    from swift_fastmtp.method.config import FastMTPConfig
    from swift_fastmtp.model.loading import load_model
    from swift_fastmtp.swift_plugin.cache import attach_hidden_cache

    knobs, columns, message = CACHE[case]
    model = load_model(TINY, torch.float32)
    model.model_dir, model.fastmtp = str(TINY), FastMTPConfig(hidden_cache=str(tmp_path / "cache"), **knobs)
    args = SimpleNamespace(max_steps=-1, num_train_epochs=3)
    data = Dataset.from_dict({"lengths": [1000, 2000], **columns})
    with pytest.raises(FastMTPError) as error:
        attach_hidden_cache(args, model, [data, None])
    assert message in str(error.value)
    assert not (tmp_path / "cache").exists()
    # One epoch reads every row once: nothing to cache.
    args.num_train_epochs = 1
    attach_hidden_cache(args, model, [data, None])
    assert model.hidden_cache is None


@pytest.mark.engine
def test_token_map_of_another_model_through_swift(rows, tmp_path):
    torch.save([5, 9, 151_000], tmp_path / "map.pt")
    knobs = json.dumps({"fastmtp_token_map": str(tmp_path / "map.pt")})
    process = swift(*sft_args(TINY, rows, tmp_path / "run", model_kwargs=knobs), check=False)
    assert_one_line(process, "map.pt: holds id 151000, the model has rows 0..6143")


def fastmtp(*args):
    command = [str(Path(sys.executable).parent / "fastmtp"), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["export", "--adapters", "missing", "--output_dir", "{tmp}/out"], "missing: no such checkpoint folder"),
        (["export", "--adapters", TINY, "--output_dir", "{tmp}/out", "--model", TINY], "nothing was trained"),
        pytest.param(
            ["simulate", "--model", "nowhere", "--dataset", "{rows}"],
            "nowhere/config.json: not found",
            marks=pytest.mark.matrix,
        ),
        pytest.param(
            ["simulate", "--model", TINY, "--dataset", "{tmp}/bad.jsonl"],
            "bad.jsonl:2: not JSON",
            marks=pytest.mark.matrix,
        ),
        pytest.param(
            ["distill", "--model", TINY, "--prompts", "{tmp}/bad.jsonl", "--output", "{tmp}/o"],
            "bad.jsonl:2: not JSON",
            marks=pytest.mark.matrix,
        ),
        pytest.param(
            ["distill", "--model", TINY, "--prompts", "{rows}", "--output", "{rows}"],
            "already exists",
            marks=pytest.mark.matrix,
        ),
    ],
)
def test_fastmtp_errors(args, message, rows, tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a"}\n{"prompt": \n')
    process = fastmtp(*(str(a).format(tmp=tmp_path, rows=rows) for a in args))
    assert process.returncode == 1
    assert process.stderr.strip().splitlines()[-1].startswith("fastmtp: error: ")
    assert message in process.stderr and "Traceback" not in process.stderr
    assert not (tmp_path / "out").exists()


def test_an_output_that_nobody_reads_any_more_is_no_error():
    """As in `fastmtp inspect MODEL | head -1`."""
    words = [sys.executable, "-m", "swift_fastmtp.cli", "serve-args", str(TINY)]
    run = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    run.stdout.close()
    assert run.stderr.read() == "" and run.wait() == 128 + signal.SIGPIPE
    run.stderr.close()
