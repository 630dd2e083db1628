"""recipes/paper/run.sh from prompts to the report, with few steps and two real servers; its own plans as they are."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.paths import ROOT, TINY

from swift_fastmtp.bench.plan import make_plan, read_plan
from swift_fastmtp.bench.results import read_results

PLAN = """
model: ${MODEL}
python: ${SGLANG}
servers:
  baseline: {label: Baseline, method: baseline}
  fixed: {label: Fixed-data FT, folder: "${OUT}/fixed"}
  self: {label: Self-data FT + FR, folder: "${OUT}/self", num_steps: [2], token_map: "${OUT}/simulate/maps.json"}
"""


@pytest.fixture
def environment(tmp_path):
    """Twenty of our prompts, no answers: without the fixed-data arm."""
    lines = (ROOT / "examples/prompts/train.jsonl").read_text(encoding="utf-8").splitlines()
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines[::40]) + "\n")
    (tmp_path / "plan.yaml").write_text(PLAN)
    return {
        "DATA": str(tmp_path / "prompts.jsonl"),
        "OUT": str(tmp_path / "out"),
        "PLAN": str(tmp_path / "plan.yaml"),
        "TRAIN": "--max_steps 2 --eval_steps 2 --save_steps 2",
        "SHARES": "general=0.4 zh=0.3 code=0.3",
        "TINY_TOKENS": "12",
        "NUM_QUESTIONS": "3",
        "MAP_TASKS": "",
        "VAL_RATIO": "0.2",
    }


@pytest.mark.matrix
def test_from_prompts_to_the_report_and_nothing_twice(environment, installed):
    bin_folder = Path(sys.executable).parent
    environment = {**os.environ, **environment, "PATH": f"{bin_folder}:{os.environ['PATH']}"}
    out = Path(environment["OUT"])
    for attempt in range(2):
        command = ["bash", str(ROOT / "recipes/paper/run.sh")]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=out.parent)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        assert ("== fastmtp bench" in done.stdout) == (attempt == 0)
    results = read_results(out / "ablation/results.json")
    assert list(results.servers) == ["baseline", "self-k2"]
    (run,) = [r for r in results.runs if r.server == "self-k2"]
    assert run.lossless.equal == run.lossless.compared == run.num_requests >= 3 and run.tau_micro > 1
    assert "Self-data FT + FR" in (out / "ablation/report/report.md").read_text()
    assert json.loads((out / "simulate/simulate.json").read_text())["by"] == "language"


def test_the_papers_plans(tmp_path, monkeypatch):
    maps = {language: [tmp_path / f"{language}-{n}.pt" for n in (8, 16)] for language in ("en", "zh")}
    for path in [p for paths in maps.values() for p in paths]:
        torch.save([1, 2, 3], path)
    (tmp_path / "simulate").mkdir()
    shutil.copy(maps["en"][0], tmp_path / "simulate")
    (tmp_path / "simulate/maps.json").write_text('{"en": "en-8.pt"}')
    for arm in ("fixed", "self"):
        (tmp_path / arm).symlink_to(TINY)
    monkeypatch.setenv("MODEL", str(TINY))
    monkeypatch.setenv("OUT", str(tmp_path))
    monkeypatch.setenv("SGLANG", sys.executable)
    for language, paths in maps.items():
        monkeypatch.setenv(f"{language.upper()}_MAPS", ",".join(map(str, paths)))
    table_1 = make_plan(read_plan([str(ROOT / "recipes/paper/bench.yaml"), str(ROOT / "tests/serving/cpu_plan.yaml")]))
    assert len(table_1.launches) == 1 + 3 + 3 + 5 + 3 and table_1.baseline == "baseline"
    assert {x.server.label for x in table_1.launches.values()} == {
        "Baseline", "Vanilla MTP", "Fixed-data FT", "Self-data FT", "Self-data FT + FR"
    }  # fmt: skip
    table_2 = make_plan(read_plan(str(ROOT / "recipes/paper/maps.yaml")))
    assert len(table_2.launches) == 1 + 1 + 4
