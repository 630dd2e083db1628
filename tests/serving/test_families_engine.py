"""Families other than MiMo behind whole SGLang servers: those whose attention a CPU server has.

Random models say nothing that a draft could learn but by heart, so the head is trained on the very answers.
"""

import pytest
import torch
from helpers.engine import Server
from helpers.learning import learn, log_probabilities
from helpers.models import CHECKPOINTS, SERVED
from helpers.paths import TINY
from transformers import AutoTokenizer

from swift_fastmtp.checkpoint.checkpoint import Checkpoint
from swift_fastmtp.checkpoint.config_file import read_config
from swift_fastmtp.checkpoint.mtp_tensors import read_head
from swift_fastmtp.export.folders import export_full
from swift_fastmtp.method.config import FastMTPConfig
from swift_fastmtp.model.loading import head_shapes, load_head, load_model
from swift_fastmtp.serving.launch import command, serve_flags
from swift_fastmtp.simulate.acceptance import draft_rounds, make_texts
from swift_fastmtp.swift_plugin.tuner import FastMTPTuner

pytestmark = pytest.mark.engine

TOKENS, STEPS = 24, 3
PROMPTS = ["Write a haiku.", "什么是函数？", "def main():", "Why is the sky blue?"]


@pytest.mark.matrix
@pytest.mark.parametrize("name", SERVED)
def test_lossless_and_as_the_simulator_said(name, tmp_path, shown):
    base = CHECKPOINTS[name](tmp_path / "base")
    model, tokenizer = load_model(base, torch.float32), AutoTokenizer.from_pretrained(TINY)
    # The default loss learns the model's own distribution, which is nearly flat here: no draft would be accepted.
    model.fastmtp, model.model_dir = FastMTPConfig(num_speculative_steps=STEPS, loss="ce"), base
    rows = [{"messages": [{"role": "user", "content": text}]} for text in PROMPTS]
    texts = make_texts(model, tokenizer, rows, TOKENS, "generate", 4)
    learn(model, texts)
    FastMTPTuner.save_pretrained(model, str(tmp_path / "checkpoint"))
    export_full(tmp_path / "checkpoint", tmp_path / "full")
    load_head(
        model, read_head(Checkpoint(tmp_path / "full"), model.family, head_shapes(Checkpoint(base)))
    )  # as served: in bfloat16
    rounds = draft_rounds(model, texts, tokenizer.pad_token_id, 4)[STEPS - 1]
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
