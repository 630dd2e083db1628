"""Three tiers of tests: `fast`, `engine` and `matrix`; a test is in one.

What carries no mark is fast: it starts neither `swift` nor a server, and is over in seconds. `engine` does, for what
most users do. `matrix` is the rest: every family, every command of the docs, every strategy, drills, large budgets.
"""

import pytest

TIERS = ("fast", "engine", "matrix")
# Those that stand for all families where a test takes seconds for each; the others' turn is in the matrix.
# A hybrid of linear attention and experts, and latent attention beside experts under numbered names.
STAND_INS = ("mimo", "qwen3_next", "deepseek_v3")


def tier_of(item):
    """The slowest tier that a test, its file or its parameter is marked with."""
    for tier in reversed(TIERS):
        if item.get_closest_marker(tier):
            return tier
    return "fast"


def some_now(names, now=STAND_INS):
    """Parameters of a test: `now` in the test's own tier, the others in the matrix."""
    return [name if name in now else pytest.param(name, marks=pytest.mark.matrix) for name in names]
