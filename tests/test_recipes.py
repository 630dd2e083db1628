"""Every recipe is accepted by ms-swift's own argument classes; the CPU ones are run by test_docs.py."""

import os

import pytest
from helpers.paths import ROOT, TINY

from swift_fastmtp.swift_plugin.knobs import knobs_of

RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))


@pytest.fixture
def parsed(tmp_path, monkeypatch, rows):
    """A function from a recipe to what ms-swift makes of it; the model and the data are others, those are not here."""
    pytest.importorskip("deepspeed", reason="pip install swift_fastmtp[deepspeed]")
    from swift.arguments import SftArguments
    from swift.cli.main import parse_yaml_args
    from swift.utils import parse_args

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(os, "environ", os.environ.copy())

    def parse(recipe):
        argv = [str(recipe)]
        parse_yaml_args(argv)
        argv += ["--model", str(TINY), "--dataset", f"fastmtp-self-distill:{rows}", "--output_dir", str(tmp_path)]
        argv += ["--use_cpu", "true", "--use_hf", "false"]
        monkeypatch.setattr("sys.argv", ["swift", *argv])
        args, rest = parse_args(SftArguments, argv)
        assert rest == []
        return args

    return parse


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda p: p.name)
def test_recipe_parses(recipe, parsed):
    args = parsed(recipe)
    assert (args.loss_type, args.tuner_type) == ("fastmtp", "fastmtp")
    assert args.training_args.metric_for_best_model == "mtp_tau"


def test_the_papers_run_trains_with_the_papers_numbers(parsed):
    """What ms-swift and the package make of the recipe, against section 3.1 and Eq. 2."""
    args = parsed(ROOT / "recipes" / "mimo_7b_rl_8xh20.yaml")
    run, knobs = args.training_args, knobs_of(args)
    processes = int(os.environ["NPROC_PER_NODE"])
    assert processes * run.per_device_train_batch_size * run.gradient_accumulation_steps == 64
    assert (run.num_train_epochs, run.learning_rate, run.get_warmup_steps(1000)) == (3, 5e-5, 50)
    assert (run.adam_beta1, run.adam_beta2, run.lr_scheduler_type) == (0.9, 0.95, "cosine")
    assert knobs.step_weights == pytest.approx([1 / 1.96, 0.6 / 1.96, 0.36 / 1.96])
    assert knobs.token_map == ""
