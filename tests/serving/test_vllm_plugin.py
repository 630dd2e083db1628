"""A real vLLM server with this package beside it, which drafts with token maps and computes the graph that was trained.

The package is installed as users install it, so vLLM finds the plugin by its entry point. Every request's text is the
model's own, and its rounds are those of the simulator with the map of the request's language.
"""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers.engine import VLLMServer
from helpers.learning import learned, learned_beside
from helpers.models import WIDE_HEADS, random_ernie, random_glm4_moe, save_checkpoint
from helpers.paths import ROOT, TINY
from transformers import AutoTokenizer

from swift_fastmtp.families.family import Graph
from swift_fastmtp.method.config import FastMTPConfig
from swift_fastmtp.method.map_files import copy_maps, read_map_list
from swift_fastmtp.method.token_map import read_token_map
from swift_fastmtp.model.loading import load_model
from swift_fastmtp.serving.flags import command
from swift_fastmtp.serving.launch import serve_flags
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
    """Greedy answers by transformers to 21 prompts: six of each kind, one of code alone, two whose language has no
    map."""
    rows = [json.loads(line) for line in (ROOT / "examples/prompts/eval.jsonl").read_text().splitlines()]
    chosen = []
    for category in ("en", "zh", "code"):
        chosen += [row for row in rows if row["category"] == category][:6]
    code = "def f(x_1):\n    return {'a': [x_1 == 2]}\n"
    for text in (code, "Почему это важно? Расскажи подробно.", "1 2"):
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


def copy_of_tiny(folder, maps=None, trained_for=None):
    """The tiny model with what an export writes: maps in config.json, and in fastmtp.json the engine."""
    shutil.copytree(TINY, folder)
    if maps:
        values = json.loads((folder / "config.json").read_text())
        values["fastmtp_token_maps"] = copy_maps(read_map_list(maps), folder)
        (folder / "config.json").write_text(json.dumps(values))
    if trained_for:
        (folder / "fastmtp.json").write_text(json.dumps({"engine": trained_for}))
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


def by_language(mimo, engine, maps):
    """Rounds of each text with the map of its prompt's language, and those of all texts with each map."""
    _, tokenizer, texts = mimo
    identify = TokenLanguages(tokenizer)
    languages = [identify.of_prompt(t.ids[: t.start]) for t in texts]
    assert set(MAPS) <= set(languages) and set(languages) - set(MAPS)
    with_map = {name: rounds(mimo, engine, maps.parent / f"{name}.pt") for name in MAPS}
    full = rounds(mimo, engine)
    expected = [with_map.get(language, full)[i] for i, language in enumerate(languages)]
    return expected, [*with_map.values(), full]


def test_every_request_drafts_in_its_own_language(installed, mimo, maps, tmp_path):
    texts = mimo[2]
    folder = copy_of_tiny(tmp_path / "model", maps)
    with server(installed, folder, tmp_path / "log") as running:
        written, counted = answers_at_once(running, folder, texts)
        again = answers_at_once(running, folder, texts)  # their prompts are cached
    expected, others = by_language(mimo, "vllm", maps)
    assert written == own_texts(texts) and counted == expected
    assert again == (written, counted)
    # No request would have had the same rounds by chance.
    for other in others:
        assert sum(one != two for one, two in zip(expected, other, strict=True)) > 5


def test_two_ranks(installed, mimo, maps, tmp_path):
    """Tensor parallelism: each rank has its part of each map; the graph is corrected in both."""
    texts = mimo[2]
    folder = copy_of_tiny(tmp_path / "model", maps, "sglang")
    ranks = {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}  # a small machine has no part of its memory for each
    with server(installed, folder, tmp_path / "log", "--tensor-parallel-size", "2", **ranks) as running:
        written, counted = answers_at_once(running, folder, texts)
    assert written == own_texts(texts) and counted == by_language(mimo, "sglang", maps)[0]


def test_one_map_for_all_requests_and_the_graph_that_was_trained(installed, mimo, maps, tmp_path):
    """A head trained for SGLang's graph, in vLLM; an environment variable names one map, another one."""
    texts, one = mimo[2], maps.parent / "code.pt"
    folder = copy_of_tiny(tmp_path / "model", maps, "sglang")
    with server(installed, folder, tmp_path / "log", SWIFT_FASTMTP_MAPS=str(one)) as running:
        written, counted = answers_at_once(running, folder, texts)
    assert written == own_texts(texts)
    assert counted == rounds(mimo, "sglang", one)
    assert counted != rounds(mimo, "vllm", one) and counted != rounds(mimo, "sglang")


def test_the_environment_leaves_vllm_as_it_is(installed, mimo, maps, tmp_path):
    texts = mimo[2]
    folder = copy_of_tiny(tmp_path / "model", maps, "sglang")
    off = {"SWIFT_FASTMTP_MAPS": "none", "SWIFT_FASTMTP_ENGINE": "none"}
    with server(installed, folder, tmp_path / "log", **off) as running:
        written, counted = answers_at_once(running, folder, texts)
    assert written == own_texts(texts)
    assert counted == rounds(mimo, "vllm") != rounds(mimo, "sglang")


PROMPTS = ["Write a haiku.", "什么是函数？", "def main():", "Why is the sky blue?", "写一首诗。", "print(1)"]


def test_the_state_that_is_fed_back_is_the_one_that_was_trained(installed, tmp_path):
    """GLM-4.5: the state after the layer's norm. The mask of position 0 stays vLLM's, and the log says so."""
    base = save_checkpoint(random_glm4_moe, tmp_path / "base", **WIDE_HEADS, head_dim=32)
    model, texts = learned(base, tmp_path, PROMPTS, TOKENS, 4, chat_template=None, num_speculative_steps=STEPS)
    folder = tmp_path / "full"
    with server(installed, folder, tmp_path / "log", SWIFT_FASTMTP_ENGINE="sglang") as running:
        written, counted = answers_at_once(running, folder, texts)
    expected = {}
    for fed_back in (False, True):
        model.head.graph = Graph(feedback_before_norm=fed_back, mask_position_zero=True)
        expected[fed_back] = draft_rounds(model, texts, 0, 8)[-1]
    assert written == own_texts(texts)
    assert counted == expected[False] != expected[True]
    log = (tmp_path / "log").read_text()
    assert "feedback_before_norm as SGLang computes it" in log and "mask_position_zero stays as vLLM has it" in log


def stops(installed, folder, tmp_path, *flags, **environment):
    """The one line with which a server stops."""
    with pytest.raises(AssertionError):
        server(installed, folder, tmp_path / "log", *flags, **environment).__enter__()
    lines = (tmp_path / "log").read_text().splitlines()
    (line,) = [line for line in lines if "fastmtp: error: " in line]
    return line.partition("fastmtp: error: ")[2]


def test_a_list_that_cannot_be_read_stops_the_start(installed, tmp_path):
    (tmp_path / "maps.json").write_text("{")
    line = stops(installed, TINY, tmp_path, SWIFT_FASTMTP_MAPS=str(tmp_path / "maps.json"))
    assert "maps.json: cannot be read as JSON" in line


def test_a_map_of_another_model_stops_the_start(installed, maps, tmp_path):
    folder = copy_of_tiny(tmp_path / "model", maps)
    (folder / "token_maps/zh.meta.json").write_text('{"tokenizer_sha256": "0"}')
    assert "zh.pt: made with another tokenizer.json" in stops(installed, folder, tmp_path)


def test_a_graph_that_cannot_be_corrected_stops_the_start(installed, tmp_path):
    folder = save_checkpoint(random_ernie, tmp_path / "ernie")
    line = stops(installed, folder, tmp_path, SWIFT_FASTMTP_ENGINE="sglang")
    assert "trained for SGLang" in line and "SWIFT_FASTMTP_ENGINE=none" in line


def test_beside_a_model_of_another_class_nothing_is_corrected(installed, tmp_path):
    """The state before the final norm comes from MiMo's own class; a Llama gives the one after it."""
    prompts = ["Write a haiku.", "def main():"]
    target, draft, texts, expected = learned_beside("llama", tmp_path, prompts, TOKENS, STEPS)
    with server(installed, draft, tmp_path / "log") as running:
        answers, accepted = answers_at_once(running, target, texts)
        assert "mask_position_zero" not in running.tail() and "hidden_before_norm as SGLang" not in running.tail()
    assert answers == own_texts(texts) and accepted == expected
