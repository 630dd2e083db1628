"""`fastmtp bench` above temperature 0, of the real vLLM: acceptance in each regime follows from the answers given, and
their distribution is that of a server without drafts."""

from contextlib import ExitStack

import pytest
import torch
from helpers.engine import VLLMServer
from helpers.paths import ROOT, TINY
from helpers.sampled_bench import STEPS, ask, foretold, interval, tau, texts_of
from transformers import AutoTokenizer

from swift_fastmtp.bench.bench import bench
from swift_fastmtp.bench.distribution import PROMPTS
from swift_fastmtp.bench.distribution import TOKENS as SAMPLED_TOKENS
from swift_fastmtp.model.loading import load_model
from swift_fastmtp.serving.flags import command
from swift_fastmtp.serving.launch import serve_flags

pytestmark = pytest.mark.matrix

QUESTIONS = ROOT / "examples/prompts/eval.jsonl"
TEMPERATURE, TOKENS, SAMPLES = 1.0, 48, 32
SEEDED = ["--no-enable-chunked-prefill", "--max-num-batched-tokens", "8192"]
TELLS = ["--per-request-spec-decode-metrics", "summary"]


FIXED = {"PYTHONPATH": str(ROOT / "tests/helpers/vllm_fix")}


def drafting(regime):
    return [*command(serve_flags(TINY, "vllm", STEPS, temperature=TEMPERATURE, regime=regime)), *SEEDED, *TELLS]


@pytest.fixture(scope="module")
def rejection(tmp_path_factory):
    """The address of a server that verifies by rejection sampling."""
    with VLLMServer(drafting("rejection"), tmp_path_factory.mktemp("rejection") / "log", FIXED) as server:
        yield f"http://127.0.0.1:{server.port}"


@pytest.mark.parametrize("regime", ["greedy", "rejection"])
def test_a_benchmark_measures_what_its_answers_foretell(regime, request, tmp_path):
    with ExitStack() as servers:
        if regime == "rejection":
            url = request.getfixturevalue("rejection")
        else:
            server = servers.enter_context(VLLMServer(drafting(regime), tmp_path / "log", FIXED))
            url = f"http://127.0.0.1:{server.port}"
        answers = ask(url, TINY, QUESTIONS, TEMPERATURE, TOKENS, tmp_path / "bench")
    served = [(accepted + rounds, rounds) for *_, accepted, rounds in answers]
    model, tokenizer = load_model(TINY, torch.float32), AutoTokenizer.from_pretrained(TINY)
    texts = texts_of(model, tokenizer, QUESTIONS, answers, TEMPERATURE)
    of_regimes = foretold(model, texts, "vllm", TEMPERATURE)
    low, high = interval(served, of_regimes[regime])
    widened = (high - low) / 2  # of a 95 % interval: twice as wide is level 1e-4
    assert low - widened < 0 < high + widened, (tau(served), tau(of_regimes[regime]))
    assert high - low < 0.2
    other = of_regimes["rejection" if regime == "greedy" else "greedy"]
    assert abs(tau(served) - tau(other)) > 0.2


def test_a_benchmark_tests_the_distribution_of_answers(rejection, tmp_path):
    """Of rejection sampling, beside a server without drafts; what so many answers tell: tests/test_distribution.py."""
    plain = drafting("rejection")
    for option in ("--speculative-config", TELLS[0]):
        place = plain.index(option)
        del plain[place : place + 2]
    with VLLMServer(plain, tmp_path / "plain.log", FIXED) as baseline:
        urls = [f"baseline=http://127.0.0.1:{baseline.port}", f"tuned={rejection}"]
        asked = {"model": str(TINY), "tasks": [f"questions={QUESTIONS}"], "num_questions": 3, "max_new_tokens": 16}
        asked |= {"temperatures": [TEMPERATURE], "concurrency": [32], "rounds": 1, "distribution_samples": SAMPLES}
        results = bench(str(tmp_path / "bench"), base_urls=urls, **asked)
    (one,) = results.distributions
    assert (one.server, one.prompts, one.samples, one.tokens) == ("tuned", PROMPTS, SAMPLES, SAMPLED_TOKENS)
    assert one.p > 1e-3, one
