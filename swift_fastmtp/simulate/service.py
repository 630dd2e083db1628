"""What a whole service gets from drafts: requests come at random times, are answered together, and end.

A server is played step by step. What waits is prefilled first, one prompt after the other; a step then takes what
`step_times.py` says for the number of answers that are decoded at once, and gives each of them one token and the drafts
that were accepted, drawn from the head's rates. Left out: that long contexts cost more than short ones, prompts that
are prefilled beside decoding, and prefixes that are cached.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil

from ..files.table import terminal_table
from .step_times import StepTimes

REQUESTS = 2000
"""That are played; the first tenth is not counted, since the server was empty."""
MOST_SERVERS = 10_000


@dataclass(frozen=True)
class Load:
    """What is asked.

    Attributes:
        rate: requests per second, at times that are independent of each other and of the servers (Poisson).
        lengths: (prompt tokens, answer tokens) of requests, each as likely as the others.
        most: answers that one server decodes at once; others wait.
    """

    rate: float
    lengths: Sequence[tuple[int, int]]
    most: int


@dataclass(frozen=True)
class Drafting:
    """How many drafts are made, and how many are accepted.

    Attributes:
        steps_from: from how many answers at once on how many drafts, K; {1: 0} is a server without a head.
        rates: [K], marginal: that at least 1, 2, .. drafts of a step are accepted.
    """

    steps_from: Mapping[int, int]
    rates: Sequence[float]

    def steps_at(self, size: int) -> int:
        return self.steps_from[max(start for start in self.steps_from if start <= size)]

    def seconds(self, size: int, times: StepTimes) -> float:
        """Of a step; one without drafts is slower beside a head."""
        return times.seconds(self.steps_at(size), size, paused=any(self.steps_from.values()))


@dataclass(frozen=True)
class Service:
    """What users see of one server; seconds are the mean over requests, and their 50th and 95th percentile."""

    tokens_per_second: float
    at_once: float
    """Answers that are decoded at once, mean over time in steps."""
    first_token: tuple[float, float, float]
    answer: tuple[float, float, float]
    """From the request to its last token."""


def capacity(load: Load, drafting: Drafting, times: StepTimes) -> float:
    """Requests per second that one server can answer at the most: while `load.most` are decoded at once."""
    K = drafting.steps_at(load.most)
    tokens_per_step = load.most * (1 + sum(drafting.rates[:K]))
    seconds_per_token = drafting.seconds(load.most, times) / tokens_per_step
    seconds = [times.prompt_seconds(prompt) + (answer - 1) * seconds_per_token for prompt, answer in load.lengths]
    return len(seconds) / sum(seconds)


def play(load: Load, drafting: Drafting, times: StepTimes, seed: int = 0) -> Service:
    """One server under a load that it keeps up with; `seed` is of arrivals, lengths and acceptance."""
    generator = random.Random(seed)
    asked: list[float] = []
    lengths: list[tuple[int, int]] = []
    for _ in range(REQUESTS):
        asked.append((asked[-1] if asked else 0.0) + generator.expovariate(load.rate))
        lengths.append(generator.choice(load.lengths))

    # Of each number of answers at once: K's rates, and what a step takes.
    step_of: dict[int, tuple[Sequence[float], float]] = {}
    # Seconds: the clock, all steps together, and those times the answers in them.
    now, decoding, weighted = 0.0, 0.0, 0.0
    first = [0.0] * REQUESTS
    done = [0.0] * REQUESTS
    left: dict[int, int] = {}
    """Request → tokens that it still gets."""
    begun = 0
    while begun < REQUESTS or left:
        # An idle server waits for the next request.
        if not left:
            now = max(now, asked[begun])
        # Prompts of those that were asked meanwhile.
        while begun < REQUESTS and asked[begun] <= now and len(left) < load.most:
            prompt, answer = lengths[begun]
            now += times.prompt_seconds(prompt)
            first[begun] = done[begun] = now
            if answer > 1:
                left[begun] = answer - 1
            begun += 1
        if not left:
            continue
        # One step for all answers.
        size = len(left)
        if size not in step_of:
            step_of[size] = drafting.rates[: drafting.steps_at(size)], drafting.seconds(size, times)
        rates, seconds = step_of[size]
        now += seconds
        decoding += seconds
        weighted += seconds * size
        for request in list(left):
            draw = generator.random()
            left[request] -= 1 + sum(draw < rate for rate in rates)
            if left[request] <= 0:
                done[request] = now
                del left[request]

    counted = range(REQUESTS // 10, REQUESTS)
    way = times.on_the_way / 1000
    return Service(
        tokens_per_second=sum(answer for _, answer in lengths) / now,
        at_once=weighted / decoding if decoding else 0.0,
        first_token=_spread([way + first[i] - asked[i] for i in counted]),
        answer=_spread([way + done[i] - asked[i] for i in counted]),
    )


def servers_needed(load: Load, drafting: Drafting, times: StepTimes, within: float | None) -> int | None:
    """How many servers answer `load.rate` together, requests spread at random; None where no number does.

    Args:
        within: seconds in which 95 % of the answers must be whole; None: they must keep up.
    """
    # A server at its limit lets requests wait ever longer.
    fewest = ceil(load.rate / (0.95 * capacity(load, drafting, times)))
    if within is None:
        return fewest

    def fast_enough(servers: int) -> bool:
        return play(_share(load, servers), drafting, times).answer[2] <= within

    most = fewest
    while not fast_enough(most):
        most *= 2
        if most > MOST_SERVERS * fewest:
            return None
    low, high = max(fewest - 1, most // 2), most
    while high - low > 1:
        middle = (low + high) // 2
        if fast_enough(middle):
            high = middle
        else:
            low = middle
    return high


@dataclass(frozen=True)
class Offer:
    """A way to serve a load: how many servers it takes, and what users of each see.

    `servers` is None where no number of them is fast enough.
    """

    rate: float
    """Requests per second, of all servers together."""
    name: str
    """`no head`, `K=1`, .. or `by load`."""
    servers: int | None
    service: Service | None


def offers(
    rates: Sequence[float],
    lengths: Sequence[tuple[int, int]],
    ways: Mapping[str, Drafting],
    times: StepTimes,
    most: int,
    within: float | None,
) -> list[Offer]:
    """Every way to serve every rate; arguments as those of `Load` and `servers_needed`."""
    made = []
    for rate in rates:
        load = Load(rate, lengths, most)
        for name, drafting in ways.items():
            servers = servers_needed(load, drafting, times, within)
            service = play(_share(load, servers), drafting, times) if servers else None
            made.append(Offer(rate, name, servers, service))
    return made


def offers_table(made: Sequence[Offer]) -> str:
    lines = []
    for offer in made:
        line = [f"{offer.rate:g}/s", offer.name]
        if offer.service is None:
            lines.append([*line, "not so fast", "", "", "", ""])
            continue
        service = offer.service
        first = f"{service.first_token[1]:.3g}, {service.first_token[2]:.3g}"
        answer = f"{service.answer[1]:.3g}, {service.answer[2]:.3g}"
        speed = f"{service.tokens_per_second:.1f}"
        lines.append([*line, str(offer.servers), speed, f"{service.at_once:.1f}", first, answer])
    header = ["requests", "drafts", "servers", "token/s each", "at once", "first token, s", "answer, s: 50, 95 %"]
    return terminal_table(header, lines, num_text=2)


def _share(load: Load, servers: int) -> Load:
    return Load(load.rate / servers, load.lengths, load.most)


def _spread(seconds: list[float]) -> tuple[float, float, float]:
    ordered = sorted(seconds)
    return sum(ordered) / len(ordered), ordered[len(ordered) // 2], ordered[int(0.95 * len(ordered))]
