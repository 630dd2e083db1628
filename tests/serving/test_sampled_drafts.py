"""SGLang with sampled drafts above temperature 0, inside a token map of ours: what it writes, and how much it accepts.

A real server on a CPU whose verification takes the branch of GPUs (`tests/helpers/sglang_sampled`): the drafts, what
they are drawn from and their verification are SGLang's own code, its kernel in Triton's interpreter. Stock SGLang
refuses a map with sampled drafts; the plugin's keeps the whole vocabulary. Thousands of answers of five tokens, at
top_k 2, are counted by outcome and compared with the exact probabilities that transformers gives; and the drafts
accepted in the first round with what `fastmtp simulate` computes.
"""

from collections import Counter

import pytest
import torch
from helpers.checkpoints import cut_vocabulary
from helpers.engine import SampledServer, Server
from helpers.outcomes import (
    CRITICAL,
    PROMPT,
    STEPS,
    TOKENS,
    TOP_K,
    TOP_P,
    VOCAB,
    chi_square,
    deviations,
    first_round,
    outcomes,
)
from helpers.paths import TINY

from swift_fastmtp.method.verification import REJECTION
from swift_fastmtp.model.loading import load_model
from swift_fastmtp.serving.flags import command
from swift_fastmtp.serving.launch import serve_flags

pytestmark = pytest.mark.matrix

TEMPERATURE = 0.7
ANSWERS = 1000
SIGMAS = 4
MAP = list(range(0, VOCAB, 3)) + list(range(1, VOCAB, 3))
# Regime -> the token map that is served with it.
SERVED = {"rejection": True, "block": False}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return cut_vocabulary(tmp_path_factory.mktemp("sampling") / "model", VOCAB)


@pytest.fixture(scope="module")
def model(folder):
    return load_model(folder, torch.float32)


@pytest.fixture(scope="module", params=SERVED)
def served(request, folder, installed, tmp_path_factory):
    """A regime, the ids of its map, its answers, and how many of as many first rounds accepted k drafts or more."""
    regime, work = request.param, tmp_path_factory.mktemp(request.param)
    token_map = work / "map.pt"
    torch.save(MAP, token_map)
    named = {"token_map": str(token_map)} if SERVED[regime] else {}
    flags = serve_flags(folder, num_steps=STEPS, temperature=TEMPERATURE, regime="rejection", **named)
    environment = {"PYTHONPATH": str(installed[1])}
    if SERVED[regime]:
        name, _, value = flags.pop(0).words[1].partition("=")
        environment[name] = value
    words = [*command(flags), "--skip-tokenizer-init"]
    with SampledServer(words, work, environment, block=regime == "block") as server:
        answers = sample(server, TOKENS)
        rounds = sample(server, 2)  # the prompt's own token, and one round
    accepted = [len(r["meta_info"]["spec_correct_drafts_histogram"]) - 1 for r in rounds]
    assert all(r["meta_info"]["spec_verify_ct"] == 1 for r in rounds)
    at_least = [sum(n >= k for n in accepted) for k in range(1, STEPS + 1)]
    return regime, MAP if SERVED[regime] else None, answers, at_least


def sample(server, tokens):
    sampling = {"temperature": TEMPERATURE, "max_new_tokens": tokens, "top_k": TOP_K, "top_p": TOP_P}
    body = {"sampling_params": {**sampling, "ignore_eos": True}}
    return server.generate([PROMPT] * ANSWERS, tokens, **body)


def test_answers_have_the_models_distribution(served, model):
    _, _, answers, _ = served
    counts = Counter(tuple(record["output_ids"]) for record in answers)
    probabilities = outcomes(model, TEMPERATURE)
    assert sum(counts.values()) == ANSWERS and counts.keys() <= probabilities.keys()
    assert chi_square(counts, probabilities) < CRITICAL


def test_drafts_are_accepted_as_often_as_the_simulator_says(served, model):
    regime, ids, _, at_least = served
    token_map = None if ids is None else torch.tensor(sorted(ids))
    rates = first_round(model, TEMPERATURE, regime, "sglang", token_map)
    assert rates[0] > 0.2 and rates[-1] * ANSWERS > 30
    assert deviations(at_least, ANSWERS, rates).abs().max() < SIGMAS
    # Had the map no effect, or were drafts greedy, it would be noticed.
    wrong = first_round(model, TEMPERATURE, "greedy" if ids is None else regime, "sglang")
    assert deviations(at_least, ANSWERS, wrong).abs().max() > 1.5 * SIGMAS


def test_stock_sglang_refuses_a_map_with_sampled_drafts(tmp_path):
    torch.save(list(range(0, 6144, 2)), tmp_path / "map.pt")
    flags = [*command(serve_flags(TINY, num_steps=STEPS, token_map=str(tmp_path / "map.pt"))), *REJECTION.sglang]
    with pytest.raises(AssertionError, match=r"the draft vocab \(3072\) != target vocab"):
        Server(flags, tmp_path / "log").__enter__()
