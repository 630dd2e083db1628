"""Questions to whole engines of the quantized tiny model, and how many rounds the simulator has for their answers."""

import torch

from helpers.paths import ROOT, TINY
from swift_fastmtp.data.chat_template import encode_prompt, load_tokenizer
from swift_fastmtp.files.rows import read_rows
from swift_fastmtp.method.config import FastMTPConfig
from swift_fastmtp.model.loading import load_model
from swift_fastmtp.simulate.acceptance import Text, draft_rounds

STEPS = 3


def tiny_model(engine="sglang"):
    """The tiny model in float32, which drafts `STEPS` tokens in an engine's graph."""
    model = load_model(TINY, torch.float32)
    model.fastmtp = FastMTPConfig(num_speculative_steps=STEPS, engine=engine)
    return model


def asked():
    tokenizer = load_tokenizer(str(TINY))
    rows = read_rows(ROOT / "examples" / "prompts" / "eval.jsonl", 12)
    return [encode_prompt(tokenizer, row["messages"], None, None) for row in rows]


def simulated_rounds(numbers, prompts, answers, engine):
    """How many rounds the simulator has for texts of a quantized tiny model, whose tensors stand for `numbers`."""
    model = tiny_model(engine)
    model.load_state_dict({name: tensor.float() for name, tensor in numbers.items()}, strict=False)
    texts = [
        Text(prompt + ids, len(prompt), len(prompt) + len(ids)) for prompt, ids in zip(prompts, answers, strict=True)
    ]
    return sum(map(len, draft_rounds(model, texts, 0, 8)[STEPS - 1]))
