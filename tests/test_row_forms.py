"""Rows in the forms that people have them in: all of a row is read, or the row is named; and one form comes out."""

import json
import subprocess
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from helpers.chat_templates import with_template
from helpers.paths import TINY
from helpers.scripted_engine import ScriptedEngine
from hypothesis import given, settings
from hypothesis import strategies as st

from swift_fastmtp.data.chat_template import load_tokenizer
from swift_fastmtp.data.clean import clean
from swift_fastmtp.data.conversation import Conversation, Reply, is_complete, message_text
from swift_fastmtp.data.distill import distill
from swift_fastmtp.data.examples import training_examples
from swift_fastmtp.data.filters import TokenCounter
from swift_fastmtp.data.mix import mix
from swift_fastmtp.errors import FastMTPError
from swift_fastmtp.files.row_forms import UnreadableRowError, normalize
from swift_fastmtp.files.rows import BadRows, iter_rows, read_rows
from swift_fastmtp.simulate.simulate import simulate
from swift_fastmtp.swift_plugin.register import register
from swift_fastmtp.vocab.build import vocab
from swift_fastmtp.vocab.counts import Counts, CountSettings, count_files
from swift_fastmtp.vocab.must_keep import read_vocabulary

PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}}
FUNCTION = {"name": "tide", "description": "high water at a port", "parameters": PARAMETERS}
TOOL = {"type": "function", "function": FUNCTION}


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **more):
    return {"role": "assistant", "content": text, **more}


def system(text):
    return {"role": "system", "content": text}


def called(number, arguments, name="tide"):
    return {"type": "function", "function": {"name": name, "arguments": arguments}, "id": f"call_{number}"}


ASKED = user("When is high water?")
FORMS = {
    "a bare prompt": ({"prompt": "When is high water?"}, [ASKED]),
    "ms-swift's query": ({"query": "When is high water?"}, [ASKED]),
    "a prompt with a system prompt": (
        {"prompt": "When is high water?", "system": "You are a harbour master."},
        [system("You are a harbour master."), ASKED],
    ),
    "an empty system prompt is one": ({"query": "When is high water?", "system": ""}, [system(""), ASKED]),
    "ms-swift's history": (
        {"system": "Be brief.", "history": [["I sail from Brest.", "Fair winds!"]], "query": "When is high water?"},
        [system("Be brief."), user("I sail from Brest."), assistant("Fair winds!"), ASKED],
    ),
    "a history as a string, with a turn that is open": (
        {"history": '[["I sail from Brest.", null]]', "query": "When is high water?", "response": "At six."},
        [user("I sail from Brest."), ASKED, assistant("At six.")],
    ),
    "Alpaca": (
        {"instruction": "Translate.", "input": "high water", "output": "pleine mer", "system": None},
        [user("Translate.\nhigh water"), assistant("pleine mer")],
    ),
    "Alpaca without input or output": (
        {"instruction": "Count to ten.", "input": "", "output": ""},
        [user("Count to ten.")],
    ),
    "TRL's and verl's prompt": ({"prompt": [system("Be brief."), ASKED]}, [system("Be brief."), ASKED]),
    "TRL's prompt and completion": (
        {"prompt": [ASKED], "completion": [assistant("At six.")]},
        [ASKED, assistant("At six.")],
    ),
    "ShareGPT": (
        {
            "system": "Be brief.",
            "conversations": [
                {"from": "human", "value": "When is high water?"},
                {"from": "function_call", "value": '{"name": "tide", "arguments": {"city": "Brest"}}'},
                {"from": "observation", "value": "06:12"},
                {"from": "gpt", "value": "At six."},
            ],
        },
        [
            system("Be brief."),
            ASKED,
            assistant("", tool_calls=[called(0, {"city": "Brest"})]),
            {"role": "tool", "content": "06:12", "tool_call_id": "call_0"},
            assistant("At six."),
        ],
    ),
    "a system prompt beside messages": (
        {"system": "Be brief.", "messages": [ASKED, assistant("At six.")]},
        [system("Be brief."), ASKED, assistant("At six.")],
    ),
    "a developer": ({"messages": [{"role": "developer", "content": "Be brief."}, ASKED]}, [system("Be brief."), ASKED]),
    "parts of text": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "When is "}, {"text": "high water?"}]}]},
        [ASKED],
    ),
    "ms-swift's agents": (
        {
            "messages": [
                ASKED,
                assistant("Let me look."),
                {"role": "tool_call", "content": '{"name": "tide", "arguments": {"city": "Brest"}}'},
                {"role": "tool_call", "content": {"name": "wind", "arguments": '{"at": 6}'}},
                {"role": "tool_response", "content": {"at": "06:12"}},
                {"role": "tool", "content": "west 4"},
                {"role": "tool_call", "content": '{"name": "tide"}'},
                {"role": "tool_response", "content": "18:31"},
                assistant("At six."),
            ]
        },
        [
            ASKED,
            assistant("Let me look.", tool_calls=[called(0, {"city": "Brest"}), called(1, '{"at": 6}', "wind")]),
            {"role": "tool", "content": '{"at": "06:12"}', "tool_call_id": "call_0"},
            {"role": "tool", "content": "west 4", "tool_call_id": "call_1"},
            assistant("", tool_calls=[called(2, "{}")]),
            {"role": "tool", "content": "18:31", "tool_call_id": "call_2"},
            assistant("At six."),
        ],
    ),
    "OpenAI's calls before there were several": (
        {
            "messages": [
                ASKED,
                {"role": "assistant", "content": None, "function_call": {"name": "tide", "arguments": "{}"}},
                {"role": "function", "name": "tide", "content": "06:12"},
            ]
        },
        [
            ASKED,
            assistant("", tool_calls=[called(0, "{}")]),
            {"role": "tool", "name": "tide", "content": "06:12", "tool_call_id": "call_0"},
        ],
    ),
    "OpenAI's calls keep their ids": (
        {
            "messages": [
                ASKED,
                {
                    "role": "assistant",
                    "content": None,
                    "refusal": None,
                    "tool_calls": [{"id": "x7", "function": {"name": "tide", "arguments": '{"city": "Brest"}'}}],
                },
                {"role": "tool", "content": [{"type": "text", "text": "06:12"}], "tool_call_id": "x7"},
            ]
        },
        [
            ASKED,
            assistant("", tool_calls=[{**called(0, '{"city": "Brest"}'), "id": "x7"}]),
            {"role": "tool", "content": "06:12", "tool_call_id": "x7"},
        ],
    ),
    "vLLM's reasoning": (
        {"messages": [ASKED, {"role": "assistant", "content": None, "reasoning": "Tides follow the moon."}]},
        [ASKED, assistant("", reasoning_content="Tides follow the moon.")],
    ),
    "token ids are of what was asked": (
        {"system": "Of another run.", "messages": [ASKED, assistant("At six.", token_ids=[5, 6])]},
        [ASKED, assistant("At six.", token_ids=[5, 6])],
    ),
}


@pytest.mark.parametrize("name", FORMS)
def test_all_of_a_row_becomes_messages(name):
    row, wanted = FORMS[name]
    before = json.dumps(row)
    read = normalize({"id": 3, **row})
    assert read["messages"] == wanted and read["id"] == 3
    assert json.dumps(row) == before and normalize(read) == read


@pytest.mark.parametrize("name", ["ShareGPT", "ms-swift's history", "TRL's prompt and completion", "vLLM's reasoning"])
def test_parquet_holds_the_same_conversation(name, tmp_path):
    """With a column for every key of any row, and null where a row has none."""
    row, wanted = FORMS[name]
    path = tmp_path / "rows.parquet"
    rows = [row, FORMS["Alpaca"][0]]
    columns = {key: [r.get(key) for r in rows] for key in {**rows[0], **rows[1]}}
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    first, second = read_rows(path)
    assert first["messages"] == wanted and second["messages"] == FORMS["Alpaca"][1]


@pytest.mark.parametrize("tools", [[TOOL], json.dumps([TOOL]), json.dumps(TOOL), [json.dumps(TOOL)], [FUNCTION]])
def test_tools_are_read(tools):
    assert normalize({"prompt": "x", "tools": tools})["tools"] == [TOOL]


def test_no_tools_are_none():
    for tools in (None, ""):
        assert normalize({"prompt": "x", "tools": tools}) == {"messages": [user("x")]}
    for tools in ([], "[]"):
        assert normalize({"prompt": "x", "tools": tools}) == {"messages": [user("x")], "tools": []}


def test_kwargs_of_the_template_are_read():
    kwargs = {"enable_thinking": False}
    for given_kwargs in (kwargs, json.dumps(kwargs)):
        assert normalize({"prompt": "x", "chat_template_kwargs": given_kwargs})["chat_template_kwargs"] == kwargs
    assert "chat_template_kwargs" not in normalize({"prompt": "x", "chat_template_kwargs": None})


def call_of(arguments):
    return {"messages": [ASKED, assistant("", tool_calls=[{"function": {"name": "tide", "arguments": arguments}}])]}


BAD = {
    "images": ({"messages": [ASKED], "images": ["port.jpg"]}, "has images, videos or audio, and this run is text only"),
    "a video": ({"query": "What happens here?", "video": "port.mp4"}, "this run is text only (`video`)"),
    "a part": (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "port.jpg"}}]}]},
        "this run is text only (message 0: type 'image_url')",
    ),
    "tools that are no JSON": ({"prompt": "x", "tools": "tide(city)"}, "`tools` must be a list"),
    "tools that are no list": ({"prompt": "x", "tools": "3"}, "`tools` must be a list"),
    "a tool that is no object": ({"prompt": "x", "tools": [TOOL, 3]}, "such a list as a string (tool 1)"),
    "kwargs": ({"prompt": "x", "chat_template_kwargs": "off"}, "`chat_template_kwargs` must be a JSON object"),
    "system": ({"prompt": "x", "system": ["Be brief."]}, "`system` must be a string"),
    "history": ({"prompt": "x", "history": [["a", "b"], ["c"]]}, "[user, assistant] pairs (pair 1)"),
    "history as text": ({"prompt": "x", "history": "a, b"}, "`history` must be a list"),
    "input": ({"instruction": "x", "input": {"a": 1}}, "`input` must be a string"),
    "arguments that are no JSON": (
        call_of("city=Brest"),
        "must be a JSON object, or one as a string (message 1: tide)",
    ),
    "arguments that are a list": (call_of('["Brest"]'), "the `arguments` of a tool call must be a JSON object"),
    "half a surrogate pair": (call_of('{"city": "\\ud800"}'), "the `arguments` of a tool call must be a JSON object"),
    "calls": ({"messages": [assistant("", tool_calls=["tide"])]}, "`tool_calls` must be a list of objects"),
    "a call without a name": ({"messages": [assistant("", tool_calls=[{"function": {}}])]}, "that has a `name`"),
    "the id of a call": ({"messages": [assistant("", tool_calls=[{**called(0, {}), "id": 7}])]}, "`id` of a tool call"),
    "the id of a result": ({"messages": [{"role": "tool", "content": "x", "tool_call_id": 7}]}, "`tool_call_id` must"),
    "a call of ms-swift's": ({"messages": [{"role": "tool_call", "content": "tide"}]}, "a `tool_call` message needs"),
    "reasoning of a call": (
        {"messages": [{"role": "tool_call", "content": {"name": "tide"}, "reasoning_content": []}]},
        "`reasoning_content` must be a string (message 0)",
    ),
    "the id of a call that is a message": (
        {"messages": [{"role": "function_call", "content": {"name": "tide"}, "tool_call_id": []}]},
        "`tool_call_id` must be a string (message 0)",
    ),
    "reasoning": ({"messages": [assistant("x", reasoning=["y"])]}, "`reasoning_content` must be a string"),
    "an unknown role": ({"conversations": [{"from": "narrator", "value": "x"}]}, "a message needs a `role`"),
    "conversations that are text": ({"conversations": "a: b"}, "(`conversations` is no list)"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_row_that_cannot_be_read_is_named(name, tmp_path):
    row, message = BAD[name]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(x) for x in [{"prompt": "a"}, row, {"prompt": "b"}]))
    with pytest.raises(FastMTPError) as error:
        list(iter_rows(path, BadRows()))
    assert str(error.value).startswith(f"{path}:2: ") and message in str(error.value)
    assert "--on_bad_row skip" in str(error.value) and "\n" not in str(error.value)
    bad = BadRows("skip")
    assert [r["messages"][0]["content"] for _, r in iter_rows(path, bad)] == ["a", "b"]
    ((_, found),) = bad.report().items()
    assert found["count"] == 1 and f"{path}:2" in found["rows"][0]


SCALARS = st.none() | st.booleans() | st.integers(-9, 9) | st.floats(allow_nan=False) | st.text(max_size=5)
JSON = st.recursive(SCALARS, lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=3), x, max_size=3))
ROLE_NAMES = "system developer user human assistant gpt bot tool function observation"
CALL_ROLES = "tool_call tool_response function_call"
ROLE = st.sampled_from([*ROLE_NAMES.split(), *CALL_ROLES.split()])
CALL = st.fixed_dictionaries(
    {"name": st.sampled_from(["tide", "wind", ""])},
    optional={"arguments": st.sampled_from(["{}", '{"a": 1}', "[]", "a", {"a": 1}, {}, None]) | JSON},
)
CALLS = st.lists(CALL | st.fixed_dictionaries({"function": CALL}, optional={"id": st.text(max_size=2)}), max_size=2)
PARTS = st.lists(st.fixed_dictionaries({"type": st.sampled_from(["text", "image"])}, optional={"text": st.text()}))
CONTENT = st.text(max_size=5) | PARTS | CALL | CALL.map(json.dumps) | st.lists(CALL, max_size=2).map(json.dumps) | JSON
MESSAGE = st.fixed_dictionaries(
    {},
    optional={
        "role": ROLE,
        "from": ROLE,
        "content": CONTENT,
        "value": CONTENT,
        "tool_calls": CALLS | JSON,
        "function_call": CALL | JSON,
        "reasoning": JSON,
        "reasoning_content": JSON,
        "tool_call_id": JSON,
    },
)
MESSAGES = st.lists(MESSAGE, max_size=5) | JSON
TOOLS = st.sampled_from([[TOOL], [FUNCTION], json.dumps([TOOL]), "[]", "x"]) | JSON
ROW = st.fixed_dictionaries(
    {},
    optional={
        "messages": MESSAGES,
        "conversations": MESSAGES,
        "prompt": st.text(max_size=5) | MESSAGES,
        "query": st.text(max_size=5) | JSON,
        "instruction": JSON,
        "input": JSON,
        "response": JSON,
        "completion": MESSAGES,
        "system": st.text(max_size=5) | JSON,
        "history": st.lists(st.lists(st.text(max_size=3) | st.none(), min_size=2, max_size=2), max_size=2) | JSON,
        "tools": TOOLS,
        "chat_template_kwargs": JSON,
        "images": JSON,
    },
)


@settings(max_examples=400, deadline=None)
@given(ROW | JSON)
def test_any_json_is_a_row_in_our_form_or_a_complaint(value):
    before = json.dumps(value)
    try:
        row = normalize(value)
    except UnreadableRowError as error:
        assert error.what
        return
    finally:
        assert json.dumps(value) == before
    json.dumps(row, ensure_ascii=False).encode()
    assert row["messages"]
    for message in row["messages"]:
        assert message["role"] in ("system", "user", "assistant", "tool") and isinstance(message["content"], str)
        assert isinstance(message.get("reasoning_content", ""), str)
        for call in message.get("tool_calls", []):
            assert isinstance(call["function"]["name"], str)
            arguments = call["function"]["arguments"]
            assert isinstance(json.loads(arguments) if isinstance(arguments, str) else arguments, dict)
    assert all(isinstance(tool, dict) for tool in row.get("tools", []))
    assert isinstance(row.get("chat_template_kwargs", {}), dict)
    assert normalize(row) == row


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


LONG = "High water at Brest is at six in the morning, and again half an hour after it was in the evening before."


def load_for_training(path):
    register()
    from swift.dataset import load_dataset

    load_dataset([f"fastmtp-self-distill:{path}"])


def test_rows_with_images_stop_every_verb(tmp_path):
    """A text-only run would ask and train the text `<image>`."""
    row = {"messages": [user("<image>What is this?"), assistant(LONG)], "images": ["port.jpg"]}
    path = write(tmp_path / "rows.jsonl", [{"query": "When?", "response": LONG}, row])
    model, out = str(TINY), str(tmp_path / "out")
    for run in (
        lambda: distill(model, path, out),
        lambda: clean([path], out),
        lambda: mix([path], out),
        lambda: vocab([path], model, out, sizes=[1024]),
        lambda: simulate(model, [], path),
        lambda: load_for_training(path),
    ):
        with pytest.raises(
            FastMTPError, match=r"rows\.jsonl:2: has images, videos or audio, and this run is text only"
        ):
            run()


@pytest.mark.parametrize(
    "reason", ["eos_token", "end_turn", "eos", "stop_sequence", "complete", "STOP", "function_call"]
)
def test_other_words_for_an_answer_that_ended(reason, tmp_path):
    """TGI's, Anthropic's and older servers' answers are not cut off: they are kept, trained and gone on from."""
    path = write(tmp_path / "rows.jsonl", [{"messages": [ASKED, assistant(LONG)], "finish_reason": reason}])
    clean([path], str(tmp_path / "clean.jsonl"))
    (row,) = read_rows(tmp_path / "clean.jsonl")
    assert row["finish_reason"] == reason
    assert len(training_examples(load_tokenizer(str(TINY)), row)) == 1
    conversation = Conversation([ASKED, assistant("x"), user("And low water?")])
    conversation.add(Reply("At six.", reason))
    assert conversation.waiting and not conversation.ended_early


@pytest.mark.parametrize("reason", ["length", "max_tokens", "content_filter", {"type": "stop"}, ["stop"], 3])
def test_what_else_a_server_says_is_no_end(reason):
    row = {"messages": [ASKED, assistant(LONG)], "finish_reason": reason}
    assert not is_complete(reason) and training_examples(load_tokenizer(str(TINY)), row) == []


def test_arguments_are_counted_the_same_in_either_form(tmp_path):
    """As the model writes them, an object, and not as a string in a string."""
    said_of = []
    for arguments in ({"city": "Brest", "day": 3}, '{"city":"Brest","day":3}', '{\n "city": "Brest",\n "day": 3}'):
        call = {"id": "x7", "type": "function", "function": {"name": "tide", "arguments": arguments}}
        row = {"messages": [ASKED, assistant("", tool_calls=[call])], "language": "en"}
        name = f"{len(said_of)}.jsonl"
        path = write(tmp_path / name, [row, {"messages": [user("And low water?"), assistant(LONG)], "language": "en"}])
        counter = TokenCounter(str(TINY))
        counts = Counts.load(count(path, tmp_path / f"{name}.counts"))
        mix([path], str(tmp_path / f"{name}.mix"), shares=["general=1"], val_ratio=0, model=str(TINY))
        mixed = json.loads((tmp_path / f"{name}.mix" / "report.json").read_text())["groups"]["general"]["input"]
        said_of.append(
            (
                message_text(row["messages"][1]),
                counter(row),
                counts.counted["en/general"].tolist(),
                mixed["answer_tokens"],
            )
        )
    assert said_of[0] == said_of[1] == said_of[2] and "\\" not in said_of[0][0]


def count(path, folder):
    """The counts of a file, as `fastmtp vocab` keeps them."""
    count_files([path], CountSettings(held_out=1e-9), read_vocabulary(str(TINY)), folder)
    (kept,) = folder.iterdir()
    return kept


def test_a_response_is_the_answer(tmp_path):
    """ms-swift trains on it, so that is what is cleaned and counted."""
    row = {"query": "When is high water?", "response": LONG, "category": "tides"}
    path = write(tmp_path / "rows.jsonl", [row])
    clean([path], str(tmp_path / "clean.jsonl"))
    (kept,) = read_rows(tmp_path / "clean.jsonl")
    assert kept == {"messages": [ASKED, assistant(LONG)], "category": "tides"}


def test_distill_asks_all_of_it(tmp_path):
    """The model answers the turn of the history and the question; the given answers are not part of what it sees."""
    row = {"system": "Be brief.", "history": [["I sail from Brest.", "Fair winds!"]], "query": "When?", "response": "6"}
    path = write(tmp_path / "rows.jsonl", [row])
    distill(str(TINY), path, str(tmp_path / "o.jsonl"), max_new_tokens=4, temperature=0)
    (answered,) = read_rows(tmp_path / "o.jsonl")
    first = answered["messages"]
    assert [m["role"] for m in first] == ["system", "user", "assistant"]  # cut off after four tokens
    assert first[0]["content"] == "Be brief." and first[1]["content"] == "I sail from Brest."
    assert not {"system", "history", "query", "response"} & answered.keys()


@pytest.mark.matrix
def test_rows_of_a_dataset_are_named_by_it(tmp_path):
    """Not by the file that they are saved in, through the command."""
    agent = [ASKED, {"role": "tool_call", "content": '{"name": "tide", "arguments": {}}'},
             {"role": "tool_response", "content": "06:12"}, assistant("At six.")]  # fmt: skip
    rows = [{"messages": agent, "tools": json.dumps([TOOL])}, {"messages": [ASKED], "images": ["port.jpg"]}]
    path = write(tmp_path / "agent.jsonl", rows)
    (tmp_path / "hub").mkdir()
    pyarrow.parquet.write_table(
        pyarrow.table({"prompt": ["a", "b"], "image": [None, "port.jpg"]}), tmp_path / "hub" / "train.parquet"
    )
    command = [str(Path(sys.executable).parent / "fastmtp"), "distill", "--model", str(TINY), "--max_new_tokens", "4"]
    for name in (f"swift:{path}", f"hf:{tmp_path / 'hub'}"):
        done = subprocess.run(
            [*command, "--prompts", name, "--output", str(tmp_path / f"{name[:2]}.jsonl")],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        last = done.stderr.strip().splitlines()[-1]
        assert done.returncode == 1 and last.startswith(f"fastmtp: error: {name}, row 2: has images, videos"), last
    output = tmp_path / "skip.jsonl"
    done = subprocess.run(
        [*command, "--prompts", f"swift:{path}", "--output", str(output), "--on_bad_row", "skip"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    (row,) = read_rows(output)
    assert row["tools"] == [TOOL]
    report = json.loads((tmp_path / "skip.jsonl.report.json").read_text())
    assert [bad["rows"] for bad in report["bad_rows"].values()] == [[f"swift:{path}, row 2 (`images`)"]]


def test_arguments_as_objects_are_sent_as_the_protocol_has_them(tmp_path):
    """Rows keep calls as objects or strings; servers get strings, templates objects: the prompt is the same."""
    folder = with_template("calls", tmp_path / "model")
    asked = []
    for arguments in ({"word": "tide"}, '{"word": "tide"}'):
        call = {"id": "c", "type": "function", "function": {"name": "look_up", "arguments": arguments}}
        result = {"role": "tool", "content": "06:12", "tool_call_id": "c"}
        row = {"tools": [TOOL], "messages": [ASKED, assistant("", tool_calls=[call]), result]}
        path, output = write(tmp_path / "p.jsonl", [row]), tmp_path / f"{len(asked)}.jsonl"
        with ScriptedEngine(folder, cut_off=0.0) as engine:
            distill(str(folder), path, str(output), base_urls=[engine.url])
        asked.append([prompt for prompt, _, _ in engine.turns])
    assert asked[0] == asked[1] and len(asked[0]) == 2
