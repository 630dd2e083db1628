"""Do two servers sample from the same distribution? A permutation test of short answers to the same prompts.

Two samples differ by the prefixes that come up more often in the one: squared differences of frequencies, of all
prefixes of all lengths, summed. That is the squared maximum mean discrepancy (Gretton et al., 2012) with the length of
the common prefix as kernel; frequent prefixes weigh most, so a verifier that prefers what is probable shows. What the
sum is where nothing differs is not looked up but made: answers to one prompt are dealt out again at random, which
changes nothing then. So the level holds for any number of answers and whatever they are.
"""

from collections import Counter
from collections.abc import Hashable, Sequence

import numpy as np

Answers = Sequence[Sequence[Hashable]]
"""Tokens (or characters) of each answer to one prompt."""
LEVEL = 0.01
"""Of the verdict, all comparisons of a benchmark together (`holm`)."""
PERMUTATIONS = 2000


def prefix_distance(one: Answers, other: Answers) -> float:
    """How far the frequencies of prefixes are apart in two samples of answers to one prompt: the definition."""
    in_one = Counter(prefix for answer in one for prefix in _prefixes(answer))
    in_other = Counter(prefix for answer in other for prefix in _prefixes(answer))
    return sum((in_one[prefix] / len(one) - in_other[prefix] / len(other)) ** 2 for prefix in in_one | in_other)


def same_distribution(prompts: Sequence[tuple[Answers, Answers]], seed: int = 0) -> float:
    """p-value of the hypothesis that both samples of every prompt are from one distribution: the share of random deals
    whose distance, summed over prompts, is at least as large.

    Args:
        prompts: of each prompt the answers of one server and of the other, at least one of each.
        seed: of the deals.
    """
    rng = np.random.default_rng(seed)
    dealt_P = np.zeros(PERMUTATIONS)
    observed = 0.0
    for one, other in prompts:
        observed += prefix_distance(one, other)
        dealt_P += _dealt(one, other, rng)
    return float((1 + (dealt_P >= observed - 1e-9).sum()) / (1 + PERMUTATIONS))


def _dealt(one: Answers, other: Answers, rng: np.random.Generator) -> "np.ndarray":
    """`prefix_distance` of random deals of the same answers, [PERMUTATIONS]."""
    answers = [*one, *other]
    number_of: dict[Hashable, int] = {}
    prefixes, answer_of = [], []
    for number, answer in enumerate(answers):
        for prefix in _prefixes(answer):
            prefixes.append(number_of.setdefault(prefix, len(number_of)))
            answer_of.append(number)
    prefix_N, answer_N = np.asarray(prefixes), np.asarray(answer_of)
    total_F = np.bincount(prefix_N)

    values = np.empty(PERMUTATIONS)
    is_one = np.arange(len(answers)) < len(one)
    for place in range(PERMUTATIONS):
        rng.shuffle(is_one)
        a_F = np.bincount(prefix_N, weights=is_one[answer_N], minlength=len(total_F))
        values[place] = ((a_F / len(one) - (total_F - a_F) / len(other)) ** 2).sum()
    return values


def _prefixes(answer: Sequence[Hashable]) -> list[Hashable]:
    return [tuple(answer[:length]) for length in range(1, len(answer) + 1)]


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values of several tests, adjusted so that a level holds for all of them together (Holm, 1979)."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = largest
    return adjusted
