"""Stock vLLM serves what we export, with its MTP layer drafting, and writes the model's own text.

Its rounds are the simulator's in vLLM's graph, and not in SGLang's: MiMo's draft gets the backbone's state before the
final norm there, in SGLang the one after it.
"""

import json

import pytest
from helpers.checkpoints import write_trained
from helpers.engine import VLLMServer
from helpers.paths import ROOT, TINY
from helpers.served_texts import STEPS, tiny_model
from transformers import AutoTokenizer

from swift_fastmtp.bench.bench import bench
from swift_fastmtp.checkpoint.checkpoint import Checkpoint
from swift_fastmtp.checkpoint.mtp_tensors import read_head
from swift_fastmtp.export.folders import export_draft, export_full
from swift_fastmtp.method.config import FastMTPConfig
from swift_fastmtp.model.loading import head_shapes, load_head
from swift_fastmtp.serving.flags import command
from swift_fastmtp.serving.launch import serve_flags
from swift_fastmtp.simulate.acceptance import draft_rounds, make_texts

pytestmark = pytest.mark.matrix

TOKENS = 40
TELLS = ["--per-request-spec-decode-metrics", "detailed"]


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def texts(model):
    """Greedy answers by transformers to 18 prompts, six of each kind."""
    rows = [json.loads(line) for line in (ROOT / "examples/prompts/eval.jsonl").read_text().splitlines()]
    chosen = [r for c in ("en", "zh", "code") for r in [r for r in rows if r["category"] == c][:6]]
    return make_texts(model, AutoTokenizer.from_pretrained(TINY), chosen, TOKENS, "generate", 8)


def rounds(model, folder, texts, engine):
    """Accepted drafts of each round, per text, in an engine's graph."""
    load_head(model, read_head(Checkpoint(folder), model.family, head_shapes(Checkpoint(TINY))))
    model.fastmtp = FastMTPConfig(num_speculative_steps=STEPS, engine=engine)
    return draft_rounds(model, texts, 0, 8)[STEPS - 1]


@pytest.mark.parametrize("kind", ["full", "draft"])
def test_lossless_and_by_its_own_graph(kind, model, texts, tmp_path):
    trained, folder = write_trained(tmp_path / "trained", added=0.001), tmp_path / kind
    (export_full if kind == "full" else export_draft)(trained, folder)
    flags = serve_flags(folder, "vllm", STEPS, model=str(TINY))
    served = flags[0].words[-1]
    with VLLMServer([*command(flags), *TELLS], tmp_path / "server.log") as server:
        answers = [server.complete(served, t.ids[: t.start], TOKENS) for t in texts]
        address = f"tuned=http://127.0.0.1:{server.port}"
        few = {"model": str(TINY), "num_questions": 4, "max_new_tokens": 16}
        (run,) = bench(str(tmp_path / "bench"), base_urls=[address], **few).runs
    assert [ids for ids, _ in answers] == [t.ids[t.start : t.end] for t in texts]
    counted = [accepted for _, accepted in answers]
    assert counted == rounds(model, folder, texts, "vllm")
    assert counted != rounds(model, folder, texts, "sglang")
    assert sum(map(sum, counted)) > len(texts)  # the equality above is not that of zeros
    # The benchmark reads the same counts.
    records = map(json.loads, (tmp_path / "bench/requests.jsonl").read_text().splitlines())
    told = [r["histogram"] for r in records if "counters" not in r and r["completion_tokens"] > 1]
    assert run.tau_macro is not None and run.histogram == [sum(column) for column in zip(*told, strict=True)]
