"""Shared fixtures. Subprocesses run offline: no test needs a network."""

import importlib
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # processes that share cores spin for each other otherwise

import pytest
import torch

if not torch.cuda.is_available() and importlib.util.find_spec("triton"):
    # Triton's own functions are made for its interpreter or for a GPU when it is first imported; ours later.
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        importlib.import_module("triton")

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")  # the libraries read these when imported
sys.path.insert(0, str(Path(__file__).parent))
pytest.register_assert_rewrite("helpers")

from helpers import swift_runs  # noqa: E402 (not before the lines above)
from helpers.checkpoints import write_trained  # noqa: E402
from helpers.paths import ROOT, TINY  # noqa: E402
from helpers.swift_runs import KEEP, sft_args, swift, write_rows  # noqa: E402
from helpers.tiers import tier_of  # noqa: E402

pytest_plugins = ["helpers.support_matrix"]
LONGEST_FIRST = [
    *("test_docs.py", "test_plugin.py", "test_engine.py", "test_asked_is_trained.py", "test_family_runs.py"),
    *("test_kill_drills.py", "test_distributed.py", "test_paper_recipe.py"),
]


@pytest.hookimpl(tryfirst=True)  # before `-m` looks at the marks
def pytest_collection_modifyitems(items):
    """Every test has a tier. A file begun last would run alone at the end."""
    for item in items:
        if tier_of(item) == "fast":
            item.add_marker("fast")
    order = {name: place for place, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))


def pytest_runtest_setup(item):
    swift_runs.allowed = tier_of(item) != "fast"


@pytest.fixture(autouse=True)
def _fixed_seed():
    torch.manual_seed(0)


@pytest.fixture
def exact_norms(monkeypatch):
    """transformers computes RMSNorm in float32 whatever it is given; float64 comparisons need it to stay float64."""
    from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

    def forward(self, x):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon) * self.weight

    monkeypatch.setattr(Qwen2RMSNorm, "forward", forward)


@pytest.fixture(scope="session")
def bases(tmp_path_factory):
    """A function from a name in `models.CHECKPOINTS` to its folder, made when first asked for."""
    from helpers.models import CHECKPOINTS

    made, folder = {}, tmp_path_factory.mktemp("bases")
    return lambda name: made.get(name) or made.setdefault(name, CHECKPOINTS[name](folder / name))


@pytest.fixture
def trained(tmp_path):
    """A head-only checkpoint of the tiny model."""
    return write_trained(tmp_path / "checkpoint")


@pytest.fixture(scope="session")
def rows(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl", 48)


@pytest.fixture(scope="session")
def run(tmp_path_factory, rows):
    """One plain `swift sft --model_type fastmtp` run that many tests look at: (output folder, its process). On rows of
    random words a head becomes worse, and is exported all the same."""
    out = tmp_path_factory.mktemp("sft") / "run"
    extra = {
        "report_to": "tensorboard",
        "val_dataset": f"{rows}#8",
        "eval_steps": 2,
        "metric_for_best_model": "mtp_tau",
        "model_kwargs": KEEP,
    }
    return out, swift(*sft_args(TINY, rows, out, **extra))


@pytest.fixture(scope="session")
def installed(tmp_path_factory):
    """The package as users install it: the wheel, and the folder of its own that it is installed in."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--quiet"]
    source = folder / "source"
    # A copy of what git knows, so that neither build folders here nor there disturb each other.
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    for name in files:
        if name.startswith(("swift_fastmtp", "setup.py", "pyproject.toml", "README.md", "LICENSE")):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    subprocess.run([*pip, "wheel", source, "--no-deps", "--no-build-isolation", "-w", folder], check=True)
    (wheel,) = folder.glob("*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", folder / "site", wheel], check=True)
    return wheel, folder / "site"
