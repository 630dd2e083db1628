"""Self-distillation from a real SGLang server: the same rows as without faults, whatever breaks and however often.

`PYTHONPATH=tests python tests/serving/test_fault_drill.py 40` runs the drill with 40 kills instead of the test's few.
"""

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers.engine import Server
from helpers.faults import FAULTS, Proxy
from helpers.paths import ROOT, TINY

from swift_fastmtp.data.distill import distill
from swift_fastmtp.errors import FastMTPError
from swift_fastmtp.files.rows import read_rows

pytestmark = pytest.mark.engine

COMMAND = ["python", "-m", "sglang.launch_server", "--model-path", str(TINY), "--trust-remote-code"]
TOKENS = 24


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return tmp_path_factory.mktemp("distill")


@pytest.fixture(scope="module")
def server(work):
    with Server(COMMAND, work / "server.log") as server:
        yield server


@pytest.fixture(scope="module")
def prompts(work):
    return write_prompts(work / "prompts.jsonl", 60)


def write_prompts(path, count):
    """Single turns, conversations of two turns, and system prompts."""
    rows = read_rows(ROOT / "examples/prompts/train.jsonl")[:count]
    with open(path, "w", encoding="utf-8") as file:
        for i, row in enumerate(rows):
            user = row["messages"][0]
            more = (
                [{"role": "assistant", "content": "…"}, {"role": "user", "content": "Say more."}] if i % 3 == 0 else []
            )
            system = [{"role": "system", "content": "Answer briefly."}] if i % 4 == 0 else []
            row = {"id": f"row-{i}", "category": row["category"], "messages": [*system, user, *more]}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    return path


def from_server(prompts, output, port, **changes):
    settings = {"max_new_tokens": TOKENS, "temperature": 0.0, "base_urls": [f"http://127.0.0.1:{port}"], **changes}
    distill(str(TINY), str(prompts), str(output), **settings)
    return output


def test_server_and_process_give_the_same_rows(server, prompts, work):
    """Greedy: text, token ids, finish reasons, turn by turn on the model's own history."""
    distill(str(TINY), str(prompts), str(work / "here.jsonl"), max_new_tokens=TOKENS, temperature=0, batch_size=1)
    there = from_server(prompts, work / "there.jsonl", server.port)
    assert (work / "here.jsonl").read_bytes() == there.read_bytes()
    rows = read_rows(there)
    assert [r["id"] for r in rows] == [f"row-{i}" for i in range(60)]
    turns = [[m for m in r["messages"] if m["role"] == "assistant"] for r in rows]
    assert {len(t) for t in turns} == {1, 2} and all("…" not in m["content"] for t in turns for m in t)


@pytest.mark.matrix
def test_sampled_answers_differ_and_are_counted(server, prompts, work):
    out = from_server(prompts, work / "sampled.jsonl", server.port, temperature=1.0, num_answers=3)
    rows = read_rows(out)
    assert [(r["id"], r["sample"]) for r in rows] == [(f"row-{i}", s) for i in range(60) for s in range(3)]
    assert len({rows[i]["messages"][-1]["content"] for i in range(0, 9)}) > 6
    report = json.loads((work / "sampled.jsonl.report.json").read_text())
    assert report["rows"] == 180 and sum(report["finish_reasons"].values()) == 180


def test_another_chat_template_is_found(server, prompts, work, tmp_path):
    """The folder's template is changed after the server has started: one line, before anything is written."""
    folder = tmp_path / "model"
    folder.mkdir()
    for file in TINY.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = folder / "tokenizer_config.json"
    config.write_text(config.read_text().replace("You are a helpful assistant.", "Be kind."))
    with pytest.raises(FastMTPError, match=r"the server saw another prompt .* differs: .*You are .*Be kind"):
        url = f"http://127.0.0.1:{server.port}"
        distill(str(folder), str(prompts), str(tmp_path / "o"), base_urls=[url], max_new_tokens=TOKENS)


def test_refused_rows_stop_or_are_counted(server, work, tmp_path):
    """A prompt beyond the server's context is that row's fault."""
    rows = [{"prompt": "one"}, {"prompt": "word " * 4000}, {"prompt": "two"}]
    prompts = tmp_path / "p.jsonl"
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(FastMTPError, match=r"p.jsonl:2: the server refuses it"):
        from_server(prompts, tmp_path / "stop.jsonl", server.port)
    out = from_server(prompts, tmp_path / "skip.jsonl", server.port, on_bad_row="skip")
    assert len(read_rows(out)) == 2
    refused = json.loads((tmp_path / "skip.jsonl.report.json").read_text())["refused_rows"]
    assert refused["count"] == 1 and "p.jsonl:2" in refused["rows"][0]


@pytest.mark.matrix
def test_fault_drill(server, prompts, work):
    drill(server, prompts, work / "drill", client_kills=2, server_kills=1)


def drill(server, prompts, folder, client_kills, server_kills, seed=0):
    """Kill client and server at random moments, through a proxy that fails all the time; compare with a quiet run."""
    folder.mkdir(parents=True)
    quiet = from_server(prompts, folder / "quiet.jsonl", server.port)
    rng = random.Random(seed)
    output = folder / "drilled.jsonl"
    command = [str(Path(sys.executable).parent / "fastmtp"), "distill", "--model", str(TINY), "--prompts", str(prompts)]
    command += ["--output", str(output), "--max_new_tokens", str(TOKENS), "--temperature", "0", "--concurrency", "8"]
    command += ["--timeout", "2", "--retry_seconds", "300"]
    killed = {"client": 0, "server": 0}
    client, lost = None, 0
    with Proxy(server.port, seed=seed) as proxy:
        command += ["--base_url", f"http://127.0.0.1:{proxy.port}"]
        kills = ["client"] * client_kills + ["server"] * server_kills
        rng.shuffle(kills)
        while not output.exists():
            before = _answers(output)
            if client is None:
                with open(folder / "client.log", "ab") as log:
                    client = subprocess.Popen(command, stdout=log, stderr=log)
            # Not before it has begun to answer; then at any moment.
            while kills and _answers(output) == before and client.poll() is None:
                time.sleep(0.02)
            time.sleep(rng.random() * 0.2)
            kill = kills.pop() if kills else None
            if kill == "server":
                server.process.send_signal(signal.SIGKILL)
                server.__exit__()
                server.__enter__()
                proxy.upstream = server.port
            elif kill == "client":
                client.kill()
            if kill is not None:
                killed[kill] += 1
            if kill != "server":
                code = client.wait()
                assert code in (0, -signal.SIGKILL), (folder / "client.log").read_text()[-3000:]
                client = None
            lost += not output.exists() and _answers(output) < before
        met = dict(proxy.met)
    assert output.read_bytes() == quiet.read_bytes()
    assert lost == 0 and not output.with_name(output.name + ".parts").exists()
    assert all(met[fault] for fault in FAULTS), met
    return {"kills": killed, "requests": met}


def _answers(output):
    """Whole records on disk; a finished job has all."""
    parts = list(output.with_name(output.name + ".parts").glob("shard-*"))
    return sum(part.read_bytes().count(b"\n") for part in parts) if parts else 0


if __name__ == "__main__":
    import tempfile

    kills = int(sys.argv[1])
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        asked = write_prompts(place / "prompts.jsonl", 830)
        with Server(COMMAND, place / "server.log") as running:
            print(drill(running, asked, place / "drill", client_kills=kills, server_kills=kills // 5))
