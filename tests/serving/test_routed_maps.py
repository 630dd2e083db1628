"""A real SGLang server in which every request drafts with its language's token map: batches of all languages at once.

Each request's acceptance counts equal those of a server with that one static map (which is what the simulator counts),
its text is the text without speculation, and what joins, ends or is aborted beside it changes nothing.
"""

import collections
import json
import re
import shutil
import threading
import time
import urllib.request
from itertools import pairwise

import pytest
import torch
from helpers.engine import Server
from helpers.paths import ROOT, TINY
from helpers.tiers import some_now
from transformers import AutoTokenizer

from swift_fastmtp.method.config import FastMTPConfig
from swift_fastmtp.method.map_files import copy_maps, read_map_list
from swift_fastmtp.method.token_map import read_token_map
from swift_fastmtp.model.loading import load_model
from swift_fastmtp.serving.flags import command
from swift_fastmtp.serving.launch import serve_flags
from swift_fastmtp.simulate.acceptance import draft_rounds, make_texts
from swift_fastmtp.vocab.languages import TokenLanguages

pytestmark = pytest.mark.engine

TOKENS = 16  # so few that no answer's language is looked at again
END = 6082


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return tmp_path_factory.mktemp("routed")


@pytest.fixture(scope="module")
def maps(work):
    """Three maps that have little in common, so that no two languages can be mistaken for each other."""
    ids = {"en": range(0, 6144, 2), "zh": range(1, 6144, 2), "code": range(3072)}
    for name, chosen in ids.items():
        torch.save(sorted({*chosen, END}), work / f"{name}.pt")
    (work / "maps.json").write_text(json.dumps({name: f"{name}.pt" for name in ids}))
    return work / "maps.json"


@pytest.fixture(scope="module")
def texts():
    """Greedy texts of 21 prompts, seven of each kind; the model and what tells their languages."""
    rows = [json.loads(line) for line in (ROOT / "examples/prompts/eval.jsonl").read_text().splitlines()]
    chosen = [r for c in ("en", "zh", "code") for r in [r for r in rows if r["category"] == c][:6]]
    # A language that has no map: the whole vocabulary.
    chosen += [
        {"messages": [{"role": "user", "content": text}]} for text in ("Почему это важно? Расскажи подробно.", "1 2")
    ]
    chosen += [{"messages": [{"role": "user", "content": "def f(x_1):\n    return {'a': [x_1 == 2]}\n"}]}]
    model, tokenizer = load_model(TINY, torch.float32), AutoTokenizer.from_pretrained(TINY)
    model.fastmtp = FastMTPConfig()
    return make_texts(model, tokenizer, chosen, TOKENS, "generate", 8), model, tokenizer


def server(installed, model, log, *flags, **environment):
    start = [*command(serve_flags(model, num_steps=3)), *flags]
    return Server(start, log, {"PYTHONPATH": str(installed[1]), **environment})


@pytest.fixture(scope="module")
def running(installed, maps, work):
    """A model whose own config.json names the maps, as `fastmtp export --token_maps` writes it."""
    model = work / "model"
    shutil.copytree(TINY, model)
    config = json.loads((model / "config.json").read_text())
    named = copy_maps(read_map_list(maps), model)
    (model / "config.json").write_text(json.dumps({**config, "fastmtp_token_maps": named}))
    with server(installed, model, work / "server.log", "--enable-metrics") as running:
        yield running


@pytest.fixture(scope="module")
def expected(texts, maps):
    """Per text: its language, itself, and the drafts that the simulator accepts with that language's static map."""
    found, model, tokenizer = texts
    identify = TokenLanguages(tokenizer)
    languages = [identify.of_prompt(t.ids[: t.start]) for t in found]
    assert {"en", "zh", "code"} <= set(languages) and set(languages) - {"en", "zh", "code"}
    rounds = {}
    for name in set(languages):
        path = maps.parent / f"{name}.pt"
        ids = read_token_map(path, model.config.vocab_size) if path.exists() else None
        counts = draft_rounds(model, found, tokenizer.pad_token_id, 8, ids)
        rounds[name] = counts[-1]
    return [(language, t, rounds[language][i]) for i, (language, t) in enumerate(zip(languages, found, strict=True))]


def assert_as_expected(records, expected):
    for record, (_, text, want) in zip(records, expected, strict=True):
        assert record["output_ids"] == text.ids[text.start : text.end]
        assert record["meta_info"]["spec_verify_ct"] == len(want)
        assert record["meta_info"]["spec_correct_drafts_histogram"] == torch.bincount(torch.tensor(want)).tolist()


def test_every_request_drafts_in_its_own_language(running, expected):
    """All at once, in mixed batches."""
    assert_as_expected(running.generate([t.ids[: t.start] for _, t, _ in expected], TOKENS), expected)
    different = sum(want != other for (_, _, want), (_, _, other) in pairwise(expected))
    assert different > 5


def test_what_joins_ends_or_is_aborted_disturbs_nobody(running, expected):
    """Long requests run beside them all the time; one of them is aborted; others end after one or two tokens."""
    beside = [t.ids[: t.start] for _, t, _ in expected[::4]]
    running.generate([beside[0]], 8)  # its prompt is cached: it joins in the middle of others
    threads = [
        threading.Thread(target=running.generate, args=([prompt], length), kwargs={"rid": [f"beside-{i}"]})
        for i, (prompt, length) in enumerate(zip(beside, (200, 1, 200, 2, 200, 3), strict=False))
    ]
    for thread in threads:
        thread.start()
    abort = urllib.request.Request(
        f"http://127.0.0.1:{running.port}/abort_request",
        data=json.dumps({"rid": "beside-0"}).encode(),
        headers={"Content-Type": "application/json"},
    )
    urllib.request.urlopen(abort, timeout=30).close()
    for _ in range(2):
        assert_as_expected(running.generate([t.ids[: t.start] for _, t, _ in expected], TOKENS), expected)
    for thread in threads:
        thread.join()


def test_metrics_count_requests_and_acceptance_by_language(running, expected):
    """In SGLang's own endpoint: what was added by one more batch is what the simulator says of it."""
    before = counters(running)
    assert_as_expected(running.generate([t.ids[: t.start] for _, t, _ in expected], TOKENS), expected)
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:  # the scheduler counts after it has answered
        after = counters(running)
        found = {key: value - before.get(key, 0) for key, value in after.items()}
        want = collections.Counter()
        for language, _, rounds in expected:
            name = language if language in ("en", "zh", "code") else "full"
            want["requests", name] += 1
            want["verify_steps", name] += len(rounds)
            want["draft_tokens", name] += 3 * len(rounds)
            want["accepted_draft_tokens", name] += sum(rounds)
        if found == want:
            return
        time.sleep(0.2)
    assert found == want


def counters(running):
    with urllib.request.urlopen(f"http://127.0.0.1:{running.port}/metrics", timeout=30) as response:
        lines = response.read().decode().splitlines()
    found = [re.match(r'fastmtp:(\w+)_total\{.*language="(\w+)".*\} ([\d.e+]+)$', line) for line in lines]
    return {(m[1], m[2]): float(m[3]) for m in found if m}


REFUSED = {
    "not json": ("{", (), "maps.json: cannot be read as JSON"),
    "another tokenizer's": ('{"zh": "zh.pt"}', (), "zh.pt: made with another tokenizer.json"),
    "EAGLE3": (
        '{"en": "en.pt"}',
        ("--speculative-algorithm", "EAGLE3"),
        "the speculative algorithm EAGLE3 has no draft",
    ),
}


@pytest.mark.parametrize("name", some_now(REFUSED, ["another tokenizer's"]))
def test_what_cannot_be_done_stops_the_start_with_one_line(name, installed, tmp_path):
    content, flags, message = REFUSED[name]
    for language in ("zh", "en"):
        torch.save([5, 6], tmp_path / f"{language}.pt")
    (tmp_path / "zh.meta.json").write_text('{"tokenizer_sha256": "0"}')
    (tmp_path / "maps.json").write_text(content)
    flags = [str(tmp_path / f) if f.endswith(".pt") else f for f in flags]
    with pytest.raises(AssertionError, match=rf"(?s)fastmtp: error: [^\n]*{message}"):
        maps = str(tmp_path / "maps.json")
        server(installed, TINY, tmp_path / "log", *flags, SWIFT_FASTMTP_MAPS=maps).__enter__()
