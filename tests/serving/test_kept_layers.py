"""A model that stock ms-swift tuned and that kept its MTP layer drafts behind stock SGLang and stock vLLM.

How many drafts are accepted tells that the layer was loaded: one of random values gets none.
"""

import pytest
import torch
from helpers.engine import Server, VLLMServer
from helpers.keep import assert_kept, stock_args, stock_mimo
from helpers.swift_runs import swift
from transformers import AutoModelForCausalLM, AutoTokenizer

from swift_fastmtp.serving.flags import command
from swift_fastmtp.serving.launch import serve_flags

pytestmark = pytest.mark.matrix

TOKENS, STEPS = 32, 3
PROMPTS = ["Write a haiku.", "什么是函数？", "def main():", "Why is the sky blue?"]


@pytest.fixture(scope="module")
def kept(rows, tmp_path_factory):
    """Tuned for two small steps."""
    work = tmp_path_factory.mktemp("kept")
    base, run = stock_mimo(work / "base"), work / "run"
    swift(*stock_args("mimo", base, rows, run, max_steps=2, learning_rate="1e-4"))
    assert_kept(run / "checkpoint-2", base)
    return run / "checkpoint-2"


@pytest.fixture(scope="module")
def texts(kept):
    """Prompts and the model's greedy answers, as token ids, by transformers."""
    tokenizer = AutoTokenizer.from_pretrained(kept)
    model = AutoModelForCausalLM.from_pretrained(kept, dtype=torch.float32).eval()
    texts = []
    for prompt in PROMPTS:
        messages = [{"role": "user", "content": prompt}]
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
        answer = model.generate(torch.tensor([ids]), max_new_tokens=TOKENS, do_sample=False)[0, len(ids) :]
        texts.append((ids, answer.tolist()))
    return texts


def test_sglang(kept, texts, tmp_path):
    with Server(command(serve_flags(kept, num_steps=STEPS)), tmp_path / "log") as server:
        records = server.generate([ids for ids, _ in texts], TOKENS)
    assert [record["output_ids"] for record in records] == [answer for _, answer in texts]
    rounds = sum(record["meta_info"]["spec_verify_ct"] for record in records)
    tokens = sum(len(answer) for _, answer in texts)
    assert tokens / rounds > 2


def test_vllm(kept, texts, tmp_path):
    flags = serve_flags(kept, "vllm", STEPS)
    tells = ["--per-request-spec-decode-metrics", "detailed"]
    with VLLMServer([*command(flags), *tells], tmp_path / "log") as server:
        answers = [server.complete(str(kept), ids, TOKENS) for ids, _ in texts]
    assert [ids for ids, _ in answers] == [answer for _, answer in texts]
    accepted = [drafts for _, rounds in answers for drafts in rounds]
    assert sum(accepted) / len(accepted) > 1
