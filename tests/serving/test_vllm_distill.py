"""Self-distillation from the real vLLM while it drafts: its version is doubted, its answers are whole.

On a CPU vLLM 0.32.0 samples wrongly then. Its wheel does not say that it runs there, so the job goes on with a warning
(`swift_fastmtp/data/vllm_pages.py`); what it would become is in docs/dev/upstream/vllm-expand-kernel.md. Here the
engine is one with the fix (`helpers/vllm_fix`).
"""

import json

import pytest
from helpers.engine import VLLMServer
from helpers.paths import ROOT, TINY

from swift_fastmtp.data.distill import distill
from swift_fastmtp.serving.flags import command
from swift_fastmtp.serving.launch import serve_flags

pytestmark = pytest.mark.matrix

FIX = {"PYTHONPATH": str(ROOT / "tests/helpers/vllm_fix")}


def test_a_drafting_server_is_doubted_above_temperature_0(tmp_path, capfd):
    prompts = tmp_path / "prompts.jsonl"
    questions = ("Write a haiku.", "什么是函数？", "def main():", "Why is the sky blue?")
    rows = [{"messages": [{"role": "user", "content": question}]} for question in questions]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with VLLMServer(command(serve_flags(TINY, "vllm", 3)), tmp_path / "log", FIX) as server:
        url = f"http://127.0.0.1:{server.port}"
        for temperature in (0.6, 0.0):
            output = tmp_path / f"at {temperature}.jsonl"
            given = {"temperature": temperature, "max_new_tokens": 24, "retry_seconds": 5}
            assert distill(str(TINY), str(prompts), str(output), base_urls=[url], **given)
            assert len(output.read_text().splitlines()) == len(questions)
            shown = capfd.readouterr()
            doubt = f"{url}: vLLM 0.32.0 drafts; if it runs on a CPU, its answers are wrong or it stops ("
            assert (doubt in shown.out + shown.err) == (temperature > 0)
