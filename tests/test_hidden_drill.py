"""kill -9 of the server, of `fastmtp hidden` and of the training on its states: the same cache and the same weights.

Which of them, and when, is drawn with a seed. A kill of the filler or of the trainer is followed by the same command;
a server comes back at its address, and the filler goes on by itself. `FASTMTP_DRILL_KILLS` sets how many there are.
"""

import json
import os
import random
import shutil
import signal
import time
from functools import partial

import pytest
from helpers.engine import Server
from helpers.hidden import STATES, write_rows
from helpers.kill_forks import Forks
from helpers.paths import TINY
from helpers.swift_runs import sft_args
from safetensors.torch import load_file

from swift_fastmtp.swift_plugin.resume import what_is_missing

pytestmark = pytest.mark.matrix

KILLS = int(os.environ.get("FASTMTP_DRILL_KILLS", "6"))
ROWS, STEPS = 40, 4


@pytest.fixture
def forks():
    forks = Forks()
    yield forks
    forks.close()


def fill(cache, rows, server):
    """One document at a time, so that each is alone in its batch and in the same place."""
    words = ["hidden", "--model", TINY, "--dataset", rows, "--hidden_cache", cache, "--concurrency", "1"]
    return [*words, "--base_url", f"http://127.0.0.1:{server.port}", "--timeout", "5", "--retry_seconds", "300"]


def train(out, rows, cache):
    knobs = json.dumps({"fastmtp_hidden_cache": str(cache)})
    words = sft_args(TINY, rows, out, max_steps=STEPS, save_steps=1, model_kwargs=knobs)
    return [*words, "--resume_from_checkpoint", out] if list(out.glob("checkpoint-*")) else words


def documents(cache):
    """How many are in the cache, as its index has them."""
    index = cache / "index-0.bin"
    return index.stat().st_size // 32 if index.exists() else 0


def bytes_of(cache):
    return {path.name: path.read_bytes() for path in sorted(cache.iterdir())}


def has(cache, number):
    return documents(cache) >= number


def kill_filler(rng, forks, server, cache, rows):
    """After so many documents, or on the way to the first."""
    happened = partial(has, cache, rng.randint(0, ROWS - 1))
    status, output = forks.start(fill(cache, rows, server)).kill_when(happened, rng.choice([0.0, rng.uniform(0, 0.05)]))
    assert status in (0, -signal.SIGKILL), output[-3000:]
    return status < 0


def kill_server(rng, forks, server, cache, rows):
    """While it is asked; the filler is not told."""
    wanted = rng.randint(documents(cache), ROWS - 1)
    run = forks.start(fill(cache, rows, server))
    deadline = time.monotonic() + 120
    while not has(cache, wanted) and time.monotonic() < deadline:
        time.sleep(0.001)
    time.sleep(rng.choice([0.0, rng.uniform(0, 0.05)]))
    os.killpg(server.process.pid, signal.SIGKILL)
    server.process.wait()
    server.__enter__()
    status, output = run.wait()
    assert status == 0 and documents(cache) == ROWS, output[-3000:]
    return True


def kill_trainer(rng, forks, out, words, seconds):
    """At any time, or while a checkpoint is written."""
    step = rng.randint(1, STEPS)
    moment = rng.choice(["args.json", f".checkpoint-{step}.tmp", f"checkpoint-{step}"])
    delay = rng.uniform(0, seconds) if moment == "args.json" else rng.uniform(0, 0.1)
    status, output = forks.start(words).kill_when(lambda: (out / moment).exists(), delay)
    assert status in (0, -signal.SIGKILL), output[-3000:]
    for checkpoint in out.glob("checkpoint-*"):
        assert what_is_missing(checkpoint) is None, checkpoint
    return status < 0


def finish(forks, words):
    status, output = forks.start(words).wait()
    assert status == 0 and "Traceback" not in output, output[-3000:]
    return output


def test_whoever_is_killed(forks, tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", ROWS)
    launch = ["python", "-m", "sglang.launch_server", "--model-path", str(TINY), "--trust-remote-code", *STATES]
    rng, killed = random.Random("hidden"), {"filler": 0, "server": 0, "trainer": 0}
    with Server(launch, tmp_path / "log") as server:
        finish(forks, fill(tmp_path / "quiet", rows, server))
        start = time.monotonic()
        finish(forks, train(tmp_path / "quiet-run", rows, tmp_path / "quiet"))
        seconds = time.monotonic() - start
        want = bytes_of(tmp_path / "quiet")
        weights = load_file(tmp_path / "quiet-run" / f"checkpoint-{STEPS}" / "model.safetensors")
        cache, out = tmp_path / "cache", tmp_path / "run"
        while sum(killed.values()) < KILLS:
            if killed["filler"] < KILLS / 3:
                killed["filler"] += kill_filler(rng, forks, server, cache, rows)
            if killed["server"] < KILLS / 3:
                killed["server"] += kill_server(rng, forks, server, cache, rows)
            finish(forks, fill(cache, rows, server))
            assert bytes_of(cache) == want
            for _ in range(2):
                if killed["trainer"] < KILLS / 3:
                    killed["trainer"] += kill_trainer(rng, forks, out, train(out, rows, cache), seconds)
            finish(forks, train(out, rows, cache))
            tensors = load_file(out / f"checkpoint-{STEPS}" / "model.safetensors")
            assert tensors.keys() == weights.keys()
            assert all(tensors[name].equal(weights[name]) for name in weights)
            for folder in (cache, out):
                shutil.rmtree(folder)
            print(f"killed: {killed}, the same cache and weights", flush=True)
