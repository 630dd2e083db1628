"""Rows as people have them: each form becomes ours, or is refused by name."""

import copy
import json

import pytest
from chat_templates import with_template
from conftest import TINY
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted_engine import ScriptedEngine

from swift_fastmtp.cli import main
from swift_fastmtp.data.clean import clean
from swift_fastmtp.data.distill import distill
from swift_fastmtp.data.row_forms import ROLES, BadRow, normalize
from swift_fastmtp.data.rows import BadRows, iter_rows, read_rows
from swift_fastmtp.errors import FastMTPError

USER = {"role": "user", "content": "What is a prime?"}
FUNCTION = {"name": "look_up", "parameters": {"type": "object"}}
TOOL = {"type": "function", "function": FUNCTION}
CALL = {"name": "look_up", "arguments": {"word": "prime"}}
CALLS = [{"id": "call_1", "type": "function", "function": CALL}]
AGENT = [
    USER,
    {"role": "assistant", "content": "", "tool_calls": CALLS},
    {"role": "tool", "content": "a number", "tool_call_id": "call_1"},
]


def says(role, content):
    return {"role": role, "content": content}


FORMS = {
    "bare prompt": ({"prompt": "What is a prime?"}, [USER]),
    "query, system, history": (
        {"query": "b", "system": "s", "history": [["a", "x"]], "response": "y"},
        [says("system", "s"), says("user", "a"), says("assistant", "x"), says("user", "b"), says("assistant", "y")],
    ),
    "history in a string": (
        {"query": "b", "history": '[["a", "x"]]'},
        [says("user", "a"), says("assistant", "x"), says("user", "b")],
    ),
    "prompt and system": ({"prompt": "b", "system": ""}, [says("system", ""), says("user", "b")]),
    "alpaca": (
        {"instruction": "Add.", "input": "1 2", "output": "3"},
        [says("user", "Add.\n1 2"), says("assistant", "3")],
    ),
    "prompt as messages": ({"prompt": [USER], "ability": "math"}, [USER]),
    "sharegpt": (
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "system": "s"},
        [says("system", "s"), says("user", "a"), says("assistant", "b")],
    ),
    "messages in a string": ({"messages": json.dumps([USER])}, [USER]),
    "developer": ({"messages": [says("developer", "s"), USER]}, [says("system", "s"), USER]),
    "text parts": (
        {"messages": [says("user", [{"type": "text", "text": "What is "}, {"type": "text", "text": "a prime?"}])]},
        [USER],
    ),
    "vLLM's reasoning": (
        {"messages": [USER, {**says("assistant", "x"), "reasoning": "why"}]},
        [USER, {**says("assistant", "x"), "reasoning_content": "why"}],
    ),
    "ms-swift's agent": (
        {"messages": [USER, says("tool_call", json.dumps(CALL)), says("tool_response", "a number")]},
        AGENT,
    ),
    "openai": ({"messages": [USER, {"role": "assistant", "content": None, "tool_calls": CALLS}, AGENT[2]]}, AGENT),
    "calls without a wrapper": (
        {"messages": [USER, {"role": "assistant", "content": "", "tool_calls": [CALL]}]},
        [USER, {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": CALL}]}],
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_form_becomes_ours(form):
    row, messages = copy.deepcopy(FORMS[form])
    normalize(row)
    assert row["messages"] == messages
    again = copy.deepcopy(row)
    normalize(again)
    assert again == row


def test_two_calls_at_once_get_their_results_in_order():
    row = {"messages": [USER, *[says("tool_call", json.dumps({**CALL, "name": n})) for n in "ab"]]}
    row["messages"] += [says("tool_response", "1"), says("tool_response", "2"), says("assistant", "done")]
    normalize(row)
    _, assistant, *results, _ = row["messages"]
    named = {call["id"]: call["function"]["name"] for call in assistant["tool_calls"]}
    assert [(named[m["tool_call_id"]], m["content"]) for m in results] == [("a", "1"), ("b", "2")]


@pytest.mark.parametrize("tools", [json.dumps([TOOL]), [TOOL], [json.dumps(TOOL)], [FUNCTION], TOOL])
def test_tools_in_every_form(tools):
    row = {"messages": [USER], "tools": tools, "chat_template_kwargs": '{"enable_thinking": false}'}
    normalize(row)
    assert row["tools"] == [TOOL] and row["chat_template_kwargs"] == {"enable_thinking": False}


BAD = {
    "has `images`, and only text": {"messages": [USER], "images": ["cat.jpg"]},
    "has `audios`, and only text": {"prompt": "x", "audios": ["a.wav"]},
    "a content has a part `image_url`": {"messages": [says("user", [{"type": "image_url", "image_url": {}}])]},
    "`tools` is a text that is not JSON": {"messages": [USER], "tools": "[{"},
    "each of `tools` needs the `name`": {"messages": [USER], "tools": [{"type": "function"}]},
    "`tools` must be a list": {"messages": [USER], "tools": 7},
    "`tool_calls` must be a list": {"messages": [{"role": "assistant", "content": "", "tool_calls": "x"}]},
    "`arguments` is a text that is not JSON": {
        "messages": [{"role": "assistant", "content": "", "tool_calls": [{**CALL, "arguments": "{"}]}]
    },
    "`arguments` of a tool call must be a JSON object": {
        "messages": [{"role": "assistant", "content": "", "tool_calls": [{**CALL, "arguments": "[1]"}]}]
    },
    "`content` is a text that is not JSON": {"messages": [USER, says("tool_call", "nonsense{}")]},
    "a `tool_call` needs a content": {"messages": [USER, says("tool_call", '{"arguments": {}}')]},
    "`history` must be a list of": {"query": "x", "history": [["a"]]},
    "`chat_template_kwargs` must be": {"prompt": "x", "chat_template_kwargs": [1]},
}


@pytest.mark.parametrize("what", BAD)
def test_what_cannot_be_asked_is_named_by_every_reader(what, tmp_path):
    """One line with file and line; skipped and counted where that was chosen: reading, distilling, cleaning."""
    path = tmp_path / "rows.jsonl"
    good = {"messages": [USER, says("assistant", "A number with two divisors.")]}
    path.write_text("".join(json.dumps(row) + "\n" for row in (good, BAD[what])))
    for read in (
        lambda: read_rows(path),
        lambda: distill(str(TINY), str(path), str(tmp_path / "o.jsonl"), max_new_tokens=2),
        lambda: clean([str(path)], str(tmp_path / "c.jsonl")),
    ):
        with pytest.raises(FastMTPError) as caught:
            read()
        assert f"rows.jsonl:2: {what}" in str(caught.value)
    bad = BadRows("skip")
    assert len(list(iter_rows(path, bad))) == 1 and bad.total == 1


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from(["", "x", "[1]", "{}", "user", "assistant", "tool_call"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["role", "content", "name", "arguments", "type", "text", "function"]), inner, max_size=4
        )
    ),
    max_leaves=8,
)
KEYS = ("messages", "prompt", "query", "system", "history", "tools", "conversations", "images", "chat_template_kwargs")
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from([*ROLES, "developer", "tool_call", "observation"]), "content": JSON},
        optional={"tool_calls": JSON, "reasoning": JSON, "tool_call_id": JSON},
    ),
    max_size=4,
)


@settings(max_examples=400, deadline=None)
@given(JSON | st.dictionaries(st.sampled_from(KEYS), JSON | MESSAGES, max_size=5))
def test_any_json_is_a_row_or_a_complaint(row):
    """Never a traceback; a row that is read once reads the same again, and has what every reader relies on."""
    try:
        normalize(row)
    except BadRow as bad:
        assert bad.what
        return
    assert row["messages"] and isinstance(row.get("tools", []), list)
    for message in row["messages"]:
        assert message["role"] in ROLES and isinstance(message["content"], str)
        assert all(call["function"]["name"] is not None for call in message.get("tool_calls") or [])
    again = copy.deepcopy(row)
    normalize(again)
    assert again == row


def test_arguments_as_objects_are_sent_as_the_protocol_has_them(tmp_path):
    """Rows keep calls as objects or strings; servers get strings, templates objects: the prompt is the same."""
    folder = with_template("calls", tmp_path / "model")
    answered = []
    for arguments in ({"word": "prime"}, '{"word": "prime"}'):
        call = {"id": "c", "type": "function", "function": {"name": "look_up", "arguments": arguments}}
        messages = [USER, {"role": "assistant", "content": "", "tool_calls": [call]}, {**AGENT[2], "tool_call_id": "c"}]
        path, output = tmp_path / "p.jsonl", tmp_path / f"{len(answered)}.jsonl"
        path.write_text(json.dumps({"tools": [TOOL], "messages": messages}) + "\n")
        with ScriptedEngine(folder, cut_off=0.0) as engine:
            distill(str(folder), str(path), str(output), base_urls=[engine.url])
        answered.append([asked for asked, _, _ in engine.turns])
    assert answered[0] == answered[1] and len(answered[0]) == 2


@pytest.mark.parametrize("reason", ["stop", "eos_token", "end_turn", "tool_use", "function_call"])
def test_answers_that_the_model_ended_are_whole(reason, tmp_path):
    row = {"messages": [USER, says("assistant", "A number with two divisors.")], "finish_reason": reason}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    clean([str(tmp_path / "rows.jsonl")], str(tmp_path / "c.jsonl"), filters=["truncated"])
    assert len(read_rows(tmp_path / "c.jsonl")) == 1


def test_rows_of_a_dataset_are_named_by_it(tmp_path):
    """`swift:` and `hf:` are saved to a file first; the user does not know that one. ms-swift's agent rows are read."""
    path, output = tmp_path / "rows.jsonl", tmp_path / "o.jsonl"
    agent = [USER, says("tool_call", json.dumps(CALL)), says("tool_response", "a number"), says("assistant", "x")]
    path.write_text(json.dumps({"messages": agent, "tools": json.dumps([TOOL])}) + "\n")
    command = ["distill", "--model", str(TINY), "--max_new_tokens", "2", "--prompts", f"swift:{path}"]
    main([*command, "--output", str(output)])
    (row,) = read_rows(output)
    assert row["messages"][0] == USER and row["tools"] == [TOOL]
    with open(path, "a") as file:
        file.write(json.dumps({"messages": [USER], "images": ["cat.jpg"]}) + "\n")
    with pytest.raises(SystemExit) as caught:
        main([*command, "--output", str(tmp_path / "o2.jsonl")])
    assert f"swift:{path}:2: has `images`" in str(caught.value)
