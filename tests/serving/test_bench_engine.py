"""The benchmark against the real SGLang: its text and its acceptance are the simulator's, to the last draft.

Two servers that the benchmark starts itself, the baseline before and behind the other, on our own prompts, second turns
included, greedy, fp32.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
import uuid

import pytest
import torch
import yaml
from helpers import orphans
from helpers.engine import CPU_FLAGS, ENVIRONMENT, engine_python
from helpers.paths import TINY
from transformers import AutoTokenizer

from swift_fastmtp.bench.bench import bench
from swift_fastmtp.bench.results import read_results
from swift_fastmtp.checkpoint.checkpoint import Checkpoint
from swift_fastmtp.checkpoint.mtp_tensors import read_head
from swift_fastmtp.data.tasks import load_task
from swift_fastmtp.method.config import FastMTPConfig
from swift_fastmtp.method.metrics import macro_tau, micro_tau
from swift_fastmtp.model.loading import head_shapes, load_head, load_model
from swift_fastmtp.simulate.acceptance import draft_rounds, make_texts

pytestmark = pytest.mark.engine

STEPS, TOKENS, QUESTIONS = 2, 40, 6


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(results, records of both servers) of one benchmark."""
    folder = tmp_path_factory.mktemp("bench")
    plan = {
        "model": str(TINY),
        "tasks": ["smoke"],
        "num_questions": QUESTIONS,
        "max_new_tokens": TOKENS,
        "num_steps": STEPS,
        "warmup": 2,
        "concurrency": [2],
        "python": engine_python(),
        "flags": CPU_FLAGS,
        "environment": ENVIRONMENT,
        "servers": {"baseline": {}, "vanilla": {"folder": str(TINY), "label": "Vanilla MTP"}},
    }
    (folder / "plan.yaml").write_text(yaml.safe_dump(plan))
    results = bench(str(folder / "out"), plan=str(folder / "plan.yaml"))
    assert results == read_results(folder / "out/results.json")
    return results, [json.loads(line) for line in (folder / "out/requests.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def rounds(run):
    """What the simulator says of every answer, (id, turn) -> drafts accepted in each step; and its own text of it."""
    answers = {(r["id"], r["turn"]): r for r in run[1] if r["server"] == "baseline"}
    rows, keys = [], []
    for question in load_task("smoke", QUESTIONS).questions:
        messages = []
        for turn, text in enumerate(question.turns):
            messages.append({"role": "user", "content": text})
            rows.append({"messages": list(messages)})
            keys.append((question.id, turn))
            messages.append({"role": "assistant", "content": answers[keys[-1]]["text"]})
    model, tokenizer = load_model(TINY, torch.float32), AutoTokenizer.from_pretrained(TINY)
    model.fastmtp = FastMTPConfig(num_speculative_steps=STEPS)
    load_head(model, read_head(Checkpoint(TINY), model.family, head_shapes(Checkpoint(TINY))))
    texts = make_texts(model, tokenizer, rows, TOKENS, "generate", 8)
    assert len(texts) == len(rows)
    found = draft_rounds(model, texts, tokenizer.pad_token_id, 8)[STEPS - 1]
    return {key: (text.ids[text.start : text.end], r) for key, text, r in zip(keys, texts, found, strict=True)}


ORDER = (("baseline", 0), ("vanilla-k2", 0), ("baseline", 1))


def records_of(records, server, number):
    return [r for r in records if (r["server"], r["round"]) == (server, number)]


def test_the_baseline_is_measured_again_at_the_end(run):
    _, records = run
    starts = [[r["start"] for r in records_of(records, *of)] for of in ORDER]
    assert max(starts[0]) < min(starts[1]) and max(starts[1]) < min(starts[2])
    assert [len(one.round_speeds) for one in run[0].runs] == [2, 1]


def test_every_answer_is_the_simulators(run, rounds):
    _, records = run
    assert [len(records_of(records, *of)) for of in ORDER] == [len(rounds)] * 3 and any(turn for _, turn in rounds)
    assert len(records) == 3 * len(rounds)
    for record in records:
        ids, want = rounds[record["id"], record["turn"]]
        assert record["output_ids"] == ids and record["completion_tokens"] == len(ids)
        assert record["engine"][0] == "sglang" and record["model"] == str(TINY)
        if record["server"] == "vanilla-k2":
            histogram = [want.count(j) for j in range(STEPS + 1)]
            assert (record["steps"], record["accepted"]) == (len(want), sum(want))
            assert record["histogram"] + [0] * (STEPS + 1 - len(record["histogram"])) == histogram


def test_the_numbers_are_the_simulators(run, rounds):
    results, _ = run
    base, tuned = results.runs
    steps = [r for _, r in rounds.values()]
    assert tuned.histogram == [sum(r.count(j) for r in steps) for j in range(STEPS + 1)]
    assert tuned.tau_micro == pytest.approx(micro_tau(steps)) and tuned.tau_micro > 1.5
    assert tuned.tau_macro == pytest.approx(macro_tau(steps))
    assert (tuned.lossless.compared, tuned.lossless.equal) == (len(rounds), len(rounds))
    tokens = sum(len(ids) for ids, _ in rounds.values())
    assert (tuned.completion_tokens, base.completion_tokens) == (tokens, 2 * tokens)
    assert base.tau_micro is None and base.histogram == [] and base.num_failed == tuned.num_failed == 0
    assert results.provenance["engine"]["name"] == "sglang" and results.servers["vanilla-k2"].method == "vanilla"


def test_steps_are_seen_where_they_happen(run, rounds):
    """tau by position, from the chunks of the stream, against the simulator's rounds laid along its answers."""
    tuned = run[0].runs[1]
    want = {}
    for _, accepted in rounds.values():
        position = 1
        for a in accepted:
            want.setdefault(position // 16, []).append(a)
            position += a + 1
    found = {part.start // 16: (part.steps, part.tau) for part in tuned.tau_by_position}
    assert sum(n for n, _ in found.values()) >= 0.9 * sum(map(len, want.values()))  # a busy client may miss one
    if sum(n for n, _ in found.values()) == sum(map(len, want.values())):
        assert found == {i: (len(a), pytest.approx(1 + sum(a) / len(a))) for i, a in want.items()}
    assert len(found) == len(want) >= 2


def test_times_make_sense(run):
    for one in run[0].runs:
        assert 0 < one.ttft.p50 <= one.ttft.p90 <= one.ttft.p99 and one.itl.p50 > 0
        assert one.tokens_per_second > 0 and one.tokens_per_second_per_request > 0
    ratio = run[0].runs[1].speedup
    assert ratio.low <= ratio.value <= ratio.high


def test_cpu_time_is_the_servers(run):
    """One thread computes (`OMP_NUM_THREADS=1`), and others make text of tokens: so about a core, and not nothing."""
    results, records = run
    for one in results.runs:
        own = [r for r in records if r["server"] == one.server]
        used = sum(r["cpu_seconds"] for r in own)
        assert 0.1 * sum(r["latency"] for r in own) < used
        assert one.cpu.tokens_per_second == pytest.approx(one.completion_tokens / used)
    assert results.runs[1].cpu.ratio.low <= results.runs[1].cpu.ratio.value <= results.runs[1].cpu.ratio.high


def killed(folder, how, group, seconds):
    """Kill a benchmark of the real server, `seconds` after it is started (None: while it answers).

    Returns how many processes the server had, and those that are left."""
    folder.mkdir(exist_ok=True)
    mark = uuid.uuid4().hex
    plan = {
        "model": str(TINY),
        "max_new_tokens": TOKENS,
        "warmup": 0,
        "python": engine_python(),
        "flags": CPU_FLAGS,
        "environment": {**ENVIRONMENT, orphans.MARK: mark},
        "servers": {"baseline": {}},
    }
    (folder / "plan.yaml").write_text(yaml.safe_dump(plan))
    words = ["--plan", str(folder / "plan.yaml"), "--output_dir", str(folder / "out")]
    command = [sys.executable, "-m", "swift_fastmtp.cli", "bench", *words]
    log, requests = folder / "out/logs/baseline.log", folder / "out/requests.jsonl"
    with open(folder / "printed.txt", "wb") as printed:
        process = subprocess.Popen(
            command, stdout=printed, stderr=printed, start_new_session=True, preexec_fn=orphans.hear_hangups
        )
    deadline = time.monotonic() + 240
    while not (log.exists() if seconds is not None else requests.exists() and requests.stat().st_size):
        assert process.poll() is None and time.monotonic() < deadline, (folder / "printed.txt").read_text()
        time.sleep(0.05)
    time.sleep(seconds or 0.5)
    alive = len(orphans.processes(mark))
    orphans.kill(process.pid, how, group)
    assert process.wait(timeout=120) != 0
    left = orphans.left_after(mark, 60)
    for one, _ in left:
        os.kill(one, signal.SIGKILL)
    return alive, left


@pytest.mark.matrix
def test_a_killed_benchmark_leaves_no_server(tmp_path):
    alive, left = killed(tmp_path, signal.SIGKILL, True, None)
    assert alive >= 3 and left == []  # the server, its scheduler, its detokenizer


@pytest.mark.matrix
def test_no_end_of_a_benchmark_leaves_a_server(tmp_path):
    """Six ends, while the server starts and while it answers."""
    chance = random.Random(0)
    ways = [(signal.SIGKILL, False), (signal.SIGHUP, False), (signal.SIGTERM, False), (signal.SIGHUP, True)]
    found = []
    for round_ in range(6):
        how, group = ways[round_ % len(ways)]
        when = None if round_ < 3 else chance.uniform(0.5, 12)
        found.append((how.name, when, *killed(tmp_path / str(round_), how, group, when)))
    assert [left for *_, left in found] == [[]] * len(found), found
    assert all(alive >= 3 for _, when, alive, _ in found if when is None), found
