"""Families other than MiMo behind whole SGLang servers: those whose attention a CPU server has.

Random models say nothing that a draft could learn but by heart, so the head is trained on the very answers.
"""

import pytest
import torch
from helpers.engine import Server
from helpers.learning import learned, log_probabilities
from helpers.models import CHECKPOINTS, SERVED

from swift_fastmtp.checkpoint.config_file import read_config
from swift_fastmtp.serving.flags import command
from swift_fastmtp.serving.launch import serve_flags
from swift_fastmtp.simulate.acceptance import draft_rounds

pytestmark = pytest.mark.engine

TOKENS, STEPS = 24, 3
PROMPTS = ["Write a haiku.", "什么是函数？", "def main():", "Why is the sky blue?"]


@pytest.mark.matrix
@pytest.mark.parametrize("name", SERVED)
def test_lossless_and_as_the_simulator_said(name, tmp_path, shown):
    base = CHECKPOINTS[name](tmp_path / "base")
    model, texts = learned(base, tmp_path, PROMPTS, TOKENS, 20, chat_template=None, num_speculative_steps=STEPS)
    rounds = draft_rounds(model, texts, 0, 4)[STEPS - 1]
    words = command(serve_flags(tmp_path / "full", num_steps=STEPS))
    if model.family.recurrent_backbone:  # SGLang's prefix cache would lend their drafts a row of another text
        words.append("--disable-radix-cache")
    with Server(words, tmp_path / "log") as server:
        records = server.generate([t.ids[: t.start] for t in texts], TOKENS, return_logprob=True)
    for record, text, want in zip(records, texts, rounds, strict=True):
        assert record["output_ids"] == text.ids[text.start : text.end]
        # A wrong state of a layer may leave the text as it was.
        served = torch.tensor([value for value, *_ in record["meta_info"]["output_token_logprobs"]])
        torch.testing.assert_close(log_probabilities(model, text), served, atol=2e-5, rtol=0)
        assert record["meta_info"]["spec_verify_ct"] == len(want)
        assert record["meta_info"]["spec_correct_drafts_histogram"] == torch.bincount(torch.tensor(want)).tolist()
    assert {0, STEPS} <= {accepted for answer in rounds for accepted in answer}
    shown("server", read_config(base)["architectures"])
