"""What the user named against what is ms-swift's default, in every form; knobs of one run; registering twice."""

import json
import os
import subprocess
import sys

import pytest
from helpers.paths import TINY
from helpers.swift_runs import ONE_CORE
from swift.arguments import SftArguments
from swift.pipelines.train.sft import SwiftSft
from swift.utils import parse_args

from swift_fastmtp.errors import FastMTPError
from swift_fastmtp.method.config import FastMTPConfig, likely_typos
from swift_fastmtp.swift_plugin import register as plugin
from swift_fastmtp.swift_plugin.typed import typed_names

NAMES = ["tuner_type", "tuner_backend", "model_type", "model", "dataset", "learning_rate", "model_kwargs"]

COMMAND_LINES = {
    "": set(),
    "--tuner_type lora": {"tuner_type"},
    "--tuner_type=lora": {"tuner_type"},
    "--tuner-type lora": {"tuner_type"},
    "--tuner-type=lora": {"tuner_type"},
    "--tuner_t lora": {"tuner_type"},  # argparse takes what fits one name only
    "--model_type=fastmtp --model tuner_type --dataset a b": {"model_type", "model", "dataset"},
    "--model fastmtp --learning_rate -1": {"model", "learning_rate"},
    '--model_kwargs {"tuner_type":"lora"} --unknown --tuner_type= x': {"model_kwargs", "tuner_type"},
}


@pytest.mark.parametrize("line", COMMAND_LINES)
def test_what_a_command_line_names(line):
    assert typed_names(NAMES, line.split()) == COMMAND_LINES[line]


@pytest.fixture(autouse=True)
def registered():
    plugin.register()


@pytest.fixture
def common(rows, tmp_path):
    """Of every run, as keywords."""
    return {
        "model": str(TINY),
        "dataset": [str(rows)],
        "output_dir": str(tmp_path / "out"),
        "torch_dtype": "float32",
        "fp16": False,
        "max_steps": 1,
        "report_to": ["none"],
        "split_dataset_ratio": 0.0,
    }


def flags(common, *more):
    listed = []
    for name, value in common.items():
        listed += [f"--{name}", *(value if isinstance(value, list) else [str(value)])]
    return [*listed, *more]


FORMS = {
    "--model_type fastmtp": "fastmtp",
    "--model_type=fastmtp": "fastmtp",
    "--model-type=fastmtp": "fastmtp",
    "--model_type=fastmtp --tuner_type=lora": "lora",
    "--model_type fastmtp --tuner-type lora": "lora",
    "--model_type=fastmtp --tuner_type full": "full",
}


@pytest.mark.parametrize("form", FORMS)
def test_lora_only_if_it_was_typed(form, common, monkeypatch):
    """As a list of flags from Python, and as the command line of this process."""
    typed = flags(common, *form.split())
    assert parse_args(SftArguments, typed)[0].tuner_type == FORMS[form]
    monkeypatch.setattr(sys, "argv", ["sft.py", *typed])
    assert parse_args(SftArguments)[0].tuner_type == FORMS[form]


def test_lora_only_if_it_is_a_keyword(common, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", "--tuner_type", "lora"])  # somebody else's command line
    assert SftArguments(model_type="fastmtp", **common).tuner_type == "fastmtp"
    assert SftArguments(model_type="fastmtp", tuner_type="lora", **common).tuner_type == "lora"


RECIPE = """
model_type: fastmtp
{tuner}
model: {model}
dataset: [{rows}]
torch_dtype: float32
fp16: false
max_steps: 1
split_dataset_ratio: 0
report_to: none
add_version: false
output_dir: {out}
"""


@pytest.mark.matrix
def test_a_recipe_that_names_lora(rows, tmp_path):
    """The real command: ms-swift makes flags of it, in a second process."""
    recipe, out = tmp_path / "recipe.yaml", tmp_path / "out"
    recipe.write_text(RECIPE.format(tuner="tuner_type: lora", model=TINY, rows=rows, out=out))
    command = [os.path.join(os.path.dirname(sys.executable), "swift"), "sft", str(recipe), "--lora_rank=4"]
    subprocess.run(command, env={**os.environ, **ONE_CORE}, check=True, capture_output=True)
    assert (out / "checkpoint-1" / "adapter_config.json").exists()


def test_knobs_are_those_of_the_run(monkeypatch):
    monkeypatch.setattr(os, "environ", {"FASTMTP_BETA": "0.5", "FASTMTP_HOME": "/home", "FASTMTP_LK_ETA": "7"})
    assert FastMTPConfig.from_env() == FastMTPConfig(beta=0.5, lk_eta=7)
    both = FastMTPConfig.from_run({"fastmtp_beta": 0.25, "FASTMTP_LOSS": "ce"}, os.environ)
    assert both == FastMTPConfig(beta=0.25, lk_eta=7, loss="ce")
    with pytest.raises(FastMTPError, match="unknown knob 'fastmtp_home'"):
        FastMTPConfig.from_run({"fastmtp_home": "/home"}, {})
    with pytest.raises(FastMTPError, match="unknown knob 'beta'"):
        FastMTPConfig.from_run({"beta": 0.5}, {})
    with pytest.raises(FastMTPError, match="fastmtp_beta: cannot read 'high'"):
        FastMTPConfig.from_env({"FASTMTP_BETA": "high"})


def test_only_what_looks_like_a_knob_is_a_typo():
    environ = dict.fromkeys(["FASTMTP_BETA", "FASTMTP_HOME", "FASTMTP_DEBUG", "FASTMTP_DATA_DIR", "BTA"], "1")
    assert likely_typos(environ) == {}
    typos = {"FASTMTP_BTA": "FASTMTP_BETA", "FASTMTP_NUM_SPECULATIVE_STEP": "FASTMTP_NUM_SPECULATIVE_STEPS"}
    assert likely_typos({**environ, **dict.fromkeys(typos, "1")}) == typos


TWO_RUNS = """
import json, os, sys
from swift import SftArguments, sft_main
common = json.loads(sys.argv[1])
def arguments(name, **knobs):
    return SftArguments(**{**common, "output_dir": f"{common['output_dir']}/{name}"}, **knobs)
knobs = {"fastmtp_num_speculative_steps": 2, "fastmtp_beta": 0.5}
first = arguments("first", model_kwargs=knobs)
second = arguments("second")
os.chdir(common["output_dir"])
sft_main(first)
sft_main(second)
print("LEFT", {k: v for k, v in os.environ.items() if k.startswith("FASTMTP_")})
"""


@pytest.mark.matrix
def test_two_runs_of_one_process_have_their_own_knobs(common, tmp_path):
    """From Python, made before either runs; the user's variables stay."""
    (tmp_path / "out").mkdir()
    asked = {**common, "model_type": "fastmtp", "add_version": False}
    environment = {**os.environ, **ONE_CORE, "FASTMTP_BETA": "0.7", "FASTMTP_HOME": "/home", "FASTMTP_LOS": "ce"}
    done = subprocess.run(
        [sys.executable, "-c", TWO_RUNS, json.dumps(asked)],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = []
    for name in ("first", "second"):
        settings = json.loads((tmp_path / "out" / name / "checkpoint-1" / "fastmtp.json").read_text())
        found.append((settings["num_speculative_steps"], settings["beta"], settings["loss"]))
    assert found == [(2, 0.5, "kl"), (3, 0.7, "kl")]
    left = {"FASTMTP_BETA": "0.7", "FASTMTP_HOME": "/home", "FASTMTP_LOS": "ce"}
    assert f"LEFT {left}" in done.stdout
    warned = done.stdout + done.stderr
    assert "FASTMTP_LOS is ignored; did you mean FASTMTP_LOSS?" in warned and "FASTMTP_HOME is" not in warned


def test_registering_again_after_a_failure(monkeypatch):
    """Nothing is wrapped twice, and a failure is not taken for done."""
    plugin.register()
    hooks = [SftArguments._init_model_kwargs, SftArguments.get_model_processor, SwiftSft.run]
    monkeypatch.setattr(plugin, "_registered", False)
    monkeypatch.setattr(plugin, "_one_line_errors", lambda: None)
    with monkeypatch.context() as patch:
        patch.setattr(plugin, "_hook_export", lambda: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            plugin.register()
        assert not plugin._registered
    plugin.register()
    assert plugin._registered
    assert hooks == [SftArguments._init_model_kwargs, SftArguments.get_model_processor, SwiftSft.run]
