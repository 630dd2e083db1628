"""What the doctor says."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong: `error` (do not serve this) or `warning` (likely not what you meant)."""

    level: str
    what: str
    why: str
    fix: str

    def __str__(self) -> str:
        return f"{self.level}: {self.what}\n    why: {self.why}\n    fix: {self.fix}"
