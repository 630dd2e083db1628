"""No Python code of a model folder runs, whatever its files ask for; what needs it is refused in one line."""

import json
import shutil
import subprocess
import sys

import pytest
from helpers.paths import TINY
from helpers.swift_runs import sft_args, swift

from swift_fastmtp.checkpoint.checkpoint import Checkpoint
from swift_fastmtp.data.chat_template import load_tokenizer
from swift_fastmtp.errors import FastMTPError
from swift_fastmtp.model.config import load_config

CONFIG = {"AutoConfig": "configuration_theirs.TheirConfig", "AutoModelForCausalLM": "configuration_theirs.Model"}
TOKENIZER = {"AutoTokenizer": ["tokenization_theirs.TheirTokenizer", "tokenization_theirs.TheirTokenizer"]}
# Changes of config.json and tokenizer_config.json → what is said, or None where the code is not needed.
FOLDERS = {
    "unknown model type": ({"model_type": "theirs", "auto_map": CONFIG}, {}, "model_type 'theirs' is known to Python"),
    "known model type": ({"auto_map": CONFIG}, {}, None),
    "transformers' own model type": ({"model_type": "qwen2", "auto_map": CONFIG}, {}, None),
    "tokenizer": ({}, {"auto_map": TOKENIZER, "tokenizer_class": "TheirTokenizer"}, "tokenizer_config.json names"),
}


@pytest.fixture(params=FOLDERS)
def folder(request, tmp_path):
    """(a folder with code that leaves a trace when it runs, the trace, what is said of it)"""
    config, tokenizer, message = FOLDERS[request.param]
    model, trace = tmp_path / "model", tmp_path / "trace"
    shutil.copytree(TINY, model)
    code = f"open({str(trace)!r}, 'w').close()\n"
    (model / "configuration_theirs.py").write_text(
        code + "from transformers import Qwen2Config\nclass TheirConfig(Qwen2Config):\n    model_type = 'theirs'\n"
    )
    (model / "tokenization_theirs.py").write_text(
        code + "from transformers import PreTrainedTokenizerFast\nclass TheirTokenizer(PreTrainedTokenizerFast): ...\n"
    )
    for name, changes in (("config.json", config), ("tokenizer_config.json", tokenizer)):
        values = json.loads((model / name).read_text())
        (model / name).write_text(json.dumps({**values, **changes}))
    return model, trace, message


@pytest.mark.engine
def test_through_swift(folder, rows, tmp_path):
    """ms-swift itself runs the code of any folder."""
    model, trace, message = folder
    done = swift(*sft_args(model, rows, tmp_path / "out", max_steps=1), check=False)
    assert not trace.exists()
    assert "trust_remote_code=True" not in done.stdout + done.stderr
    if message is None:
        assert done.returncode == 0, done.stderr[-2000:]
        return
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("fastmtp: error:")]
    assert done.returncode == 1 and message in line


@pytest.mark.matrix
def test_through_our_verbs(folder, rows, tmp_path):
    model, trace, message = folder
    verbs = {
        "distill": ["--model", model, "--prompts", rows, "--output", tmp_path / "d.jsonl", "--max_new_tokens", "1"],
        "simulate": ["--model", model, "--dataset", rows, "--answers", "given", "--max_rows", "2"],
    }
    for verb, words in verbs.items():
        done = subprocess.run(
            [sys.executable, "-m", "swift_fastmtp.cli", verb, *map(str, words)],
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            check=False,
        )
        assert not trace.exists() and "Traceback" not in done.stderr
        assert done.returncode == (message is not None), done.stderr[-2000:]
        if message:
            (line,) = [line for line in done.stderr.splitlines() if line.startswith("fastmtp: error:")]
            assert message in line and "trust_remote_code" not in line


def test_in_process(folder):
    model, trace, message = folder
    lines = []
    for read in (lambda: load_config(Checkpoint(model)), lambda: load_tokenizer(str(model))):
        try:
            read()
        except FastMTPError as error:
            lines.append(str(error))
    assert not trace.exists()
    assert any(message in line for line in lines) if message else not lines
