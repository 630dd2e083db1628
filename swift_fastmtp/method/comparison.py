"""A trained head beside the initial one, with which its run began: the rule by which it is worse.

It is worse where the 95 % interval of the change of tau lies below 0, on the same rows (`metrics.tau_change`). Less
than that is noise, and no verdict.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .metrics import tau_change, tau_of_rows


@dataclass(frozen=True)
class Change:
    """tau on one set of rows before and after training.

    Attributes:
        rows: how many.
        before, now: tau of the initial head, and of the trained one.
        low, high: ends of the 95 % interval of `now - before`.
    """

    rows: int
    before: float
    now: float
    low: float
    high: float

    @property
    def worse(self) -> bool:
        return self.high < 0

    @property
    def better(self) -> bool:
        return self.low > 0

    def __str__(self) -> str:
        word = "worse" if self.worse else "better" if self.better else "within noise"
        interval = f"95 %: {self.low:+.3f} to {self.high:+.3f}"
        return f"tau {self.before:.3f} -> {self.now:.3f} ({word}; {interval}; {self.rows} rows)"

    def to_dict(self) -> dict[str, Any]:
        """As it stands in `fastmtp.json`."""
        numbers = {name: round(getattr(self, name), 4) for name in ("before", "now", "low", "high")}
        return {"rows": self.rows, **numbers, "worse": self.worse}


def compare(before_R2K: Any, now_R2K: Any) -> Change | None:
    """The change between two measurements (`metrics.row_counts`, lists); None if they are not of the same rows: another
    number of them, other answers, another depth."""
    if not before_R2K or [row[1] for row in before_R2K] != [row[1] for row in now_R2K]:
        return None
    _, low, high = tau_change(before_R2K, now_R2K)
    return Change(len(now_R2K), tau_of_rows(before_R2K), tau_of_rows(now_R2K), low, high)


def context_changes(
    before: Sequence[Sequence[Any]] | None, now: Sequence[tuple[int, int, float, int]]
) -> list[dict[str, Any]]:
    """tau of two heads by tokens before the draft, as it stands in `fastmtp.json`.

    Args:
        before, now: `metrics.taus_of_context`; None: the initial head was not measured.

    Each part has `start`, `end`, `positions` (that a draft begins at), `before` and `now`; `before` is None where that
    head was not measured at the same positions.
    """
    known = {(start, end, positions): tau for start, end, tau, positions in before or ()}
    parts = []
    for start, end, tau, positions in now:
        tau_before = known.get((start, end, positions))
        rounded = None if tau_before is None else round(tau_before, 4)
        parts.append(
            {"start": start, "end": end, "positions": positions, "before": rounded, "now": round(tau, 4)},
        )
    return parts


def shown_contexts(parts: list[dict[str, Any]]) -> str:
    """`context_changes` in a line."""
    shown = []
    for part in parts:
        before = "" if part["before"] is None else f"{part['before']:.2f} -> "
        shown.append(f"{part['start']} to {part['end'] - 1}: {before}{part['now']:.2f}")
    return ", ".join(shown) or "no draft"


def shown_changes(settings: dict[str, Any]) -> dict[str, str]:
    """By set of rows, what a `fastmtp.json` says of the change of tau; nothing of what cannot be read."""
    shown = {}
    for name, words in (("validation", "validation rows"), ("other_val_dataset", "rows of another kind")):
        known = (settings.get("compared") or {}).get(name)
        if not isinstance(known, dict):
            continue
        numbers = [known.get(key) for key in ("before", "now", "low", "high")]
        if not all(isinstance(number, int | float) for number in numbers):
            continue
        before, now, low, high = numbers
        shown[words] = f"{before:.3f} → {now:.3f} (95 %: {low:+.3f} to {high:+.3f})"
    return shown


def why_worse(loss: str) -> str:
    """What usually makes a head worse, in one clause; `loss` is the run's."""
    hard = "hard labels (fastmtp_loss ce; kl learns the model's own distribution), " if loss == "ce" else ""
    return f"likely reasons: {hard}answers that are not the model's own (fastmtp distill), a high --learning_rate"


def why_withheld(compared: dict[str, Any] | None) -> str | None:
    """Why a checkpoint is not handed out, by the `compared` of its `fastmtp.json`; None if it may be."""
    if not compared:
        return None
    validation = compared.get("validation")
    if not isinstance(validation, dict) or not validation.get("worse"):
        return None
    return (
        f"it is worse than the head its run began with: tau {validation.get('before')} -> {validation.get('now')} on "
        f"{validation.get('rows')} validation rows; {why_worse(str(compared.get('loss')))}"
    )
