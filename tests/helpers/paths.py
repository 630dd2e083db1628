"""Where the repository is, and the tiny trained model in it."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
TINY = ROOT / "examples" / "tiny-mimo"
