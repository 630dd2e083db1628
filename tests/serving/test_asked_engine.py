"""Rows distilled from a real SGLang server are trained on the ids that the server says it saw and generated."""

import json
import urllib.request

import pytest
from helpers.chat_templates import with_template
from helpers.engine import Server
from helpers.tiers import some_now
from helpers.training_ids import TOOLS, supervised, trained

from swift_fastmtp.data.distill import distill
from swift_fastmtp.files.rows import read_rows

pytestmark = pytest.mark.engine

ROWS = {
    "thinking": [
        {"messages": [{"role": "user", "content": "What is a cell?"}]},
        {"messages": [{"role": "user", "content": "Hello."}], "chat_template_kwargs": {"enable_thinking": False}},
        {
            "messages": [
                {"role": "user", "content": "Name a color."},
                {"role": "assistant", "content": "x"},
                {"role": "user", "content": "Are you sure?"},
            ]
        },
    ],
    "calls": [
        {"tools": TOOLS, "messages": [{"role": "user", "content": "What is a cell?"}]},
        {
            # The conversation goes on behind a call that is the source's own: asked as history, arguments as a string.
            "tools": TOOLS,
            "messages": [
                {"role": "system", "content": ""},
                {"role": "user", "content": "What is a cell?"},
                {"role": "user", "content": "And what is water?"},
            ],
        },
    ],
}
FLAGS = {"thinking": ["--reasoning-parser", "qwen3"], "calls": ["--tool-call-parser", "qwen25"]}


def asked_and_answered(port, row):
    """What the server itself says of the same request: its prompt and its answer, as ids."""
    body = {"model": "x", "messages": row["messages"], "temperature": 0, "max_tokens": 24, "return_token_ids": True}
    body |= {key: row[key] for key in ("tools", "chat_template_kwargs") if key in row}
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as response:
        choice = json.load(response)["choices"][0]
    return choice["prompt_token_ids"], choice.get("response_token_ids") or choice["token_ids"]


@pytest.mark.parametrize("name", some_now(ROWS, ["thinking"]))
def test_trained_on_what_sglang_saw_and_generated(name, tmp_path):
    folder = with_template(name, tmp_path / "model")
    rows = ROWS[name]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["python", "-m", "sglang.launch_server", "--model-path", str(folder), "--trust-remote-code", *FLAGS[name]]
    with Server(command, tmp_path / "server.log") as server:
        options = {"base_urls": [f"http://127.0.0.1:{server.port}"], "temperature": 0, "max_new_tokens": 24}
        distill(str(folder), str(tmp_path / "prompts.jsonl"), str(tmp_path / "rows.jsonl"), **options)
        wanted, ended = [], []
        for row in read_rows(tmp_path / "rows.jsonl"):
            for number, message in enumerate(row["messages"]):
                if message["role"] == "assistant":
                    before = [{k: m[k] for k in m if k in KEPT} for m in row["messages"][:number]]
                    wanted.append(asked_and_answered(server.port, {**row, "messages": before}))
                    message["finish_reason"] = "stop"  # the tiny model rarely ends an answer
            ended.append(json.dumps({**row, "finish_reason": "stop"}))
    (tmp_path / "ended.jsonl").write_text("\n".join(ended))
    assert len(wanted) >= len(rows)
    assert supervised(trained(folder, tmp_path / "ended.jsonl")) == sorted(wanted)


KEPT = ("role", "content", "reasoning_content", "tool_calls", "tool_call_id")
