"""Conversations answered turn by turn; jobs that survive kills and are shared; bad rows; what is trained."""

import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from helpers.paths import ROOT, TINY
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from swift_fastmtp.bench.servers import free_port
from swift_fastmtp.data.conversation import Conversation, Reply
from swift_fastmtp.data.distill import distill
from swift_fastmtp.data.examples import training_examples
from swift_fastmtp.data.prompt_ids import asked_ids, shorten
from swift_fastmtp.errors import FastMTPError
from swift_fastmtp.files.jobs import Job
from swift_fastmtp.files.rows import BadRows, iter_rows, read_rows
from swift_fastmtp.swift_plugin.register import register

ROLES = st.sampled_from(["system", "user", "assistant", "tool"])
REASONS = st.sampled_from(["stop", "stop", "stop", "length", "tool_calls"])


def call(name, number):
    return {"id": f"call-{number}", "type": "function", "function": {"name": name, "arguments": "{}"}}


@given(st.lists(ROLES, min_size=1, max_size=10), st.lists(st.tuples(REASONS, st.booleans()), min_size=10, max_size=10))
def test_conversations_keep_the_source_and_speak_for_themselves(roles, replies):
    source = [{"role": role, "content": f"{role} {i}"} for i, role in enumerate(roles)]
    talk = Conversation(source)
    spoken = 0
    for reason, calls in replies:
        if not talk.waiting:
            break
        assert talk.messages == [] or talk.messages[-1]["role"] != "assistant"
        talk.add(Reply(f"own {spoken}", reason, [spoken], tool_calls=[call("f", spoken)] if calls else None))
        spoken += 1
    others = [m["content"] for m in talk.messages if m["role"] != "assistant"]
    assert others == [m["content"] for m in source if m["role"] != "assistant"][: len(others)]
    own = [m["content"] for m in talk.messages if m["role"] == "assistant"]
    assert own == [f"own {i}" for i in range(spoken)]
    if not talk.waiting:
        assert talk.messages[-1]["role"] == "assistant" and talk.finish_reason == talk.messages[-1]["finish_reason"]
        if not talk.ended_early:
            assert others == [m["content"] for m in source if m["role"] != "assistant"]


def test_results_of_tools_follow_only_the_calls_they_answer():
    source = [
        {"role": "user", "content": "weather?"},
        {"role": "assistant", "content": "", "tool_calls": [call("weather", "source")]},
        {"role": "tool", "content": "rain", "tool_call_id": "call-source"},
        {"role": "assistant", "content": "It rains."},
    ]
    talk = Conversation(source)
    talk.add(Reply("", "tool_calls", tool_calls=[call("weather", "own")]))
    assert talk.messages[-1] == {"role": "tool", "content": "rain", "tool_call_id": "call-own"} and talk.waiting
    talk.add(Reply("Rain.", "stop"))
    assert not talk.waiting and not talk.ended_early

    for reply in (Reply("No idea.", "stop"), Reply("", "tool_calls", tool_calls=[call("stocks", "own")])):
        talk = Conversation(source)
        talk.add(reply)
        assert not talk.waiting and talk.ended_early and talk.messages[-1]["role"] == "assistant"


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    """Twelve prompts, some with a second turn."""
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    rows = [json.loads(x) for x in (ROOT / "examples/prompts/train.jsonl").read_text().splitlines()[:12]]
    for i, row in enumerate(rows):
        if i % 3 == 0:
            row["messages"] += [{"role": "assistant", "content": "…"}, {"role": "user", "content": "Why?"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def own_answers(prompts, output, **changes):
    return distill(str(TINY), str(prompts), str(output), **{"max_new_tokens": 12, "batch_size": 4, **changes})


def test_rows_keep_tokens_and_why_the_answer_ended(prompts, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    own_answers(prompts, tmp_path / "o.jsonl", max_new_tokens=24)
    rows = read_rows(tmp_path / "o.jsonl")
    assert [r["id"] for r in rows] == [r["id"] for r in read_rows(prompts)]
    assert {r["finish_reason"] for r in rows} == {"stop", "length"}
    for row in rows:
        for answer in (m for m in row["messages"] if m["role"] == "assistant"):
            ids = answer["token_ids"]
            ended = ids[-1] == tokenizer.eos_token_id
            assert answer["finish_reason"] == ("stop" if ended else "length") and (ended or len(ids) == 24)
            assert tokenizer.decode(ids[:-1] if ended else ids) == answer["content"]


def test_each_turn_answers_the_models_own_history(prompts, tmp_path):
    """Greedy, unbatched: the second turn is what the model says behind its own first one."""
    greedy = {"temperature": 0, "batch_size": 1, "max_new_tokens": 60}
    assert own_answers(prompts, tmp_path / "o.jsonl", **greedy)
    turns = [row["messages"] for row in read_rows(tmp_path / "o.jsonl") if len(row["messages"]) == 4]
    assert turns and all("…" not in m["content"] for messages in turns for m in messages)
    again = tmp_path / "again.jsonl"
    again.write_text("".join(json.dumps({"messages": messages[:3]}) + "\n" for messages in turns))
    own_answers(again, tmp_path / "o2.jsonl", **greedy)
    first, second = (m for m in (turns[0][1], turns[0][3]))
    assert "prompt_shared" not in first and len(second["prompt_token_ids"]) < second["prompt_shared"]
    assert [row["messages"] for row in read_rows(tmp_path / "o2.jsonl")] == turns


def test_shards_together_are_one_job(prompts, tmp_path, capsys):
    """Several answers per prompt, three workers; whoever ends last writes the output, in the prompts' order."""
    job = {"num_answers": 2, "temperature": 0, "batch_size": 1}
    own_answers(prompts, tmp_path / "whole.jsonl", **job)
    done = [own_answers(prompts, tmp_path / "shared.jsonl", shard=f"{i}/3", **job) for i in (2, 0, 1)]
    assert done == [False, False, True] and "answers of other shards are missing" in capsys.readouterr().out
    assert (tmp_path / "shared.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert [r["sample"] for r in read_rows(tmp_path / "shared.jsonl")] == [0, 1] * 12
    assert not (tmp_path / "shared.jsonl.parts").exists()


@pytest.mark.matrix
def test_kill_9_many_times_gives_the_same_file(prompts, tmp_path):
    """Sampled, so that a batch generated again must draw the same tokens again."""
    own_answers(prompts, tmp_path / "quiet.jsonl", num_answers=3, max_new_tokens=40)
    output = tmp_path / "killed.jsonl"
    code = "import sys; from swift_fastmtp.data.distill import distill; "
    code += f"distill({str(TINY)!r}, {str(prompts)!r}, {str(output)!r}, max_new_tokens=40, batch_size=4, num_answers=3)"
    for wait in (0.0, 0.15, 0.4):
        process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        part = tmp_path / "killed.jsonl.parts" / "shard-0of1.jsonl"
        size = part.stat().st_size if part.exists() else 0
        while process.poll() is None and not (part.exists() and part.stat().st_size > size):
            time.sleep(0.01)
        time.sleep(wait)
        process.send_signal(signal.SIGKILL)
        process.wait()
        if output.exists():
            break
        with open(part, "ab") as file:  # a kill in the middle of a line
            file.write(b'{"key": [11, 2], "row": {"mess')
    if not output.exists():
        own_answers(prompts, output, num_answers=3, max_new_tokens=40)
    assert output.read_bytes() == (tmp_path / "quiet.jsonl").read_bytes()


def test_killed_when_its_output_was_there(prompts, tmp_path):
    """What is left then is the parts folder; the report was there before the output."""
    output = tmp_path / "o.jsonl"
    code = "import os; from swift_fastmtp.data import distill; from swift_fastmtp.files import jobs; "
    code += "jobs.Job._remove = lambda self: os.kill(os.getpid(), 9); "
    code += f"distill.distill({str(TINY)!r}, {str(prompts)!r}, {str(output)!r}, max_new_tokens=4)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == -signal.SIGKILL
    assert output.exists() and (tmp_path / "o.jsonl.parts").exists()
    assert json.loads((tmp_path / "o.jsonl.report.json").read_text())["rows"] == len(read_rows(output))
    with pytest.raises(FastMTPError, match="already exists"):
        distill(str(TINY), str(prompts), str(output), max_new_tokens=4)
    assert not (tmp_path / "o.jsonl.parts").exists()


def test_a_job_is_not_mixed_with_another(prompts, tmp_path):
    output = tmp_path / "o.jsonl"
    own_answers(prompts, output, shard="0/2")
    with pytest.raises(FastMTPError, match=r"started with temperature 0.6, not 0.7"):
        own_answers(prompts, output, shard="1/2", temperature=0.7)
    job = Job(output, json.loads((tmp_path / "o.jsonl.parts" / "job.json").read_text()))
    with job.part(1, 2), pytest.raises(FastMTPError, match=r"another process works on this shard"):
        own_answers(prompts, output, shard="1/2")
    with pytest.raises(FastMTPError, match=r"--num_answers 0: must be above 0"):
        own_answers(prompts, output, num_answers=0)
    with pytest.raises(FastMTPError, match=r"--shard 2/2: must be i/n"):
        own_answers(prompts, output, shard="2/2")


BAD = {
    "corrupt": (b'{"messages": [', "not JSON"),
    "encoding": ('{"prompt": "é"}'.encode("latin-1"), "not UTF-8"),
    "field": (b'{"text": "no messages"}', "needs `messages`"),
    "role": (b'{"messages": [{"role": "bot", "content": "x"}]}', "needs a `role`"),
    "content": (b'{"messages": [{"role": "user", "content": 7}]}', "needs a `content`"),
    "surrogate": (b'{"prompt": "\\ud800"}', "surrogate"),
    "reasoning": (b'{"prompt": "x", "reasoning_content": "\\udc00"}', "surrogate"),
    "list": (b"[1, 2]", "must be a JSON object"),
    "duplicate": (b'{"id": "one", "prompt": "x"}', "duplicate id"),
    "long": (b'{"prompt": "' + b"x" * 100_000_000 + b'"}', "longer than 32 MiB"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_row_stops_or_is_counted(name, tmp_path):
    line, what = BAD[name]
    path = tmp_path / "p.jsonl"
    path.write_bytes(b'{"id": "one", "prompt": "a"}\n\n' + line + b'\n{"id": "two", "prompt": "b"}')
    with pytest.raises(FastMTPError, match=rf"p\.jsonl:3: .*{what}.*--on_bad_row skip"):
        list(iter_rows(path, BadRows(), unique_ids=True))
    if name != "duplicate":  # without the option it is not offered
        with pytest.raises(FastMTPError, match=rf"p\.jsonl:3: .*{what}.*; fix it$"):
            read_rows(path)
    bad = BadRows("skip")
    assert [row["id"] for _, row in iter_rows(path, bad, unique_ids=True)] == ["one", "two"]
    ((kind, found),) = bad.report().items()
    assert what.strip("`") in kind.replace("`", "") or what in kind
    assert found["count"] == 1 and "p.jsonl:3" in found["rows"][0]


def test_skipped_rows_are_in_the_report(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a"}\nnot json\n{"messages": [{"role": "assistant", "content": "hello"}]}\n')
    own_answers(path, tmp_path / "o.jsonl", on_bad_row="skip")
    report = json.loads((tmp_path / "o.jsonl.report.json").read_text())
    assert report["rows"] == 1
    assert {what: bad["count"] for what, bad in report["bad_rows"].items()} == {
        "not JSON": 1,
        "no user message for the assistant to answer": 1,
    }


def test_other_file_formats_hold_the_same_rows(prompts, tmp_path):
    rows = read_rows(prompts)
    (tmp_path / "p.jsonl.gz").write_bytes(gzip.compress(prompts.read_bytes()))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "p.parquet")
    for name in ("p.jsonl.gz", "p.parquet"):
        assert read_rows(tmp_path / name) == rows
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(prompts.read_bytes())[:-20])
    with pytest.raises(FastMTPError, match=r"cut.jsonl.gz: cannot be read"):
        read_rows(tmp_path / "cut.jsonl.gz")


@pytest.mark.matrix
def test_swift_deploy_gives_the_same_rows(prompts, tmp_path):
    """ms-swift's own server, waited for while it starts: text, token ids and finish reasons as in this process."""
    port = free_port()
    command = [str(Path(sys.executable).parent / "swift"), "deploy", "--model", str(TINY), "--model_type", "fastmtp"]
    command += ["--infer_backend", "transformers", "--torch_dtype", "float32", "--port", str(port)]
    with open(tmp_path / "log", "w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    try:
        greedy = {"temperature": 0, "max_new_tokens": 24}
        distill(
            str(TINY), str(prompts), str(tmp_path / "there.jsonl"), base_urls=[f"http://127.0.0.1:{port}"], **greedy
        )
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()
    own_answers(prompts, tmp_path / "here.jsonl", batch_size=1, **greedy)
    assert (tmp_path / "there.jsonl").read_bytes() == (tmp_path / "here.jsonl").read_bytes()


@pytest.mark.matrix
def test_datasets_of_hubs_are_prompts(prompts, tmp_path):
    """A folder in the hub's layout, and ms-swift's own syntax with a sample of a file; through the command."""
    (tmp_path / "hub").mkdir()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(read_rows(prompts)), tmp_path / "hub" / "train.parquet")
    command = [str(Path(sys.executable).parent / "fastmtp"), "distill", "--model", str(TINY), "--max_new_tokens", "4"]
    sources = [f"hf:{tmp_path / 'hub'}", f"swift:{prompts}#5"]
    subprocess.run([*command, "--prompts", *sources, "--output", str(tmp_path / "o.jsonl")], check=True)
    rows = read_rows(tmp_path / "o.jsonl")
    assert [r["id"] for r in rows[:12]] == [r["id"] for r in read_rows(prompts)] and len(rows) == 17
    failed = subprocess.run(
        [*command, "--prompts", "hf:no/such", "--output", str(tmp_path / "o2.jsonl")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert failed.returncode == 1
    assert failed.stderr.strip().splitlines()[-1].startswith("fastmtp: error: hf:no/such: cannot be loaded")


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TINY)


def test_a_bad_row_is_named_when_ms_swift_loads_the_file(tmp_path):
    register()
    from swift.dataset import load_dataset

    (tmp_path / "rows.jsonl").write_text('{"prompt": "x"}\n{"messages": 5}\n')
    with pytest.raises(FastMTPError, match=r"rows\.jsonl:2: needs `messages`"):
        load_dataset([f"fastmtp-self-distill:{tmp_path / 'rows.jsonl'}"])


@settings(max_examples=30, deadline=None)
@given(st.lists(st.lists(st.integers(0, 6000), min_size=1, max_size=6), min_size=1, max_size=3))
def test_training_sees_exactly_the_generated_tokens(tokenizer, turns):
    """Any ids, also ones that no text encodes to: a prompt that goes on from the turn before is joined with it."""
    end = tokenizer.eos_token_id
    conversation = Conversation(
        [{"role": role, "content": f"q{i}"} for i in range(3) for role in ("user", "assistant")]
    )
    sequence, labels = [], []
    for number, ids in enumerate(turns):
        asked = [*sequence, *tokenizer.encode(f"\nuser {number}")]
        answered = [*ids, end]
        conversation.add(Reply("text", "stop", answered), asked)
        labels += [-100] * (len(asked) - len(sequence)) + answered
        sequence = asked + answered
    assert sum(len(m.get("prompt_token_ids", [])) for m in conversation.messages) < len(sequence)  # kept once
    (example,) = training_examples(tokenizer, {"messages": conversation.messages, "finish_reason": "stop"})
    assert example.ids == sequence and example.labels == labels


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.tuples(st.lists(st.integers(0, 3), max_size=6), st.lists(st.integers(0, 3), max_size=3)), max_size=5)
)
def test_prompts_are_kept_whatever_they_share(pairs):
    """What `shorten` keeps of a prompt is the prompt again, whether or not it goes on from the turn before."""
    previous = []
    for asked, answered in pairs:
        kept = shorten(asked, previous)
        assert asked_ids(kept, previous) == asked
        assert kept.get("prompt_shared", 0) + len(kept["prompt_token_ids"]) == len(asked)
        previous = asked + answered


def test_prompts_of_a_row_that_was_cut_are_an_error(tokenizer):
    """Removing a turn leaves a prompt that goes on from nothing: it is refused, not trained on."""
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "token_ids": [1, 2]}]}
    row["messages"][1] |= {"prompt_shared": 7, "prompt_token_ids": [5]}
    with pytest.raises(FastMTPError, match=r"prompt_shared is 7.*the turn before it has 0 tokens.*distill it again"):
        training_examples(tokenizer, row)
    row["messages"][1] |= {"prompt_shared": 0, "prompt_token_ids": "xy"}
    with pytest.raises(FastMTPError, match=r"prompt_token_ids must be a list of whole numbers"):
        training_examples(tokenizer, row)


def test_a_cut_off_turn_is_trained_on_as_far_as_its_tokens_go(tokenizer):
    """As text it has no end, and its last word may be half of one: nobody knows which tokens it was."""
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b", "finish_reason": "stop"},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "d", "finish_reason": "length"},
    ]
    (kept,) = training_examples(tokenizer, {"messages": messages, "finish_reason": "length"})
    assert tokenizer.decode([i for i in kept.labels if i != -100]) == "b<|im_end|>"
    assert tokenizer.decode(kept.ids).endswith("b<|im_end|>")
    assert training_examples(tokenizer, {"messages": messages[:2], "finish_reason": "length"}) == []
    assert training_examples(tokenizer, {"messages": [{"role": "user", "content": "a"}]}) == []
    messages[3]["token_ids"] = tokenizer.encode("d e")
    (kept,) = training_examples(tokenizer, {"messages": messages, "finish_reason": "length"})
    assert tokenizer.decode([i for i in kept.labels if i != -100]) == "b<|im_end|>d e"
    assert tokenizer.decode(kept.ids).endswith("d e")


def test_results_of_tools_are_given_by_id():
    """Two calls whose results come in the other order: each call gets its own, in the order of the model's calls."""
    source = [
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": "", "tool_calls": [call("weather", "a"), call("time", "b")]},
        {"role": "tool", "content": "noon", "tool_call_id": "call-b"},
        {"role": "tool", "content": "rain", "tool_call_id": "call-a"},
    ]
    conversation = Conversation(source)
    conversation.add(Reply("", "tool_calls", tool_calls=[call("weather", "1"), call("time", "2")]))
    assert conversation.messages[2:] == [
        {"role": "tool", "content": "rain", "tool_call_id": "call-1"},
        {"role": "tool", "content": "noon", "tool_call_id": "call-2"},
    ]


def test_parts_survive_any_cut(tmp_path):
    """Wherever a kill cuts the file, whole records stay and a new one follows them."""
    records = [{"key": [i, 0], "row": {"messages": [{"role": "user", "content": "é" * i}]}} for i in range(3)]
    for cut in range(0, 200, 7):
        job = Job(tmp_path / f"{cut}.jsonl", {"seed": 0})
        with job.part(0, 1) as part:
            part.write(records)
        path = job.folder / "shard-0of1.jsonl"
        whole = path.read_bytes()
        os.truncate(path, min(cut, len(whole)))
        kept = whole[: min(cut, len(whole))].count(b"\n")
        assert set(job.finished()) == {(i, 0) for i in range(kept)}
        with job.part(0, 1) as part:
            part.write(records[kept:])
        assert path.read_bytes() == whole
        assert job.merge(3) == [] and len(read_rows(Path(job.output))) == 3


def test_workers_that_end_and_begin_together_see_the_output(tmp_path):
    """One of them merges; the others find the output, none a half removed folder, and none answers anything again."""
    command = [sys.executable, str(ROOT / "tests/helpers/job_workers.py"), str(tmp_path), "20"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_parts_folder_that_somebody_removed_is_one_line(tmp_path):
    job = Job(tmp_path / "o.jsonl", {})
    with job.part(0, 1) as part:
        part.write([{"key": [0, 0], "row": {"messages": []}}])
        shutil.rmtree(job.folder)
    for ask in (job.finished, lambda: job.merge(1), lambda: job.part(0, 1).__enter__()):
        with pytest.raises(FastMTPError, match=r"o\.jsonl\.parts: was removed while this job ran; start again"):
            ask()
