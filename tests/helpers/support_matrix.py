"""What the tests show of each model family: recorded while they run, and the tables of docs/families.md (short) and
docs/dev-families.md made from it.
The forms of targets (`target_matrix.py`) are recorded the same way.

A test that shows something says so with `shown`, or `ran`; it counts where the test passes. `pytest
--record_families` writes docs/results/families.json and target_forms.json, of the tests that it ran; what others
recorded stays. A run of whole tiers under the
recorded versions fails if its tests show anything else than recorded, so the table cannot claim what no longer holds.
"""

import json
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from helpers import target_matrix
from helpers.engine import engine_version, vllm_version
from helpers.paths import ROOT
from swift_fastmtp.families.table import FAMILIES
from swift_fastmtp.files.table import markdown_table

RECORD = ROOT / "docs/results/families.json"
CLAIMS = {
    "keys": "its own names from load through training to export: every tensor accounted for, the backbone's bits kept",
    "exact": "the `exact` rollout is a draft with a KV cache, to 1e-9 in float64, against a plain reference",
    "swift": "`swift sft`, resumed half-way to the same weights, `swift export`",
    "draft class": "SGLang's own draft class loads draft folder and full folder, every parameter of it is filled, and "
    "hidden states and logits of a chain of four steps are the trainer's in float32",
    "server": "a whole SGLang server drafts with the exported head: the text is the model's own, and the counts of "
    "accepted drafts are the simulator's",
    "vLLM": "a vLLM engine drafts with the exported head: the text is the model's own, the drafts accepted in each "
    "round are those of the simulator with vLLM's graph, and with any field of that graph left out they are not",
    "FP8 base": "trained on, and exported as, a checkpoint in [FP8 blocks](fp8.md)",
    "layers on disk": "the same loss and gradients with [backbone layers on disk](huge.md)",
    "graft": "[`fastmtp graft`](graft.md) brings back an MTP layer that transformers dropped",
}

MODELS = {
    "mimo": "MiMo-7B",
    "qwen3_next": "Qwen3-Next",
    "qwen3_5": "Qwen3.5, 3.6, dense",
    "qwen3_5_moe": "Qwen3.5, 3.6, experts",
    "qwen3_moe": "Qwen3-MoE, layer by graft",
    "ernie4_5_moe": "ERNIE-4.5, experts",
    "glm4_moe": "GLM-4.5, 4.6, 4.7",
    "deepseek_v3": "DeepSeek-V3, V3.1, R1",
    "glm4_moe_lite": "GLM-4.7-Flash",
    "deepseek_v32": "DeepSeek-V3.2",
    "glm_moe_dsa": "GLM-5 to 5.3",
    "longcat_flash": "LongCat-Flash",
    "bailing_moe_v2": "Ling 2.0, Ring 2.0",
}
"""Family -> what people call the models, for the short table."""


@pytest.fixture
def shown(record_property):
    """`shown(claim, architectures)`: this test, if it passes, shows a claim for config.json's `architectures`."""

    def say(claim, architectures):
        assert claim in CLAIMS
        record_property("shown", (architectures[0], claim))

    return say


@pytest.fixture
def ran(record_property):
    """`ran(stage, form)`: this test, if it passes, shows that a stage works with a form of target."""

    def say(stage, form):
        assert stage in target_matrix.STAGES and form in target_matrix.FORMS
        record_property("ran", (form, stage))

    return say


class Matrix(NamedTuple):
    """A table and its record."""

    record: Path
    columns: Iterable[str]
    rows: Callable[[], Iterable[str]]


def matrices():
    """By the name of the property that tests record."""
    return {
        "shown": Matrix(RECORD, CLAIMS, architectures),
        "ran": Matrix(target_matrix.RECORD, target_matrix.STAGES, lambda: target_matrix.FORMS),
    }


def pytest_addoption(parser):
    parser.addoption(
        "--record_families",
        action="store_true",
        help="write docs/results/families.json and target_forms.json from this run",
    )


def pytest_configure(config):
    # Reports of all processes come together in the one that started them.
    config.pluginmanager.register(Sender(config) if hasattr(config, "workerinput") else Recorder(config))


class Recorder:
    """Compares what the tests of a run showed with what is recorded of these tests.

    A run of one tier leaves the tests of others out: what is recorded of those stays as it is.
    """

    def __init__(self, config):
        self.config = config
        self.shown, self.deselected = {name: set() for name in matrices()}, set()

    def pytest_runtest_logreport(self, report):
        if report.when == "call" and report.passed:
            for name, value in report.user_properties:
                if name in self.shown:
                    self.shown[name].add((*value, report.nodeid))

    def pytest_deselected(self, items):
        self.deselected.update(item.nodeid for item in items)

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node):
        """A process of pytest-xdist has ended: what it left out, as each of them has collected everything."""
        self.deselected.update(getattr(node, "workeroutput", {}).get("deselected", ()))

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session, exitstatus):
        option = self.config.option
        whole = self.config.args_source.name == "TESTPATHS" and not option.keyword and not option.collectonly
        for name, matrix in matrices().items():
            record, shown = read(matrix.record), self.shown[name]
            others = {one for one in triples(record) if one[-1] in self.deselected}
            if option.record_families:
                write(matrix, shown | (others if whole else triples(record)))
            elif whole and exitstatus == 0 and record["run with"] == versions():
                different = triples(record) - others ^ shown
                if different:
                    file = matrix.record.relative_to(ROOT)
                    print(f"\n{file} and this run differ: {sorted(different)}; `pytest --record_families` rewrites it")
                    session.exitstatus = pytest.ExitCode.TESTS_FAILED


def write(matrix, shown):
    """The record of what was shown: (row, column, test)."""
    rows = {}
    for row, column, test in sorted(shown):
        rows.setdefault(row, {}).setdefault(column, []).append(test)
    in_order = {}
    for row in matrix.rows():
        if row in rows:
            in_order[row] = {column: rows[row][column] for column in matrix.columns if column in rows[row]}
    text = json.dumps({"run with": versions(), "shown": in_order}, indent=1, ensure_ascii=False)
    matrix.record.write_text(text + "\n", encoding="utf-8")


class Sender:
    """In a process of pytest-xdist: tells the process that started it which tests are left out."""

    def __init__(self, config):
        self.config = config

    def pytest_deselected(self, items):
        self.config.workeroutput.setdefault("deselected", []).extend(item.nodeid for item in items)


def triples(record):
    """(architecture, claim, test that showed it), all that is recorded."""
    recorded = set()
    for row, claims in record["shown"].items():
        for claim, tests in claims.items():
            recorded.update((row, claim, test) for test in tests)
    return recorded


def architectures():
    return [a for family in FAMILIES for a in family.architectures]


def versions():
    packages = {name: version(name) for name in ("ms-swift", "transformers", "torch")}
    engines = {"SGLang": engine_version(), "vLLM": vllm_version()}
    return {**engines, **packages, "device": "GPU" if torch.cuda.is_available() else "CPU"}


def read(record=RECORD):
    if not record.exists():
        return {"run with": {}, "shown": {}}
    return json.loads(record.read_text(encoding="utf-8"))


def short_table():
    """The table of docs/families.md: a row for each family, what was run of it in a word."""
    shown = read()["shown"]
    rows = []
    for family in FAMILIES:
        claims = {claim for each in family.architectures for claim in shown[each]}
        names = "<br>".join(f"`{each}`" for each in family.architectures)
        fp8 = "yes" if "FP8 base" in claims else "–"
        rows.append(
            (MODELS[family.name], names, _word(claims, "swift"), _sglang(family, claims), _vllm(family, claims), fp8)
        )
    return markdown_table(
        ("models", "`architectures`", "train", "SGLang", "vLLM", "FP8 base"), rows, num_text=6, raw=True
    )


def _word(claims, claim):
    return "yes" if claim in claims else "–"


def _sglang(family, claims):
    if family.engines.sglang_gap:
        return "needs fixes"
    return "served" if "server" in claims else "class"


def _vllm(family, claims):
    if family.engines.vllm is None:
        return "no"
    return "served" if "vLLM" in claims else "read"


def table():
    """The support matrix of docs/dev-families.md: a row for each architecture, a column for each claim."""
    record = read()
    rows = [
        (f"`{row}`", *("yes" if claim in claims else "–" for claim in CLAIMS))
        for row, claims in record["shown"].items()
    ]
    return target_matrix.page(CLAIMS, rows, record)
