"""What servers do besides answering one prompt: stock vLLM on a CPU with the tiny MiMo, in one situation after another.

In each the text is the model's own greedy one, and the drafts accepted in each round are those of the simulator with
vLLM's graph.
"""

import json
from contextlib import contextmanager

import pytest
import torch
from helpers.checkpoints import write_trained
from helpers.paths import ROOT, TINY
from helpers.swift_runs import sft_args, swift
from helpers.vllm_jobs import VLLMJobs
from transformers import AutoTokenizer

from swift_fastmtp.checkpoint.checkpoint import Checkpoint
from swift_fastmtp.checkpoint.mtp_tensors import read_head
from swift_fastmtp.export.folders import export_full
from swift_fastmtp.method.config import FastMTPConfig
from swift_fastmtp.model.loading import head_shapes, load_head, load_model
from swift_fastmtp.simulate.acceptance import draft_rounds, greedy_acceptance, make_texts

pytestmark = pytest.mark.matrix

TOKENS, MAX_STEPS = 32, 5
REMOTE = {"trust_remote_code": True}


@pytest.fixture(scope="module")
def vllm(tmp_path_factory):
    with VLLMJobs(tmp_path_factory.mktemp("vllm") / "log") as jobs:
        yield jobs


@pytest.fixture(scope="module")
def model():
    model = load_model(TINY, torch.float32)
    model.fastmtp = FastMTPConfig(num_speculative_steps=MAX_STEPS, engine="vllm")
    return model


@pytest.fixture(scope="module")
def rows():
    """32 prompts: English, Chinese and code in turn."""
    lines = (ROOT / "examples/prompts/eval.jsonl").read_text().splitlines()
    by_kind = {"en": [], "zh": [], "code": []}
    for row in map(json.loads, lines):
        by_kind[row["category"]].append(row)
    in_turn = []
    for three in zip(*by_kind.values(), strict=False):
        in_turn.extend(three)
    return in_turn[:32]


@pytest.fixture(scope="module")
def texts(model, rows):
    return make_texts(model, AutoTokenizer.from_pretrained(TINY), rows, TOKENS, "generate", 16)


@pytest.fixture(scope="module")
def long_texts(model, rows):
    """Answers to prompts of about 150 tokens, each of several questions."""
    questions = [row["messages"][0]["content"] for row in rows]
    long = []
    for start in range(0, 32, 4):
        content = "\n".join(questions[start:] + questions[:start])[:400]
        long.append({"messages": [{"role": "user", "content": content}]})
    return make_texts(model, AutoTokenizer.from_pretrained(TINY), long, TOKENS, "generate", 8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A full export of a trained head."""
    tmp_path = tmp_path_factory.mktemp("export")
    export_full(write_trained(tmp_path / "trained", added=0.001), tmp_path / "full")
    return tmp_path / "full"


def load(model, folder):
    load_head(model, read_head(Checkpoint(folder), model.family, head_shapes(Checkpoint(TINY))))


def prompts_of(texts):
    return [text.ids[: text.start] for text in texts]


def check(answers, texts, rounds):
    """The text of each answer is the model's own, and the drafts accepted in its rounds are the simulator's."""
    for answer, text, accepted in zip(answers, texts, rounds, strict=True):
        assert answer.ids == text.ids[text.start : text.end]
        assert answer.accepted == accepted
    assert sum(map(sum, rounds)) > len(texts)  # the equality above is not that of zeros


@pytest.mark.parametrize("steps", range(1, MAX_STEPS + 1))
def test_drafts_per_round(steps, vllm, model, texts, folder):
    load(model, folder)
    some = texts[:12]
    (answers,) = vllm.run(folder, [prompts_of(some)], TOKENS, steps, **REMOTE)
    check(answers, some, draft_rounds(model, some, 0, 16)[steps - 1])


def test_batches(vllm, model, texts, folder):
    """One prompt, 8, and 32 of which 12 run at once: later ones are read in beside answers that are under way."""
    load(model, folder)
    prompts, rounds = prompts_of(texts), draft_rounds(model, texts, 0, 16)[2]
    sizes = [1, 8, 32]
    batches = vllm.run(folder, [prompts[:n] for n in sizes], TOKENS, 3, max_num_seqs=12, **REMOTE)
    for answers, n in zip(batches, sizes, strict=True):
        check(answers, texts[:n], rounds[:n])


def test_without_remote_code(vllm, model, texts, tmp_path):
    some = texts[:12]
    export_full(write_trained(tmp_path / "trained", added=0.001), tmp_path / "plain", remote_code=False)
    load(model, tmp_path / "plain")
    (answers,) = vllm.run(tmp_path / "plain", [prompts_of(some)], TOKENS, 3)
    check(answers, some, draft_rounds(model, some, 0, 16)[2])


def test_trained_with_lora(vllm, model, texts, rows, tmp_path):
    some = texts[:12]
    data = tmp_path / "rows.jsonl"
    with open(data, "w", encoding="utf-8") as file:
        for row in rows[:8]:
            answered = [*row["messages"], {"role": "assistant", "content": "one two 计算 def return"}]
            file.write(json.dumps({"messages": answered, "finish_reason": "stop"}, ensure_ascii=False) + "\n")
    swift(*sft_args(TINY, data, tmp_path / "run", max_steps=2, tuner_type="lora", lora_rank=4))
    export_full(tmp_path / "run/checkpoint-2", tmp_path / "full")
    load(model, tmp_path / "full")
    rounds = draft_rounds(model, some, 0, 16)[2]
    load(model, TINY)
    assert rounds != draft_rounds(model, some, 0, 16)[2]  # another head than the base's
    (answers,) = vllm.run(tmp_path / "full", [prompts_of(some)], TOKENS, 3, **REMOTE)
    check(answers, some, rounds)


def test_prefix_cache(vllm, model, long_texts, folder):
    """Long prompts twice: the second time most of each comes from the cache, of the MTP layer's keys too."""
    load(model, folder)
    prompts, rounds = prompts_of(long_texts), draft_rounds(model, long_texts, 0, 8)[2]
    first, second = vllm.run(folder, [prompts, prompts], TOKENS, 3, enable_prefix_caching=True, block_size=32, **REMOTE)
    check(first, long_texts, rounds)
    check(second, long_texts, rounds)
    cached = sum(answer.cached for answer in second)
    assert cached > sum(map(len, prompts)) / 2


def test_chunked_prefill(vllm, model, long_texts, folder):
    """Prompts read in chunks. vLLM's drafter gives the last row of each chunk but the prompt's last the prompt's last
    token where it should give the next one (`prepare_next_token_ids_padded` of `v1/spec_decode/llm_base_proposer.py`;
    vLLM's older model runner, the one that it has for CPUs): the key that stays behind is another one."""
    load(model, folder)
    chunk = 16
    one_by_one = [[prompt] for prompt in prompts_of(long_texts)]
    options = {"max_num_batched_tokens": chunk, "max_num_seqs": 4, "enable_chunked_prefill": True}
    answers = [answer for (answer,) in vllm.run(folder, one_by_one, TOKENS, 3, **options, **REMOTE)]
    wrong = []
    for text in long_texts:
        with last_token_at_chunk_ends(model, text, chunk):
            (rounds,) = draft_rounds(model, [text], 0, 1)[2]
        wrong.append(rounds)
    check(answers, long_texts, wrong)
    assert wrong != draft_rounds(model, long_texts, 0, 8)[2]


@contextmanager
def last_token_at_chunk_ends(model, text, chunk):
    """Step 1 of the draft reads the prompt's last token at the last row of every chunk but the last."""
    rows = range(chunk - 1, text.start - 1, chunk)
    last = model.model.embed_tokens(torch.tensor(text.ids[text.start - 1])).detach()

    def change(_, arguments):
        hidden, embeds, *rest = arguments
        if embeds.shape[1] == len(text.ids):  # step 1; the others compute the answer's rows only
            embeds = embeds.clone()
            embeds[0, list(rows)] = last
        return hidden, embeds, *rest

    hook = model.head.register_forward_pre_hook(change)
    try:
        yield
    finally:
        hook.remove()


def test_drafts_by_batch_size(vllm, model, texts, folder):
    """K by the number of requests that are under way: 5 drafts up to two, 3 up to eight, none above.

    Rounds without drafts are not in vLLM's record, but the MTP layer has read their tokens all the same: drafts that
    begin late are those of a server that has drafted all along.
    """
    load(model, folder)
    speculative = {"num_speculative_tokens_per_batch_size": [[1, 2, 5], [3, 8, 3], [9, 32, 0]]}
    # Ten of which three are over early: with the second of them, the others are eight.
    by_length = sorted(texts, key=lambda text: text.end - text.start)
    chosen = [texts[:1], texts[:6], by_length[:3] + by_length[-7:]]
    late = by_length[1].end - by_length[1].start
    questions = [prompts_of(some) for some in chosen]
    alone, few, many = vllm.run(folder, questions, TOKENS, MAX_STEPS, speculative=speculative, **REMOTE)
    assert set(alone[0].drafted) == {5} and few[0].drafted[0] == 3 and not any(a.drafted for a in many[:3])
    started = [(alone, 0), (few, 0), (many[3:], late)]
    for (answers, start), some in zip(started, [*chosen[:2], chosen[2][3:]], strict=True):
        (accepted,) = greedy_acceptance(model, some, 0, 16)
        rounds = [rounds_of(table, start, answer.drafted) for table, answer in zip(accepted, answers, strict=True)]
        check(answers, some, rounds)
    for answer, text in zip(many, chosen[2], strict=True):
        assert answer.ids == text.ids[text.start : text.end]


def rounds_of(accepted_KA, start, drafted):
    """Drafts accepted in rounds of so many drafts each, the first of them behind answer token `start`."""
    rounds = []
    for number in drafted:
        accepted = int(accepted_KA[:number, start].cumprod(0).sum())
        rounds.append(accepted)
        start += accepted + 1
    assert start >= accepted_KA.shape[1] - 1  # up to the end of the answer
    return rounds
