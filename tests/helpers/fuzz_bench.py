"""Hostile plans, tasks, results and records: strategies that make them, and functions that read one and judge it.

A reader may succeed or raise one line; it may not raise anything else, nor work for over a second.
"""

import copy
import json
import tempfile
import time
from pathlib import Path

from hypothesis import strategies as st

from helpers import bench_results
from helpers.paths import TINY
from swift_fastmtp.bench.plan import make_plan, read_plan
from swift_fastmtp.bench.plan_keys import PlanKeys, ServerKeys
from swift_fastmtp.bench.records import read_records
from swift_fastmtp.bench.results import read_results
from swift_fastmtp.data.tasks import load_task
from swift_fastmtp.errors import FastMTPError
from swift_fastmtp.files.table import markdown
from swift_fastmtp.report.compare import Limits, compare_results, text
from swift_fastmtp.report.merge import merge, notes
from swift_fastmtp.report.report import tables

SECONDS = 1.0
LONGEST = 2500
"""Characters of an error: what it quotes is cut, but for a path of 1,000 of them, twice."""


class Raw(str):
    """Text that stands in a document as it is."""


def emit(value):
    """A document in JSON, which is YAML too, with `Raw` pieces as they are."""
    if isinstance(value, Raw):
        return str(value)
    if isinstance(value, dict):
        return "{" + ", ".join(f"{emit(key)}: {emit(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list):
        return f"[{', '.join(map(emit, value))}]"
    return json.dumps(value)


def judge(read, content):
    """Write a file, read it, and say whether it was taken. Raises `AssertionError` for anything but one line."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "file"
        path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
        taken, seconds = _timed(read, path, folder)
        if seconds >= SECONDS:  # once more: a machine that is busy is no reader that is slow
            taken, seconds = _timed(read, path, folder)
        assert seconds < SECONDS, f"{seconds:.1f} s for {content[:500]!r}"
    return taken


def _timed(read, path, folder):
    """Whether a file was taken, and the seconds of work that it took."""
    begin = time.process_time()  # what others do meanwhile does not count
    try:
        read(str(path))
        taken = True
    except FastMTPError as error:
        taken = False
        line = str(error).replace(folder, "")
        assert len(line.splitlines()) == 1, line
        assert len(line) <= LONGEST, line
    return taken, time.process_time() - begin


def check_plan(content):
    """A plan's file, text or bytes. Returns whether it is one."""
    return judge(lambda path: make_plan(read_plan(path)), content)


def check_task(content):
    """A file of rows."""
    return judge(lambda path: load_task(f"name={path}"), content)


def check_results(content):
    """A results file, and what is made of a good one."""
    return judge(_use_results, content)


def _use_results(path):
    results = read_results(path)
    merged = merge([(path, results)])
    for table in tables(merged):
        markdown(table)
    notes(merged)
    text(compare_results(merged, merged, Limits(0.02, 0.05, 0.0)))


RUN = ("a", "smoke", 0.0, 1, 0)


def check_records(content):
    """`requests.jsonl`, of a plan with the one round `RUN`."""

    def read(path):
        with open(path, "rb") as file:
            read_records(file, Path("requests.jsonl"), {RUN})

    return judge(read, content)


# What stands where something else should.
_NAMES = st.sampled_from(
    [
        "../x",
        "/etc/x",
        "a/b",
        "x" * 300,
        "\0",
        "",
        ".",
        "..",
        "名" * 100,
        "\x1b[31m",
        "a\nb",
        "$x$",
        "http://u@[",
        "none",
    ]
)
_NUMBERS = st.sampled_from([0, -1, 1, 2, 0.5, 2**31, 2**63, 10**30, -(10**30), 1e300, -0.0])
_SCALARS = st.one_of(st.none(), st.booleans(), _NUMBERS, _NAMES, st.integers(), st.text(max_size=20))
_VALUES = st.recursive(
    _SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=8) | _NAMES, inner, max_size=4)
    ),
    max_leaves=8,
)
_YAML = st.sampled_from(
    [".nan", ".inf", "-.inf", "1.0e+999", "1e999", "0x" + "f" * 6000, "9" * 6000, "1:1:1:1", "2024-99-99", "2024-01-01",
     "!!python/object/apply:os.system [x]", "!!bool x", "!!int ''", "!!float x", "!!binary x", "!!set {a}",
     "!!omap [a]",
     "!!timestamp x", "*nowhere", "&a [*a]", "<<", "@", "`", "%", "- -", "{", "[", "]", "?", "${HOME}", "${NO_SUCH}",
     "[" * 10_000, "{a: " * 10_000, "!x y", "'", '"', '"\\ud800"', '"\\0"', "|", "&x", "\ue000HOME\ue001", "\t",
     "[" + ",".join(["a"] * 9000) + "]", "[" + ",".join(map(str, range(1, 900))) + "]"]
).map(Raw)  # fmt: skip
_JSON = st.sampled_from(
    ["NaN", "Infinity", "-Infinity", "1e999", "-1e999", "9" * 5000, "9" * 4000, "[" * 10_000, '{"a":' * 10_000,
     '"\\ud800"', '"\\u0000"', "]", "tru", "", "[" * 40 + "]" * 40]
).map(Raw)  # fmt: skip


def yaml_value():
    return st.one_of(_VALUES, _YAML)


@st.composite
def plans(draw):
    """A plan's text: a good one, of which some values are others, or its text with something put in."""
    server = {
        "folder": str(TINY),
        "num_steps": draw(st.sampled_from([1, [1, 2], "${STEPS}"])),
        **draw(st.dictionaries(st.sampled_from(list(ServerKeys.model_fields)), yaml_value(), max_size=2)),
    }
    plan = {
        "model": str(TINY),
        "tasks": ["smoke"],
        "servers": {"base": {}, draw(st.just("v") | _NAMES): server},
        **draw(st.dictionaries(st.sampled_from(sorted(PlanKeys.model_fields)), yaml_value(), max_size=2)),
    }
    document = emit(plan)
    return document if draw(st.booleans()) else draw(spliced(document, _YAML))


@st.composite
def spliced(draw, document, pieces):
    """A document of which a part is cut out, or has another piece in its place."""
    start = draw(st.integers(0, len(document)))
    end = start + draw(st.integers(0, 40))
    return document[:start] + draw(pieces | st.just(Raw("")) | st.text(max_size=5).map(Raw)) + document[end:]


def laughs(depth):
    """A plan of a few lines that stands for 9 ** `depth` values."""
    lines = ["model: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"k{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, depth)]
    return "\n".join(lines)


def merged_laughs(depth):
    """The same with merge keys, which YAML expands itself."""
    lines = ["a0: &a0 {x: 1}"]
    lines += [f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}" for i in range(1, depth)]
    return "\n".join(lines)


def _places(value, path=()):
    """Every place in a document."""
    yield path
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _places(inner, (*path, key))


def _put(value, path, inner):
    if not path:
        return inner
    value[path[0]] = _put(value[path[0]], path[1:], inner)
    return value


@st.composite
def changed(draw, document, times=2):
    """A document in JSON with other values in some places, or cut and spliced."""
    value = copy.deepcopy(document)
    for _ in range(draw(st.integers(1, times))):
        place = draw(st.sampled_from(list(_places(value))))
        value = _put(value, place, draw(st.one_of(_VALUES, _JSON)))
    written = emit(value)
    return written if draw(st.booleans()) else draw(spliced(written, _JSON))


def _small_results():
    """One baseline and two servers on one task."""
    value = bench_results.table_2()
    value["servers"] = dict(list(value["servers"].items())[:3])
    value["runs"] = [run for run in value["runs"] if run["server"] in value["servers"]]
    return value


RESULTS = _small_results()
ROW = {"id": "1", "turns": ["A question?", "And the next?"], "messages": None}
CHAT = {"id": "2", "messages": [{"role": "system", "content": "x"}, {"role": "user", "content": "A question?"}]}
_NAMED = {"server": "a", "task": "smoke", "temperature": 0.0, "concurrency": 1}
ANSWER = {
    **_NAMED,
    "id": "1",
    "turn": 0,
    "engine": ["sglang", "0.5"],
    "text": "x",
    "output_ids": [1, 2, 3],
    "completion_tokens": 3,
    "prompt_tokens": 4,
    "finish_reason": "stop",
    "start": 1.5,
    "latency": 0.5,
    "ttft": 0.1,
    "model": "m",
    "chunk_tokens": [1, 2],
    "chunk_seconds": [0.1, 0.4],
    "steps": 1,
    "accepted": 1,
    "histogram": [0, 1],
    "reasoning_content": None,
}
RECORDS = [ANSWER, {**_NAMED, "counters": [1, 2]}, {**_NAMED, "id": "1", "turn": 0, "engine": ["a", "b"], "error": "x"}]


def results():
    return changed(RESULTS)


def task_rows():
    return st.one_of(changed(ROW), changed(CHAT), st.binary(max_size=40))


def records():
    return st.sampled_from(RECORDS).flatmap(changed)
