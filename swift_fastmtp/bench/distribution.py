"""Above temperature 0: many short answers to a few prompts, of every server, beside the baseline's.

They are a run of their own in a server's first round (`order.plan_passes`), timed and counted in no other. Each server
draws with seeds of its own: equal seeds could give equal answers by themselves.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain, zip_longest
from typing import Any

from ..data.tasks import Question
from ..files.schema import Amount, Count, Positive, Rate
from ..method.same_distribution import LEVEL, Answers, holm, same_distribution

DISTRIBUTION = "distribution"
"""In the place of a task's name."""
PROMPTS = 3
TOKENS = 8
"""Of an answer: what a verifier gets wrong shows in the first rounds, and longer answers are all different."""
MAX_SAMPLES = 2000

Sample = tuple[str, list[int] | None, str]
"""An answer: the prompt's name, token ids if the server tells them, text."""


@dataclass
class Distribution:
    """Short answers of a server, above temperature 0, beside the baseline's to the same prompts
    (`method.same_distribution`)."""

    server: str
    temperature: Amount
    prompts: Count
    samples: Positive
    """Of each prompt and server, at least."""
    tokens: Positive
    """Of an answer, at most."""
    p: Rate
    """The share of random deals of these answers between the two servers that differ as much."""
    p_holm: Rate
    """The same, adjusted for all comparisons of the benchmark."""

    @property
    def differs(self) -> bool:
        return self.p_holm < LEVEL

    def __str__(self) -> str:
        verdict = "differs from the baseline's" if self.differs else "same as the baseline's"
        return f"{verdict}, p = {self.p_holm:.2g}, {self.prompts} x {self.samples} samples of {self.tokens} tokens"


def sampled_questions(tasks: Iterable[tuple[str, list[Question]]], samples: int) -> list[Question]:
    """Each of the prompts as often as it is sampled: first questions, of each task in turn, without later turns."""
    by_task = [[(name, question) for question in questions] for name, questions in tasks]
    in_turn = chain.from_iterable(zip_longest(*by_task))
    chosen = [pair for pair in in_turn if pair][:PROMPTS]
    sampled = []
    for name, question in chosen:
        for number in range(samples):
            sampled.append(Question(f"{name}/{question.id}#{number}", question.turns[:1], question.system))
    return sampled


def prompt_of(question: str) -> str:
    """The prompt of a sampled question's id."""
    return question.rpartition("#")[0]


def compare_distributions(
    samples: dict[tuple[str, float], list[Sample]], baseline: str, tokens: int
) -> list[Distribution]:
    """Every server at every temperature beside the baseline; not of prompts that one of the two refuses.

    Args:
        samples: answers by server and temperature.
        baseline: its name.
        tokens: the limit of an answer.
    """
    facts: list[dict[str, Any]] = []
    for (server, temperature), own in samples.items():
        reference = samples.get((baseline, temperature))
        if server == baseline or not reference:
            continue
        with_ids = all(ids is not None for _, ids, _ in [*own, *reference])
        one, other = _by_prompt(reference, with_ids), _by_prompt(own, with_ids)
        pairs = [(one[prompt], other[prompt]) for prompt in one if prompt in other]
        if pairs:
            fewest = min(len(answers) for pair in pairs for answers in pair)
            facts.append(
                {
                    "server": server,
                    "temperature": temperature,
                    "prompts": len(pairs),
                    "samples": fewest,
                    "tokens": tokens,
                    "p": same_distribution(pairs),
                }
            )
    adjusted = holm([one["p"] for one in facts])
    return [Distribution(**one, p_holm=p) for one, p in zip(facts, adjusted, strict=True)]


def _by_prompt(samples: list[Sample], with_ids: bool) -> dict[str, Answers]:
    """In an order that does not depend on which answer came first."""
    answers: dict[str, list[Any]] = {}
    for prompt, ids, text in samples:
        answers.setdefault(prompt, []).append(ids if with_ids else text)
    return {prompt: sorted(answers[prompt]) for prompt in sorted(answers)}
