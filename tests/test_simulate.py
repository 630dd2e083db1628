"""Generation and the simulator, on the trained tiny model."""

import json

import pytest
import torch
from conftest import ROOT, TINY
from reference import speculative_greedy
from transformers import AutoTokenizer

from swift_fastmtp.config import FastMTPConfig
from swift_fastmtp.data.conversation import encode_prompt
from swift_fastmtp.data.distill import distill
from swift_fastmtp.data.generate import end_token_ids, generate
from swift_fastmtp.data.rows import read_rows
from swift_fastmtp.evaluation.metrics import micro_tau
from swift_fastmtp.evaluation.simulate import draft_rounds, make_texts, simulate
from swift_fastmtp.modeling import load_model

PROMPTS = ROOT / "examples" / "prompts" / "eval.jsonl"


@pytest.fixture(scope="module")
def tiny():
    return load_model(TINY, torch.float32), AutoTokenizer.from_pretrained(TINY)


@pytest.fixture
def few(tmp_path):
    """Six prompts: two of each kind."""
    rows = [json.loads(line) for line in PROMPTS.read_text().splitlines()]
    chosen = [r for c in ("en", "zh", "code") for r in [r for r in rows if r["category"] == c][:2]]
    path = tmp_path / "few.jsonl"
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in chosen))
    return path


def test_simulated_rounds_are_those_of_real_speculative_decoding(tiny, few):
    """Teacher-forced matches walked as rounds = drafting on own tokens and verifying, round by round."""
    model, tokenizer = tiny
    model.fastmtp = FastMTPConfig(num_speculative_steps=4)
    ends = end_token_ids(model, tokenizer)
    texts = make_texts(model, tokenizer, read_rows(few), 24, "generate", 4)
    half = torch.arange(0, 6144, 2)
    accepted = []
    for token_map in (None, half):
        _, rounds = draft_rounds(model, texts, tokenizer.pad_token_id, 4, token_map)
        for i, text in enumerate(texts):
            for steps in (1, 4):
                with torch.no_grad():
                    tokens, want = speculative_greedy(model, text.ids[: text.start], steps, 24, ends, token_map)
                assert tokens == text.ids[text.start : text.end]  # lossless
                assert rounds[steps - 1][i] == want
        accepted.append(sum(map(sum, rounds[-1])))
    assert accepted[0] > accepted[1] > 0  # drafts were really accepted, and the map costs some


def test_batched_generation_equals_one_by_one(tiny, few):
    model, tokenizer = tiny
    prompts = [encode_prompt(tokenizer, r["messages"]) for r in read_rows(few)]
    assert generate(model, tokenizer, prompts, 16) == [generate(model, tokenizer, [p], 16)[0] for p in prompts]


def test_simulate_writes_table_json_and_plot(few, tmp_path, capsys):
    (result,) = simulate(str(TINY), [], str(few), output_dir=str(tmp_path / "out"), num_steps=3, max_new_tokens=24)
    printed = capsys.readouterr().out
    assert "tau K=3" in printed and "marginal" in printed and "conditional" in printed
    record = json.loads((tmp_path / "out" / "simulate.json").read_text())
    assert record["heads"][0]["tau_micro"] == result.tau_micro
    assert {"command", "git_revision", "torch", "hardware"} <= set(record["provenance"])
    assert (tmp_path / "out" / "simulate.png").read_bytes()[:4] == b"\x89PNG"
    assert result.tau_micro == sorted(result.tau_micro) and result.tau_micro[0] > 1.2
    rounds = [[k] * n for k, n in enumerate(result.histogram)]
    assert micro_tau(rounds) == pytest.approx(result.tau_micro[-1])


def test_given_answers_are_taken_as_they_are(few, tmp_path):
    distill(str(TINY), str(few), str(tmp_path / "d.jsonl"), max_new_tokens=24, temperature=0)
    (given,) = simulate(str(TINY), [], str(tmp_path / "d.jsonl"), answers="given")
    (generated,) = simulate(str(TINY), [], str(few), max_new_tokens=24)
    assert given.marginal == generated.marginal and given.conditional == generated.conditional
    # What would have followed a given answer is not known, so drafts past its end never count.
    assert all(a <= b for a, b in zip(given.tau_micro, generated.tau_micro, strict=True))
