"""The faults of engines that docs/dev/upstream reports are still there: each page's script prints what the page says.

Where one fails after a new release of the engine, the fault may be gone. Then take the page away, and what this project
does because of it.
"""

import os
import re
import subprocess

import pytest
from helpers.engine import ENVIRONMENT, VLLMServer, engine_folder
from helpers.paths import ROOT

pytestmark = pytest.mark.matrix

REPORTS = ROOT / "docs/dev/upstream"
PAGES = sorted(path for path in REPORTS.glob("*.md") if path.name != "README.md")
# Engine → the script that makes its environment, and its variables.
ENGINES = {"vllm": ("setup_vllm.sh", VLLMServer.environment), "sglang": ("setup_engine.sh", ENVIRONMENT)}
MOST_LINES = 60


def block(page, language):
    (text,) = re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.S | re.M)
    return text


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_fault_is_there(page, tmp_path):
    setup, variables = ENGINES[page.name.partition("-")[0]]
    script = tmp_path / "report.py"
    script.write_text(block(page, "python"), encoding="utf-8")
    done = subprocess.run(
        [f"{engine_folder(setup)}/bin/python", "-W", "ignore", script],
        cwd=tmp_path,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    printed, wanted = done.stdout.splitlines(), block(page, "text").splitlines()
    # Engines write lines of their own in between.
    assert [line for line in printed if line in wanted] == wanted, done.stdout[-4000:]


def test_every_report_is_listed_and_short():
    index = (REPORTS / "README.md").read_text(encoding="utf-8")
    assert len(PAGES) > 5
    for page in PAGES:
        assert f"({page.name})" in index
        assert len(page.read_text(encoding="utf-8").splitlines()) <= MOST_LINES
