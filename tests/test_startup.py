"""What a verb imports. torch and transformers take seconds, so what only parses or looks at files must not import them;
a test of modules, not of times, so that it says the same on any machine (`benchmarks/startup.py` has the times)."""

import json
import subprocess
import sys

import pytest
from helpers.paths import ROOT, TINY

from swift_fastmtp.cli import VERBS

HEAVY = {"torch", "transformers", "swift", "sglang", "vllm", "deepspeed", "datasets", "pandas", "scipy"}
RESULTS = ROOT / "docs/results/paper/ablation/results.json"
PROMPTS = ROOT / "examples/prompts/eval.jsonl"
CODE = """
import atexit, json, os, sys
from swift_fastmtp.cli import main
top = lambda: json.dumps(sorted({name.partition(".")[0] for name in sys.modules}))
atexit.register(lambda: os.write(int(sys.argv[1]), top().encode()))
main(sys.argv[2:])
"""


def imported(*words, returncode=0):
    """The top-level modules that a command has imported by its end."""
    out = subprocess.run(
        [sys.executable, "-c", CODE, "2", *map(str, words)],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert out.returncode == returncode, out.stderr
    modules = json.loads(out.stderr[out.stderr.rindex("[") :])
    assert "argparse" in modules and "swift_fastmtp" in modules
    return set(modules), out.stderr


@pytest.mark.parametrize("verb", VERBS)
def test_help(verb):
    """Numbers of arrays, schemas and plots are for work, too."""
    modules, _ = imported(verb, "--help")
    assert not modules & {*HEAVY, "numpy", "pydantic", "matplotlib", "openai"}


@pytest.mark.parametrize("verb", VERBS)
def test_a_misspelt_option(verb):
    modules, error = imported(verb, "--no_such_option", returncode=2)
    assert not modules & HEAVY and "usage: fastmtp" in error


def test_inspect():
    modules, _ = imported("inspect", TINY)
    assert not modules & HEAVY


def test_serve_args():
    modules, _ = imported("serve-args", TINY)
    assert not modules & HEAVY


def test_data_verbs(tmp_path):
    rows = tmp_path / "rows.jsonl"
    with open(rows, "w") as file:
        for i in range(20):
            answer = {"role": "assistant", "content": f"It is {i * i * 7919}."}
            file.write(json.dumps({"messages": [{"role": "user", "content": f"What is {i}?"}, answer]}) + "\n")
    modules, _ = imported("clean", "--inputs", rows, "--output", tmp_path / "kept.jsonl")
    assert not modules & HEAVY
    modules, _ = imported("mix", "--inputs", f"all={rows}", "--shares", "all=1", "--output_dir", tmp_path / "out")
    assert not modules & HEAVY


def test_compare():
    modules, _ = imported("compare", RESULTS, RESULTS)
    assert not modules & {*HEAVY, "matplotlib"}


@pytest.mark.matrix
def test_report(tmp_path):
    """Draws a dozen plots."""
    modules, _ = imported("report", RESULTS, "--output_dir", tmp_path / "report")
    assert not modules & HEAVY and "matplotlib" in modules


NOTHING = "/nonexistent"
# A command with one thing wrong, and what the error line says of it.
REFUSED = {
    "doctor": (["doctor", NOTHING], "not found"),
    "doctor, no family": (["doctor", "{folder}"], "no known MTP layout"),
    "doctor, no prompts": (["doctor", TINY, "--probe_prompts", NOTHING], "nonexistent"),
    "vocab": (["vocab", "--inputs", NOTHING, "--model", TINY, "--output_dir", "{folder}/out"], "nonexistent"),
    "vocab, no model": (
        ["vocab", "--inputs", PROMPTS, "--model", NOTHING, "--output_dir", "{folder}/out"],
        "not found",
    ),
    "bench": (["bench", "--plan", NOTHING, "--output_dir", "{folder}/out"], "nonexistent"),
    "card": (["card", TINY, "--results", RESULTS], "no fastmtp.json"),
    "compare": (["compare", NOTHING, RESULTS], "nonexistent"),
    "report": (["report", NOTHING, "--output_dir", "{folder}/out"], "nonexistent"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_bad_input_is_refused_before_anything_heavy(case, tmp_path):
    words, message = REFUSED[case]
    (tmp_path / "config.json").write_text('{"architectures": ["NewForCausalLM"]}')
    modules, error = imported(*(str(word).format(folder=tmp_path) for word in words), returncode=1)
    assert "fastmtp: error: " in error and message in error
    assert not modules & HEAVY
