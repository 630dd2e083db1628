"""What is fuzzed: the readers of everything that others write, and two ways to make what they read.

`strategies` are hypothesis', which shrink what they find; `mutated` and `mutated_bytes` are plain, a hundred times as
fast, for large budgets. Both begin with something right, because what is wrong all over is refused at the first check.
"""

import copy
import json
import math
import random
import string
import time

import torch
from hypothesis import strategies as st

from helpers.paths import TINY
from swift_fastmtp.checkpoint.config_file import read_config
from swift_fastmtp.checkpoint.headers import read_header
from swift_fastmtp.checkpoint.quantization import left_out, read_quantization
from swift_fastmtp.checkpoint.quantization_methods import Part
from swift_fastmtp.checkpoint.refusals import refusals
from swift_fastmtp.checkpoint.weight_files import INDEX_FILE, resolve
from swift_fastmtp.data.conversation import Conversation, message_text
from swift_fastmtp.data.examples import with_finish_reason
from swift_fastmtp.data.filters import Reasoning, Repetition, SpecialTokens, Truncated, estimate_tokens
from swift_fastmtp.data.language_names import language_code
from swift_fastmtp.data.mix import prompt_text
from swift_fastmtp.data.mix_groups import Groups, language_of, read_groups
from swift_fastmtp.data.near_duplicates import ExactDuplicates, prompt_and_answer
from swift_fastmtp.data.prompt_ids import asked_ids, ids_of
from swift_fastmtp.errors import FastMTPError
from swift_fastmtp.families.table import match_family
from swift_fastmtp.files import inputs
from swift_fastmtp.files.known_files import read_object
from swift_fastmtp.files.row_forms import UnreadableRowError, normalize
from swift_fastmtp.files.rows import BadRows, as_json, dump_row
from swift_fastmtp.method.map_files import read_map_list
from swift_fastmtp.method.token_map import read_token_map

SECONDS = 1.0
"""Of CPU, for one case."""

# --- what is right --------------------------------------------------------------------------------------------------

_CALL = {"id": "call_0", "type": "function", "function": {"name": "f", "arguments": '{"a": [1, {"b": null}]}'}}
_TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
ROWS = [
    {
        "messages": [
            {"role": "user", "content": "Why? 为什么"},
            {"role": "assistant", "content": "<think>a</think> b $x$"},
        ]
    },
    {
        "id": "r1",
        "sample": 0,
        "language": "zh-Hans",
        "category": "math",
        "source": "s",
        "messages": [
            {"role": "system", "content": "s"},
            {"role": "user", "content": [{"type": "text", "text": "q"}, "more"]},
            {"role": "assistant", "content": None, "tool_calls": [_CALL], "reasoning": "r"},
            {"role": "tool", "content": {"a": 1}, "tool_call_id": "call_0"},
            {
                "role": "assistant",
                "content": "a" * 80,
                "token_ids": [5, 6],
                "prompt_token_ids": [1, 2],
                "prompt_shared": 0,
                "finish_reason": "stop",
            },
        ],
        "tools": [_TOOL],
        "chat_template_kwargs": {"enable_thinking": False},
        "finish_reason": "stop",
    },
    {"prompt": "q", "response": "a", "system": "s", "history": [["a", "b"]]},
    {"instruction": "q", "input": "i", "output": "o"},
    {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "tools": json.dumps([_TOOL])},
    {"prompt": [{"role": "user", "content": "q"}], "completion": [{"role": "assistant", "content": "a"}]},
    {
        "messages": [
            {"role": "tool_call", "content": '{"name": "f", "arguments": {}}'},
            {"role": "tool", "content": "x"},
        ]
    },
]
_QUANTIZED = {
    "fp8": {"quant_method": "fp8", "weight_block_size": [128, 128], "modules_to_not_convert": ["lm_head", "mtp.fc"]},
    "compressed-tensors": {"ignore": ["lm_head", "re:mtp.*"], "config_groups": {"group_0": {"targets": ["Linear"]}}},
    "gptq": {"dynamic": {"-:^mtp[.].*": {}, "+:.*q_proj": {"bits": 4}}, "bits": 4},
    "auto-round": {"bits": 4, "extra_config": {"^mtp[.].*": {"bits": 16}}, "block_name_to_quantize": "model.layers"},
    "modelopt": {"exclude_modules": ["mtp*", "lm_head"], "quant_algo": "NVFP4", "producer": {"name": "modelopt"}},
    "quark": {"exclude": ["re:mtp.*", "lm_head"]},
    "bitsandbytes": {"llm_int8_skip_modules": ["mtp"], "load_in_4bit": True},
    "awq": {"modules_to_not_convert": ["mtp."]},
}
SETTINGS = {
    "swift_fastmtp": "0.1.0",
    "num_speculative_steps": 3,
    "beta": 0.6,
    "loss": "kl",
    "token_map": "",
    "base_model": "models/base",
    "base_fingerprint": "v2:0",
    "dataset": ["rows.jsonl"],
}
MIX = """shares: {general: 0.42, math: 0.18, code: 0.13, zh: 0.27}
languages: {zh: [zh, Chinese]}
categories:
  math: [math]
  code: [code, "a b"]
other: general
"""
INDEX = {"metadata": {"total_size": 4}, "weight_map": {"a.weight": "model.safetensors", "b": "other.safetensors"}}
MAP_LIST = {"zh": "zh.pt", "en": "en.pt"}
HEADER = {
    "__metadata__": {"format": "pt"},
    "a.weight": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [0, 12]},
    "model.mtp_layers.0.b": {"dtype": "F32", "shape": [1], "data_offsets": [12, 16]},
}


def configs(bases=()):
    """config.json of families, plain and quantized."""
    plain = [json.loads((folder / "config.json").read_text()) for folder in (TINY, *bases)]
    return plain + [{**plain[0], "quantization_config": {"quant_method": n, **q}} for n, q in _QUANTIZED.items()]


# --- what is wrong --------------------------------------------------------------------------------------------------

ODD = [
    *(None, True, False, 0, -1, 1, 2, 1.5, -0.0, 1e308, math.nan, math.inf, 2**31, 2**63, 10**18, 10**400),
    *(
        "",
        " ",
        "x",
        "0",
        "null",
        "[]",
        "{}",
        '{"name": "f"}',
        "[" * 2000,
        "a\nb",
        "\x00",
        "\x1b[31m",
        "\ufeff",
        "\u0301",
    ),
    *("../x", "/", "a\x00b", "x" * 300, "user", "assistant", "tool", "system", "tool_call", "stop", "9" * 5000),
    *("(a+)+$", "re:(", "re:(.*)*x", "*" * 50, "\\(" * 50, "$" * 51, "<think>", "</think>", "\u202e", "𝒳", "ﷺ"),
    *([], [None], ["x"], [[]], [0], [1, 2], {}, {"a": None}, {"": {}}, {"role": "user"}, {"type": "text"}),
]


def places(value):
    """Every object and list of a value, with each of its keys."""
    found, waiting = [], [value]
    while waiting:
        item = waiting.pop()
        keys = list(item) if isinstance(item, dict) else range(len(item)) if isinstance(item, list) else ()
        for key in keys:
            found.append((item, key))
            waiting.append(item[key])
    return found


def mutated(rng, value):
    """A copy with one to three changes: other values, missing or further keys, values of other places."""
    value = json.loads(json.dumps(value))
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        found = places(value)
        if not found:
            return copy.deepcopy(rng.choice(ODD))
        holder, key = rng.choice(found)
        change = rng.randrange(7)
        if change <= 2:
            holder[key] = copy.deepcopy(rng.choice(ODD))
        elif change == 3:
            del holder[key]
        elif change == 4:
            other, name = rng.choice(found)
            if name in (other if isinstance(other, dict) else range(len(other))):
                holder[key] = copy.deepcopy(other[name])
        elif change == 5:
            holder[key] = [holder[key]]
        elif isinstance(holder, dict):
            holder[rng.choice([*ODD_KEYS, str(key) + "s"])] = copy.deepcopy(rng.choice(ODD))
        else:
            holder.insert(0, copy.deepcopy(rng.choice(ODD)))
    return value


ODD_KEYS = [
    *("messages", "prompt", "tools", "tool_calls", "content", "role", "from", "value", "history", "images", "text"),
    *("function", "arguments", "name", "token_ids", "prompt_token_ids", "prompt_shared", "reasoning", "id", "type"),
    *("text_config", "quantization_config", "architectures", "num_hidden_layers", "a\nb", "", "\x00"),
]
ODD_BYTES = [b"[", b"{", b"]", b"}", b'"', b",", b"\\ud800", b"\xff", b"\0", b"\n", b"NaN", b"9" * 5000]


def mutated_bytes(rng, data):
    """Bytes with some changed, cut out, doubled or put in."""
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4))):
        at = rng.randrange(len(data) + 1)
        length = rng.choice((1, 1, 2, 8, 64))
        change = rng.randrange(5)
        if change == 0 and data:
            data[at % len(data)] = rng.randrange(256)
        elif change == 1:
            del data[at : at + length]
        elif change == 2:
            data[at:at] = data[at : at + length] * rng.choice((1, 1, 50))
        elif change == 3:
            data[at:at] = rng.choice(
                (b"[", b"{", b"]", b"}", b'"', b",", b"\\ud800", b"\xff", b"\0", b"\n", b"NaN", b"9" * 5000)
            )
        else:
            data[at : at + 8] = rng.randrange(2**64).to_bytes(8, "little")
    return bytes(data)


_words = st.text(alphabet=string.printable + "为什么éß\u0301\x00\ud800\u202e`$\\()[]{}<>|", max_size=30)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | _words,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(_words | st.sampled_from(ODD_KEYS), inner),
    max_leaves=12,
)
rngs = st.integers(0, 2**32).map(random.Random)


def near(values):
    """Mutations of right values."""
    return st.tuples(rngs, st.sampled_from(values)).map(lambda pair: mutated(*pair))


def near_bytes(values):
    return st.tuples(rngs, st.sampled_from(values)).map(lambda pair: mutated_bytes(*pair))


# --- the readers ----------------------------------------------------------------------------------------------------


def as_line(value):
    return json.dumps(value).encode("utf-8", "surrogatepass")


def read_row(data, folder):
    """A line of a file of rows, and all that only looks at one row."""
    try:
        value = inputs.loads(data)
    except ValueError:
        return
    use_row(normalize(value))


def use_row(row):
    dump_row(row).encode()
    dump_row(as_json(row)).encode()
    assert normalize(row) == row, "a row in our form is not returned as it is"
    Conversation(row["messages"])
    BadRows("skip").new_id(row, "here")
    prompt_text(row)
    prompt_and_answer(row)
    Groups().group(row, language_of(row))
    language_code(row.get("language"))
    ExactDuplicates("row")(row, "here")
    with_finish_reason(row)
    for judge in (Truncated(), Reasoning(), SpecialTokens(), Repetition()):
        judge(row)
    previous = []
    for message in row["messages"]:
        estimate_tokens(message_text(message))
        previous = (asked_ids(message, previous) or []) + (ids_of(message, "token_ids") or [])


_PARTS = [Part("mtp.layers.0.self_attn.qkv_proj", tuple(f"mtp.layers.0.self_attn.{p}_proj" for p in "qkv")),
          Part("mtp.layers.0.mlp.experts", ("mtp.layers.0.mlp.experts.0.up_proj",))]  # fmt: skip


def read_a_config(data, folder):
    (folder / "config.json").write_bytes(data)
    config = read_config(folder)
    quantization = read_quantization(config, folder)
    for part in _PARTS if quantization else ():
        left_out(quantization, part)
    list(refusals(config, match_family(config), folder))


def read_settings(data, folder):
    (folder / "fastmtp.json").write_bytes(data)
    read_object(folder / "fastmtp.json")


def read_a_header(data, folder):
    (folder / "model.safetensors").write_bytes(data)
    read_header(folder / "model.safetensors")


def read_an_index(data, folder):
    (folder / "model.safetensors").touch()
    (folder / INDEX_FILE).write_bytes(data)
    resolve(folder)


def read_a_map(data, folder):
    (folder / "map.pt").write_bytes(data)
    read_token_map(folder / "map.pt", 97)


def read_a_list(data, folder):
    (folder / "maps.json").write_bytes(data)
    read_map_list(folder / "maps.json")


def read_a_mix(data, folder):
    (folder / "mix.yaml").write_bytes(data)
    read_groups(str(folder / "mix.yaml"), None)


def header_bytes(value):
    text = json.dumps(value).encode()
    return len(text).to_bytes(8, "little") + text + bytes(16)


def map_bytes(value, folder):
    torch.save(value, folder / "saved.pt")
    return (folder / "saved.pt").read_bytes()


def fault(reader, data, folder):
    """What is wrong with how a reader took some bytes; None if it ended well, or with one line, in time."""
    start = time.perf_counter()
    found = _outcome(reader, data, folder)
    if found is not None or time.perf_counter() - start < SECONDS:
        return found
    start = time.process_time()  # is exact where others use the machine too, and takes its time
    _outcome(reader, data, folder)
    seconds = time.process_time() - start
    return f"{seconds:.1f} s" if seconds > SECONDS else None


def _outcome(reader, data, folder):
    try:
        reader(data, folder)
    except (FastMTPError, UnreadableRowError) as error:
        text = str(error)
        if isinstance(error, FastMTPError) and not (text.isprintable() and len(text) < 800):
            return f"more than one line: {text!r:.300}"
    except BaseException as error:
        return f"{type(error).__name__}: {error!s:.300}"
    return None
