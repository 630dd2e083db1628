"""A key is given in every way to every verb that takes one, and then looked for in all that was written and printed."""

import base64
import os
import shutil
import sys
import traceback
from urllib.parse import quote

import pytest
import yaml
from helpers.fake_engine import FakeEngine
from helpers.paths import ROOT, TINY
from helpers.scripted_engine import ScriptedEngine
from helpers.swift_runs import write_rows
from helpers.tiers import some_now

from swift_fastmtp.bench import bench
from swift_fastmtp.bench.results import read_results
from swift_fastmtp.cli import main
from swift_fastmtp.data import distill
from swift_fastmtp.data.chat_template import load_tokenizer
from swift_fastmtp.redaction import redact, redact_words
from swift_fastmtp.report import compare, report

FAKE = ROOT / "tests/helpers/fake_engine.py"
KEY = "canary-7f3a/90+c4%e"
"""With characters that addresses, JSON and base64 write otherwise."""
LOGIN = f"user:{quote(KEY, safe='')}"
FORMS = [KEY, quote(KEY, safe=""), base64.b64encode(f"user:{KEY}".encode()).decode(), "canary"]


@pytest.fixture(autouse=True, scope="module")
def _imported():
    """Once, and not in every fork."""
    assert distill and bench and compare and report
    load_tokenizer(str(TINY))


@pytest.fixture(autouse=True)
def _no_other_keys(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def fastmtp(folder, *args, **env):
    """The command in a process of its own; its status and all that it printed. A fork, since imports take seconds."""
    folder.mkdir(parents=True, exist_ok=True)
    printed = folder / "printed.txt"
    child = os.fork()
    if not child:
        status = 99
        try:
            output = os.open(printed, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(output, 1)
            os.dup2(output, 2)
            sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
            sys.argv = ["fastmtp", *map(str, args)]
            os.environ.update(env)
            os.chdir(folder)
            main()
            status = 0
        except SystemExit as end:
            if isinstance(end.code, str):
                print(end.code, file=sys.stderr)
            status = end.code if isinstance(end.code, int) else 1
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    _, ended = os.waitpid(child, 0)
    text = printed.read_text(errors="replace")
    assert "Traceback" not in text, text
    return os.waitstatus_to_exitcode(ended), text


def assert_clean(folder):
    """No form of the key in any file below a folder, nor in a file's name."""
    for path in [p for p in folder.rglob("*") if p.is_file()]:
        content = path.read_bytes()
        for form in FORMS:
            assert form.encode() not in content, f"{path}: {content[max(0, content.find(form.encode()) - 200) :][:400]}"
            assert form not in str(path.relative_to(folder))


WAYS = {
    "option": (["--api_key", KEY], {}, ""),
    "option=": ([f"--api_key={KEY}"], {}, ""),
    "abbreviation": (["--api", KEY], {}, ""),
    "shortest": (["--a", KEY], {}, ""),
    "shortest=": ([f"--api_k={KEY}"], {}, ""),
    "environment": ([], {"OPENAI_API_KEY": KEY}, ""),
    "address": ([], {}, f"{LOGIN}@"),
}


def with_login(url, login):
    return url.replace("//", f"//{login}")


@pytest.mark.parametrize("way", some_now(WAYS, ["shortest", "address"]))
def test_distill(way, tmp_path):
    options, env, login = WAYS[way]
    rows = write_rows(tmp_path / "rows.jsonl", 2)
    words = ["--model", TINY, "--prompts", rows, "--max_new_tokens", 8, "--retry_seconds", 1, "--concurrency", 2]
    with FakeEngine(kind="openai") as server:
        address = ["--base_url", with_login(server.url, login)]
        server.echo = 401
        status, text = fastmtp(tmp_path / "401", "distill", *words, "--output", "out.jsonl", *address, *options, **env)
        assert status == 1 and "answers 401 (Error code: 401" in text
        assert "is the server's key in OPENAI_API_KEY, or given with --api_key?" in text
        server.echo = 400
        words += ["--on_bad_row", "skip"]
        status, text = fastmtp(tmp_path / "400", "distill", *words, "--output", "out.jsonl", *address, *options, **env)
        assert status == 0 and "2 prompt rows left out" in text
        wanted = f"Basic {FORMS[2]}" if login else f"Bearer {KEY}"
        assert server.authorizations - {None} == {wanted}  # hidden, and sent
    report = (tmp_path / "400/out.jsonl.report.json").read_text()
    assert "wrong key" in report and ("***" in report or "${OPENAI_API_KEY}" in report)
    with ScriptedEngine(TINY) as server:
        address = ["--base_url", with_login(server.url, login)]
        status, text = fastmtp(tmp_path / "200", "distill", *words, "--output", "out.jsonl", *address, *options, **env)
        assert status == 0, text
    assert_clean(tmp_path)


@pytest.mark.parametrize(
    "way", some_now([f"{way}{mark}" for way in WAYS for mark in ("", " ")], ["option ", "address"])
)
def test_running_servers(way, tmp_path):
    """And what is made of their results; with a name before the address, and without."""
    options, env, login = WAYS[way.strip()]
    named = "vanilla=" if way.endswith(" ") else ""
    words = ["--model", TINY, "--num_questions", 2, "--max_new_tokens", 8, "--warmup", 1, "--retry_seconds", 1]
    with FakeEngine(num_steps=2) as server, FakeEngine() as base:
        server.launch_command = f"python -m sglang.launch_server --api-key {KEY} --admin-api-key={KEY} --port 1"
        address = ["--base_url", named + with_login(server.url, login), f"baseline={with_login(base.url, login)}"]
        status, text = fastmtp(tmp_path / "200", "bench", *words, "--output_dir", "out", *address, *options, **env)
        assert status == 0, text
        for echo in (400, 401):
            server.echo = base.echo = echo
            folder = tmp_path / str(echo)
            status, text = fastmtp(folder, "bench", *words, "--output_dir", "out", *address, *options, **env)
            assert status == 1 and str(echo) in text
        wanted = f"Basic {FORMS[2]}" if login else f"Bearer {KEY}"
        assert server.authorizations == {wanted}
    results = tmp_path / "200/out/results.json"
    server = next(server for server in read_results(results).servers.values() if server.num_steps)
    assert server.command[-5:] == ["--api-key", "***", "--admin-api-key=***", "--port", "1"]
    assert fastmtp(tmp_path / "report", "report", results, "--output_dir", "out")[0] == 0
    assert fastmtp(tmp_path / "compare", "compare", results, results)[0] == 0
    assert_clean(tmp_path)


def plan_of(folder, key, **server):
    """A plan outside of what is searched, whose server gets the key in every place."""
    command = [sys.executable, str(FAKE), "--num_steps", "{num_steps}", "--api-key", key, f"--admin-api-key={key}"]
    server = {"label": "Fake", "command": command, "environment": {"SERVER_TOKEN": key}, **server}
    values = {
        "model": str(TINY),
        "num_questions": 2,
        "max_new_tokens": 8,
        "warmup": 1,
        "retry_seconds": 1,
        "num_steps": [1],
        "servers": {"fake": server},
    }
    folder.mkdir()
    (folder / "plan.yaml").write_text(yaml.safe_dump(values))
    return folder / "plan.yaml"


@pytest.mark.parametrize("written", some_now(["${CANARY}", "${SERVER_KEY}", KEY], ["${SERVER_KEY}"]))
def test_a_plan(written, tmp_path, tmp_path_factory):
    inputs = tmp_path_factory.mktemp("inputs")
    env = {"CANARY": KEY, "SERVER_KEY": KEY}
    more = {"environment": {"SERVER_TOKEN": written, "WHATEVER": written if "$" in written else "x"}}
    plan = plan_of(inputs / "200", written, flags=["--echo", "0"], **more)
    status, text = fastmtp(tmp_path / "200", "bench", "--plan", plan, "--output_dir", "out", **env)
    assert status == 0, text
    shown = written if "$" in written else "***"
    results = read_results(tmp_path / "200/out/results.json")
    command = results.servers["fake-k1"].command
    assert command[command.index("--api-key") + 1] == shown
    log = (tmp_path / "200/out/logs/fake-k1.log").read_text()
    assert log.startswith("$ ") and f"--api-key {shown}" in log.replace("'", "") and "Namespace(" in log
    # Again, with another key: it measures the same. Of another variable nobody knows.
    other = {"CANARY": "canary-other-one", "SERVER_KEY": "canary-other-one"}
    status, text = fastmtp(tmp_path / "200", "bench", "--plan", plan, "--output_dir", "out", **other)
    assert status == 0 or (written == "${CANARY}" and "of a plan with variables.CANARY" in text), text

    for echo in (400, 401):
        plan = plan_of(inputs / str(echo), written, flags=["--echo", str(echo)], **more)
        words = ["bench", "--plan", plan, "--output_dir", "out", "--api", KEY]
        assert fastmtp(tmp_path / str(echo), *words, **env)[0] == 1
    # A server that dies, and says why.
    script = ["bash", "-c", f"echo Error: no such key: {written}; exit 7"]
    plan = plan_of(inputs / "dies", written, command=script, method="tuned", **more)
    status, text = fastmtp(tmp_path / "dies", "bench", "--plan", plan, "--output_dir", "out", **env)
    assert status == 1 and "ended with status 7 (Error: no such key: " in text
    if written == KEY:
        return assert_clean(tmp_path)
    # A program that is not there.
    plan = plan_of(inputs / "none", written, command=[f"/nowhere/{written}"], **more)
    status, text = fastmtp(tmp_path / "none", "bench", "--plan", plan, "--output_dir", "out", **env)
    assert status == 1 and "cannot start /nowhere/${" in text
    # Running servers, with a login.
    with FakeEngine(num_steps=1) as server:
        name = written[2:-1]
        url = with_login(server.url, f"user:${{{name}}}@")
        plan = inputs / "url.yaml"
        plan.write_text(f"model: {TINY}\nnum_questions: 2\nwarmup: 0\nservers: {{a: {{base_url: '{url}'}}}}")
        words = ["bench", "--plan", plan, "--output_dir", "out"]
        status, text = fastmtp(tmp_path / "url", *words, CANARY=quote(KEY, safe=""), SERVER_KEY=quote(KEY, safe=""))
        assert status == 0 and server.authorizations == {f"Basic {FORMS[2]}"}
    assert_clean(tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        "model: [${CANARY}",
        "servers: {a: ${CANARY}, b: @}",
        "${CANARY}: 1",
        "servers: {'${CANARY}/x': {}}",
        "servers: {a: {base_url: 'http://user:${CANARY}@[x'}}",
        "servers: {a: {base_url: 'user:${CANARY}@host'}}",
        "servers: {a: {folder: '${CANARY}'}}",
        "servers: {a: {method: '${CANARY}'}}",
        "servers: {a: {base_url: 'http://h', num_steps: '${CANARY}'}}",
        "tasks: ['${CANARY}']",
        "concurrency: ${CANARY}",
        "servers: ${CANARY}",
    ],
)
def test_errors_about_a_plan(text, tmp_path, tmp_path_factory):
    path = tmp_path_factory.mktemp("inputs") / "plan.yaml"
    if "model:" not in text:
        text += f"\nmodel: {TINY}"
    if "servers:" not in text:
        text += "\nservers: {base: {}}"
    path.write_text(text)
    status, printed = fastmtp(tmp_path, "bench", "--plan", path, "--output_dir", "out", CANARY=KEY)
    assert status == 1 and len(printed.splitlines()) == 1 and printed.startswith("fastmtp: error: ")
    assert_clean(tmp_path)


def test_mistakes_on_the_command_line(tmp_path):
    words = ["bench", "--output_dir", "out", "--base_url", f"http://{LOGIN}@127.0.0.1:1", "--model", TINY]
    for more in (["--apikey", KEY], ["--api_kye", KEY], [f"--api_kye={KEY}"], ["--warmup", "x", "--api_key", KEY]):
        status, text = fastmtp(tmp_path, *words, *more)
        assert status == 2 and "error: " in text
    twice = ["--base_url", f"http://{LOGIN}@127.0.0.1:1", f"http://{LOGIN}@127.0.0.1:1"]
    status, text = fastmtp(tmp_path, *words, *twice)
    assert status == 1 and "the name 127.0.0.1:1 is there twice" in text
    for url in (f"http://{LOGIN}@127.0.0.1:x", f"{LOGIN}@host"):
        for verb in (["bench", "--output_dir", "out"], ["distill", "--output", "o", "--prompts", "p.jsonl"]):
            write_rows(tmp_path / "p.jsonl", 1)
            status, text = fastmtp(tmp_path, *verb, "--model", TINY, "--base_url", url)
            assert status == 1 and "is no address" in text
    assert_clean(tmp_path)


def test_results_of_an_older_version(tmp_path, tmp_path_factory):
    """They are clean in what is made of them."""
    import json

    from helpers import bench_results

    value = bench_results.table_2()
    value["provenance"]["command"] = ["fastmtp", "bench", "--api_key", KEY, "--base_url", f"http://{LOGIN}@host"]
    value["servers"]["tuned-k3"]["command"] = ["python", "-m", "sglang.launch_server", f"--api-key={KEY}"]
    old = tmp_path_factory.mktemp("inputs") / "results.json"
    old.write_text(json.dumps(value))
    status, text = fastmtp(tmp_path, "report", old, "--output_dir", "out")
    assert status == 0 and "--api_key" in (tmp_path / "out/report.md").read_text(), text
    shutil.copytree(TINY, tmp_path / "model", ignore=shutil.ignore_patterns("README.md"))
    (tmp_path / "model" / "fastmtp.json").write_text(json.dumps({"base_model": "OWNER/NAME", "loss": "kl"}))
    status, text = fastmtp(tmp_path, "card", "model", "--results", old)
    assert status == 0 and (tmp_path / "model/README.md").exists(), text
    assert_clean(tmp_path)


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("http://a:b@h/v1, http://c@h", "http://***@h/v1, http://***@h"),
        ("Authorization: Bearer abc", "Authorization: Bearer ***"),
        ("{'Authorization': 'Basic dXNlcjpw'}", "{'Authorization': 'Basic ***'}"),
        ("bash -c 'x --api-key abc --port 1'", "bash -c 'x --api-key *** --port 1'"),
        ("ServerArgs(api_key='abc', port=1)", "ServerArgs(api_key='***', port=1)"),
        ('{"api_key": "abc"}', '{"api_key": "***"}'),
        ("sk-0123456789abcdef0123 is wrong", "sk-*** is wrong"),
        ("--api-key ${KEY} and http://${USER}:${KEY}@h", "--api-key ${KEY} and http://${USER}:${KEY}@h"),
        # What is no secret stays.
        ("basic information, token 4 differs: 'x'", "basic information, token 4 differs: 'x'"),
        ("--speculative-token-map map.pt --max-total-tokens 8", "--speculative-token-map map.pt --max-total-tokens 8"),
        ("is it in OPENAI_API_KEY, or given with --api_key?", "is it in OPENAI_API_KEY, or given with --api_key?"),
    ],
)  # fmt: skip
def test_places_of_secrets(text, want):
    assert redact(text) == want


def test_flags_of_secrets():
    words = [
        "x",
        "--api-key",
        "a",
        "--admin-api-key=b",
        "--hf-token",
        "c",
        "--token",
        "--port",
        "1",
        "--map-token-map",
        "d",
    ]
    hidden = ["x", "--api-key", "***", "--admin-api-key=***", "--hf-token", "***", "--token", "--port", "1"]
    assert redact_words(words) == [*hidden, "--map-token-map", "d"]
    assert redact_words(["--a", "b", "--api", "c"]) == ["--a", "b", "--api", "***"]
    assert redact_words(["--a", "b", "--api_k=c"], "--a") == ["--a", "***", "--api_k=***"]
