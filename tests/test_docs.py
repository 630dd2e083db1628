"""Every command of README.md and docs/ is run: quickstart first, then each ```bash block, in order.

Blocks marked ```console need a GPU, the real model or a server, and are not run; their options are checked. Set-up and
test commands stand in .ci/run, which is how this test came to run.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import fields
from itertools import pairwise
from pathlib import Path

import pytest
from helpers.paths import ROOT

from swift_fastmtp.bench.plan import make_plan, read_plan
from swift_fastmtp.cli import _check_words
from swift_fastmtp.errors import FastMTPError
from swift_fastmtp.method.config import FastMTPConfig
from swift_fastmtp.swift_plugin.names import argument_names

PAGES = [ROOT / "README.md", ROOT / "README_zh.md", *sorted((ROOT / "docs").rglob("*.md"))]
QUICKSTART = "bash examples/quickstart.sh"


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.S | re.M)


def bash(command, cwd, **env):
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", **env}
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", command],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-5000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """The files a user has after cloning."""
    folder = tmp_path_factory.mktemp("clone")
    for name in ("examples", "recipes", "tests/serving", "docs/results"):
        shutil.copytree(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def quickstart(clone):
    return bash(QUICKSTART, clone)


@pytest.mark.matrix
def test_quickstart_makes_the_head_better(clone, quickstart):
    assert "== 7/7" in quickstart and "tau K=3" in quickstart
    before, after = json.loads((clone / "output/quickstart/simulate/simulate.json").read_text())["heads"]
    assert after["tau_micro"][2] > before["tau_micro"][2] + 0.05
    assert all(a > b for a, b in zip(after["marginal"][:3], before["marginal"][:3], strict=True))
    assert (clone / "output/quickstart/export/model.safetensors").exists()


@pytest.mark.matrix
def test_quickstart_started_again_repeats_nothing(clone, quickstart):
    stamp = (clone / "output/quickstart/distilled.jsonl").stat().st_mtime_ns
    trained = (clone / "output/quickstart/train/best/model.safetensors").stat().st_mtime_ns
    bash(QUICKSTART, clone)
    assert (clone / "output/quickstart/distilled.jsonl").stat().st_mtime_ns == stamp
    assert (clone / "output/quickstart/train/best/model.safetensors").stat().st_mtime_ns == trained


COMMANDS = [(page.name, block) for page in PAGES for block in blocks(page, "bash") if block.strip() != QUICKSTART]


@pytest.mark.matrix
@pytest.mark.parametrize(("page", "block"), COMMANDS, ids=[f"{p}-{i}" for i, (p, _) in enumerate(COMMANDS)])
def test_command(page, block, clone, quickstart):
    bash(block, clone)


@pytest.mark.matrix
def test_the_plan_of_the_healed_model_finds_what_its_script_left(clone, quickstart, monkeypatch):
    """Its servers are started by hand (docs/graft.md); the script is one of the commands above."""
    monkeypatch.chdir(clone)
    monkeypatch.setenv("SGLANG", sys.executable)
    plan = make_plan(read_plan(["examples/heal_plan.yaml", "tests/serving/cpu_plan.yaml"]))
    assert list(plan.launches) == ["lost", "grafted-k3", "healed-k3"]


def test_readme_names_the_quickstart_and_ci_runs_the_readmes_commands():
    readme, ci = (ROOT / "README.md").read_text(encoding="utf-8"), (ROOT / ".ci" / "run").read_text()
    assert f"```bash\n{QUICKSTART}\n```" in readme
    setup, test = blocks(ROOT / "README.md", "sh")
    assert len(setup.splitlines()) == 2
    for line in (*setup.splitlines(), *test.splitlines()):
        assert line.replace("pip install", "pip install --quiet") in ci.splitlines()


def console_commands(page):
    """The words of each command that is only shown, block by block; without variables before it."""
    for block in blocks(page, "console"):
        commands = []
        for line in block.replace("\\\n", " ").splitlines():
            if not re.match(r"(\$ )?(\w+=\S* )*(fastmtp|swift) ", line):
                continue  # another program, or what one prints
            words = shlex.split(line.removeprefix("$ "), comments=True)
            while "=" in words[0]:
                words.pop(0)
            commands.append(words)
        yield commands


SHORTENED = {"...", "…", "VERB"}


@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])
def test_commands_that_are_shown_have_known_options(page):
    for commands in console_commands(page):
        for program, *words in commands:
            if program == "fastmtp" and not SHORTENED & set(words):
                try:
                    _check_words(words)
                except FastMTPError as error:
                    pytest.fail(f"{' '.join(words)}: {error}")
            if program == "swift" and words[0] == "sft":
                unknown = {word[2:] for word in words if word.startswith("--")} - set(argument_names())
                assert not unknown, f"{' '.join(words)}: {unknown}"


@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])
def test_a_checkpoint_that_is_shown_is_where_the_run_before_leaves_it(page):
    for commands in console_commands(page):
        run = {}
        for words in commands:
            options = dict(pairwise(words))
            if words[:2] == ["swift", "sft"]:
                run = options
            folder, _, name = options.get("--adapters", "").rpartition("/")
            if run and folder == run.get("--output_dir"):
                assert run.get("--add_version") == "false", words
                assert name == "last-checkpoint" or "--create_checkpoint_symlink" in run, words


def test_knob_table_is_the_configs():
    rows = re.findall(r"^\| `fastmtp_(\w+)` \| `(.*?)` \| (.*) \|$", (ROOT / "docs/training.md").read_text(), re.M)
    assert rows == [(f.name, str(f.default) or '""', f.metadata["help"]) for f in fields(FastMTPConfig)]


def test_links_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
