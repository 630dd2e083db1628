"""Drafts by load: both engines take the schedule that `fastmtp simulate --costs` writes, and draft as it says.

Requests one at a time get the K of a batch of one, many at once get none, and the text is the same. Others are being
written already when these many are sent: they may arrive one by one.
"""

from concurrent.futures import ThreadPoolExecutor

import pytest
from helpers.engine import Server, VLLMServer
from helpers.paths import ROOT, TINY
from helpers.served_texts import STEPS, tiny_model

from swift_fastmtp.data.chat_template import load_tokenizer
from swift_fastmtp.files.rows import read_rows
from swift_fastmtp.files.staging import write_json
from swift_fastmtp.method.config import FastMTPConfig
from swift_fastmtp.serving.flags import command
from swift_fastmtp.serving.launch import serve_flags
from swift_fastmtp.simulate.acceptance import draft_rounds, make_texts
from swift_fastmtp.simulate.schedule import Depth, schedule

pytestmark = pytest.mark.matrix

TOKENS, MANY = 32, 6
LONG = 900
DEPTHS = [Depth(1, STEPS, []), Depth(2, 1, []), Depth(4, 0, []), Depth(8, 0, [])]


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def texts(model):
    """Greedy answers, all of the same length, by transformers."""
    rows = read_rows(ROOT / "examples/prompts/eval.jsonl", 60)
    made = make_texts(model, load_tokenizer(str(TINY)), rows, TOKENS, "generate", 16)
    long = [text for text in made if text.end - text.start >= TOKENS]
    assert len(long) >= MANY
    return long[:MANY]


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("schedule") / "adaptive.json"
    write_json(schedule(DEPTHS), path)
    return path


def test_sglang_drafts_by_load(model, texts, file, tmp_path):
    prompts, answers = [t.ids[: t.start] for t in texts], [t.ids[t.start : t.end][:TOKENS] for t in texts]
    expected = draft_rounds(model, texts, 0, 8)[STEPS - 1]
    flags = command(serve_flags(TINY, "sglang", schedule=str(file)))
    with Server([*flags, "--disable-cuda-graph"], tmp_path / "server.log") as server:  # it would capture one per K
        alone = [server.generate([prompt], TOKENS)[0] for prompt in prompts]
        with server.busy(str(TINY), prompts, LONG):
            together = server.generate(prompts, TOKENS)
    assert [a["output_ids"] for a in alone] == answers
    assert [a["output_ids"] for a in together] == answers
    # Alone: K = 3, round for round as simulated. Many at once: no drafts, a round for each token but the first.
    assert [a["meta_info"]["spec_verify_ct"] for a in alone] == [len(rounds) for rounds in expected]
    assert [a["meta_info"]["spec_verify_ct"] for a in together] == [TOKENS - 1] * MANY


def test_vllm_drafts_by_load(model, texts, file, tmp_path):
    model.fastmtp = FastMTPConfig(num_speculative_steps=STEPS, engine="vllm")
    expected = draft_rounds(model, texts, 0, 8)[STEPS - 1]
    flags = command(serve_flags(TINY, "vllm", schedule=str(file)))
    tells = ["--per-request-spec-decode-metrics", "detailed"]
    with VLLMServer([*flags, *tells], tmp_path / "server.log") as server:

        def ask(text):
            return server.complete(str(TINY), text.ids[: text.start], TOKENS)

        alone = [ask(text) for text in texts]
        prompts = [text.ids[: text.start] for text in texts]
        with server.busy(str(TINY), prompts, LONG), ThreadPoolExecutor(MANY) as pool:
            together = list(pool.map(ask, texts))
    answers = [t.ids[t.start : t.end][:TOKENS] for t in texts]
    assert [ids for ids, _ in alone] == answers
    assert [ids for ids, _ in together] == answers
    # vLLM tells only rounds that had drafts.
    assert [len(rounds) for _, rounds in alone] == [len(rounds) for rounds in expected]
    assert not any(rounds for _, rounds in together)
