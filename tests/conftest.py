"""Shared fixtures. Subprocesses run offline: no test needs a network."""

import os
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
TINY = ROOT / "examples" / "tiny-mimo"

sys.path.insert(0, str(Path(__file__).parent))
os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")


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
