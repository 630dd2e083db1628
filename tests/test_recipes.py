"""Every recipe is accepted by ms-swift's own argument classes; the CPU ones are run by test_docs.py."""

import os
from pathlib import Path

import pytest
import yaml
from helpers.paths import ROOT, TINY

RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda p: p.name)
def test_recipe_parses(recipe, tmp_path, monkeypatch, rows):
    pytest.importorskip("deepspeed", reason="pip install swift_fastmtp[deepspeed]")
    from swift.arguments import SftArguments
    from swift.cli.main import parse_yaml_args
    from swift.utils import parse_args

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(os, "environ", os.environ.copy())
    # The model and the data are not here; everything else is the recipe's.
    argv = [str(recipe)]
    parse_yaml_args(argv)
    argv += ["--model", str(TINY), "--dataset", f"fastmtp-self-distill:{rows}", "--output_dir", str(tmp_path)]
    argv += ["--use_cpu", "true", "--use_hf", "false"]
    monkeypatch.setattr("sys.argv", ["swift", *argv])
    args, rest = parse_args(SftArguments, argv)
    assert rest == []
    assert (args.loss_type, args.tuner_type) == ("fastmtp", "fastmtp")
    assert args.training_args.metric_for_best_model == "mtp_tau"


def test_the_papers_numbers():
    recipe = yaml.safe_load((ROOT / "recipes" / "mimo_7b_rl_8xh20.yaml").read_text())
    batch = recipe["ENV"]["NPROC_PER_NODE"] * recipe["per_device_train_batch_size"]
    assert batch * recipe["gradient_accumulation_steps"] == 64
    assert (recipe["num_train_epochs"], recipe["learning_rate"], recipe["warmup_ratio"]) == (3, 5e-5, 0.05)
    assert (recipe["adam_beta1"], recipe["adam_beta2"], recipe["lr_scheduler_type"]) == (0.9, 0.95, "cosine")
    assert recipe["model_kwargs"]["fastmtp_num_speculative_steps"] == 3
    assert recipe["model_kwargs"]["fastmtp_beta"] == 0.6
    assert Path(ROOT / recipe["deepspeed"]).exists()
