"""Texts and files that are slow on purpose: time and memory stay bounded, and ordinary texts give what they gave."""

import random
import re
import time
import unicodedata
import zipfile
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from swift_fastmtp.checkpoint.quantization import left_out, read_quantization
from swift_fastmtp.checkpoint.quantization_methods import Part
from swift_fastmtp.data import language as language_module
from swift_fastmtp.data.chat_template import _NULL_FIELD
from swift_fastmtp.data.filters import Decontaminate, Language, Refusals, Repetition, SpecialTokens
from swift_fastmtp.data.language import language
from swift_fastmtp.data.language_names import language_tag
from swift_fastmtp.data.mix import prompt_text
from swift_fastmtp.data.mix_groups import read_groups
from swift_fastmtp.data.scripts import normalized
from swift_fastmtp.data.shingles import units
from swift_fastmtp.errors import FastMTPError
from swift_fastmtp.method.token_map import read_token_map

UNITS = ("\\(", "\\[", "\\[\\(", "$$ $", "`\n", "`a", "```", "~~~ ", "((", "\u0315\u0300", "\uff9e\u0300", '", "', "{ ",
         "    x\n", "from a", "<|a", "<｜a", "<think>", "i am sorry ", "ab ", "https://", "\\a", "\n", " ")  # fmt: skip


def _row(text):
    return {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": text}]}


def _judge(judge, text):
    return judge(_row(text))


READERS = {
    "language": language,
    "language's name": language_tag,
    "units": units,
    "null fields": lambda text: _NULL_FIELD.sub("", text),
    "prompt": lambda text: prompt_text(_row(text)),
    **{judge.name: partial(_judge, judge) for judge in (SpecialTokens(), Repetition(), Language(), Refusals())},
    "decontaminate": partial(_judge, Decontaminate()),
}


@pytest.mark.parametrize("reader", READERS)
def test_texts_take_time_in_proportion_to_their_length(reader):
    """Of each unit, repeated: four times the text takes about four times as long, and never the square."""
    read = READERS[reader]
    for unit in UNITS:
        seconds = []
        for length in (50_000, 200_000):
            text = (unit * (length // len(unit) + 1))[:length]
            start = time.process_time()
            read(text)
            seconds.append(time.process_time() - start)
        assert seconds[1] < max(8 * seconds[0], 2), (unit, seconds)


# The expression as it was: right, and quadratic.
_BY_AN_EXPRESSION = re.compile(
    r"```.*?(?:```|\Z)|~~~.*?(?:~~~|\Z)|`[^`\n]*`|<think>|</think>|https?://\S+"
    r"|\$\$.*?\$\$|\$[^$\n]*\$|\\\[.*?\\\]|\\\(.*?\\\)|\\\w+|^(?: {4}|\t).*$",
    re.S | re.M,
)
_PIECES = st.sampled_from(
    [
        *("\\(", "\\)", "\\[", "\\]", "$", "$$", "`", "```", "~~~", "\n", "    ", "\t", "a", " ", "\\x", "\\"),
        *("(", "]", "<think>", "http://b", "为"),
    ]
)


@settings(max_examples=2000, derandomize=True, deadline=None)
@given(st.lists(_PIECES, max_size=14).map("".join))
def test_code_is_taken_out_as_by_one_expression(text):
    assert language_module._without_code(text) == _BY_AN_EXPRESSION.sub(" ", text)


@settings(max_examples=500, derandomize=True, deadline=None)
@given(st.text(max_size=60))
def test_characters_have_one_form_as_before(text):
    assert normalized(text) == unicodedata.normalize("NFKC", text)


def test_accents_up_to_thirty_stay_and_more_are_cut():
    few, many = "e" + "\u0315\u0300" * 15, "e" + "\u0315\u0300" * 20
    assert normalized(few) == unicodedata.normalize("NFKC", few)
    assert normalized(many) != unicodedata.normalize("NFKC", many)
    assert normalized(many).replace("\u034f", "").count("\u0315") == 20


_PART = [Part("mtp.layers.0.self_attn.q_proj", ("mtp.layers.0.self_attn.q_proj",))]
PATTERNS = {
    "repetition of repetitions": r"(\w+)+!",
    "alternatives": r"(?:\w|\w\w|[a-z])*!",
    "large counts": "(a{60000}){60000}",
    "many groups": "(" * 90 + "a+" + ")+" * 90,
    "many stars": ".*" * 200 + "!",
    "very long": "a?" * 5000,
}
QUANTIZED = {
    "compressed-tensors": lambda pattern: {"quant_method": "compressed-tensors", "ignore": [f"re:{pattern}"]},
    "gptq": lambda pattern: {"quant_method": "gptq", "dynamic": {f"-:{pattern}": {}}},
    "auto-round": lambda pattern: {"quant_method": "auto-round", "extra_config": {pattern: {"bits": 16}}},
    "fp8": lambda pattern: {"quant_method": "fp8", "ignored_layers": [pattern]},
}


@pytest.mark.parametrize("method", QUANTIZED)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_expressions_of_a_config_are_given_up(pattern, method):
    quantization = read_quantization({"quantization_config": QUANTIZED[method](PATTERNS[pattern])})
    start = time.process_time()
    try:
        for part in _PART:
            left_out(quantization, part)
    except FastMTPError as error:
        assert "quantization_config: " in str(error)
    assert time.process_time() - start < 4


def test_aliases_in_yaml_do_not_multiply(tmp_path):
    lines = ["a: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"b{i}: &a{i + 1} [{', '.join([f'*a{i}'] * 10)}]" for i in range(12)]
    (tmp_path / "mix.yaml").write_text("\n".join(lines))
    with pytest.raises(FastMTPError, match="more than 20000 values, aliases counted"):
        read_groups(str(tmp_path / "mix.yaml"), None)


def test_a_token_map_takes_no_more_than_its_ids(tmp_path):
    """One stored id, of any shape that it claims: nothing is copied."""
    path = tmp_path / "map.pt"
    torch.save(torch.zeros(1, dtype=torch.int64).expand(10**9), path)
    start = time.process_time()
    with pytest.raises(FastMTPError, match="at most 6144 token ids"):
        read_token_map(path, 6144)
    assert time.process_time() - start < 1
    assert path.stat().st_size < 10_000


def test_a_token_map_of_lists_in_lists_does_not_multiply(tmp_path):
    value = [1]
    for _ in range(60):
        value = [value, value]
    torch.save(value, tmp_path / "map.pt")
    with pytest.raises(FastMTPError, match="flat list"):
        read_token_map(tmp_path / "map.pt", 6144)


def test_compressed_maps_are_measured_before_they_are_unpacked(tmp_path):
    with zipfile.ZipFile(tmp_path / "map.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("map/data.pkl", bytes(50_000_000))
    with pytest.raises(FastMTPError, match="unpacks to 50000000 bytes"):
        read_token_map(tmp_path / "map.pt", 6144)


def test_rows_in_any_order_of_odd_parts_are_as_fast(tmp_path):
    """A mixture of everything above, shuffled."""
    rng = random.Random(0)
    text = "".join(rng.choice(UNITS) for _ in range(40_000))
    for name, read in READERS.items():
        start = time.process_time()
        read(text)
        assert time.process_time() - start < 5, name
