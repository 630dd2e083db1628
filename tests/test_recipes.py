"""Every recipe is accepted by ms-swift's own argument classes, and says what `fastmtp inspect --gpus` says.

They are run by test_recipe_runs.py, the CPU one by test_docs.py.
"""

import os

import pytest
from helpers.paths import ROOT, TINY
from helpers.published import published
from helpers.recipes import RECIPES, expectations, workload

from swift_fastmtp.simulate.training_plan import numbers, plan
from swift_fastmtp.swift_plugin.knobs import knobs_of


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


@pytest.mark.parametrize("name", ["mimo_7b_rl_8xh20_paper.yaml", "mimo_7b_rl_8xh20.yaml"])
def test_the_papers_run_trains_with_the_papers_numbers(name, parsed):
    """What ms-swift and the package make of the recipe, against section 3.1 and Eq. 2. The one that is recommended has
    its own graph and loss."""
    args = parsed(ROOT / "recipes" / name)
    run, knobs = args.training_args, knobs_of(args)
    processes = int(os.environ["NPROC_PER_NODE"])
    assert processes * run.per_device_train_batch_size * run.gradient_accumulation_steps == 64
    assert (run.num_train_epochs, run.learning_rate, run.get_warmup_steps(1000)) == (3, 5e-5, 50)
    assert (run.adam_beta1, run.adam_beta2, run.lr_scheduler_type) == (0.9, 0.95, "cosine")
    assert knobs.step_weights == pytest.approx([1 / 1.96, 0.6 / 1.96, 0.36 / 1.96])
    assert knobs.token_map == ""
    assert (knobs.rollout, knobs.loss) == (("paper", "ce") if "paper" in name else ("exact", "kl"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A function from a name on the hub to a folder with its config.json."""
    root, made = tmp_path_factory.mktemp("published"), {}
    return lambda name: made.get(name) or made.setdefault(name, published(name, root / name))


@pytest.mark.parametrize("recipe", [r for r in RECIPES if "cpu" not in r.name], ids=lambda p: p.name)
def test_a_recipe_says_what_inspect_says(recipe, folder):
    """A line that differs is to be replaced by what this shows."""
    lines = expectations(recipe)
    assert lines
    for model, gpus, way, text in lines:
        found = plan(str(folder(model)), gpus, workload(recipe))
        assert found.take == way, (model, gpus)
        assert text == numbers(next(each for each in found.ways if each.name == way)), (model, gpus)


def test_the_table_of_recipes():
    """docs/recipes.md has every recipe, with the memory and the hours that the recipe states."""
    page = (ROOT / "docs/recipes.md").read_text(encoding="utf-8")
    for recipe in RECIPES:
        assert f"recipes/{recipe.name}" in page, recipe.name
        for model, gpus, _, text in expectations(recipe):
            number, name = gpus.split("x", 1)
            _, memory, _, hours, disk = text.split(", ")
            begin = f"| {model.split('/')[1]} | {number} {name} |"
            row = next(line for line in page.splitlines() if line.startswith(begin) and recipe.name in line)
            for cell in (memory.removesuffix(" a GPU"), hours.removesuffix(" hours"), disk.removesuffix(" of disk")):
                assert f" {cell} |" in row, row
