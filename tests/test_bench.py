"""The benchmark's client against servers that fail: nothing is lost, nothing wrong is kept, one line says what it is.

The servers are fakes (`helpers/fake_engine.py`); numbers of the real engine are in `serving/test_bench_engine.py`.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from helpers.fake_engine import FakeEngine, answer, chunks
from helpers.paths import ROOT, TINY

from swift_fastmtp.bench.bench import bench
from swift_fastmtp.bench.plan import make_plan, read_plan
from swift_fastmtp.bench.results import read_results
from swift_fastmtp.bench.summary import warnings
from swift_fastmtp.data.chat_template import encode_prompt, load_tokenizer
from swift_fastmtp.errors import FastMTPError
from swift_fastmtp.report.merge import load_results
from swift_fastmtp.report.tables import acceptance_table
from swift_fastmtp.serving.maps import VARIABLE

FAKE = ROOT / "tests/helpers/fake_engine.py"
ASKED = {
    "model": str(TINY),
    "num_questions": 6,
    "max_new_tokens": 10,
    "rounds": 1,
    "warmup": 1,
    "retry_seconds": 1,
}


def lines(folder):
    return [json.loads(line) for line in (Path(folder) / "requests.jsonl").read_text().splitlines()]


def named(record):
    return tuple(record[k] for k in ("server", "task", "temperature", "concurrency", "round", "id", "turn"))


def untimed(results):
    """What does not depend on the clock."""
    found = []
    for run in results.as_json()["runs"]:
        timed = ("ttft", "itl", "step", "speedup", "round_speeds", "cpu")
        found.append({k: v for k, v in run.items() if k not in timed and "second" not in k})
    return found


@pytest.fixture
def pair():
    with FakeEngine() as base, FakeEngine(num_steps=2) as drafting:
        yield base, drafting


def urls(pair):
    return [f"baseline={pair[0].url}", f"vanilla={pair[1].url}"]


def measure(pair, folder, **changes):
    return bench(str(folder), base_urls=urls(pair), **{**ASKED, **changes})


def test_what_is_measured(pair, tmp_path, capsys):
    results = measure(pair, tmp_path, temperatures=[0.0, 0.7], concurrency=[1, 3])
    assert results == read_results(tmp_path / "results.json")
    assert [s.method for s in results.servers.values()] == ["baseline", "vanilla"]
    assert [s.num_steps for s in results.servers.values()] == [0, 2]
    assert len(results.runs) == 8 and pair[1].flushed == 4
    tokenizer = load_tokenizer(str(TINY))
    records = [r for r in lines(tmp_path) if r["server"] == "vanilla" and not r["temperature"]]
    assert {len([r for r in records if r["turn"] == t]) for t in (0, 1)} == {12, 6}
    for r in records:
        if r["turn"] == 0:
            continue
        first = next(x for x in records if named(x) == (*named(r)[:-1], 0))
        task = make_plan({**ASKED, "servers": {"x": {"base_url": "http://u"}}}).tasks["smoke"]
        turns = next(q.turns for q in task.questions if q.id == r["id"])
        history = [("user", turns[0]), ("assistant", first["text"]), ("user", turns[1])]
        ids = encode_prompt(tokenizer, [{"role": a, "content": b} for a, b in history])
        assert r["prompt_tokens"] == len(ids) and r["output_ids"] == answer(ids, 10)
    for run in results.runs[4:]:
        mine = [r for r in records if r["concurrency"] == run.concurrency] if not run.temperature else None
        if mine:
            steps = [c for r in mine for c in chunks(r["completion_tokens"], 2)]
            assert run.histogram == [sum(a == k for _, a in steps) for k in range(3)]
            assert run.tau_micro == 1 + sum(a for _, a in steps) / len(steps)
            assert run.lossless.equal == run.lossless.compared == run.num_requests == 9
            assert sum(part.steps for part in run.tau_by_position) == len(steps)
        else:
            assert run.lossless is None
        assert run.speedup.low <= run.speedup.value <= run.speedup.high and run.ttft.p50 <= run.ttft.p99
    assert capsys.readouterr().out.count("9/9") == 2


def test_seven_drafts_per_step(tmp_path):
    """Rates to the last depth, in the results and in a report's table."""
    with FakeEngine() as base, FakeEngine(num_steps=7) as drafting:
        results = measure((base, drafting), tmp_path, max_new_tokens=12)
    (run,) = [run for run in results.runs if run.server == "vanilla"]
    assert [len(x) for x in (run.marginal, run.conditional, run.histogram)] == [7, 7, 8]
    table = acceptance_table(load_results([tmp_path / "results.json"]), 0.0)
    assert [name for group, name in table.columns if group == "accepted at depth"] == list("1234567")


def test_passing_faults_leave_no_trace(pair, tmp_path):
    quiet = measure(pair, tmp_path / "quiet")
    for i, fault in enumerate(("garbage", "500", "error in stream", "hang up", "no integers")):
        pair[1].fail(fault, 2)
        assert untimed(measure(pair, tmp_path / str(i), retry_seconds=30)) == untimed(quiet)
        keys = [named(r) for r in lines(tmp_path / str(i))]
        assert len(keys) == len(set(keys)) == 18


FAULTS = {
    "garbage": "(an empty response); what is finished is kept",
    "500": "answers 500 (Error code: 500)",
    "no metadata": "its answers do not tell spec_verify_ct, spec_num_correct_drafts, as SGLang 0.5.23 should",
    "wrong histogram": "drafts accepted in 5 steps; its acceptance cannot be trusted",
    "empty": "vanilla: every answer to smoke is empty; is",
    "refuse": "vanilla: refuses every request of smoke (Error code: 400",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_broken_server_is_one_line(fault, pair, tmp_path):
    pair[1].fail(fault)
    with pytest.raises(FastMTPError) as error:
        measure(pair, tmp_path, warmup=0)
    assert FAULTS[fault] in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "results.json").exists()
    pair[1].fail("")
    asked = pair[0].asked
    results = measure(pair, tmp_path, warmup=0)
    assert pair[0].asked == asked  # what was finished is not asked for again
    assert all(run.num_requests == 9 and run.num_failed == 0 for run in results.runs)


LIES = {
    "too many accepted": ({"spec_num_correct_drafts": 99}, "99 drafts accepted in 5 steps of 2 drafts is not possible"),
    "negative": ({"spec_num_correct_drafts": -1}, "-1 drafts accepted in 5 steps of 2 drafts is not possible"),
    "negative steps": ({"spec_verify_ct": -5}, "drafts accepted in -5 steps of 2 drafts is not possible"),
    "NaN": ({"spec_num_correct_drafts": float("nan")}, "its answers do not tell spec_num_correct_drafts"),
    "a histogram of texts": ({"spec_correct_drafts_histogram": ["1"]}, "its histogram ['1'] is not that of"),
    "a negative histogram": (
        {"spec_correct_drafts_histogram": [-1, 8, -2]},
        "its histogram [-1, 8, -2] is not that of",
    ),
    "a length that is no number": (
        {"prompt_tokens": float("inf")},
        "a wrong prompt_tokens: must be a valid integer, not inf",
    ),
}


@pytest.mark.parametrize("lie", LIES)
def test_numbers_that_cannot_be(lie, pair, tmp_path):
    """Of a server, at once, with the run named; nothing of it is kept."""
    pair[1].lies, message = LIES[lie]
    with pytest.raises(FastMTPError) as error:
        measure(pair, tmp_path, warmup=0)
    assert message in str(error.value) and str(error.value).startswith("vanilla on smoke, T=0, 1 at once: ")
    assert not (tmp_path / "results.json").exists()
    assert not [r for r in lines(tmp_path) if r["server"] == "vanilla"]


@pytest.mark.parametrize("value", ["NaN", "-1", "x", "1e999", "7"])
def test_counters_that_cannot_be(value, tmp_path):
    """Of vLLM; 7 drafts accepted behind 3 is impossible too."""
    with FakeEngine(num_steps=2, kind="vllm") as server:
        name = "vllm:spec_decode_num_accepted_tokens_per_pos_total"
        metrics = [f'{name}{{position="{i}"}} {n}' for i, n in ((0, 3), (1, value))]
        server.lies = {"metrics": ["vllm:spec_decode_num_drafts_total 5", *metrics]}
        with pytest.raises(FastMTPError, match=r"cannot be trusted|no count"):
            bench(str(tmp_path / "out"), base_urls=[f"vanilla={server.url}"], **{**ASKED, "warmup": 0})
    assert not (tmp_path / "out/results.json").exists()


def test_files_of_a_folder_that_somebody_changed(pair, tmp_path):
    """One line each, and nothing is overwritten."""
    measure(pair, tmp_path / "good", num_questions=2)
    plan = json.loads((tmp_path / "good/plan.json").read_text())
    record = lines(tmp_path / "good")[0]
    changes = {
        "plan.json": [
            "[]",
            "null",
            "[" * 10_000,
            '{"servers": 1}',
            json.dumps({**plan, "temperatures": [0, 1]}),
            "\xff",
        ],
        "requests.jsonl": [
            "[]",
            json.dumps({**record, "task": "other"}),
            json.dumps({**record, "latency": -1}),
            json.dumps({**record, "latency": float("nan")}),
            json.dumps({**record, "chunk_tokens": [1]}),
            json.dumps({**record, "output_ids": [1, "2"]}),
            json.dumps({**record, "accepted": 3}),
            "[" * 10_000,
        ],
    }
    for name, contents in changes.items():
        for i, content in enumerate(contents):
            folder = tmp_path / f"{name}-{i}"
            shutil.copytree(tmp_path / "good", folder)
            (folder / name).write_text(content + "\n", encoding="latin-1")
            before = (folder / name).read_bytes()
            with pytest.raises(FastMTPError) as error:
                measure(pair, folder, num_questions=2)
            assert name in str(error.value) and len(str(error.value).splitlines()) == 1 and len(str(error.value)) < 600
            assert (folder / name).read_bytes() == before
    os.remove(tmp_path / "good/plan.json")
    os.mkfifo(tmp_path / "good/plan.json")
    with pytest.raises(FastMTPError, match=r"plan.json: not the plan of a benchmark .*is a pipe, not a file"):
        measure(pair, tmp_path / "good", num_questions=2)


def test_one_refused_request_is_counted_and_said(pair, tmp_path):
    pair[1].fail("refuse", 1)
    results = measure(pair, tmp_path, warmup=0)
    run = results.runs[1]
    assert run.num_failed == 1 and run.num_requests in (8, 9) and run.lossless.compared == run.num_requests - 1
    assert "1 of" in warnings(results)[0] and "refused" in warnings(results)[0]
    assert measure(pair, tmp_path, warmup=0) == results  # and not tried again


def test_other_text_is_found(pair, tmp_path):
    pair[1].shift = 1
    results = measure(pair, tmp_path)
    lossless = results.runs[1].lossless
    assert (lossless.compared, lossless.equal) == (6, 0)  # second turns answer another history
    first = lossless.first_divergence
    record = next(r for r in lines(tmp_path) if r["id"] == first.id and r["turn"] == first.turn)
    assert first.token == record["completion_tokens"] - 1
    assert f"first: {first.id}, turn 0, token {first.token}" in warnings(results)[0]


def test_a_server_that_changes_its_model(pair, tmp_path):
    measure(pair, tmp_path)
    other = tmp_path / "other"
    pair[1].change_at = pair[1].asked + 5
    with pytest.raises(FastMTPError, match=r"vanilla: the server at .* is now model fake \(weights 42\), it was fake;"):
        measure(pair, other)
    assert any("void" in r for r in lines(other))
    with pytest.raises(FastMTPError, match="drafts per step, not 2"):
        pair[1].num_steps = 3
        measure(pair, other)
    pair[1].num_steps, pair[1].weights, pair[1].change_at = 2, "default", 10**9
    assert untimed(measure(pair, other)) == untimed(read_results(tmp_path / "results.json"))


def test_older_names_are_read(tmp_path):
    with FakeEngine(num_steps=2, version="0.5.9") as old:
        results = bench(str(tmp_path), base_urls=[f"vanilla={old.url}"], **ASKED)
    assert results.baseline is None and results.runs[0].tau_micro > 1 and results.runs[0].speedup is None


def test_openai_servers(tmp_path):
    with FakeEngine(kind="openai") as base, FakeEngine(num_steps=2, kind="vllm") as vllm:
        servers = {"baseline": {"base_url": base.url, "num_steps": 0}, "v": {"base_url": vllm.url}}
        plan = tmp_path / "plan.yaml"
        plan.write_text(yaml.safe_dump({**ASKED, "servers": servers}))
        results = bench(str(tmp_path / "out"), plan=str(plan))
        run = results.runs[1]
        own = [r for r in lines(tmp_path / "out") if r["server"] == "v" and "counters" not in r]
        steps = [a for r in own for _, a in chunks(r["completion_tokens"], 2)]
        assert run.histogram == [steps.count(k) for k in range(3)] and run.tau_micro == 1 + sum(steps) / len(steps)
        assert run.tau_macro is None and run.itl is not None and results.runs[0].itl is None
        assert run.lossless.equal == run.lossless.compared == 9  # as text: one of them tells no ids
        assert results.servers["v"].method == "tuned" and base.flushed == 0

    with FakeEngine(num_steps=2, kind="openai") as silent:
        servers = {"v": {"base_url": silent.url, "num_steps": 2}}
        plan.write_text(yaml.safe_dump({**ASKED, "servers": servers}))
        results = bench(str(tmp_path / "silent"), plan=str(plan))
    assert results.runs[0].tau_micro is None and "tau is not known" in warnings(results)[0]


def test_vllm_tells_of_each_request(tmp_path):
    """With `--per-request-spec-decode-metrics`: then the mean over answers is known too, whoever else is served."""
    plan = tmp_path / "plan.yaml"
    with FakeEngine(num_steps=2, kind="vllm") as server:
        server.tells = True
        plan.write_text(yaml.safe_dump({**ASKED, "servers": {"v": {"base_url": server.url}}}))
        (run,) = bench(str(tmp_path / "out"), plan=str(plan)).runs
        own = [r for r in lines(tmp_path / "out") if "counters" not in r]
        steps = [[a for _, a in chunks(r["completion_tokens"], 2)] for r in own]
        assert [(r["steps"], r["accepted"]) for r in own] == [(len(s), sum(s)) for s in steps]
        assert run.tau_macro == pytest.approx(sum(1 + sum(s) / len(s) for s in steps) / len(steps))
        assert sum(run.histogram) == sum(map(len, steps))
        server.lies = {"num_accepted_draft_tokens": 99}
        with pytest.raises(FastMTPError, match=r"99 drafts accepted in .* is not possible"):
            bench(str(tmp_path / "lies"), plan=str(plan))


THINKING = (
    "{%- for m in messages %}"
    "{%- set text = m.content %}"
    "{%- if m.role == 'system' and not loop.first %}{{ raise_exception('Only the first may be system.') }}{%- endif %}"
    "{%- if m.role == 'assistant' and '</think>' in text %}{%- set text = text.split('</think>')[1]|trim %}{%- endif %}"
    "{{- '<|im_start|>' + m.role + '\\n' + text + '<|im_end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n<think>\\n' }}{%- endif %}"
)
"""As templates of reasoning models are: `<think>` is open before the answer, and history goes without the reasoning."""


def with_template(folder, template):
    """The tiny model's folder, with another chat template or none."""
    shutil.copytree(TINY, folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    del settings["chat_template"]
    if template:
        settings["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def two_turns(folder):
    path = folder / "turns.jsonl"
    path.write_text(json.dumps({"id": "t", "turns": ["When is high water?", "Are you sure?"]}) + "\n")
    return str(path)


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning"])
def test_history_is_the_message_that_the_server_gave(key, tmp_path):
    """Content and reasoning apart, under the names of SGLang and of vLLM; also after a kill between the turns."""
    options = {**ASKED, "tasks": [two_turns(tmp_path)], "num_questions": None, "warmup": 0, "max_new_tokens": 32}
    with FakeEngine(kind="vllm") as server:
        server.reasoning = key
        bench(str(tmp_path / "out"), base_urls=[f"baseline={server.url}"], **options)
        first, second = lines(tmp_path / "out")
        assert first["reasoning_content"] and first["text"]
        generated = [int(x) for x in (first["reasoning_content"] + first["text"]).split()]
        assert generated == first["output_ids"]
        asked = server.conversations[-1]
        turn = {"role": "assistant", "content": first["text"], "reasoning_content": first["reasoning_content"]}
        assert asked[1] == {**turn, "reasoning": first["reasoning_content"]}  # vLLM reads the one, SGLang the other

        (tmp_path / "out" / "requests.jsonl").write_text(json.dumps(first) + "\n")
        (tmp_path / "out" / "results.json").unlink()
        bench(str(tmp_path / "out"), base_urls=[f"baseline={server.url}"], **options)
        assert server.conversations[-1] == asked and len(server.conversations) == 3
        assert lines(tmp_path / "out")[1]["output_ids"] == second["output_ids"]


def test_history_of_raw_text_is_what_the_template_makes_of_it(tmp_path):
    """SGLang's `/generate` gives the reasoning as text; the template of the folder takes it out."""
    model = with_template(tmp_path / "model", THINKING)
    options = {**ASKED, "model": str(model), "tasks": [two_turns(tmp_path)], "num_questions": None, "warmup": 0}
    with FakeEngine() as server:
        server.text = "the moon\n</think>\n\n"
        bench(str(tmp_path / "out"), base_urls=[f"baseline={server.url}"], **options)
        first, _ = lines(tmp_path / "out")
        assert first["text"].startswith("the moon\n</think>")
        answer = first["text"].removeprefix(server.text)
        tokenizer = load_tokenizer(str(model))
        text = tokenizer.decode(server.prompts[1])
    assert text == (
        "<|im_start|>user\nWhen is high water?<|im_end|>\n"
        f"<|im_start|>assistant\n{answer}<|im_end|>\n"
        "<|im_start|>user\nAre you sure?<|im_end|>\n<|im_start|>assistant\n<think>\n"
    )


@pytest.mark.parametrize("reason", ["eos_token", "end_turn", "EOS", "tool_calls"])
@pytest.mark.parametrize("kind", ["sglang", "openai"])
def test_other_words_for_an_answer_that_ended(kind, reason, tmp_path):
    options = {**ASKED, "tasks": [two_turns(tmp_path)], "num_questions": None, "warmup": 0, "max_new_tokens": 32}
    with FakeEngine(kind=kind) as server:
        server.reason = reason
        results = bench(str(tmp_path / "out"), base_urls=[f"baseline={server.url}"], **options)
    assert results.runs[0].num_requests == 2 and results.runs[0].num_failed == 0


def test_a_template_that_refuses_a_conversation(tmp_path):
    """As servers that render it themselves do: that request has failed, and the others are measured."""
    template = THINKING.replace("m.role == 'system' and not loop.first", "'secret' in m.content")
    model = with_template(tmp_path / "model", template)
    rows = [{"id": "a", "prompt": "When is high water?"}, {"id": "b", "prompt": "Tell me a secret."}]
    (tmp_path / "task.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {**ASKED, "model": str(model), "num_questions": None, "tasks": [str(tmp_path / "task.jsonl")]}
    with FakeEngine() as server:
        results = bench(str(tmp_path / "out"), base_urls=[f"baseline={server.url}"], **options)
        assert (results.runs[0].num_requests, results.runs[0].num_failed) == (2, 1)
        (failed,) = [r for r in lines(tmp_path / "out") if "error" in r]
        assert "cannot render this conversation (Only the first may be system.)" in failed["error"]

        (tmp_path / "task.jsonl").write_text(json.dumps(rows[1]) + "\n")
        with pytest.raises(FastMTPError, match=r"refuses every request of task \(the model's chat template cannot"):
            bench(str(tmp_path / "all"), base_urls=[f"baseline={server.url}"], **options)


def test_a_folder_without_a_chat_template(tmp_path):
    """Said before anything is started or asked; a server that renders with its own template does without."""
    model = with_template(tmp_path / "model", None)
    options = {**ASKED, "model": str(model)}
    message = "has no chat template .*take the folder of the chat model"
    with FakeEngine() as server, pytest.raises(FastMTPError, match=message):
        bench(str(tmp_path / "out"), base_urls=[f"baseline={server.url}"], **options)
    assert server.asked == 0
    plan = tmp_path / "plan.yaml"
    plan.write_text(yaml.safe_dump({**options, "servers": {"baseline": {}}}))
    with pytest.raises(FastMTPError, match=message):
        bench(str(tmp_path / "started"), plan=str(plan))
    with FakeEngine(kind="openai") as server:
        assert bench(str(tmp_path / "openai"), base_urls=[f"baseline={server.url}"], **options).runs[0].num_requests


def test_another_plan_is_refused(pair, tmp_path):
    measure(pair, tmp_path)
    with pytest.raises(FastMTPError, match=r"plan with settings.max_new_tokens 10, not 12; go on with that plan"):
        measure(pair, tmp_path, max_new_tokens=12)
    with pytest.raises(FastMTPError, match=r"of a plan with servers\.fake null"):
        bench(str(tmp_path), base_urls=[*urls(pair), f"fake={pair[0].url}"], **ASKED)
    assert measure(pair, tmp_path) == read_results(tmp_path / "results.json")


def test_a_name_that_says_something_else(pair, tmp_path):
    with pytest.raises(FastMTPError, match=r"baseline: the server at .* makes 2 drafts per step, so it is no baseline"):
        bench(str(tmp_path / "a"), base_urls=[f"baseline={pair[1].url}"], **ASKED)
    with pytest.raises(FastMTPError, match=r"tuned: the server at .* makes no drafts, so it is no tuned server"):
        bench(str(tmp_path / "b"), base_urls=[f"tuned={pair[0].url}"], **ASKED)


def managed(tmp_path, *words, **changes):
    """A plan whose servers are started."""
    command = [sys.executable, str(FAKE), "--num_steps", "{num_steps}"]
    servers = {"baseline": {"method": "baseline", "command": command}, "v": {"command": [*command, *words]}}
    path = tmp_path / "plan.yaml"
    path.write_text(yaml.safe_dump({**ASKED, "num_steps": [1, 2], "servers": servers, **changes}))
    return path


def test_servers_are_started_and_stopped(tmp_path):
    results = bench(str(tmp_path / "out"), plan=str(managed(tmp_path)))
    assert list(results.servers) == ["baseline", "v-k1", "v-k2"]
    assert [run.lossless and run.lossless.equal for run in results.runs] == [None, 9, 9]
    assert sorted(p.name for p in (tmp_path / "out/logs").iterdir()) == ["baseline.log", "v-k1.log", "v-k2.log"]
    assert not running(tmp_path / "out")


def running(folder):
    """Ports of a folder's servers that still answer."""
    ports = [p.read_text().split("--port ")[1].split()[0] for p in (Path(folder) / "logs").iterdir()]
    done = subprocess.run(["ps", "ax", "-o", "args"], capture_output=True, text=True, check=True).stdout
    return [port for port in ports if f"--port {port}" in done]


def test_a_server_that_dies(tmp_path):
    whole = bench(str(tmp_path / "whole"), plan=str(managed(tmp_path)))
    plan = managed(tmp_path, "--die_after", "8")
    done = 0
    for _ in range(20):
        try:
            results = bench(str(tmp_path / "out"), plan=str(plan))
            break
        except FastMTPError as error:
            assert "the server ended with status 3 (RuntimeError: CUDA error: the fake card fell out)" in str(error)
            assert len(lines(tmp_path / "out")) > done and not running(tmp_path / "out")
            done = len(lines(tmp_path / "out"))
    assert untimed(results) == untimed(whole)


def test_a_server_that_does_not_start(tmp_path):
    plan = tmp_path / "plan.yaml"
    for command, want in ((["nowhere"], "b: cannot start nowhere"), (["false"], "b: the server ended with status 1")):
        servers = {"b": {"method": "baseline", "command": command}}
        plan.write_text(yaml.safe_dump({**ASKED, "servers": servers}))
        with pytest.raises(FastMTPError, match=want):
            bench(str(tmp_path / command[0]), plan=str(plan))


def start(plan, out):
    code = f"from swift_fastmtp.bench.bench import bench; bench({str(out)!r}, plan={str(plan)!r})"
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


@pytest.mark.matrix
def test_killed_and_started_again(tmp_path):
    """In the first round of a server, in that of another, and in the baseline's second."""
    plan = managed(tmp_path, "--pause", "0.1", rounds=2)
    out = tmp_path / "out"
    done = []
    for how, wanted in ((signal.SIGKILL, 12), (signal.SIGTERM, 20), (signal.SIGKILL, 28)):
        process = start(plan, out)
        while not (out / "requests.jsonl").exists() or len(whole_lines(out)) < wanted:
            assert process.poll() is None, process.stderr.read().decode()
            time.sleep(0.02)
        if not done:
            with pytest.raises(FastMTPError, match="another fastmtp bench writes here"):
                bench(str(out), plan=str(plan))
        os.kill(process.pid, how)
        process.communicate(timeout=30)
        assert process.returncode
        time.sleep(0.3)
        assert not running(out)  # whatever ended the benchmark ended its server
        assert whole_lines(out)[: len(done)] == done
        done = whole_lines(out)
        with open(out / "requests.jsonl", "a") as file:
            file.write('{"server": "v-k1", "ta')  # as a kill leaves it
    results = bench(str(out), plan=str(plan))
    keys = [named(r) for r in lines(out)]
    assert lines(out)[: len(done)] == done and len(keys) == len(set(keys)) == 36
    assert untimed(results) == untimed(bench(str(tmp_path / "whole"), plan=str(managed(tmp_path, rounds=2))))


def whole_lines(out):
    return [json.loads(x) for x in (out / "requests.jsonl").read_text().splitlines(True) if x.endswith("\n")]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"serves": {}}, "has no 'serves'; it has model, tasks"),
        ({"servers": {}}, "servers: a plan needs at least one"),
        ({"servers": {"a": {"foldr": "x"}}}, "servers.a: has no 'foldr'; it has label, method"),
        (
            {"servers": {"a": {"folder": "x", "method": "best"}}},
            "servers.a.method: must be 'baseline', 'vanilla', 'tuned' or 'tuned+map', not 'best'",
        ),
        ({"servers": {"a": {"folder": str(TINY), "num_steps": 0}}}, "servers.a.num_steps: must be at least 1, not 0"),
        ({"servers": {"a": {"folder": "nowhere"}}}, "nowhere"),
        ({"temperatures": [-1]}, "temperatures[0]: must be greater than or equal to 0, not -1"),
        ({"concurrency": [0]}, "concurrency[0]: must be greater than or equal to 1, not 0"),
        ({"concurrency": [2, 2]}, "concurrency: needs at least one value, and none twice"),
        ({"max_new_tokens": 1.5}, "max_new_tokens: must be a valid integer, not 1.5"),
        ({"model": None}, "model: a plan needs the folder of the model"),
        ({"tasks": ["smoke", "smoke"]}, "tasks: needs at least one value, and none twice"),
        ({"tasks": ["mt-bench"]}, "no task is called 'mt-bench'; there are c_eval"),
        ({"baseline": "b"}, "baseline: 'b' is not among the servers"),
    ],
)
def test_mistakes_in_a_plan(change, message):
    values = {"model": str(TINY), "servers": {"base": {}}, **change}
    with pytest.raises(FastMTPError) as error:
        make_plan(values)
    assert message in str(error.value)


def test_the_papers_ablation_is_a_dozen_lines(tmp_path):
    text = f"""
model: {TINY}
tasks: [smoke]
num_steps: [1, 2, 3]
servers:
  baseline: {{label: Baseline}}
  vanilla: {{label: Vanilla MTP, folder: {TINY}}}
  fixed: {{label: Fixed-data FT, folder: {TINY}, method: tuned}}
  self: {{label: Self-data FT, folder: {TINY}, method: tuned}}
  self-fr: {{label: Self-data FT + FR, folder: {TINY}, token_map: [{tmp_path}/a.pt, {tmp_path}/b.pt]}}
"""
    for name, size in (("a", 100), ("b", 200)):
        torch.save(list(range(size)), tmp_path / f"{name}.pt")
    plan = make_plan(yaml.safe_load(text))
    assert len(plan.launches) == 1 + 3 * 3 + 6 and list(plan.launches)[-1] == "self-fr-k3-b"
    last = plan.launches["self-fr-k3-b"]
    assert (last.server.method, last.server.num_steps, last.server.token_map_size) == ("tuned+map", 3, 200)
    assert last.command[last.command.index("--speculative-num-draft-tokens") + 1] == "4"
    assert f"{tmp_path}/b.pt" in last.command
    assert not any("speculative" in word for word in plan.launches["baseline"].command)
    assert [launch.server.method for launch in plan.launches.values()][1] == "vanilla"


def test_maps_of_a_server_are_what_the_plan_says(tmp_path):
    """Maps per language are the plugin's; a server without any is told so, whatever its folder or environment has."""
    with_maps = tmp_path / "folder"
    shutil.copytree(TINY, with_maps)
    config = json.loads((with_maps / "config.json").read_text())
    (with_maps / "config.json").write_text(json.dumps({**config, "fastmtp_token_maps": {"en": "en.pt"}}))
    servers = {
        "listed": {"folder": str(TINY), "token_map": str(tmp_path / "maps.json")},
        "own": {"folder": str(with_maps)},
        "none": {"folder": str(with_maps), "token_map": "none"},
        "plain": {"folder": str(TINY)},
        "baseline": {},
    }
    launches = make_plan({"model": str(TINY), "servers": servers}).launches
    found = {name: (x.server.method, x.server.token_map, x.environment) for name, x in launches.items()}
    off = {"SWIFT_FASTMTP_MAPS": "none"}
    assert found == {
        "baseline": ("baseline", None, off),
        "listed-k3": ("tuned+map", "maps", {"SWIFT_FASTMTP_MAPS": str(tmp_path / "maps.json")}),
        "own-k3": ("tuned+map", "config", {}),
        "none-k3": ("tuned", None, off),
        "plain-k3": ("vanilla", None, off),
    }
    assert not any("--speculative-token-map" in x.command for x in launches.values())


def test_the_map_that_a_head_was_trained_inside_is_named(tmp_path):
    folder = tmp_path / "folder"
    shutil.copytree(TINY, folder)
    torch.save(list(range(64)), tmp_path / "inside.pt")
    (folder / "fastmtp.json").write_text(json.dumps({"token_map": str(tmp_path / "inside.pt")}))
    servers = {"a": {"folder": str(folder)}, "b": {"folder": str(folder), "token_map": "none"}}
    launches = make_plan({"model": str(TINY), "servers": servers}).launches
    assert launches["a-k3"].server.token_map == "inside" and launches["a-k3"].server.token_map_size == 64
    assert launches["b-k3"].server.token_map is None and "--speculative-token-map" not in launches["b-k3"].command


def test_vllm_gets_its_maps_by_a_variable(tmp_path):
    """One for all requests, or a list; the command is the stock one, and the plan decides, not the environment."""
    folder = tmp_path / "folder"
    shutil.copytree(TINY, folder)
    torch.save(list(range(64)), tmp_path / "inside.pt")
    torch.save(list(range(32)), tmp_path / "asked.pt")
    (folder / "fastmtp.json").write_text(json.dumps({"token_map": str(tmp_path / "inside.pt")}))
    servers = {
        "inside": {"folder": str(folder)},
        "asked": {"folder": str(folder), "token_map": str(tmp_path / "asked.pt")},
        "listed": {"folder": str(folder), "token_map": str(tmp_path / "maps.json")},
        "none": {"folder": str(folder), "token_map": "none"},
        "plain": {"folder": str(TINY)},
        "baseline": {},
    }
    launches = make_plan({"model": str(TINY), "engine": "vllm", "servers": servers}).launches
    found = {
        name: (x.server.token_map, x.server.token_map_size, x.environment[VARIABLE]) for name, x in launches.items()
    }
    assert found == {
        "baseline": (None, None, "none"),
        "inside-k3": ("inside", 64, str(tmp_path / "inside.pt")),
        "asked-k3": ("asked", 32, str(tmp_path / "asked.pt")),
        "listed-k3": ("maps", None, str(tmp_path / "maps.json")),
        "none-k3": (None, None, "none"),
        "plain-k3": (None, None, "none"),
    }
    assert all(x.command[:2] == ["vllm", "serve"] for x in launches.values())


def test_plans_are_put_together(tmp_path, monkeypatch):
    monkeypatch.setenv("FOLDER", str(TINY))
    one, two = tmp_path / "1.yaml", tmp_path / "2.yaml"
    one.write_text("model: ${FOLDER}\nflags: [--a]\nseed: 1\nenvironment: {A: 1}\nservers: {base: {}}\n")
    two.write_text("flags: [--b]\nseed: 2\nenvironment: {B: 2}\n")
    plan = read_plan([str(one), str(two)])
    assert plan["flags"] == ["--a", "--b"] and plan["seed"] == 2 and plan["environment"] == {"A": 1, "B": 2}
    launch = make_plan(plan).launches["base"]
    assert launch.command[-2:] == ["--a", "--b"] and str(TINY) in launch.command and launch.environment["B"] == "2"
    for text, message in (("model: ${NO_SUCH_FOLDER}", "is not set"), ("a: [", "not YAML"), ("[]", "a plan is a")):
        one.write_text(text)
        with pytest.raises(FastMTPError, match=message) as error:
            read_plan(str(one))
        assert "\n" not in str(error.value)
    with pytest.raises(FastMTPError, match="cannot be read"):
        read_plan(str(tmp_path / "nowhere.yaml"))


def test_a_variable_may_hold_a_number(tmp_path, monkeypatch):
    for name, value in {"STEPS": "1,2", "HEAT": "0.5", "SEED": "7", "PYTHON": "3"}.items():
        monkeypatch.setenv(name, value)
    plan = tmp_path / "plan.yaml"
    plan.write_text(
        f"model: {TINY}\ntemperatures: ${{HEAT}}\nseed: ${{SEED}}\npython: ${{PYTHON}}\n"
        f"servers: {{v: {{folder: {TINY}, num_steps: ['${{STEPS}}']}}}}\n"
    )
    made = make_plan(read_plan(str(plan)))
    assert list(made.launches) == ["v-k1", "v-k2"] and made.launches["v-k2"].server.num_steps == 2
    assert made.temperatures == [0.5] and made.seed == 7
    assert made.launches["v-k1"].command[0] == "3"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda r: r.update(schema="swift_fastmtp.bench/3"),
            "its schema is 'swift_fastmtp.bench/3', this version reads",
        ),
        (lambda r: r["runs"][1].pop("tau_micro"), "runs[1] lacks tau_micro"),
        (lambda r: r.pop("servers"), "the file lacks servers"),
        (lambda r: r["runs"][0].update(histogram=3), "runs[0].histogram: must be a valid list, not 3"),
        (lambda r: r["runs"][0].update(concurrency="1"), "runs[0].concurrency: must be a valid integer, not '1'"),
        (lambda r: r["runs"][0].update(server="x"), "runs[0]: of a server or task that is not listed"),
        (lambda r: r.update(baseline="x"), "baseline: 'x' is not among the servers"),
        (lambda r: r["settings"]["tasks"]["smoke"].pop("title"), "settings.tasks.smoke lacks title"),
    ],
)
def test_results_that_cannot_be_read(change, message, pair, tmp_path):
    path = tmp_path / "results.json"
    value = measure(pair, tmp_path, num_questions=2).as_json()
    change(value)
    path.write_text(json.dumps(value))
    with pytest.raises(FastMTPError) as error:
        read_results(path)
    assert message in str(error.value) and str(path) in str(error.value) and "\n" not in str(error.value)


def test_files_that_are_no_results(tmp_path):
    for text in ("[]", "{}", "{", "\xff"):
        (tmp_path / "r.json").write_text(text, encoding="latin-1")
        with pytest.raises(FastMTPError):
            read_results(tmp_path / "r.json")
    with pytest.raises(FastMTPError, match="cannot be read"):
        read_results(tmp_path / "nowhere.json")
