"""`fastmtp clean`: every filter on good and bad rows, and what holds for every run."""

import gzip
import json
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from helpers.paths import ROOT, TINY
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from swift_fastmtp.data import filters
from swift_fastmtp.data.clean import clean
from swift_fastmtp.data.filters import looping_end
from swift_fastmtp.data.language import language
from swift_fastmtp.errors import FastMTPError

EN = (
    "Photosynthesis turns light into chemical energy. Chlorophyll in the leaves absorbs the light, water is split into "
    "oxygen and hydrogen, and carbon dioxide from the air becomes sugar that the plant stores for the winter."
)
ZH = (
    "光合作用把光能变成化学能。叶绿素吸收阳光，水被分解成氧气和氢，空气中的二氧化碳变成糖，植物把它储存起来过冬。"
    "这是地球上最重要的反应之一，没有它就没有我们呼吸的氧气。"
)
ZH_HANT = (
    "光合作用把光能變成化學能。葉綠素吸收陽光，水被分解成氧氣和氫，空氣中的二氧化碳變成糖，植物把它儲存起來過冬。"
    "這是地球上最重要的反應之一，沒有它就沒有我們呼吸的氧氣。"
)
FR = (
    "La photosynthèse transforme la lumière en énergie chimique. La chlorophylle des feuilles absorbe la lumière, "
    "l'eau est séparée en oxygène et en hydrogène, et le gaz carbonique de l'air devient du sucre pour l'hiver."
)
CODE = """Here is the function:

```python
import functools

@functools.cache
def fibonacci(n: int) -> int:
    if n < 2:
        return n
    return fibonacci(n - 1) + fibonacci(n - 2)

for number in range(10):
    print(number, fibonacci(number))
```
"""
TABLE = "| n | square |\n|---|---|\n" + "\n".join(f"| {n} | {n * n} |" for n in range(40)) + "\n" + "-" * 100
POEM = "\n".join(f"Row, row, row your boat, verse {n},\ngently down the stream,\n" for n in range(3))


def row(answer, prompt=EN, **extra):
    return {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}], **extra}


GOOD = [row(t, t) for t in (EN, ZH, ZH_HANT, FR, CODE, TABLE, POEM)]

CASES = [
    (
        filters.Truncated(),
        [row(EN, finish_reason="stop"), row(EN, finish_reason="tool_calls"), row("42")],
        [row(EN, finish_reason="length"), row(EN, finish_reason="abort"), row(" \n"),
         {"messages": row(EN)["messages"][:1]}],
    ),
    (
        filters.Reasoning(),
        [row("<think>\nhm\n</think>\nYes."), row("hm</think>是的。"), row("Use `x < y`.")],
        [
            row("<think> hm"),
            row("<think>a</think> b <think>c</think>"),
            row("想</think>好</think>答"),
            row("</think> a <think>"),
            row("<think>只有思考</think>\n"),
        ],
    ),
    (
        filters.SpecialTokens(),
        [row("a <| b |> c"), row("x |> f <| y"), row("tab\tand\r\nline\x0c"), row("<s>old</s> 中文，。！")],
        [
            row("done<|im_end|>"),
            row("<|endoftext|>", EN),
            row(EN, "你好<|im_start|>user"),
            row("<｜end▁of▁sentence｜>"),
            row("broken \ufffd"),
            row("bell \x07"),
            row("nul \x00 in code"),
        ],
    ),
    (
        filters.Length(filters.TokenCounter()),
        [row(EN), row(ZH), row(CODE)],
        [row("42"), row("好。"), row("word " * 5000), row("字" * 6000), row(EN, "word " * 40000)],
    ),
    (
        filters.Repetition(),
        [row("ha ha ha"), row("哈哈哈哈哈哈"), row(", ".join(map(str, range(40))))],
        [
            row(EN + " and so on" * 20),
            row(ZH + "我们应该努力学习。" * 10),
            row(EN + "\n" + (CODE + "\n") * 6),
            row(f"{EN} " + " ".join(f"{n}. The answer is that it is not known, and never will be." for n in range(9))),
            row("\n".join(["你好，世界", "再见，世界", "我们走吧"] * 4) + "\n" + ZH),
        ],
    ),
    (
        filters.Language(),
        [
            row(FR, EN + " Translate this into French."),
            row(EN, "请翻译：" + ZH),
            row(ZH, ZH_HANT),
            row(CODE, ZH),
            row("Yes.", ZH),
            row(EN, ZH, language="en"),
            row("```\n" + EN + "\n```\n代码如上。", ZH),
        ],
        [row(ZH, EN), row(EN, ZH), row(EN, ZH_HANT, language="zh-Hant"), row(FR, EN), row(EN, FR)],
    ),
    (
        filters.Refusals(),
        [row("Sorry is a hard word, as the song says."), row("我不能同意你的观点更多！")],
        [
            row("I'm sorry, but I can't help with that."),
            row("As an AI language model, I have no feelings."),
            row("I cannot assist with that request."),
            row("<think>no</think>\n\nI’m sorry, I am unable to do so."),
            row("很抱歉，我无法回答这个问题。"),
            row("作为一个人工智能，我没有感情。"),
        ],
    ),
]  # fmt: skip


@pytest.mark.parametrize(("judge", "good", "bad"), CASES, ids=[judge.name for judge, *_ in CASES])
def test_filter(judge, good, bad):
    assert [judge(r) for r in GOOD + good] == [None] * len(GOOD + good)
    assert all(judge(r) for r in bad), [r for r in bad if not judge(r)]


def test_reasoning_content_and_tool_calls():
    call = [{"function": {"name": "f", "arguments": "{}"}}]
    message = {"role": "assistant", "content": "", "tool_calls": call}
    assert filters.Truncated()({"messages": [message], "finish_reason": "tool_calls"}) is None
    assert filters.Reasoning()({"messages": [{**message, "content": "<think>a</think>"}]}) is None
    assert filters.Reasoning()({"messages": [{**message, "reasoning_content": "a</think>"}]})
    assert filters.Reasoning()({"messages": [{**message, "content": "<think>a</think>b", "reasoning_content": "c"}]})
    assert filters.Repetition()({"messages": [{**message, "reasoning_content": "wait, " * 50}]})
    assert filters.SpecialTokens()({"messages": [{**message, "reasoning_content": "<|im_end|>"}]})


def test_a_cut_off_turn_in_the_middle():
    first, last = row(EN), row(EN, finish_reason="stop")
    first["messages"][1]["finish_reason"] = "length"
    assert filters.Truncated()({**last, "messages": first["messages"] + last["messages"]}) == "finish_reason is length"


def test_lengths_are_of_token_ids_then_tokenizer_then_estimate():
    exact, text = row("a b c d e f g h"), row("a b c d e f g h")
    exact["messages"][1]["token_ids"] = [1, 2]
    counter = filters.TokenCounter(str(TINY))
    assert counter(exact)[1] == 2 and counter(text)[1] == 8
    assert counter.how == {"token_ids": 1, "tokenizer": 3}
    assert filters.Length(counter)(exact) == "an answer of 2 tokens" and filters.Length(counter)(text) is None
    assert filters.estimate_tokens("字" * 13) == 10 and filters.estimate_tokens("") == 0


def plain_loop(text, characters):
    """By the definition: a unit with a word or digit, five times or more at the end, over so many characters."""
    text = text.rstrip()
    for period in range(1, len(text) // 5 + 1):
        unit = text[-period:]
        times = max(5, -(-characters // period))
        if text.endswith(unit * times) and any(map(str.isalnum, unit)):
            return unit
    return ""


@settings(max_examples=300, deadline=None)
@given(
    st.text("ab 是", max_size=12),
    st.text("ab 是\n", min_size=1, max_size=25),
    st.integers(0, 12),
    st.text("ab", max_size=2),
)
@example("", "a" * 20 + "b", 6, "")
def test_looping_end_equals_its_definition(head, unit, times, tail):
    text = head + unit * times + tail
    assert looping_end(text, 20) == plain_loop(text, 20)


def test_looping_end_is_linear():
    """Strings that make naive searches quadratic; each a few hundred thousand characters."""
    for text in (
        "a" * 300_000 + "b",
        ("a" * 999 + "b") * 300,
        "ab" * 150_000 + "a" * 3,
        "".join(map(chr, range(0x4E00, 0x9000))) * 12,
    ):
        start = time.process_time()
        looping_end(text, 60)
        assert time.process_time() - start < 2


def test_duplicate_share_is_goppers_by_units():
    from swift_fastmtp.data.shingles import runs

    words = list("abcdefghij") * 3 + list("klmnopqrst")
    assert filters.duplicate_share(runs(words, 10), 10) == 20 / 40
    assert filters.duplicate_share(runs(list("abcdefghijkl"), 10), 10) == 0


def test_language_codes():
    assert [language(t) for t in (EN, ZH, ZH_HANT, FR, CODE, "short")] == ["en", "zh", "zh", "fr", None, None]
    assert language("これは日本語の文章です。漢字とひらがなとカタカナが混ざっています。長い文章が必要です。") == "ja"
    assert language("x" * 30 + "$" + EN + "$") is None


TASK_EN = "A train leaves the station at nine with forty people, and at every stop three get off while two get on."
TASK_ZH = "小明有三十二个苹果，给了小红一半以后又买了十五个，现在一共有多少个？"


@pytest.mark.parametrize(
    "tasks",
    [
        [{"turns": [TASK_EN, "Why?"]}, {"turns": [TASK_ZH]}],
        [{"prompt": TASK_EN}, {"prompt": TASK_ZH}, {"prompt": "why"}, {"prompt": " "}],
        [{"messages": [{"role": "user", "content": TASK_EN}, {"role": "assistant", "content": EN}]},
         {"turns": [TASK_ZH, "Why"]}],
    ],
)  # fmt: skip
def test_decontaminate(tasks, tmp_path):
    path = tmp_path / "tasks.jsonl"
    path.write_text("\n".join(json.dumps(t) for t in tasks) + "\n")
    judge = filters.Decontaminate([str(path)])
    for bad in (TASK_EN, "Please: " + TASK_EN.upper(), TASK_EN[10:90], TASK_ZH, "题目：" + TASK_ZH[:16]):
        assert judge(row(EN, bad)), bad
    for good in (EN, ZH, "why is the sky blue", " ".join(TASK_EN.split()[:10]), TASK_ZH[:11], CODE):
        assert judge(row(EN, good)) is None, good
    if "Why" in json.dumps(tasks):
        assert judge(row(EN, "WHY ?"))
    assert judge(row(TASK_EN, ZH)) is None  # the prompt counts, not what the model said


def test_a_template_of_many_tasks_does_not_count(tmp_path):
    template = "Think about it step by step, and put your final answer within a box at the end, please."
    path = tmp_path / "tasks.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"{TASK_EN} Number {n}. {template}"}) + "\n" for n in range(10)))
    assert filters.Decontaminate([str(path)])(row(EN, f"{ZH} {template}"))
    path.write_text("".join(json.dumps({"prompt": f"{TASK_EN[n:]} {n} {template}"}) + "\n" for n in range(0, 99, 9)))
    judge = filters.Decontaminate([str(path)])
    assert judge(row(EN, f"{ZH} {template}")) is None and judge(row(EN, f"{ZH} all two on 3 {template}")) is None
    assert judge(row(EN, TASK_EN[:80]))


def test_bundled_tasks_are_the_default():
    assert filters.Decontaminate().decontaminate == filters.bundled_tasks()
    assert filters.bundled_tasks() == ["smoke"]


def write(path, rows):
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8")
    return path


def read(path):
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def run(folder, *inputs, **options):
    """(kept, removed, report) of one run."""
    folder.mkdir(parents=True, exist_ok=True)
    out, removed = folder / "out.jsonl", folder / "removed.jsonl"
    clean([str(i) for i in inputs], str(out), removed=str(removed), **options)
    return read(out), read(removed), json.loads((folder / "out.jsonl.report.json").read_text(encoding="utf-8"))


TEXTS = st.sampled_from(
    [EN, ZH, FR, CODE, POEM, EN + " Indeed.", ZH + "好的。", "ok", "so " * 60, "", "<think>", "\x07", "是"]
)
ROWS = st.builds(
    lambda a, p, reason, extra: row(a, p, **extra, **({"finish_reason": reason} if reason else {})),
    TEXTS,
    TEXTS,
    st.sampled_from(["stop", "length", None]),
    st.sampled_from([{}, {"category": "zh", "tools": []}, {"language": "en", "sample": 1}]),
)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(ROWS, min_size=1, max_size=25), of=st.sampled_from(["row", "prompt"]), cut=st.integers(0, 25))
def test_what_holds_for_every_run(rows, of, cut, tmp_path_factory):
    folder = tmp_path_factory.mktemp("clean")
    rows = [{**r, "id": i} for i, r in enumerate([row(TASK_EN, TASK_EN), *rows])]
    inputs = [write(folder / "a.jsonl", rows[:cut]), write(folder / "b.jsonl", rows[cut:])]
    kept, removed, report = run(folder / "1", *inputs, duplicates_of=of)
    assert kept == [r for r in rows if r in kept]  # unchanged and in order
    assert Counter(r["removed_by"] for r in removed) == {
        k: v["rows"] for k, v in report["removed"].items() if v["rows"]
    }
    assert sorted([r["id"] for r in kept + removed]) == list(range(len(rows)))
    assert report["rows"] == {"read": len(rows), "kept": len(kept), "bad": 0}
    assert report["tokens"]["kept"] + sum(v["tokens"] for v in report["removed"].values()) == report["tokens"]["read"]
    for r in removed:
        original = {k: v for k, v in r.items() if k not in ("removed_by", "why")}
        assert original == rows[r["id"]] and 0 < len(r["why"]) <= 200
    again, gone, _ = run(folder / "2", folder / "1" / "out.jsonl", duplicates_of=of)
    assert again == kept and gone == []
    other, _, _ = run(folder / "3", *inputs[::-1], duplicates_of=of)
    assert len(other) == len(kept)


def test_report_names_files_lines_and_settings(tmp_path):
    rows = [row(EN), row(EN, finish_reason="length"), row(EN), row("so it goes, " * 30), *[row("no")] * 7]
    rows.append(row(EN + " Really.", "So: " + EN))
    source = write(tmp_path / "rows.jsonl", rows)
    kept, removed, report = run(tmp_path / "out", source, max_answer_tokens=2000, skip_filters=["language"])
    assert kept == rows[:1] and len(removed) == 11
    found = {name: r["examples"] for name, r in report["removed"].items()}
    assert found["truncated"] == [f"{source}:2: finish_reason is length"]
    assert found["exact_duplicates"] == [f"{source}:3: the same row as {source}:1"]
    assert found["near_duplicates"] == [f"{source}:12: 0.97 similar to {source}:1"]
    assert found["repetition"] == [f"{source}:4: ends with ' so it goes,' again and again"]
    assert len(found["length"]) == 5 and report["removed"]["length"]["rows"] == 7
    assert "language" not in found and "refusals" not in found
    assert report["settings"]["max_answer_tokens"] == 2000 and report["settings"]["filters"] == list(found)
    assert report["inputs"][0]["file"] == str(source) and len(report["inputs"][0]["sha256"]) == 64
    assert report["messages_whose_tokens_come_from"] == {"estimate": 24}


def test_a_removed_row_never_removes_a_good_one(tmp_path):
    rows = [row(EN, finish_reason="length"), row(EN, finish_reason="stop")]
    assert run(tmp_path, write(tmp_path / "rows.jsonl", rows))[0] == rows[1:]


def test_several_answers_to_one_prompt(tmp_path):
    """As `fastmtp distill --num_answers 3` writes them: one id, another sample; only a copy goes."""
    rows = [row(answer, "What is photosynthesis?", id=1, sample=i) for i, answer in enumerate((EN, CODE, EN))]
    source = write(tmp_path / "rows.jsonl", rows)
    assert run(tmp_path / "out", source)[0] == rows[:2]
    with pytest.raises(FastMTPError, match=r"rows.jsonl:2: duplicate id \(1, first at .*:1\)"):
        run(tmp_path / "twice", write(source, rows[:1] * 2))


def test_what_is_no_text_where_text_belongs(tmp_path):
    """Fields that are not part of the conversation are not checked by the reader; those that are make a bad row."""
    odd = [row(f"{EN} {i}", str(i), finish_reason="stop") for i in range(4)]
    odd[0]["messages"][1] |= {"token_ids": "x"}
    odd[1] |= {"language": 5, "tools": {"a": [1]}}
    odd[2]["finish_reason"] = {"type": "stop"}
    _, removed, report = run(tmp_path / "out", write(tmp_path / "rows.jsonl", odd))
    assert report["rows"]["read"] == 4 and removed[0]["why"] == "finish_reason is {'type': 'stop'}"
    odd[0]["messages"][1] |= {"reasoning_content": 3}
    odd[1]["messages"][1] |= {"tool_calls": {"a": 1}}
    _, _, report = run(tmp_path / "bad", write(tmp_path / "rows.jsonl", odd), on_bad_row="skip")
    assert {what.split("`")[1] for what in report["bad_rows"]} == {"reasoning_content", "tool_calls"}


def test_prompts_before_they_are_answered(tmp_path):
    """docs/clean.md: only the filters that need no answer."""
    source = tmp_path / "prompts.jsonl"
    source.write_bytes((ROOT / "examples/prompts/train.jsonl").read_bytes())
    chosen = ["special_tokens", "decontaminate", "exact_duplicates", "near_duplicates"]
    kept, removed, _ = run(tmp_path / "out", source, filters=chosen, duplicates_of="prompt")
    assert len(kept) > 0.5 * len(read(source)) and {r["removed_by"] for r in removed} <= set(chosen)


def test_tasks_in_other_forms_are_compared(tmp_path):
    """As rows are read: a task that is asked by `query`, or whose content is a list of parts, is a task."""
    parts = [{"type": "text", "text": TASK_ZH}]
    tasks = write(tmp_path / "tasks.jsonl", [{"query": TASK_EN}, {"messages": [{"role": "user", "content": parts}]}])
    rows = [row(EN, TASK_EN), row(ZH, TASK_ZH), row(EN, "What is photosynthesis?")]
    source = write(tmp_path / "rows.jsonl", rows)
    kept, _, _ = run(tmp_path / "out", source, filters=["decontaminate"], decontaminate=[str(tasks)])
    assert kept == rows[2:]


BAD = {
    b'{"messages": [': "not JSON",
    '{"prompt": "ä"}'.encode("latin-1"): "not UTF-8",
    b'{"messages": "' + b"x" * (33 * 2**20) + b'"}': "longer than 32 MiB",
    b'{"text": "a"}': "needs `messages`, or `prompt`",
    b'{"messages": [{"role": "user"}]}': "a message needs a `content` string",
    b'{"prompt": "b", "id": 1}': "duplicate id",
    b"3": "a row must be a JSON object",
}


@pytest.mark.parametrize("compress", [False, True])
def test_bad_rows(compress, tmp_path):
    good = row(EN, finish_reason="stop", id=1)
    lines = [json.dumps(good).encode(), b"", *BAD]
    source = tmp_path / ("rows.jsonl.gz" if compress else "rows.jsonl")
    source.write_bytes(gzip.compress(b"\n".join(lines), 1) if compress else b"\n".join(lines))
    with pytest.raises(FastMTPError, match=r"rows\.jsonl.*:3: not JSON.*--on_bad_row skip"):
        run(tmp_path / "stop", source)
    assert not list((tmp_path / "stop").iterdir())
    kept, removed, report = run(tmp_path / "skip", source, on_bad_row="skip")
    assert kept == [good] and removed == []
    assert report["rows"] == {"read": 1, "kept": 1, "bad": len(BAD)}
    assert {what: r["count"] for what, r in report["bad_rows"].items()} == dict.fromkeys(BAD.values(), 1)


ERRORS = {
    "no filter": ({"filters": ["lenght"]}, "no filter is called 'lenght'; there are truncated, "),
    "no such skipped filter": ({"skip_filters": ["minhash"]}, "no filter is called 'minhash'"),
    "parameter": ({"min_tokens": 3}, "--min_tokens: no filter has such a parameter"),
    "similarity": ({"similarity": 0}, "--similarity must be above 0"),
    "duplicates_of": ({"duplicates_of": "answer"}, "--duplicates_of answer: must be `row` or `prompt`"),
    "tasks missing": ({"decontaminate": ["nowhere.jsonl"]}, "--decontaminate nowhere.jsonl: cannot be read"),
    "tasks broken": ({"decontaminate": ["{tmp}/broken.jsonl"]}, "broken.jsonl:2: a task needs"),
    "tasks no JSON": ({"decontaminate": ["{tmp}/text.jsonl"]}, "text.jsonl:1: not JSON"),
    "model": ({"model": "nowhere"}, "--model nowhere: holds no tokenizer"),
    "nothing left": ({"min_answer_tokens": 4000}, "no row is left; `length` removed 1 of 1, the first: "),
    "on_bad_row": ({"on_bad_row": "fix"}, "neither `stop` nor `skip`"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors(case, tmp_path):
    options, message = ERRORS[case]
    (tmp_path / "broken.jsonl").write_text('{"turns": ["a"]}\n{"turns": [3]}\n')
    (tmp_path / "text.jsonl").write_text("hello\n")
    options = {k: [x.format(tmp=tmp_path) for x in v] if isinstance(v, list) else v for k, v in options.items()}
    with pytest.raises(FastMTPError) as error:
        run(tmp_path / "out", write(tmp_path / "rows.jsonl", [row(EN)]), **options)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not list((tmp_path / "out").glob("*.jsonl")) and not list((tmp_path / "out").glob(".*"))


def test_outputs_are_never_overwritten(tmp_path):
    source = write(tmp_path / "rows.jsonl", [row(EN)])
    with pytest.raises(FastMTPError, match="must all be different files"):
        clean([str(source)], str(source))
    with pytest.raises(FastMTPError, match="must all be different files"):
        clean([str(source)] * 2, str(tmp_path / "out.jsonl"))
    for name in ("out", "removed"):
        (tmp_path / name).mkdir()
        write(tmp_path / name / f"{name}.jsonl", [])
        with pytest.raises(FastMTPError, match=f"{name}.jsonl: already exists"):
            run(tmp_path / name, source)
    with pytest.raises(FastMTPError, match="holds no rows"):
        run(tmp_path / "empty", write(tmp_path / "empty.jsonl", []))


@pytest.mark.matrix
def test_killed_and_started_again(tmp_path):
    """kill -9 at three moments of the run, the last while rows are written: no output, then the same bytes."""
    rows = [row(f"{EN} {i} {i * 7919 % 1000}", f"{i * 104729 % 99991} {ZH}") for i in range(3000)]
    source = write(tmp_path / "rows.jsonl", rows + rows[:50])
    run(tmp_path / "whole", source, skip_filters=["language"])
    names = ["out.jsonl", "removed.jsonl", "out.jsonl.report.json"]
    want = [(tmp_path / "whole" / name).read_bytes() for name in names]
    folder = tmp_path / "killed"
    code = f"""from swift_fastmtp.data.clean import clean
clean([{str(source)!r}], {str(folder / names[0])!r}, removed={str(folder / names[1])!r}, skip_filters=["language"])"""
    for moment in (b"", b"read and filter", b"write"):
        returncode = 0
        while returncode == 0:  # on a busy machine it may be done before the signal comes
            for name in names:
                (folder / name).unlink(missing_ok=True)
            process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE)
            seen = b""
            while moment not in seen and (more := process.stderr.read1()):
                seen += more
            process.send_signal(signal.SIGKILL)
            process.communicate()
            returncode = process.returncode
        assert returncode == -signal.SIGKILL and moment in seen
        assert not (folder / names[0]).exists()
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    assert [(folder / name).read_bytes() for name in names] == want


def test_killed_between_the_renames(tmp_path):
    """The removed rows are there, the output is not: the same command goes over them, and over nothing else."""
    source = write(tmp_path / "rows.jsonl", [row(f"{EN} {i} {i * 7919 % 1000}") for i in range(50)] * 2)
    output, removed = tmp_path / "out.jsonl", tmp_path / "removed.jsonl"
    call = {"removed": str(removed), "skip_filters": ["language"]}
    clean([str(source)], str(output), **call)
    want = [path.read_bytes() for path in (output, removed)]
    output.unlink()
    with pytest.raises(FastMTPError, match=r"removed\.jsonl: already exists"):
        clean([str(source)], str(output), **call, similarity=0.7)  # of another job
    clean([str(source)], str(output), **call)
    assert [path.read_bytes() for path in (output, removed)] == want
    output.unlink()
    removed.write_bytes(want[1] + b"{}\n")
    with pytest.raises(FastMTPError, match=r"removed\.jsonl: already exists"):
        clean([str(source)], str(output), **call)
    assert removed.read_bytes() == want[1] + b"{}\n" and not output.exists()
