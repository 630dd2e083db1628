"""Hostile files × verbs: whatever a file holds, a verb ends in a second or so, well or with one line. No tracebacks."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.broken_models import assert_one_line
from helpers.checkpoints import write_trained
from helpers.hostile import DEEP, FORMS, KINDS, LONG, left_over, model_folder, put, run
from helpers.paths import TINY
from helpers.swift_runs import sft_args, swift, write_rows
from helpers.tiers import some_now

from swift_fastmtp.checkpoint.weight_files import INDEX_FILE

CHEAP = ("inspect", "doctor", "serve-args", "card")
READERS = (*CHEAP, "vocab", "clean", "mix", "export", "graft", "graft donor", "simulate", "distill")


def words(verb, folder, place):
    """The command line of a verb with a model folder."""
    rows, out = place / "rows.jsonl", place / "out"
    return {
        "inspect": ["inspect", folder],
        "doctor": ["doctor", folder],
        "serve-args": ["serve-args", folder],
        "card": ["card", folder],
        "vocab": [
            "vocab",
            "--model",
            folder,
            "--inputs",
            rows,
            "--output_dir",
            out,
            "--sizes",
            "1024",
            "--held_out",
            0.5,
        ],
        "clean": ["clean", "--model", folder, "--inputs", rows, "--output", out, "--min_answer_tokens", 1],
        "mix": ["mix", "--model", folder, "--inputs", rows, "--output_dir", out, "--shares", "general=1"],
        "export": ["export", "--adapters", place / "trained", "--model", folder, "--output_dir", out],
        "graft": ["graft", "--model", folder, "--donor", TINY, "--output_dir", out, "--overwrite"],
        "graft donor": ["graft", "--model", TINY, "--donor", folder, "--output_dir", out, "--overwrite"],
        "simulate": ["simulate", "--model", folder, "--dataset", rows, "--max_rows", 1, "--answers", "given"],
        "distill": ["distill", "--model", folder, "--prompts", rows, "--output", out, "--max_new_tokens", 2],
    }[verb]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hostile")
    write_rows(folder / "rows.jsonl", 3)
    write_trained(folder / "trained")
    return folder


def outcome(verb, folder, place):
    found = run(*words(verb, folder, place))
    for name in ("out", "out.report.json", "out.parts"):
        path = place / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    if not found and (left := left_over(place)):
        found = f"left {left}"
        for path in left:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    return found


def check(cases, place, verbs):
    """All cases (name, file, form) through the verbs; the faults in one message."""
    faults, count = [], 0
    for name, file, form in cases:
        folder = model_folder(place / "model")
        put(folder / file, form)
        for verb in verbs:
            count += 1
            if found := outcome(verb, folder, place):
                faults.append(f"--- {verb}, {file}: {name}\n{found}")
        shutil.rmtree(folder)
    print(f"{count} hostile inputs, {len(faults)} faults")
    assert not faults, "\n".join([*faults, f"{len(faults)} of {count}"])


FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer_config.json",
    "tokenizer.json",
    "chat_template.jinja",
    "model.safetensors",
    INDEX_FILE,
    "fastmtp.json",
    "hf_quant_config.json",
)
ALL_FORMS = [(name, file, form) for file in FILES for name, form in {**FORMS, **KINDS}.items()]


@pytest.mark.parametrize("file", FILES)
def test_files_of_every_form(file, place):
    check([case for case in ALL_FORMS if case[1] == file], place, CHEAP[:2])


@pytest.mark.matrix
@pytest.mark.parametrize("verb", READERS[2:])
def test_files_of_every_form_in_every_verb(verb, place):
    # A template that is 100,000 characters of text is a prompt of as many tokens, which takes a model its time.
    long = [name for name, form in FORMS.items() if len(form) > 4000] if verb == "distill" else []
    check([case for case in ALL_FORMS if case[1] != "chat_template.jinja" or case[0] not in long], place, [verb])


VALUES = (None, "x", "", -1, 0, 1.5, 1e308, 10**18, 10**400, True, [], [None], ["x"], [[]], {}, {"a": {}}, "a\nb" * 300)
CONFIG = json.loads((TINY / "config.json").read_text())
KEYS = sorted(
    {*CONFIG, "text_config", "quantization_config", "rope_parameters", "rope_scaling", "layer_types", "auto_map"}
)


def changed(key, value):
    return f"{key} is {str(value)[:20]}", "config.json", {**CONFIG, key: value}


CONFIGS = [changed(key, value) for key in KEYS for value in VALUES]


def test_config_keys_of_every_type(place):
    check(CONFIGS[::7], place, CHEAP[:2])


@pytest.mark.matrix
@pytest.mark.parametrize("verb", ["inspect", "doctor", "serve-args", "graft", "simulate"])
def test_config_keys_of_every_type_in_every_verb(verb, place):
    check(CONFIGS if verb in CHEAP else CONFIGS[::5], place, [verb])


SETTINGS = {
    "base_model": str(TINY),
    "base_fingerprint": "v2:0",
    "num_speculative_steps": 3,
    "token_map": "",
    "dataset": ["rows.jsonl"],
    "swift_fastmtp": "0.1.0",
}
SETTINGS_CASES = [
    (f"{key} is {str(value)[:20]}", "fastmtp.json", {**SETTINGS, key: value})
    for key in SETTINGS
    for value in (*VALUES, "a\0b", LONG, "/" + LONG)
]


@pytest.mark.matrix
def test_settings_of_every_type(place):
    check(SETTINGS_CASES, place, ["serve-args", "card", "doctor"])


INDEXES = {
    "map is null": {"weight_map": None},
    "map is a list": {"weight_map": []},
    "empty map": {"weight_map": {}},
    "a number": {"weight_map": {"a": 1}},
    "a list": {"weight_map": {"a": ["model.safetensors"]}},
    "long name": {"weight_map": {"a": f"{LONG}.safetensors"}},
    "a NUL": {"weight_map": {"a": "a\0.safetensors"}},
    "a line end": {"weight_map": {"a": "a\nb.safetensors"}},
    "above": {"weight_map": {"a": "../model.safetensors"}},
    "absolute": {"weight_map": {"a": "/model.safetensors"}},
    "metadata": {"metadata": 5, "weight_map": {"a": "model.safetensors"}},
    "many": {"weight_map": {f"a{i}": "model.safetensors" for i in range(50_000)}},
    "surrogate": {"weight_map": {"a": "\ud800.safetensors"}},
}


def test_indexes(place):
    check(
        [(name, INDEX_FILE, form) for name, form in INDEXES.items()],
        place,
        ["inspect", "doctor", "serve-args", "graft"],
    )


def header(entries, data=b"", length=None):
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(dtype="F32", shape=(1,), offsets=(0, 4)):
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


HEADERS = {
    "claims gigabytes": header({"a": entry()}, bytes(4), length=50_000_000),
    "claims exabytes": header({"a": entry()}, bytes(4), length=2**63),
    "large shape": header({"a": entry(shape=[10**18])}, bytes(4)),
    "larger shape": header({"a": entry(shape=[10**18] * 60)}, bytes(4)),
    "huge integer": header(b'{"a": {"dtype": "F32", "shape": [' + b"9" * 5000 + b'], "data_offsets": [0, 4]}}'),
    "many dimensions": header({"a": entry(shape=[1] * 10_000)}, bytes(4)),
    "negative": header({"a": entry(shape=[-1], offsets=[4, 0])}, bytes(4)),
    "fraction": header({"a": entry(shape=[1.5])}, bytes(4)),
    "true": header({"a": entry(shape=[True])}, bytes(4)),
    "no list": header({"a": entry(shape=5)}, bytes(4)),
    "one offset": header({"a": entry(offsets=[0])}, bytes(4)),
    "overlap": header({"a": entry(), "b": entry()}, bytes(4)),
    "gap": header({"a": entry(offsets=[4, 8])}, bytes(8)),
    "outside": header({"a": entry(shape=[10**6], offsets=[0, 4 * 10**6])}, bytes(4)),
    "dtype": header({"a": entry(dtype="Q4")}, bytes(4)),
    "dtype is a list": header({"a": entry(dtype=[])}, bytes(4)),
    "twice": header(b'{"a": %b, "a": %b}' % ((json.dumps(entry()).encode(),) * 2), bytes(4)),
    "long name": header({"x" * 100_000: entry()}, bytes(4)),
    "line end in a name": header({"model.mtp_layers.0.\n\x1b[31m": entry()}, bytes(4)),
    "digits in a name": header({f"model.layers.{'9' * 900}.mtp.{'9' * 50}.x": entry()}, bytes(4)),
    "layer of 5000 digits": header({f"model.mtp_layers.{'9' * 5000}.x": entry()}, bytes(4)),
    "dots in a name": header({"a." * 490 + "mtp": entry()}, bytes(4)),
    "metadata is a list": header({"__metadata__": [], "a": entry()}, bytes(4)),
    "deep": header(DEEP),
    "no tensors": header({}),
    "not in the model": header({"a": entry()}, bytes(4)),
    "empty tensor": header({"a": entry(shape=[0], offsets=[0, 0])}),
    "an unusual dtype": header({"model.embed_tokens.weight": entry("F8_E8M0", [4], [0, 4])}, bytes(4)),
    "half a byte": header({"model.embed_tokens.weight": entry("F4", [8], [0, 4])}, bytes(4)),
    "complex": header({"model.embed_tokens.weight": entry("C64", [1], [0, 8])}, bytes(8)),
}


def test_headers(place):
    check(
        [(n, "model.safetensors", f) for n, f in HEADERS.items()], place, ["inspect", "doctor", "serve-args", "graft"]
    )


@pytest.mark.matrix
@pytest.mark.parametrize("verb", ["export", "graft donor", "simulate"])
def test_headers_and_indexes_in_every_verb(verb, place):
    cases = [(n, "model.safetensors", f) for n, f in HEADERS.items()]
    check(cases + [(n, INDEX_FILE, f) for n, f in INDEXES.items()], place, [verb])


SAMPLE = {
    "a list": ("config.json", b"[]"),
    "nested": ("config.json", DEEP),
    "a pipe": ("model.safetensors", KINDS["pipe"]),
    "a loop": ("config.json", KINDS["loop"]),
    "layers are null": ("config.json", {**CONFIG, "num_hidden_layers": None}),
    "NaN": ("config.json", json.dumps({**CONFIG, "rms_norm_eps": float("nan")}).encode()),
    "settings are a number": ("fastmtp.json", b"5"),
    "an index is a list": (INDEX_FILE, b"[]"),
    "the tokenizer is a page": ("tokenizer.json", FORMS["html"]),
}


@pytest.mark.parametrize("case", some_now(SAMPLE, ["an index is a list"]))
def test_through_the_real_command(case, place):
    file, form = SAMPLE[case]
    folder = model_folder(place / f"real {case}")
    put(folder / file, form)
    verb = {"fastmtp.json": "serve-args", "tokenizer.json": "vocab"}.get(file, "inspect")
    command = [str(Path(sys.executable).parent / "fastmtp"), *map(str, words(verb, folder, place))]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert "Traceback" not in done.stderr, done.stderr[-3000:]
    assert done.returncode == 1
    if case != "layers are null":  # of which inspect tells a whole page
        assert done.stderr.splitlines()[-1].startswith("fastmtp: error: "), done.stderr[-3000:]


@pytest.mark.engine
@pytest.mark.parametrize("case", some_now(["a list", "nested", "a loop", "NaN", "an index is a list"], ["nested"]))
def test_through_swift(case, place):
    """ms-swift reads config.json too; our line is the one that is read."""
    file, form = SAMPLE[case]
    folder = model_folder(place / f"swift {case}")
    put(folder / file, form)
    done = swift(*sft_args(folder, place / "rows.jsonl", place / "run"), check=False)
    assert_one_line(done, file)
