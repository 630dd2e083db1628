"""`fastmtp run` with a real SGLang or vLLM, which answers the prompts and serves the heads, up to report and card."""

import json
import subprocess
import sys

import pytest
import yaml
from helpers.engine import engine_folder
from helpers.paths import ROOT, TINY

from swift_fastmtp.bench.results import read_results
from swift_fastmtp.checkpoint.checkpoint import Checkpoint

PLAN = {
    "model": str(TINY),
    "tasks": ["smoke"],
    "distill": {"max_new_tokens": 16, "concurrency": 8},
    "mix": {"val_ratio": 0.1},
    "train": {
        "recipe": "recipes/quickstart_cpu.yaml",
        "max_steps": 2,
        "save_steps": 2,
        "eval_steps": 2,
        "report_to": "none",
        "model_kwargs": {"fastmtp_on_worse": "keep"},
    },
    "bench": {"num_questions": 3, "max_new_tokens": 12, "num_steps": [2], "rounds": 1},
}


ENGINES = {"sglang": ("setup_engine.sh", "cpu_plan.yaml"), "vllm": ("setup_vllm.sh", "cpu_plan_vllm.yaml")}


@pytest.mark.matrix
@pytest.mark.parametrize("engine", ENGINES)
def test_from_prompts_to_the_model_card(engine, tmp_path):
    lines = (ROOT / "examples/prompts/train.jsonl").read_text(encoding="utf-8").splitlines()
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines[::40]) + "\n", encoding="utf-8")
    out = tmp_path / "out"
    set_up, machine = ENGINES[engine]
    values = {**PLAN, "prompts": str(tmp_path / "prompts.jsonl"), "output_dir": str(out), "engine": engine}
    values["python"] = f"{engine_folder(set_up)}/bin/python"
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(values))
    command = [
        sys.executable,
        "-m",
        "swift_fastmtp.cli",
        "run",
        str(tmp_path / "plan.yaml"),
        f"tests/serving/{machine}",
    ]
    # The second time nothing is left to do, which does not depend on the engine.
    for attempt in range(2 if engine == "sglang" else 1):
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=900)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        assert ("$ fastmtp bench" in done.stdout) == (attempt == 0)
    results = read_results(out / "bench/results.json")
    assert list(results.servers) == ["baseline", "vanilla-k2", "tuned-k2"]
    (run,) = [run for run in results.runs if run.server == "tuned-k2"]
    assert run.lossless.equal == run.lossless.compared == run.num_requests >= 3 and run.tau_micro > 1
    # It is trained on what this engine computes with it.
    assert Checkpoint(out / "train/best").trained_for == engine
    # The answers are the server's, with what it was asked with.
    row = json.loads((out / "distilled.jsonl").read_text(encoding="utf-8").splitlines()[0])
    assert row["messages"][-1]["prompt_token_ids"]
    assert "FastMTP" in (out / "export/README.md").read_text(encoding="utf-8")
    page = (out / "run.html").read_text(encoding="utf-8")
    assert "fastmtp bench --plan" in page and "Vanilla MTP" in page and page.count("<svg ") > 2
    assert (out / "report/report.html").exists() and "${" not in (out / "bench.yaml").read_text()
