"""Whatever ends `fastmtp bench`, nothing of a server that it started lives on.

Here the server is a shell script with children that do not want to end; the real SGLang is in
`serving/test_bench_engine.py`.
"""

import multiprocessing
import os
import random
import signal
import sys
import threading
import time
import uuid
from pathlib import Path

import pytest
import yaml
from helpers import orphans
from helpers.paths import ROOT, TINY
from tqdm import tqdm

from swift_fastmtp.bench.bench import bench
from swift_fastmtp.data.chat_template import load_tokenizer
from swift_fastmtp.errors import FastMTPError

FAKE = ROOT / "tests/helpers/fake_engine.py"
TREE = f"""
trap '' HUP
sleep 1000 &                                            # an ordinary child
setsid sleep 1001 &                                     # one with a session of its own
(setsid bash -c 'trap "" TERM HUP INT; while true; do sleep 1002; done' &)  # one that lost its parent, and will not end
{sys.executable} {FAKE} --port $1 --pause 0.3 &         # the server
(sleep 0.5; setsid nohup sleep 1003 >/dev/null 2>&1) &  # one that comes later
wait
"""
CHILDREN = 7
"""The script, and what it starts; at least."""


def plan_of(folder, mark):
    values = {
        "model": str(TINY),
        "warmup": 0,
        "max_new_tokens": 8,
        "retry_seconds": 1,
        "environment": {orphans.MARK: mark},
        "servers": {"base": {"method": "baseline", "command": ["bash", "-c", TREE, "tree", "{port}"]}},
    }
    (folder / "plan.yaml").write_text(yaml.safe_dump(values))
    return str(folder / "plan.yaml")


def forked(folder, mark, output="out"):
    """The benchmark in a process and a process group of its own."""
    plan = plan_of(folder, mark)
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        os.setpgrp()
        orphans.hear_hangups()
        # tqdm's own lock is a semaphore that forks share: one killed while it holds it would stop all later ones.
        tqdm.set_lock(threading.RLock())
        null = os.open(folder / "printed.txt", os.O_WRONLY | os.O_CREAT)
        os.dup2(null, 1)
        os.dup2(null, 2)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        bench(str(folder / output), plan=plan)
        status = 0
    finally:
        os._exit(status)


@pytest.fixture(scope="module", autouse=True)
def _imported():
    load_tokenizer(str(TINY))


def drill(folder, how, group, when):
    """Kill a benchmark `when` seconds after its server answers (None: as it starts). Returns how many there were, and
    who is left."""
    mark = uuid.uuid4().hex
    child = forked(folder, mark)
    requests = folder / "out/requests.jsonl"
    deadline = time.monotonic() + 60
    while not (orphans.processes(mark) if when is None else requests.exists() and requests.stat().st_size):
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            printed = (folder / "printed.txt").read_text(errors="replace")
            pytest.fail(f"no answer in 60 s; it printed: {printed}")
        assert os.waitpid(child, os.WNOHANG) == (0, 0)
        time.sleep(0.02)
    time.sleep(0.3 if when is None else when)
    alive = len(orphans.processes(mark))
    orphans.kill(child, how, group)
    _, status = os.waitpid(child, 0)
    assert status != 0
    left = orphans.left_after(mark, 20)
    for process, _ in left:
        os.kill(process, signal.SIGKILL)
    return alive, left


HOW = {
    "kill -9": (signal.SIGKILL, False),
    "kill -9 of the group": (signal.SIGKILL, True),
    "SIGHUP": (signal.SIGHUP, False),
    "SIGHUP of the group": (signal.SIGHUP, True),
    "SIGTERM": (signal.SIGTERM, False),
    "SIGINT": (signal.SIGINT, True),
}


def test_a_killed_fork_does_not_stop_the_next(tmp_path, monkeypatch):
    """The drills below are forks of one process, killed at any time: what they share must not be left locked."""
    monkeypatch.setattr(tqdm, "_lock", multiprocessing.RLock(), raising=False)
    child = os.fork()
    if not child:
        tqdm.get_lock().acquire()
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    alive, left = drill(tmp_path, *HOW["kill -9"], 0)
    assert alive and left == []


@pytest.mark.parametrize("how", ["kill -9 of the group", "SIGHUP"])
def test_nobody_is_left(how, tmp_path):
    alive, left = drill(tmp_path, *HOW[how], 0.8)
    assert alive >= CHILDREN and left == []


@pytest.mark.matrix
@pytest.mark.parametrize("seed", range(12))
def test_nobody_is_left_at_any_time(seed, tmp_path):
    chance = random.Random(seed)
    how = list(HOW)[seed % len(HOW)]
    when = None if seed >= 9 else chance.uniform(0, 2)
    alive, left = drill(tmp_path, *HOW[how], when)
    assert alive and left == []


def test_a_normal_end_leaves_nobody(tmp_path):
    mark = uuid.uuid4().hex
    plan = yaml.safe_load(Path(plan_of(tmp_path, mark)).read_text())
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump({**plan, "num_questions": 1}))
    bench(str(tmp_path / "out"), plan=str(tmp_path / "plan.yaml"))
    assert orphans.processes(mark) == []


def test_children_of_a_server_that_died(tmp_path):
    mark = uuid.uuid4().hex
    plan = yaml.safe_load(Path(plan_of(tmp_path, mark)).read_text())
    plan["servers"]["base"]["command"] = ["bash", "-c", "setsid sleep 1000 & echo Error: no card; exit 9"]
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(plan))
    with pytest.raises(FastMTPError, match=r"the server ended with status 9 \(Error: no card\)"):
        bench(str(tmp_path / "out"), plan=str(tmp_path / "plan.yaml"))
    assert orphans.processes(mark) == []


def test_somebody_ends_the_watchdog(tmp_path):
    """It takes its server along, and the benchmark says that the server has ended."""
    mark = uuid.uuid4().hex
    child = forked(tmp_path, mark)
    requests = tmp_path / "out/requests.jsonl"
    while not (requests.exists() and requests.stat().st_size):
        time.sleep(0.02)
    below = Path(f"/proc/{child}/task/{child}/children").read_text().split()
    watchdog = next(int(p) for p in below if "watchdog" in Path(f"/proc/{p}/cmdline").read_text())
    os.kill(watchdog, signal.SIGTERM)
    _, status = os.waitpid(child, 0)
    assert status and orphans.left_after(mark, 20) == []
