"""`fastmtp bench` above temperature 0, of the real vLLM: acceptance in each regime follows from the answers given."""

import pytest
import torch
from helpers.engine import VLLMServer
from helpers.paths import ROOT, TINY
from helpers.sampled_bench import STEPS, ask, foretold, interval, tau, texts_of
from transformers import AutoTokenizer

from swift_fastmtp.model.loading import load_model
from swift_fastmtp.serving.flags import command
from swift_fastmtp.serving.launch import serve_flags

pytestmark = pytest.mark.matrix

QUESTIONS = ROOT / "examples/prompts/eval.jsonl"
TEMPERATURE, TOKENS = 1.0, 48
SEEDED = ["--no-enable-chunked-prefill", "--max-num-batched-tokens", "8192"]
TELLS = ["--per-request-spec-decode-metrics", "summary"]


@pytest.mark.parametrize("regime", ["greedy", "rejection"])
def test_a_benchmark_measures_what_its_answers_foretell(regime, tmp_path):
    flags = serve_flags(TINY, "vllm", STEPS, temperature=TEMPERATURE, regime=regime)
    fixed = {"PYTHONPATH": str(ROOT / "tests/helpers/vllm_fix")}
    with VLLMServer([*command(flags), *SEEDED, *TELLS], tmp_path / "log", fixed) as server:
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
