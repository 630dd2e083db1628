"""The real engine: stock SGLang serves what we train, and does what the simulator said it would.

Greedy text with speculation equals greedy text without, token by token; SGLang's own acceptance counts equal the
simulator's, number by number, for every prompt of an English + Chinese + code set, in fp32.
"""

import json
from pathlib import Path

import pytest
import torch
from helpers.engine import TRIED, UNTRIED, Server, engine_version
from helpers.paths import ROOT, TINY
from helpers.swift_runs import sft_args, swift
from transformers import AutoTokenizer

from swift_fastmtp.checkpoint.checkpoint import Checkpoint
from swift_fastmtp.checkpoint.mtp_tensors import read_head
from swift_fastmtp.data.distill import distill
from swift_fastmtp.export.folders import export_draft, export_full
from swift_fastmtp.method.config import FastMTPConfig
from swift_fastmtp.method.token_map import read_token_map
from swift_fastmtp.model.loading import head_shapes, load_head, load_model
from swift_fastmtp.serving.flags import command
from swift_fastmtp.serving.launch import serve_flags
from swift_fastmtp.simulate.acceptance import draft_rounds, make_texts

pytestmark = pytest.mark.engine

TOKENS = 40
MAX_STEPS = 5


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return tmp_path_factory.mktemp("serving")


@pytest.fixture(scope="module")
def texts():
    """Greedy texts of 18 prompts, six of each kind, by transformers; with the simulator's model and tokenizer."""
    rows = [json.loads(line) for line in (ROOT / "examples/prompts/eval.jsonl").read_text().splitlines()]
    chosen = [r for c in ("en", "zh", "code") for r in [r for r in rows if r["category"] == c][:6]]
    model, tokenizer = load_model(TINY, torch.float32), AutoTokenizer.from_pretrained(TINY)
    model.fastmtp = FastMTPConfig(num_speculative_steps=MAX_STEPS)
    return make_texts(model, tokenizer, chosen, TOKENS, "generate", 8), model, tokenizer


@pytest.fixture(scope="module")
def token_map(work, texts):
    """Every second id, and what makes answers end: a map that costs acceptance without being useless."""
    path = work / "map.pt"
    torch.save(list(range(0, 6144, 2)), path)
    return path


@pytest.fixture(scope="module")
def heads(work):
    """Folders to serve, by name; the trained ones come from a real `swift sft` run on distilled answers."""
    prompts, rows = work / "prompts.jsonl", work / "distilled.jsonl"
    prompts.write_text("\n".join((ROOT / "examples/prompts/train.jsonl").read_text().splitlines()[::4]))
    distill(str(TINY), str(prompts), str(rows), max_new_tokens=48, batch_size=208)
    common = {"max_steps": 30, "save_steps": 30, "learning_rate": "5e-4", "per_device_train_batch_size": 8}
    swift(*sft_args(TINY, rows, work / "fastmtp", **common))
    swift("export", "--adapters", work / "fastmtp/checkpoint-30", "--output_dir", work / "full")
    export_draft(work / "fastmtp/checkpoint-30", work / "draft")
    export_full(work / "fastmtp/checkpoint-30", work / "no_remote_code", remote_code=False)
    return {
        "full": work / "full",
        "checkpoint": work / "fastmtp/checkpoint-30",
        "draft": work / "draft",
        "no_remote_code": work / "no_remote_code",
    }


@pytest.fixture(scope="module")
def plain(texts, work):
    """Greedy answers of SGLang without speculation."""
    base = ["python", "-m", "sglang.launch_server", "--model-path", str(TINY), "--trust-remote-code"]
    with Server(base, work / "plain.log") as server:
        return [r["output_ids"] for r in server.generate([t.ids[: t.start] for t in texts[0]], TOKENS)]


def test_the_stand_in_was_tried_with_this_version():
    version = engine_version()
    assert version in TRIED, UNTRIED.format(version=version, tried=", ".join(TRIED))


def test_sglang_and_transformers_write_the_same_text(plain, texts):
    assert plain == [t.ids[t.start : t.end] for t in texts[0]]


# The base's own head is served in test_bench_engine.py.
CASES = [
    ("draft", 3, True),
    pytest.param("checkpoint", 3, False, marks=pytest.mark.matrix),
    pytest.param("full", 2, True, marks=pytest.mark.matrix),
    pytest.param("no_remote_code", 5, False, marks=pytest.mark.matrix),
]


@pytest.mark.parametrize(("name", "steps", "mapped"), CASES)
def test_lossless_and_as_the_simulator_said(name, steps, mapped, heads, texts, token_map, plain, work, shown):
    rows, model, tokenizer = texts
    folder = Path(heads[name])
    ids = read_token_map(token_map, model.config.vocab_size) if mapped else None
    load_head(model, read_head(Checkpoint(folder), model.family, head_shapes(Checkpoint(TINY))))
    rounds = draft_rounds(model, rows, tokenizer.pad_token_id, 8, ids)
    flags = serve_flags(folder, num_steps=steps, token_map=str(token_map) if mapped else None, model=str(TINY))
    with Server(command(flags), work / f"{name}-{steps}.log") as server:
        records = server.generate([t.ids[: t.start] for t in rows], TOKENS)
        temperature_zero_is_all_the_cpu_engine_can_show(server, rows[0].ids[: rows[0].start])
    accepted = 0
    for record, want_ids, want in zip(records, plain, rounds[steps - 1], strict=True):
        assert record["output_ids"] == want_ids
        histogram = torch.bincount(torch.tensor(want)).tolist()
        assert record["meta_info"]["spec_verify_ct"] == len(want)
        assert record["meta_info"]["spec_correct_drafts_histogram"] == histogram
        accepted += sum(want)
    assert accepted > len(rows)  # drafts are really accepted: the equality above is not that of zeros
    shown("server", model.config.architectures)


def temperature_zero_is_all_the_cpu_engine_can_show(server, prompt):
    """On CPU SGLang verifies greedily whatever the temperature; from the second token on, the text is greedy."""
    (record,) = server.generate([prompt], TOKENS, temperature=1.0)
    (rest,) = server.generate([[*prompt, record["output_ids"][0]]], TOKENS - 1)
    assert record["output_ids"][1 : TOKENS - 2] == rest["output_ids"][: TOKENS - 3]
