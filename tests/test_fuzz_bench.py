"""Whatever a plan, a task or a results file holds or is: one line, in a second."""

import json
import os
import time

import pytest
from helpers import fuzz_bench as fuzz
from helpers.paths import TINY
from hypothesis import HealthCheck, given, settings

from swift_fastmtp.bench.bench import bench
from swift_fastmtp.bench.plan import make_plan, read_plan
from swift_fastmtp.bench.results import read_results
from swift_fastmtp.data.tasks import load_task
from swift_fastmtp.errors import FastMTPError

CHECKS = {
    "plan": (fuzz.plans, fuzz.check_plan),
    "task": (fuzz.task_rows, fuzz.check_task),
    "results": (fuzz.results, fuzz.check_results),
    "records": (fuzz.records, fuzz.check_records),
}
MANY = {"plan": 2_000, "task": 5_000, "results": 5_000, "records": 5_000}
"""Cases in about two minutes."""
GOOD = {
    "plan": fuzz.emit({"model": str(TINY), "servers": {"base": {}, "v": {"folder": str(TINY)}}}),
    "task": json.dumps(fuzz.ROW),
    "results": json.dumps(fuzz.RESULTS),
    "records": "\n".join(map(json.dumps, fuzz.RECORDS)),
}


def run(kind, cases):
    strategy, check = CHECKS[kind]

    @settings(
        max_examples=cases, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck)
    )
    @given(strategy())
    def holds(content):
        check(content)

    holds()


@pytest.fixture(autouse=True)
def _one_variable(monkeypatch):
    monkeypatch.setenv("STEPS", "2")
    fuzz.check_plan(GOOD["plan"])  # what is imported on the way is not timed


@pytest.mark.parametrize("kind", CHECKS)
def test_hostile_files(kind):
    assert CHECKS[kind][1](GOOD[kind])
    run(kind, 100)


@pytest.mark.matrix
@pytest.mark.parametrize("kind", CHECKS)
def test_many_hostile_files(kind):
    run(kind, MANY[kind])


@pytest.mark.parametrize("depth", [2, 4, 10, 100])
def test_aliases_that_expand(depth):
    for make in (fuzz.laughs, fuzz.merged_laughs):
        assert not fuzz.check_plan(make(depth))


def not_files(folder):
    """Things that are no file, under the names that a reader is given."""
    os.mkfifo(folder / "pipe")
    (folder / "folder").mkdir()
    os.symlink(folder / "loop", folder / "loop")
    (folder / "bytes").write_bytes(b"\xff\xfe\x00a: \x80")
    with open(folder / "large", "wb") as file:
        file.truncate(2**33)
    names = ["pipe", "folder", "loop", "bytes", "large", "nowhere", "x" * 300, "nul\0", "bytes/inside"]
    return [str(folder / name) for name in names] + ["/dev/zero"]


READERS = {
    "plan": read_plan,
    "results": read_results,
    "task": lambda path: load_task(f"name={path}"),
}


@pytest.mark.parametrize("reader", READERS)
def test_what_is_no_file(reader, tmp_path):
    for path in not_files(tmp_path):
        if reader == "task" and path.endswith("large"):
            continue  # rows are read one by one, and may be many
        begin = time.monotonic()
        with pytest.raises(FastMTPError) as error:
            READERS[reader](path)
        assert len(str(error.value).splitlines()) == 1 and time.monotonic() - begin < 1, path


BAD_PLANS = {
    "a NaN": ("timeout: .nan", "timeout: nan"),
    "infinity": ("temperatures: [.inf]", "temperatures[0]: inf is not"),
    "1e999": ("top_p: 1.0e+999", "top_p: inf"),
    "a huge integer": (f"seed: {'9' * 4000}", "seed: an integer of 13288 bits is too large"),
    "a list": ("[1]", "a plan is a mapping"),
    "null": ("", "a plan is a mapping"),
    "nested": ("model: " + "[" * 10_000, "maximum nesting depth"),
    "a quoted line": ("model: {" + "x" * 5000, "not YAML"),
    "a surrogate": ('model: "\\ud800"', "not YAML"),
    "a key that is no text": ("servers: {1: {}}", "servers: its key 1 must be a text"),
    "servers as a list": ("servers: [a]", "servers: must be a valid dictionary, not ['a']"),
    "a server as a text": ("servers: {a: b}", "servers.a: must be an object, not 'b'"),
    "flags as a mapping": ("flags: {a: b}", "flags[0]: must be a text, not {'a': 'b'}"),
    "environment as a list": ("environment: [a]", "environment: must be a valid dictionary, not ['a']"),
    "a name of no variable": ("environment: {'A=B': c}", "environment: 'A=B' is no name of a variable"),
    "chat_template_kwargs": ("chat_template_kwargs: 3", "chat_template_kwargs: must be a valid dictionary, not 3"),
    "an engine": ("engine: llama", "engine: must be 'sglang' or 'vllm', not 'llama'"),
    "an address": ("servers: {a: {base_url: 3}}", "servers.a.base_url: '3' is no address"),
    "too many servers": (f"num_steps: {list(range(1, 2000))}", "must be less than or equal to 1000, not 1001"),
    "too many runs": (f"concurrency: {list(range(1, 4000))}\ntemperatures: {list(range(90))}", "a plan of 359910 runs"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_PLANS)
def test_plans_that_cannot_be(case, tmp_path):
    text, message = BAD_PLANS[case]
    path = tmp_path / "plan.yaml"
    if ":" in text:
        for line in (f"model: {TINY}", "servers: {base: {}}"):
            text += f"\n{line}" if line.split(":")[0] + ":" not in text else ""
    path.write_text(text)
    with pytest.raises(FastMTPError) as error:
        make_plan(read_plan(str(path)))
    assert message in str(error.value) and len(str(error.value)) < 700


@pytest.mark.parametrize(
    "name", ["../x", "/x", "a/b", "..", ".", "x" * 300, "名" * 90, "a\0b", "a\nb", "", " ", "a\\b", ".hidden"]
)
def test_a_servers_name_stays_in_the_folder(name, tmp_path):
    command = {"command": ["false"], "method": "baseline"}
    for server in ({}, {"folder": str(TINY)}, {"base_url": "http://127.0.0.1:1"}, command):
        with pytest.raises(FastMTPError, match="its log has the name of the server, which must be plain") as error:
            make_plan({"model": str(TINY), "servers": {name: server}})
        assert len(str(error.value).splitlines()) == 1
    with pytest.raises(FastMTPError):
        bench(str(tmp_path / "in/out"), plan=str(_written(tmp_path, name, command)))
    assert sorted(p.name for p in tmp_path.rglob("*") if p.suffix != ".yaml") == []


def _written(folder, name, server):
    path = folder / "plan.yaml"
    path.write_text(json.dumps({"model": str(TINY), "servers": {name: server}}))
    return path


BAD_RESULTS = {
    "runs.1.marginal.0": (1.5, "runs[1].marginal[0]: must be less than or equal to 1, not 1.5"),
    "runs.1.conditional.0": (-0.1, "runs[1].conditional[0]: must be greater than or equal to 0, not -0.1"),
    "runs.1.tau_micro": (0.5, "runs[1].tau_micro: must be greater than or equal to 1, not 0.5"),
    "runs.1.histogram.0": (-1, "runs[1].histogram[0]: must be greater than or equal to 0, not -1"),
    "runs.1.num_failed": (10**6, "runs[1].num_failed: 1000000 of 80 requests is not possible"),
    "runs.1.tokens_per_second": (float("nan"), "runs[1].tokens_per_second: nan is not a finite number"),
    "runs.1.tokens_per_second_per_request": (fuzz.Raw("1e999"), "runs[1].tokens_per_second_per_request: inf is not a"),
    "runs.1.ttft.p50": (-1, "runs[1].ttft.p50: must be greater than or equal to 0, not -1"),
    "runs.1.completion_tokens": (2**70, "runs[1].completion_tokens: an integer of 71 bits is too large"),
    "runs.1.lossless": ({"compared": 1, "equal": 2, "first_divergence": None}, "2 equal of 1 compared"),
    "servers.tuned-k3.num_steps": (-1, "servers.tuned-k3.num_steps: must be greater than or equal to 0, not -1"),
    "servers.tuned-k3.label": (fuzz.Raw('"\\ud800"'), "not JSON ('utf-8' codec can't encode"),
    "provenance.engine": ("sglang", "provenance.engine: must be a valid dictionary, not 'sglang'"),
    "provenance.x": (fuzz.Raw("[" * 100 + "]" * 100), "nested deeper than 100 levels"),
    "settings": (None, "settings: must be an object, not None"),
}


@pytest.mark.parametrize("place", BAD_RESULTS)
def test_results_that_cannot_be(place, tmp_path):
    value, message = BAD_RESULTS[place]
    results = json.loads(GOOD["results"])
    inner = results
    *above, last = [int(part) if part.isdigit() else part for part in place.split(".")]
    for part in above:
        inner = inner[part]
    inner[last] = value
    path = tmp_path / "results.json"
    path.write_text(fuzz.emit(results))
    with pytest.raises(FastMTPError) as error:
        read_results(path)
    assert message in str(error.value) and str(path) in str(error.value)
