"""The language of a text by its token ids, and the router that follows it; no engine."""

import json
from types import SimpleNamespace

import pytest
import torch
from helpers.paths import ROOT, TINY
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from swift_fastmtp.checkpoint.config_file import TOKEN_MAPS_KEY
from swift_fastmtp.data.chat_template import encode_prompt
from swift_fastmtp.errors import FastMTPError
from swift_fastmtp.method.map_files import read_map_list
from swift_fastmtp.serving.maps import AGAIN_EVERY, VARIABLE, check_weight, maps_of
from swift_fastmtp.serving.routed_head import NOTHING, RoutedHead
from swift_fastmtp.serving.router import FULL, Router
from swift_fastmtp.serving.sglang_plugin import refuse_unsupported
from swift_fastmtp.vocab.languages import MIN_TOKENS, Languages, TokenLanguages

EN = "The heart pumps blood through the body, and the lungs fill it with oxygen."
ZH = "心脏把血液泵到全身，肺给血液带来氧气。这是人体最重要的过程之一。"
CODE = "def add(a_1, b_1):\n    return {'sum': a_1 + b_1}\n\nfor i in range(10):\n    print(add(i, i)[0])\n"
TEXTS = {
    "en": EN,
    "zh": ZH,
    "code": CODE,
    "ja": "これはとても大切なことですから、もう一度ゆっくり読んでください。",
    "ko": "이것은 매우 중요한 일이므로 다시 한번 천천히 읽어 주십시오.",
    "ru": "Это очень важно, поэтому прочитайте ещё раз медленно и внимательно.",
}


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TINY)


@pytest.fixture(scope="module")
def identify(tokenizer):
    return TokenLanguages(tokenizer)


@pytest.mark.parametrize("name", ["en", "zh", "code"])
def test_languages_have_names(name, tokenizer, identify):
    assert identify(tokenizer.encode(TEXTS[name])) == name


@pytest.mark.parametrize("name", ["en", "zh", "code"])
def test_a_prompts_language_is_that_of_what_was_said_last(name, tokenizer, identify):
    """Not of the system prompt, the roles, or an earlier turn in another language."""
    talk = [
        {"role": "system", "content": EN * 5},
        {"role": "user", "content": ZH if name == "en" else EN},
        {"role": "assistant", "content": ZH if name == "en" else EN},
        {"role": "user", "content": TEXTS[name]},
    ]
    assert identify.of_prompt(encode_prompt(tokenizer, talk)) == name


def test_what_is_short_mixed_or_nothing_has_no_name(tokenizer, identify):
    assert identify([]) is None and identify.of_prompt([]) is None
    assert identify(tokenizer.encode("1 2 3 4 5 6 7 8 9")) is None
    assert identify(tokenizer.encode(EN)[: MIN_TOKENS - 1]) is None
    mixed = "The 心 heart 脏 pumps 血 blood 液 through 全 the 身 body 肺 and 氧 lungs 气 fill 体"
    assert identify(tokenizer.encode(mixed)) is None


@given(st.lists(st.integers(0, 7000), max_size=60))
def test_any_ids_have_a_language_or_none(identify, ids):
    """Also padded rows of the vocabulary, which no tokenizer knows."""
    for found in (identify(ids), identify.of_prompt(ids)):
        assert found in (None, *TEXTS, "ar")


def test_the_bundled_prompts_are_told_apart(tokenizer, identify):
    """Questions in English that ask for code are English until the answer is code."""
    right = {"en": {"en"}, "zh": {"zh"}, "code": {"code", "en", "zh"}}
    lines = (ROOT / "examples/prompts/train.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    found = [identify.of_prompt(encode_prompt(tokenizer, row["messages"])) in right[row["category"]] for row in rows]
    assert sum(found) > 0.95 * len(found)


def router(identify):
    """A router without an engine: two maps, four slots."""
    made = Router.__new__(Router)
    made.head = RoutedHead({"en": [1, 2], "zh": [3, 4]}, 10)
    made.identify = identify
    made.numbers = {"en": 0, "zh": 1}
    made.languages = torch.full((5,), NOTHING, dtype=torch.int32)
    made.metrics = None
    return made


def batch(slots, prompts, answers):
    reqs = [
        SimpleNamespace(rid=str(slot), origin_input_ids=prompt, output_ids=answer)
        for slot, prompt, answer in zip(slots, prompts, answers, strict=True)
    ]
    return SimpleNamespace(reqs=reqs, req_pool_indices=torch.tensor(slots))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[1]", "must be an object of languages and files"),
        ('{"zh": 5}', "must be an object of languages and files"),
        ("{}", "must be an object of languages and files"),
        ('{"zh": "missing.pt"}', "zh: .*missing.pt: no such file"),
    ],
)
def test_a_list_of_maps_that_is_none(content, message, tmp_path):
    (tmp_path / "maps.json").write_text(content)
    with pytest.raises(FastMTPError, match=rf"maps.json: {message}"):
        read_map_list(tmp_path / "maps.json")


def test_requests_have_their_prompts_language_until_the_answer_has_another(tokenizer, identify):
    made = router(identify)
    prompts = [encode_prompt(tokenizer, [{"role": "user", "content": TEXTS[n]}]) for n in ("en", "zh", "code")]
    talk = batch([3, 1, 4], prompts, [tokenizer.encode(text) for text in (ZH, ZH, EN)])
    made.begin(talk)
    # `code` has no map here: the whole vocabulary. Slots 0 (padding) and 2 (nobody) compute nothing.
    assert made.languages.tolist() == [NOTHING, 1, NOTHING, 0, made.head.full]
    for _ in range(AGAIN_EVERY - 1):
        made.go_on(talk)
    assert made.languages.tolist() == [NOTHING, 1, NOTHING, 0, made.head.full]
    made.go_on(talk)
    assert made.languages.tolist() == [NOTHING, 1, NOTHING, 1, 0]
    assert [req.fastmtp_language for req in talk.reqs] == ["zh", "zh", "en"]


def test_a_language_without_a_map_is_counted_as_the_whole_vocabulary(tokenizer, identify):
    talk = batch([3], [encode_prompt(tokenizer, [{"role": "user", "content": CODE}])], [[]])
    router(identify).begin(talk)
    assert talk.reqs[0].fastmtp_language == FULL


DE = "Das Herz pumpt das Blut durch den Körper, und die Lunge reichert es mit Sauerstoff an, damit der Mensch lebt."
LONG_EN = f"{EN} People have known this for a long time, but nobody could explain it."


def test_languages_of_one_script_are_told_from_the_text_once_a_map_asks_for_it(tokenizer):
    plain, both = Languages(tokenizer, ["en", "zh"]), Languages(tokenizer, ["en", "zh", "de", "code"])
    for text, name in ((DE, "de"), (LONG_EN, "en"), (ZH, "zh"), (CODE, "code")):
        assert both(tokenizer.encode(text)) == name
        assert both.of_prompt(encode_prompt(tokenizer, [{"role": "user", "content": text}])) == name
    assert plain(tokenizer.encode(DE)) == "en"  # nothing else is in that script
    assert Languages(tokenizer, ["de"])(tokenizer.encode(LONG_EN)) == "en"  # which has no map there
    with pytest.raises(FastMTPError, match="no text is ever told to be legal; known: ar, code, en"):
        Languages(tokenizer, ["en", "legal"])


def test_maps_come_from_the_model_or_the_environment(tmp_path, monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    model = tmp_path / "model"
    model.mkdir()
    (model / "zh.pt").touch()
    (tmp_path / "en.pt").touch()
    (model / "config.json").write_text(json.dumps({TOKEN_MAPS_KEY: {"zh": "zh.pt"}}))
    (tmp_path / "maps.json").write_text('{"en": "en.pt"}')
    assert maps_of(str(model), None) == {"zh": model / "zh.pt"}
    assert maps_of(str(tmp_path), str(model)) == {"zh": model / "zh.pt"}  # a draft-only folder's
    assert maps_of(str(tmp_path), None) == {}
    monkeypatch.setenv(VARIABLE, str(tmp_path / "maps.json"))
    assert maps_of(str(model), None) == {"en": tmp_path / "en.pt"}
    monkeypatch.setenv(VARIABLE, "none")
    assert maps_of(str(model), None) == {}
    monkeypatch.delenv(VARIABLE)
    (model / "config.json").write_text(json.dumps({TOKEN_MAPS_KEY: {"zh": "gone.pt"}}))
    with pytest.raises(FastMTPError, match=r"config.json: zh: .*gone.pt: no such file"):
        maps_of(str(model), None)


ARGUMENTS = {"speculative_token_map": None, "enable_dp_attention": False, "enable_lora": None}
REFUSED = {
    "EAGLE3": (("EAGLE3", False, {}), "EAGLE3 has no draft on"),
    "DP attention": (("EAGLE", True, {"enable_dp_attention": True}), "--enable-dp-attention is not supported"),
    "DP head": (("EAGLE", True, {"enable_dp_lm_head": True}), "--enable-dp-lm-head is not supported"),
    "LoRA": (("EAGLE", True, {"enable_lora": True}), "--enable-lora is not supported"),
    "static map": (("EAGLE", True, {"speculative_token_map": "x.pt"}), "leave it or the maps per language out"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_combined_is_refused(case):
    (algorithm, is_eagle, options), message = REFUSED[case]
    with pytest.raises(FastMTPError, match=message):
        refuse_unsupported(algorithm, is_eagle, SimpleNamespace(**ARGUMENTS | options))
    refuse_unsupported("EAGLE", True, SimpleNamespace(**ARGUMENTS))


def test_a_quantised_output_matrix_is_refused():
    check_weight(torch.zeros(2, dtype=torch.bfloat16))
    for dtype in (torch.int8, torch.float8_e4m3fn):
        with pytest.raises(FastMTPError, match="is quantized"):
            check_weight(torch.zeros(2, dtype=dtype))
