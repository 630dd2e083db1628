"""The example with a real language model, in small: a head of this repository, behind a real SGLang."""

import json
import os
import subprocess

import pytest
from helpers.paths import ROOT

HEAD = ROOT / "examples/smollm2-head"


@pytest.mark.matrix
def test_smollm2_drafts_with_the_repositorys_head(tmp_path):
    """The script's last step compares every answer with the plain server's; what a head is worth is tau."""
    environment = {**os.environ, "OUT": str(tmp_path), "QUESTIONS": "2", "ROUNDS": "1", "DTYPE": "float32"}
    environment["THREADS"] = "1"  # other tests run beside it
    script = ["bash", str(ROOT / "examples/smollm2.sh")]
    done = subprocess.run(script, env=environment, capture_output=True, text=True, check=False, timeout=1800)
    assert done.returncode == 0, done.stdout + done.stderr
    runs = {run["server"]: run for run in json.loads((tmp_path / "bench/results.json").read_text())["runs"]}
    drafting = runs["drafting-k2"]
    assert drafting["lossless"]["equal"] == drafting["lossless"]["compared"] == 2
    assert drafting["tau_micro"] > 1.25
