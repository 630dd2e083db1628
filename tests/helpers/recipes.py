"""The recipes: their values, and what they say is to be expected."""

import re

import yaml

from helpers.paths import ROOT
from swift_fastmtp.simulate.training_cost import Workload

RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
_EXPECTED = re.compile(r"# Expected (?:of (\S+) )?on (\S+) \(([^)]+)\): (.*)")


def values(recipe):
    return yaml.safe_load(recipe.read_text(encoding="utf-8"))


def expectations(recipe):
    """(model, GPUs, way, text) of every line of a recipe that says what to expect."""
    model = values(recipe)["model"]
    found = _EXPECTED.findall(recipe.read_text(encoding="utf-8"))
    return [(of or model, gpus, way, text) for of, gpus, way, text in found]


def workload(recipe):
    """What `fastmtp inspect --gpus` is to be asked with for a recipe."""
    stated = values(recipe)
    knobs = stated.get("model_kwargs", {})
    method = {name: knobs[f"fastmtp_{name}"] for name in ("loss", "rollout") if f"fastmtp_{name}" in knobs}
    return Workload(
        epochs=stated["num_train_epochs"],
        rows_per_step=stated["per_device_train_batch_size"],
        max_length=stated["max_length"],
        **method,
    )
