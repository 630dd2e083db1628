"""A real vLLM server with this package beside it, which drafts with token maps and computes the graph that was trained.

The package is installed as users install it, so vLLM finds the plugin by its entry point. Every request's text is the
model's own, and its rounds are those of the simulator with the map of the request's language.
"""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from helpers.engine import VLLMServer
from helpers.models import RANDOM
from helpers.paths import ROOT, TINY
from transformers import AutoTokenizer

from swift_fastmtp.method.config import FastMTPConfig
from swift_fastmtp.method.token_map import copy_maps, read_map_list, read_token_map
from swift_fastmtp.model.loading import load_model
from swift_fastmtp.serving.launch import command, serve_flags
from swift_fastmtp.simulate.acceptance import draft_rounds, make_texts
from swift_fastmtp.vocab.languages import TokenLanguages

pytestmark = pytest.mark.matrix

TOKENS, STEPS = 16, 3  # so few that no answer's language is looked at again
TELLS = ["--per-request-spec-decode-metrics", "detailed"]
END = 6082
MAPS = {"en": range(0, 6144, 2), "zh": range(1, 6144, 2), "code": range(3072)}


@pytest.fixture(scope="module")
def maps(tmp_path_factory):
    """Three maps that have little in common, so that no two languages can be mistaken for each other."""
    folder = tmp_path_factory.mktemp("maps")
    for name, chosen in MAPS.items():
        torch.save(sorted({*chosen, END}), folder / f"{name}.pt")
    (folder / "maps.json").write_text(json.dumps({name: f"{name}.pt" for name in MAPS}))
    return folder / "maps.json"


def greedy_texts(model, tokenizer):
    """Greedy answers by transformers to 20 prompts: six of each kind, and two in languages that have no map."""
    rows = [json.loads(line) for line in (ROOT / "examples/prompts/eval.jsonl").read_text().splitlines()]
    chosen = []
    for category in ("en", "zh", "code"):
        chosen += [row for row in rows if row["category"] == category][:6]
    for text in ("Почему это важно? Расскажи подробно.", "1 2"):
        chosen.append({"messages": [{"role": "user", "content": text}]})
    return make_texts(model, tokenizer, chosen, TOKENS, "generate", 8)


@pytest.fixture(scope="module")
def mimo():
    model, tokenizer = load_model(TINY, torch.float32), AutoTokenizer.from_pretrained(TINY)
    model.fastmtp = FastMTPConfig(num_speculative_steps=STEPS)
    return model, tokenizer, greedy_texts(model, tokenizer)


def rounds(mimo, engine, token_map=None):
    """Accepted drafts of each round, per text, of a server that computes an engine's graph."""
    model, tokenizer, texts = mimo
    model.fastmtp = FastMTPConfig(num_speculative_steps=STEPS, engine=engine)
    ids = token_map and read_token_map(token_map, model.config.vocab_size)
    return draft_rounds(model, texts, tokenizer.pad_token_id, 8, ids)[-1]


def copy_of_tiny(folder, maps=None, **config):
    """The tiny model, with keys in its config.json as an export writes them."""
    shutil.copytree(TINY, folder)
    if maps:
        config["fastmtp_token_maps"] = copy_maps(read_map_list(maps), folder)
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, **config}))
    return folder


def server(installed, folder, log, *flags, **environment):
    words = command(serve_flags(folder, "vllm", STEPS))
    return VLLMServer([*words, *TELLS, *flags], log, {"PYTHONPATH": str(installed[1]), **environment})


def answers_at_once(running, folder, texts):
    """Answers to all prompts, asked at the same time: batches of all languages. (texts, rounds)"""
    with ThreadPoolExecutor(len(texts)) as pool:
        asked = [pool.submit(running.complete, str(folder), t.ids[: t.start], TOKENS) for t in texts]
        answers = [future.result() for future in asked]
    return [ids for ids, _ in answers], [accepted for _, accepted in answers]


def own_texts(texts):
    return [t.ids[t.start : t.end] for t in texts]


def test_every_request_drafts_in_its_own_language(installed, mimo, maps, tmp_path):
    _, tokenizer, texts = mimo
    folder = copy_of_tiny(tmp_path / "model", maps)
    with server(installed, folder, tmp_path / "log") as running:
        written, counted = answers_at_once(running, folder, texts)
        again = answers_at_once(running, folder, texts)  # their prompts are cached
    identify = TokenLanguages(tokenizer)
    languages = [identify.of_prompt(t.ids[: t.start]) for t in texts]
    assert set(MAPS) <= set(languages) and set(languages) - set(MAPS)
    by_map = {name: rounds(mimo, "vllm", maps.parent / f"{name}.pt") for name in MAPS}
    full = rounds(mimo, "vllm")
    expected = [by_map.get(language, full)[i] for i, language in enumerate(languages)]
    assert written == own_texts(texts) and counted == expected
    assert again == (written, counted)
    # No request would have had the same rounds by chance.
    for other in (*by_map.values(), full):
        assert sum(one != two for one, two in zip(expected, other, strict=True)) > 5
