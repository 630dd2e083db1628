"""What is trained is what the model was asked with, followed by what it answered: for every kind of chat template,
through ms-swift's own pipeline."""

import json

import pytest
import torch
from helpers.chat_templates import TEMPLATES, with_template
from helpers.scripted_engine import ScriptedEngine
from helpers.tiers import some_now
from helpers.training_ids import TOOLS, supervised, trained
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from swift_fastmtp.data.clean import clean
from swift_fastmtp.data.distill import distill
from swift_fastmtp.errors import FastMTPError
from swift_fastmtp.export.data_check import examine_data
from swift_fastmtp.files.rows import read_rows
from swift_fastmtp.method.config import FastMTPConfig
from swift_fastmtp.model.loading import load_model
from swift_fastmtp.simulate.acceptance import make_texts
from swift_fastmtp.simulate.simulate import simulate

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A function from a template's name to a folder of the tiny model with it."""
    made, root = {}, tmp_path_factory.mktemp("templates")
    return lambda name: made.get(name) or made.setdefault(name, with_template(name, root / name))


def pairs(turns):
    """Prompt and answer of every turn, those that were cut off too."""
    return sorted((asked, answered) for asked, answered, _ in turns)


TEXT = st.sampled_from(["", "Hello.", "Name a color.", "two\n\nlines ", " <think>", "什么是细胞", "1 + 1 = ?"])
QUESTION = st.builds(lambda text: {"role": "user", "content": text}, TEXT)
ANSWER = st.just([{"role": "assistant", "content": "somebody's"}])


@st.composite
def conversations(draw):
    """One to three turns, users who speak twice, system prompts that may be empty, switches of the template."""
    messages = []
    if draw(st.booleans()):
        messages.append({"role": "system", "content": draw(TEXT)})
    for turn in range(draw(st.integers(1, 3))):
        messages += draw(ANSWER) if turn else []
        messages += draw(st.lists(QUESTION, min_size=1, max_size=2))
    row = {"messages": messages}
    if draw(st.booleans()):
        row["chat_template_kwargs"] = {"enable_thinking": draw(st.booleans())}
    return row


@pytest.mark.parametrize("parse", some_now([True, False], [True]), ids=["parsed", "raw"])
@pytest.mark.parametrize("name", some_now(TEMPLATES, ["hybrid"]))
@settings(max_examples=6, deadline=None, suppress_health_check=list(HealthCheck), phases=[Phase.generate])
@given(rows=st.lists(conversations(), min_size=4, max_size=10))
def test_from_a_server(name, parse, folders, tmp_path_factory, rows):
    """Thinking on and off, one and several turns, reasoning parsed by the server or not."""
    folder, work = folders(name), tmp_path_factory.mktemp("server")
    (work / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with ScriptedEngine(folder, parse) as engine:
        distill(str(folder), str(work / "prompts.jsonl"), str(work / "rows.jsonl"), base_urls=[engine.url])
    wanted = pairs(engine.turns)
    if wanted:
        assert supervised(trained(folder, work / "rows.jsonl")) == wanted


def test_with_tools(folders, tmp_path):
    """Calls and their results: arguments as JSON strings, results named by id in another order than the calls."""
    call = {"id": "c1", "type": "function", "function": {"name": "look_up", "arguments": '{"word": "cell"}'}}
    source = [
        {"role": "user", "content": "What is a cell?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "a small part", "tool_call_id": "c1"},
        {"role": "assistant", "content": "x"},
        {"role": "user", "content": "Really?"},
    ]
    for name in ("calls", "items"):
        work = tmp_path / name
        work.mkdir()
        rows = [{"tools": TOOLS, "messages": source[:n]} for n in (1, 4, 5)]
        (work / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        with ScriptedEngine(folders(name), cut_off=0.0) as engine:
            distill(str(folders(name)), str(work / "prompts.jsonl"), str(work / "rows.jsonl"), base_urls=[engine.url])
        assert len(engine.turns) == 6
        examples = trained(folders(name), work / "rows.jsonl")
        assert supervised(examples) == pairs(engine.turns)
        end = AutoTokenizer.from_pretrained(folders(name)).eos_token_id
        assert not any(ids[at : at + 2] == [end, end] for ids, _ in examples for at in range(len(ids)))


@pytest.mark.parametrize("tells", ["count", "nothing"])
def test_from_servers_that_tell_less(tells, folders, tmp_path):
    """No ids: prompts are what the folder's template renders, answers are written as it writes them."""
    rows = [{"messages": [{"role": "user", "content": text}]} for text in ("Hello.", "Name a color.", "Why?")]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder = folders("thinking")
    with ScriptedEngine(folder, tells=tells, cut_off=0.0) as engine:
        distill(str(folder), str(tmp_path / "prompts.jsonl"), str(tmp_path / "rows.jsonl"), base_urls=[engine.url])
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = [[tokenizer.decode(ids) for ids in pair] for pair in supervised(trained(folder, tmp_path / "rows.jsonl"))]
    wanted = [[tokenizer.decode(asked), tokenizer.decode(answered)] for asked, answered, _ in engine.turns]
    assert sorted(texts) == sorted(wanted)


@pytest.mark.parametrize("name", TEMPLATES)
def test_in_process(name, folders, tmp_path):
    """The model itself, with several turns and the template's switch."""
    thinking = {"enable_thinking": False}
    two_turns = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "x"},
        {"role": "user", "content": "Why?"},
    ]
    rows = [
        {"prompt": "Name a color."},
        {"prompt": "Hello.", "chat_template_kwargs": thinking},
        {"messages": two_turns},
    ]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder = folders(name)
    distill(
        str(folder), str(tmp_path / "prompts.jsonl"), str(tmp_path / "rows.jsonl"), max_new_tokens=12, temperature=0
    )
    tokenizer = AutoTokenizer.from_pretrained(folder)
    wanted, lines = [], []
    for row in read_rows(tmp_path / "rows.jsonl"):
        for number, message in enumerate(row["messages"]):
            if message["role"] != "assistant":
                continue
            history = [{k: m[k] for k in ("role", "content")} for m in row["messages"][:number]]
            kwargs = row.get("chat_template_kwargs") or {}
            prompt = tokenizer.apply_chat_template(history, tokenize=False, add_generation_prompt=True, **kwargs)
            wanted.append((tokenizer.encode(prompt, add_special_tokens=False), message["token_ids"]))
            message["finish_reason"] = "stop"  # the tiny model rarely ends an answer behind a foreign template
        lines.append(json.dumps({**row, "finish_reason": "stop"}))
    (tmp_path / "ended.jsonl").write_text("\n".join(lines))
    assert supervised(trained(folder, tmp_path / "ended.jsonl")) == sorted(wanted) and len(wanted) >= 3


PLAIN = [
    {"role": "user", "content": "What is two plus two?"},
    {"role": "assistant", "content": "Four.", "reasoning_content": "2+2"},
    {"role": "user", "content": "Are you sure?"},
    {"role": "assistant", "content": "Yes."},
]
RENDERED = {
    "thinking": [
        ("<|im_start|>user\nWhat is two plus two?<|im_end|>\n<|im_start|>assistant\n<think>\n",
         "2+2\n</think>\n\nFour.<|im_end|>"),
        ("<|im_start|>user\nWhat is two plus two?<|im_end|>\n<|im_start|>assistant\nFour.<|im_end|>\n"
         "<|im_start|>user\nAre you sure?<|im_end|>\n<|im_start|>assistant\n<think>\n", "\n</think>\n\nYes.<|im_end|>"),
    ],
    "hybrid": [
        ("<|start|><|user|>\nWhat is two plus two?<|assistant|>", "\n<think>2+2</think>\nFour.<|user|>"),
        ("<|start|><|user|>\nWhat is two plus two?<|assistant|>\n<think></think>\nFour."
         "<|user|>\nAre you sure?<|assistant|>", "\n<think></think>\nYes.<|user|>"),
    ],
    "closing": [
        ("<|user|>What is two plus two?<|assistant|><think>", "2+2</think>Four.<|end|>"),
        ("<|user|>What is two plus two?<|assistant|></think>Four.<|end|><|user|>Are you sure?<|assistant|><think>",
         "</think>Yes.<|end|>"),
    ],
    "calls": [
        ("<|im_start|>system\nYou are a tiny assistant.<|im_end|>\n<|im_start|>user\nWhat is two plus two?<|im_end|>\n"
         "<|im_start|>assistant\n", "Four.<|im_end|>"),
        ("<|im_start|>system\nYou are a tiny assistant.<|im_end|>\n<|im_start|>user\nWhat is two plus two?<|im_end|>\n"
         "<|im_start|>assistant\nFour.<|im_end|>\n<|im_start|>user\nAre you sure?<|im_end|>\n<|im_start|>assistant\n",
         "Yes.<|im_end|>"),
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", RENDERED)
def test_plain_rows_are_rendered_as_they_are_served(name, folders, tmp_path):
    """Rows without ids, written down by hand what each is: the history without the reasoning where the template drops
    it, and an end where the model would have ended."""
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": PLAIN}) + "\n")
    tokenizer = AutoTokenizer.from_pretrained(folders(name))
    pairs = supervised(trained(folders(name), tmp_path / "rows.jsonl"))
    assert sorted(tuple(map(tokenizer.decode, pair)) for pair in pairs) == sorted(RENDERED[name])


def test_options_that_say_how_plain_rows_are_asked(folders, tmp_path):
    """`--system`, `--enable_thinking`, `--loss_scale`, a message's own `loss`: by the folder's template."""
    folder, path = folders("thinking"), tmp_path / "rows.jsonl"
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def texts(messages, **options):
        path.write_text(json.dumps({"messages": messages}) + "\n")
        return [list(map(tokenizer.decode, pair)) for pair in supervised(trained(folder, path, **options))]

    start = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhat is two plus two?<|im_end|>\n"
    quiet = "<|im_start|>assistant\n<think>\n\n</think>\n\n"
    assert texts(PLAIN[:2], system="Be brief.", enable_thinking="false")[0][0] == start + quiet
    assert [answer for _, answer in texts(PLAIN, loss_scale="last_round")] == ["\n</think>\n\nYes.<|im_end|>"]
    unwanted = [PLAIN[0], {**PLAIN[1], "loss": False}, *PLAIN[2:]]
    assert [answer for _, answer in texts(unwanted)] == ["\n</think>\n\nYes.<|im_end|>"]
    path.write_text(json.dumps({"messages": PLAIN[:2]}) + "\n")
    ((ids, labels),) = trained(folder, path, loss_scale="all")
    assert labels == [-100, *ids[1:]]


def test_two_renderings_that_differ_stop_the_run(folders, tmp_path):
    """Another folder's template than the rows were asked with; a template of ms-swift's that renders otherwise."""
    path, folder = tmp_path / "rows.jsonl", folders("thinking")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "Hello."}\n')
    with ScriptedEngine(folder, cut_off=0.0) as engine:
        distill(str(folder), str(tmp_path / "prompts.jsonl"), str(path), base_urls=[engine.url])
    with pytest.raises(FastMTPError, match=r"rows\.jsonl:1: was asked with another prompt .*asked .*<think>.*rendered"):
        trained(folders("calls"), path)
    with pytest.raises(FastMTPError, match=r"--template qwen: renders .*rows\.jsonl:1 otherwise .*helpful assistant"):
        trained(folder, path, template="qwen")
    with pytest.raises(FastMTPError, match=r"--system: the row keeps the prompts"):
        trained(folder, path, system="Be brief.")
    with pytest.raises(FastMTPError, match=r"--response_prefix .* chat template of the model's folder"):
        trained(folder, path, response_prefix="<think>")
    with pytest.raises(FastMTPError, match=r"--loss_scale react .*default, last_round, all"):
        trained(folder, path, loss_scale="react")


def test_rows_that_cannot_be_trained_on_are_named(folders, tmp_path, caplog):
    """They stop the run, or are counted, as the user chose; none is deleted silently."""
    late = [{"role": "user", "content": "a"}, {"role": "system", "content": "b"}, {"role": "assistant", "content": "c"}]
    foreign = [PLAIN[0], {"role": "assistant", "content": "x", "token_ids": [5, 70000]}]
    good = {"messages": PLAIN[:2]}
    bad = {
        r"\(a system message must come first\); fix the row, or skip": {"messages": late},
        r"holds token id 70000, the model has 6144": {"messages": foreign},
        r"needs a `content`": {"messages": [{"role": "user", "content": 7}]},
    }
    path = tmp_path / "rows.jsonl"
    for what, row in bad.items():
        path.write_text("".join(json.dumps(row) + "\n" for row in (good, row)))
        with pytest.raises(FastMTPError, match=rf"rows\.jsonl:2: .*{what}"):
            trained(folders("thinking"), path)
    path.write_text("".join(json.dumps(row) + "\n" for row in (good, *bad.values(), good)))
    monkey = {"model_kwargs": json.dumps({"fastmtp_on_bad_row": "skip"})}
    with caplog.at_level("WARNING", logger="swift"):
        assert len(trained(folders("thinking"), path, **monkey)) == 2
    assert "3 of 5 rows skipped, which cannot be trained on" in caplog.text and "rows.jsonl:2" in caplog.text


def test_data_is_checked_against_a_model(folders, tmp_path, capsys):
    """`fastmtp doctor --data` and `fastmtp clean --model`: rows of this folder, of another one, and impossible ids."""
    folder, path = folders("thinking"), tmp_path / "rows.jsonl"
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "Hello."}\n{"prompt": "Name a color."}\n')
    with ScriptedEngine(folder, cut_off=0.0) as engine:
        distill(str(folder), str(tmp_path / "prompts.jsonl"), str(path), base_urls=[engine.url])
    assert examine_data(folder, path) == []

    foreign = [PLAIN[0], {"role": "assistant", "content": "It is four.", "token_ids": [5, 70000]}]
    with open(path, "a") as file:
        file.write(json.dumps({"messages": foreign}) + "\n" + json.dumps({"messages": 5}) + "\n")
    (unusable,) = examine_data(folder, path)
    assert unusable.level == "error" and "2 of 4 rows cannot be trained on; first: " in unusable.what
    assert "rows.jsonl:3: holds token id 70000, the model has 6144" in unusable.what
    other, _ = examine_data(folders("calls"), path)
    assert (
        "renders 2 of 4 rows otherwise than they were asked" in other.what and "rows.jsonl:1: from token" in other.what
    )

    for name, kept in (("thinking", 2), ("calls", 1)):
        cleaned = tmp_path / f"{name}.jsonl"
        options = {"model": str(folders(name)), "filters": ["asked"], "on_bad_row": "skip"}
        with open(path, "a") as file:
            file.write(json.dumps({"messages": PLAIN[:2], "id": name}) + "\n")
        clean([str(path)], str(cleaned), **options)
        report = json.loads((tmp_path / f"{name}.jsonl.report.json").read_text())
        assert report["removed"]["asked"]["rows"] == 3 - kept + (name == "calls")


def test_a_folder_without_a_chat_template_is_refused_at_once(tmp_path):
    """By the first command, with the reason; DeepSeek-V3.2 ships Python code instead of a template."""
    folder = with_template("calls", tmp_path / "model")
    (folder / "chat_template.jinja").unlink()
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "Hello."}\n')
    for encoder, what in (
        (False, "take the folder of the chat model"),
        (True, r"encoding/encoding_x\.py\), which is not run"),
    ):
        if encoder:
            (folder / "encoding").mkdir()
            (folder / "encoding" / "encoding_x.py").write_text("raise SystemExit('this code was run')")
        with pytest.raises(FastMTPError, match=rf"has no chat template.*{what}"):
            distill(str(folder), str(tmp_path / "prompts.jsonl"), str(tmp_path / "rows.jsonl"))
        with pytest.raises(FastMTPError, match=rf"has no chat template.*{what}"):
            simulate(str(folder), [], str(tmp_path / "prompts.jsonl"))
        assert any(
            what.split("(")[0][:10] in str(finding) for finding in examine_data(folder, tmp_path / "prompts.jsonl")
        )


def test_distill_skips_what_the_template_refuses(folders, tmp_path):
    """From a server and in process: the row is named, or counted, and the others are answered."""
    late = [{"role": "user", "content": "a"}, {"role": "system", "content": "b"}, {"role": "user", "content": "c"}]
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "Hello."}\n' + json.dumps({"messages": late}) + "\n")
    folder = str(folders("thinking"))
    with ScriptedEngine(folders("thinking")) as engine:
        for where in ({"base_urls": [engine.url]}, {}):
            output = tmp_path / f"{len(where)}.jsonl"
            options = {**where, "max_new_tokens": 4}
            with pytest.raises(
                FastMTPError, match=r"prompts\.jsonl:2: .*a system message must come first.*--on_bad_row skip"
            ):
                distill(folder, str(prompts), str(output), **options)
            distill(folder, str(prompts), str(output), on_bad_row="skip", **options)
            refused = json.loads((tmp_path / f"{output.name}.report.json").read_text())["refused_rows"]
            assert len(read_rows(output)) == 1 and refused["count"] == 1 and "prompts.jsonl:2" in refused["rows"][0]


def test_simulate_asks_with_the_rows_tools_and_switches(folders):
    """Generated and given answers stand behind the prompt that a server would be asked with."""
    folder = folders("calls")
    model, tokenizer = load_model(folder, torch.float32), AutoTokenizer.from_pretrained(folder)
    model.fastmtp = FastMTPConfig()
    row = {
        "tools": TOOLS,
        "messages": [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": "Hi there."}],
    }
    prompt = tokenizer.apply_chat_template(row["messages"][:1], tools=TOOLS, tokenize=False, add_generation_prompt=True)
    for answers in ("generate", "given"):
        (text,) = make_texts(model, tokenizer, [row], 4, answers, 1)
        assert tokenizer.decode(text.ids[: text.start]) == prompt and "look_up" in prompt
    assert tokenizer.decode(text.ids[text.start : text.end]) == "Hi there.<|im_end|>"
