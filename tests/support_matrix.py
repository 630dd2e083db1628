"""What the tests show of each model family: recorded while they run, and the table of docs/families.md made from it.

A test that shows something says so with `shown`; it counts where the test passes. `pytest --record_families` writes
docs/results/families.json, and with names of tests adds to it. A run of the whole suite under the recorded versions
fails if it shows anything else, so the table cannot claim what no longer holds.
"""

import json
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from engine import engine_version

from swift_fastmtp.families.table import FAMILIES

ROOT = Path(__file__).parents[1]
RECORD = ROOT / "docs/results/families.json"
CLAIMS = {
    "keys": "its own names from load through training to export: every tensor accounted for, the backbone's bits kept",
    "exact": "the `exact` rollout is a draft with a KV cache, to 1e-9 in float64, against a plain reference",
    "swift": "`swift sft`, resumed half-way to the same weights, `swift export`",
    "draft class": "SGLang's own draft class loads draft folder and full folder, every parameter of it is filled, and "
    "hidden states and logits of a chain of four steps are the trainer's in float32",
    "server": "a whole SGLang server drafts with the exported head: the text is the model's own, and the counts of "
    "accepted drafts are the simulator's",
    "FP8 base": "trained on, and exported as, a checkpoint in [FP8 blocks](fp8.md)",
    "layers on disk": "the same loss and gradients with [backbone layers on disk](huge.md)",
    "graft": "[`fastmtp graft`](graft.md) brings back an MTP layer that transformers dropped",
}


@pytest.fixture
def shown(record_property):
    """`shown(claim, architectures)`: this test, if it passes, shows a claim for config.json's `architectures`."""

    def say(claim, architectures):
        assert claim in CLAIMS
        record_property("shown", (architectures[0], claim))

    return say


def pytest_addoption(parser):
    parser.addoption("--record_families", action="store_true", help=f"write {RECORD.relative_to(ROOT)} from this run")


def pytest_configure(config):
    if not hasattr(config, "workerinput"):  # reports of all processes come together in the one that started them
        config.pluginmanager.register(Recorder(config))


class Recorder:
    def __init__(self, config):
        self.config, self.seen = config, {}

    def pytest_runtest_logreport(self, report):
        if report.when == "call" and report.passed:
            for name, value in report.user_properties:
                if name == "shown":
                    self.seen.setdefault(tuple(value), set()).add(report.nodeid)

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session, exitstatus):
        option = self.config.option
        whole = self.config.args_source.name == "TESTPATHS" and not option.keyword and not option.markexpr
        if option.record_families:
            # A run of some tests adds to what others recorded, under the same versions.
            old = {} if whole or read()["run with"] != versions() else read()["shown"]
            rows = {}
            for row in architectures():
                tests = {c: self.seen.get((row, c), set()) | set(old.get(row, {}).get(c, ())) for c in CLAIMS}
                rows[row] = {c: sorted(names) for c, names in tests.items() if names}
            record = {"run with": versions(), "shown": rows}
            RECORD.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        elif whole and exitstatus == 0 and (record := read())["run with"] == versions():
            claimed = {(row, claim) for row, claims in record["shown"].items() for claim in claims}
            if claimed != self.seen.keys():
                other = sorted(claimed ^ self.seen.keys())
                print(
                    f"\n{RECORD.relative_to(ROOT)} and this run differ: {other}; `pytest --record_families` rewrites it"
                )
                session.exitstatus = pytest.ExitCode.TESTS_FAILED


def architectures():
    return [a for family in FAMILIES for a in family.architectures]


def versions():
    packages = {name: version(name) for name in ("ms-swift", "transformers", "torch")}
    return {"SGLang": engine_version(), **packages, "device": "GPU" if torch.cuda.is_available() else "CPU"}


def read():
    return json.loads(RECORD.read_text(encoding="utf-8"))


def table():
    """The support matrix of docs/families.md: a row for each architecture, a column for each claim."""
    record = read()
    ran, on = dict(record["run with"]), record["run with"]["device"]
    del ran["device"]
    lines = [f"| | {' | '.join(CLAIMS)} |", "|---" * (len(CLAIMS) + 1) + "|"]
    for row, claims in record["shown"].items():
        lines.append(f"| `{row}` | {' | '.join('yes' if c in claims else '–' for c in CLAIMS)} |")
    lines += ["", f"Run on a {on} with {', '.join(' '.join(package) for package in ran.items())}:", ""]
    for claim, meaning in CLAIMS.items():
        tests = {test for claims in record["shown"].values() for test in claims.get(claim, ())}
        files = ", ".join(f"`{name}`" for name in sorted({test.partition("::")[0] for test in tests}))
        lines.append(f"* **{claim}**: {meaning} ({len(tests)} {'test' if len(tests) == 1 else 'tests'} in {files})")
    return "\n".join(lines)
