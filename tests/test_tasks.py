"""Tasks: descriptors, users' files, sampling, and what is said when something is missing or broken."""

import json
import re
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from swift_fastmtp.data import tasks
from swift_fastmtp.data.clean import clean
from swift_fastmtp.data.tasks import FOLDER, load_task, read_descriptor, task_names
from swift_fastmtp.errors import FastMTPError

PAPER = {"mt_bench": "MT.", "livecodebench": "Code", "math_500": "Math", "rag": "RAG", "nq": "QA", "cnn_dm": "Summ."}
# A row as each source has it, and what must be in the prompt.
ROWS = {
    "mt_bench": ({"question_id": 81, "category": "writing", "turns": ["First?", "Second?"]}, "First?"),
    "livecodebench": ({"question_id": "x_1", "question_content": "Add {two}.", "starter_code": ""}, "Add {two}."),
    "math_500": ({"unique_id": "test/1.json", "problem": "1 + 1?"}, "final answer in \\boxed{}."),
    "rag": ({"question_id": 481, "category": "rag", "turns": ["Passage. Question?"]}, "Passage."),
    "nq": ({"question_id": 321, "category": "qa", "turns": ["Who?"]}, "Who?"),
    "cnn_dm": ({"question_id": 241, "category": "summarization", "turns": ["Summarize: x"]}, "Summarize: x"),
    "c_eval": ({"id": 0, "question": "水的沸点？", "A": "90", "B": "100", "C": "1", "D": "2"}, "B. 100"),
    "humaneval": ({"task_id": "HumanEval/0", "prompt": "def f(x):"}, "def f(x):"),
    "gsm8k": ({"question": "How many?", "answer": "3"}, "How many?"),
    "spec_bench": ({"question_id": 161, "category": "translation", "turns": ["Translate: x"]}, "Translate: x"),
    # As specdec_bench fills the rows in, and as NVIDIA-NeMo/Skills does.
    "speed_bench": ({"question_id": "a1", "category": "coding", "turns": ["def f(x):"]}, "def f(x):"),
    **{
        f"speed_bench_{length}k": ({"question_id": "a1", "messages": [{"role": "user", "content": "Sort:"}]}, "Sort:")
        for length in (1, 2, 8, 16, 32)
    },
}


def write(path, rows):
    path.write_text("".join(json.dumps(r) + "\n" if not isinstance(r, str) else f"{r}\n" for r in rows))
    return path


def test_every_paper_task_is_described():
    assert {name: read_descriptor(name).title for name in PAPER} == PAPER
    assert read_descriptor("c_eval").title == "ZH."
    assert set(ROWS) | {"smoke"} == set(task_names())
    for name in task_names():
        described = read_descriptor(name)
        assert described.licence and described.language and described.source
        assert sum(x is not None for x in (described.hub, described.url, described.file)) == 1


@pytest.mark.parametrize("name", ROWS)
def test_rows_of_a_source_become_turns(name, tmp_path):
    row, inside = ROWS[name]
    task = load_task(f"{name}={write(tmp_path / 'rows.jsonl', [row])}")
    assert inside in task.questions[0].turns[0] and "{" not in task.questions[0].turns[0].replace("{two}", "").replace(
        "{}", ""
    )
    assert len(task.questions[0].turns) == (2 if name == "mt_bench" else 1)
    assert task.title == read_descriptor(name).title and task.source == "rows.jsonl"


def test_only_the_rows_of_the_task(tmp_path):
    rows = [ROWS[name][0] for name in ("mt_bench", "rag", "nq", "cnn_dm")]
    task = load_task(f"rag={write(tmp_path / 'question.jsonl', rows)}")
    assert [q.id for q in task.questions] == ["481"]


def test_one_category_of_a_task(tmp_path):
    rows = [
        {"question_id": i, "category": kind, "turns": [f"{kind} {i}?"]}
        for i, kind in enumerate(("coding", "math", "coding", "rag"))
    ]
    path = write(tmp_path / "question.jsonl", rows)
    for name in ("spec_bench", "mine"):
        task = load_task(f"{name}:coding={path}")
        assert task.name == f"{name}:coding" and task.title.endswith(": coding")
        assert [q.turns for q in task.questions] == [["coding 0?"], ["coding 2?"]]
    with pytest.raises(FastMTPError, match="holds no questions of the category 'poems'"):
        load_task(f"spec_bench:poems={path}")
    # A file's own name may have a colon.
    assert len(load_task(str(path.rename(tmp_path / "a:b.jsonl"))).questions) == 4


def test_a_row_without_its_text_is_no_question(tmp_path):
    """More than half of SPEED-Bench's rows, as they are on the hub."""
    rows = [
        {"question_id": "a", "category": "coding", "turns": ["def f(x):"]},
        {
            "question_id": "b",
            "category": "math",
            "turns": ["FULL BENCHMARK DATA SHOULD BE FETCHED FROM THE SOURCE USING SPECDEC_BENCH"],
        },
    ]
    path = write(tmp_path / "qualitative.jsonl", rows)
    with pytest.raises(
        FastMTPError, match=r"jsonl:2: its text is not in this file, .*prepare.py.* as speed_bench=FILE"
    ):
        load_task(f"speed_bench={path}")
    assert [q.id for q in load_task(f"speed_bench:coding={path}").questions] == ["a"]


def test_users_files(tmp_path):
    rows = [
        {"prompt": "One?"},
        {"id": "b", "turns": ["Two?", "And?"]},
        {
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": "Three?"},
                {"role": "assistant", "content": "not the model's"},
                {"role": "user", "content": "Why?"},
            ]
        },
    ]
    path = write(tmp_path / "my-task.jsonl", rows)
    for spec, name in ((str(path), "my-task"), (f"other={path}", "other"), (f"gsm8k={path}", "gsm8k")):
        task = load_task(spec)
        assert task.name == name
        assert [q.turns for q in task.questions] == [["One?"], ["Two?", "And?"], ["Three?", "Why?"]]
        assert [q.id for q in task.questions] == ["0", "b", "2"] and task.questions[2].system == "Be brief."
    forms = [
        {"query": "Two?", "history": [["One?", "Yes."]], "system": "Be brief."},
        {"messages": [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": [{"text": "One?"}]}]},
    ]
    questions = load_task(str(write(tmp_path / "forms.jsonl", forms))).questions
    assert [(q.turns, q.system) for q in questions] == [(["One?", "Two?"], "Be brief."), (["One?"], "Be brief.")]
    pyarrow.parquet.write_table(pyarrow.table({"prompt": ["One?"]}), tmp_path / "t.parquet")
    assert load_task(str(tmp_path / "t.parquet")).questions[0].turns == ["One?"]


def test_questions_are_drawn_by_the_seed(tmp_path):
    path = write(tmp_path / "t.jsonl", [{"prompt": f"Question {i}?"} for i in range(200)])
    few = load_task(str(path), 20, seed=1)
    assert len(few.questions) == 20 and few == load_task(str(path), 20, seed=1)
    assert few.sha256 != load_task(str(path), 20, seed=2).sha256
    order = [int(q.id) for q in few.questions]
    assert order == sorted(order) and order != list(range(20))
    assert len(load_task(f"gsm8k={path}").questions) == 80  # as many as the descriptor says
    assert len(load_task(f"gsm8k={path}", 150).questions) == 150


def test_a_source_of_many_files_gives_some_of_each(tmp_path, monkeypatch):
    """C-Eval: ids begin again in every subject."""
    paths = []
    for subject in ("law", "logic", "physics"):
        (tmp_path / subject).mkdir()
        table = pyarrow.Table.from_pylist([{**ROWS["c_eval"][0], "id": i} for i in range(5)])
        paths.append(tmp_path / subject / "val-00000-of-00001.parquet")
        pyarrow.parquet.write_table(table, paths[-1])
    monkeypatch.setattr(tasks, "_fetch", lambda *_: paths)
    task = load_task("c_eval")
    assert [q.id.split("/")[0] for q in task.questions] == ["law", "law", "logic", "logic", "physics", "physics"]


def test_offline_is_one_line_that_says_how(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for name in sorted(set(task_names()) - {"smoke"}):
        with pytest.raises(FastMTPError) as error:
            load_task(name, offline=True)
        message = str(error.value)
        assert f"give its file as {name}=FILE" in message and read_descriptor(name).source in message
        assert "\n" not in message
    with pytest.raises(FastMTPError, match="go online, or give its file as mt_bench=FILE"):
        load_task("mt_bench")  # HF_HUB_OFFLINE


def test_a_url_is_read_once(monkeypatch, tmp_path):
    source = write(tmp_path / "question.jsonl", [ROWS["mt_bench"][0]])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    described = read_descriptor("mt_bench")
    monkeypatch.setattr(tasks, "read_descriptor", lambda _: vars_of(described, url=source.as_uri()))
    assert load_task("mt_bench").questions[0].id == "81"
    source.unlink()
    assert load_task("mt_bench", offline=True).questions[0].id == "81"
    with pytest.raises(FastMTPError, match="cannot be read"):
        monkeypatch.setattr(tasks, "read_descriptor", lambda _: vars_of(described, url=source.as_uri() + "l"))
        load_task("mt_bench")


def vars_of(described, **changes):
    return tasks.Descriptor(**{**vars(described), **changes})


BROKEN = {
    "not JSON": (['{"prompt": "a"}', "{"], ":2: not JSON"),
    "no object": (["[]"], ":1: a row must be a JSON object"),
    "nothing asked": ([{"prompt": "a"}, {"question": "b"}], ":2: needs turns, prompt or messages"),
    "empty": ([{"prompt": " "}], ":1: its turns must be texts, none of them empty"),
    "no texts": ([{"turns": [1]}], ":1: its turns must be texts"),
    "no list": ([{"turns": "a"}], ":1: its turns must be texts"),
    "no user": ([{"messages": [{"role": "assistant", "content": "a"}]}], ":1: its turns must be texts"),
    "odd messages": ([{"messages": ["a"]}], ":1: its turns must be texts"),
    "an image": (
        [{"prompt": "What is this?", "images": ["port.jpg"]}],
        ":1: its turns must be texts, none of them empty "
        "(has images, videos or audio, and this run is text only (`images`)); fix the row",
    ),
    "id twice": ([{"id": 1, "prompt": "a"}, {"id": 1, "prompt": "b"}], "two questions have the id '1'"),
    "no rows": ([], "holds no questions"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_rows_are_named(case, tmp_path):
    rows, message = BROKEN[case]
    path = write(tmp_path / "t.jsonl", rows)
    with pytest.raises(FastMTPError, match=re.escape(message)) as error:
        load_task(str(path))
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_a_row_that_lacks_a_templates_field(tmp_path):
    path = write(tmp_path / "t.jsonl", [{"unique_id": "1", "question": "x"}])
    with pytest.raises(FastMTPError, match=r"t.jsonl:1: needs problem \(or turns, prompt or messages\); fix the row"):
        load_task(f"math_500={path}")
    with pytest.raises(FastMTPError, match="cannot be read"):
        load_task("gsm8k=nowhere.jsonl")
    with pytest.raises(FastMTPError, match="no task is called 'mtbench'; there are c_eval"):
        load_task("mtbench")


def test_our_own_prompts():
    task = load_task("smoke")
    assert len(task.questions) == 30 and sum(len(q.turns) == 2 for q in task.questions) >= 5
    assert {q.id.split("-")[0] for q in task.questions} == {"en", "zh", "code"}
    assert [p.name for p in FOLDER.glob("*.jsonl")] == ["smoke.jsonl"]  # no third party's text


def test_clean_compares_with_the_same_tasks_on_every_machine(tmp_path, monkeypatch, capsys):
    """Whatever is in the cache, and whatever files lie about: the bundled tasks, unless others are named."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    asked = load_task("smoke").questions[0].turns[0]
    rows = [
        {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": f"An answer to {text}"}]}
        for text in (asked, "Another question altogether?")
    ]
    source = write(tmp_path / "rows.jsonl", rows)
    path = write(tmp_path / "mt.jsonl", [{"question_id": 1, "turns": ["Another question altogether?"]}])
    write(tmp_path / "smoke", [{"turns": ["Another question altogether?"]}])
    kept = []
    for name in ("empty", "full"):
        clean([str(source)], str(tmp_path / f"{name}.jsonl"))
        report = json.loads(Path(f"{tmp_path}/{name}.jsonl.report.json").read_text())
        assert report["removed"]["decontaminate"]["rows"] == 1
        kept.append((Path(f"{tmp_path}/{name}.jsonl").read_bytes(), report))
        # From now on a task that the second row is in is in the cache.
        monkeypatch.setattr(tasks, "_fetch", lambda task, *_: [path if task == "mt_bench" else FOLDER / "smoke.jsonl"])
    assert kept[0] == kept[1]
    (compared,) = kept[0][1]["decontaminated_with"]
    assert (compared["task"], len(compared["sha256"])) == ("smoke", 64)
    assert compared["prompts"] == sum(len(q.turns) for q in load_task("smoke").questions)
    assert "compared with the tasks smoke and no others" in capsys.readouterr().out

    for name, named in (("file", f"mt_bench={path}"), ("name", "mt_bench")):
        clean([str(source)], str(tmp_path / f"{name}.jsonl"), decontaminate=[named])
        report = json.loads(Path(f"{tmp_path}/{name}.jsonl.report.json").read_text())
        assert report["removed"]["decontaminate"]["rows"] == 1
        assert [(t["task"], t["prompts"]) for t in report["decontaminated_with"]] == [(named, 1)]
