"""Runs of the real `swift` command, their arguments, rows and logs."""

import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

from helpers.paths import ROOT
from swift_fastmtp.bench.servers import free_port


def write_rows(path, count, seed=0):
    """Chat rows of very different lengths, in English, Chinese and code."""
    rng = random.Random(seed)
    words = [
        "one",
        "two",
        "计算",
        "机",
        "函数",
        "def",
        "return",
        "x = y + 1;",
        "history",
        "of",
        "the cell",
        "是",
        "什么",
    ]

    def text(n):
        return " ".join(rng.choice(words) for _ in range(n))

    with open(path, "w", encoding="utf-8") as file:
        for _ in range(count):
            messages = [
                {"role": "user", "content": text(rng.randint(2, 12))},
                {"role": "assistant", "content": text(rng.randint(4, 40))},
            ]
            file.write(json.dumps({"messages": messages, "finish_reason": "stop"}, ensure_ascii=False) + "\n")
    return path


allowed = True  # False while a fast test runs
ONE_CORE = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


KEEP = json.dumps({"fastmtp_on_worse": "keep"})


class _Forks:
    """`swift_forks.py`, started when first asked."""

    process = None

    def run(self, words):
        if self.process is None:
            command = [sys.executable, str(ROOT / "tests/helpers/swift_forks.py")]
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
            self.process = subprocess.Popen(command, env={**os.environ, **ONE_CORE}, **pipes)
        with tempfile.TemporaryDirectory() as folder:
            self.process.stdin.write(json.dumps({"words": words, "folder": folder, "seconds": 570}) + "\n")
            self.process.stdin.flush()
            status = int(self.process.stdout.readline())
            output = [Path(folder, name).read_text(encoding="utf-8") for name in ("stdout", "stderr")]
        return subprocess.CompletedProcess(["swift", *words], status, *output)


_FORKS = _Forks()


def swift(*args, env=None, check=True, processes=1):
    """Run the real `swift` command; returns the finished process with its output as text.

    A verb with flags, in this environment and in one process, runs the script that `swift` would start, in a fork of a
    process that has imported ms-swift: imports are most of a short command's time. Recipes, several processes and
    other environments need `swift`.
    """
    assert allowed, "a test that runs `swift` is marked `engine` or `matrix`"
    words = [str(word) for word in args]
    if processes == 1 and not env and words[1].startswith("--"):
        done = _FORKS.run(words)
    else:
        environment = {**os.environ, **ONE_CORE, **(env or {})}
        if processes > 1:
            environment.update(NPROC_PER_NODE=str(processes), MASTER_PORT=str(free_port()), DS_ACCELERATOR="cpu")
        command = [str(Path(sys.executable).parent / "swift"), *words]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=570, check=False)
    # gloo may abort a process at its exit, after the ranks have met behind training; what was written is looked at.
    finished = processes > 1 and "train_runtime" in done.stdout and "(SIGABRT)" in done.stderr
    if check and done.returncode and not finished:
        raise AssertionError(f"{' '.join(done.args)}\n{done.stdout[-4000:]}\n{done.stderr[-6000:]}")
    return done


def sft_args(model, dataset, output_dir, **changes):
    """Arguments of a short, deterministic CPU run; keyword `None` removes one."""
    args = {
        "model_type": "fastmtp",
        "model": model,
        "dataset": dataset,
        "output_dir": output_dir,
        "torch_dtype": "float32",
        "fp16": "false",
        "max_length": 256,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "learning_rate": "2e-3",
        "max_steps": 6,
        "save_steps": 2,
        "logging_steps": 1,
        "dataloader_num_workers": 0,
        "split_dataset_ratio": 0,
        "add_version": "false",
        "check_model": "false",
        "report_to": "none",  # or ms-swift draws a picture of every metric, which takes longer than these runs
        **changes,
    }
    return ["sft", *(str(x) for k, v in args.items() if v is not None for x in (f"--{k}", v))]


def logged(output_dir, key="loss"):
    """Values of one key in a run's logging.jsonl, in order."""
    lines = (Path(output_dir) / "logging.jsonl").read_text().splitlines()
    return [row[key] for row in map(json.loads, lines) if key in row]
