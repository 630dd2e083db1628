"""How an engine drafts and verifies above temperature 0: three regimes, what each accepts, and what selects it.

At temperature 0 they are one. Above it a draft x is verified against the distribution p that the engine samples from
(temperature, top-k and top-p applied), and what is written has that distribution in every regime; they differ in how
often a draft is accepted. q is the draft's own distribution, at the same temperature, over its whole vocabulary.

* `greedy`: x is q's most probable token and is accepted with probability p(x).
* `rejection`: x is drawn from q and is accepted with probability min(1, p(x) / q(x)) (Leviathan et al. 2023,
  Algorithm 1).
* `block`: drafts are drawn from q and verified together (Sun et al. 2024, Algorithm 2, arXiv 2403.10444).

All three follow from a text that was drawn from p, in which a draft of greedy tokens is accepted where it is the text's
token, and drawn ones by the likelihood ratio q / p of the text's own tokens.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch  # takes seconds, and what prints a command has no tensors


@dataclass(frozen=True)
class Regime:
    """One way to draft and verify, and what selects it."""

    name: str
    title: str
    short: str
    """Of a row in a table; empty for what every engine does by itself."""
    sglang: tuple[str, ...] = ()
    """Flags of SGLang beside those of NEXTN (0.5.23 `arg_groups/fields/spec.py`)."""
    vllm: dict[str, str] = field(default_factory=dict)
    """Keys of vLLM's `--speculative-config` (0.32.0 `config/speculative.py`)."""

    @property
    def selected_by(self) -> str:
        """For people: what selects it in each engine."""
        settings = ", ".join(f"{key} {value}" for key, value in self.vllm.items())
        return f"SGLang: {' '.join(self.sglang) or 'no flag'}; vLLM: {settings or 'no setting'}"


GREEDY = Regime("greedy", "greedy drafts, target-only acceptance", "")
REJECTION = Regime(
    "rejection",
    "sampled drafts, rejection sampling",
    "rejection sampling",
    ("--speculative-use-rejection-sampling",),
    {"draft_sample_method": "probabilistic"},
)
BLOCK = Regime(
    "block",
    "sampled drafts, block verification",
    "block verification",
    ("--speculative-use-block-verification",),
    {"draft_sample_method": "probabilistic", "rejection_sample_method": "block"},
)
REGIMES = {regime.name: regime for regime in (GREEDY, REJECTION, BLOCK)}


def default_regime(temperature: float) -> Regime:
    """What is recommended: above temperature 0 every head that was measured does as well with sampled drafts or far
    better (docs/sampling.md), and block verification runs on fewer devices."""
    return REJECTION if temperature > 0 else GREEDY


def regime_of(command: Sequence[str]) -> Regime:
    """The regime that the command of an engine selects."""
    words = list(command)
    for regime in (BLOCK, REJECTION):
        if regime.sglang[0] in words:
            return regime
    for word in words:
        if '"num_speculative_tokens"' not in word:
            continue
        try:
            settings = json.loads(word.removeprefix("--speculative-config="))
        except ValueError:
            continue
        for regime in (BLOCK, REJECTION):
            if isinstance(settings, dict) and regime.vllm.items() <= settings.items():
                return regime
    return GREEDY


def rejection_acceptance(ratio_KA: torch.Tensor) -> torch.Tensor:
    """Probability [K, A] that depth k's draft is accepted where those before it were, `rejection`.

    Its mean over texts drawn from p is sum min(p, q) (Leviathan et al. 2023, Theorem 3.5).

    Args:
        ratio_KA: q / p of the text's token at depth k, where depths 1..k-1 drafted the text's tokens; 0 of a token that
            the draft cannot choose.
    """
    return ratio_KA.clamp(max=1)


def block_acceptance(ratio_KA: torch.Tensor) -> torch.Tensor:
    """As `rejection_acceptance`, for `block`: the chance of depth k where those before it were accepted.

    Algorithm 2 accepts i drafts x or more with probability p_i = min(p_{i-1} p(x_i) / q(x_i), 1), p_0 = 1, by induction
    from its last draft, whatever their number. Drafts x are drawn with probability q(x_1) .. q(x_i), the text's tokens
    with p(x_1) .. p(x_i), and what follows i accepted drafts is drawn from p. So of a text, at least i drafts are
    accepted with probability min over j <= i of the product of its first j ratios, the empty one included.
    """
    at_least_KA = ratio_KA.double().cumprod(0).clamp(max=1).cummin(0).values
    before_KA = at_least_KA.roll(1, 0)
    before_KA[0] = 1
    return (at_least_KA / before_KA).nan_to_num(0.0)  # 0 / 0 behind a token that cannot be drafted
