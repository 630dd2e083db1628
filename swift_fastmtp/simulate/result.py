"""What one head reaches: the numbers that the tables, plots and the recommendation are made from."""

from dataclasses import dataclass
from pathlib import Path

from ..method.verification import REGIMES

ALL = "all"
"""The group that holds every answer."""


@dataclass
class HeadResult:
    """What one head reaches with one token map on one group of answers; lists are per depth or per K, 1..num_steps."""

    head: str
    token_map: str | None
    """File; None is the whole vocabulary."""
    num_ids: int
    """Tokens that the draft chooses from; with those of the request, on average."""
    regime: str
    """How drafts are made and verified above temperature 0 (`method.verification`); `greedy` at 0."""
    group: str
    marginal: list[float]
    conditional: list[float]
    tau_micro: list[float]
    tau_macro: list[float]
    speedup: list[float]
    """Predicted (`cost.py`)."""
    histogram: list[int] | None
    """Rounds of the largest K that accepted 0, 1, .. K drafts (SGLang's `spec_correct_drafts_histogram`); of greedy
    drafts."""
    engine: str = "sglang"
    """Whose graph the drafts were computed in (`families.family.Graph`)."""
    by_request: bool = False
    """Whether the ids of each request's prompt and answer so far are added to the map's."""

    @property
    def name(self) -> str:
        parts = [
            self.head,
            Path(self.token_map).name if self.token_map else "",
            "the request's ids" if self.by_request else "",
            REGIMES[self.regime].short,
            "vLLM's graph" if self.engine == "vllm" else "",
        ]
        return " + ".join(filter(None, parts))
