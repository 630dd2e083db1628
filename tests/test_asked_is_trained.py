"""What is trained is what the model was asked with, followed by what it answered: for every kind of chat template, through
ms-swift's own pipeline."""

import json
import shutil

import pytest
from chat_templates import TEMPLATES, with_template
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from scripted_engine import ScriptedEngine
from transformers import AutoTokenizer

from swift_fastmtp.data.distill import distill
from swift_fastmtp.data.rows import read_rows
from swift_fastmtp.errors import FastMTPError
from swift_fastmtp.swift_plugin.register import register

TOOLS = [{"type": "function", "function": {"name": "look_up", "parameters": {"type": "object", "properties": {}}}}]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A function from a template's name to a folder of the tiny model with it."""
    made, root = {}, tmp_path_factory.mktemp("templates")
    return lambda name: made.get(name) or made.setdefault(name, with_template(name, root / name))


def trained(folder, dataset, **options):
    """(input ids, labels) of every example that `swift sft` would train on, by ms-swift's own pipeline."""
    register()
    from swift.pipelines.export.cached_dataset import ExportCachedDataset

    flags = {"model": folder, "model_type": "fastmtp", "dataset": dataset, "to_cached_dataset": "true"}
    flags |= {"split_dataset_ratio": 0, "output_dir": f"{dataset}.cache", "dataset_num_proc": 1, **options}
    pipeline = ExportCachedDataset([str(x) for k, v in flags.items() for x in (f"--{k}", v)])
    rows, _ = pipeline._prepare_dataset()
    encoded = [pipeline.template.encode(row, return_length=True) for row in rows]
    shutil.rmtree(f"{dataset}.cache", ignore_errors=True)
    return [(x["input_ids"], x["labels"]) for x in encoded]


def supervised(examples):
    """(everything before, answer) of each run of supervised tokens."""
    found = []
    for ids, labels in examples:
        assert all(label in (-100, i) for i, label in zip(ids, labels, strict=True))
        start = None
        for at, label in enumerate([*labels, -100]):
            if label != -100 and start is None:
                start = at
            if label == -100 and start is not None:
                found.append((ids[:start], ids[start:at]))
                start = None
    return sorted(found)


def finished(turns):
    return sorted((asked, answered) for asked, answered, reason in turns if reason != "length")


TEXT = st.sampled_from(["", "Hello.", "Name a colour.", "two\n\nlines ", " <think>", "什么是细胞", "1 + 1 = ?"])
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


@pytest.mark.parametrize("parse", [True, False], ids=["parsed", "raw"])
@pytest.mark.parametrize("name", TEMPLATES)
@settings(max_examples=6, deadline=None, suppress_health_check=list(HealthCheck), phases=[Phase.generate])
@given(rows=st.lists(conversations(), min_size=4, max_size=10))
def test_from_a_server(name, parse, folders, tmp_path_factory, rows):
    """Thinking on and off, one and several turns, reasoning parsed by the server or not."""
    folder, work = folders(name), tmp_path_factory.mktemp("server")
    (work / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with ScriptedEngine(folder, parse) as engine:
        distill(str(folder), str(work / "prompts.jsonl"), str(work / "rows.jsonl"), base_urls=[engine.url])
    wanted = finished(engine.turns)
    if wanted:
        assert supervised(trained(folder, work / "rows.jsonl")) == wanted
