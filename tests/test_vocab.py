"""`fastmtp vocab`: what holds for every token map, coverage against plain counts, and the errors."""

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter

import numpy as np
import pytest
import torch
from helpers.paths import ROOT, TINY
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from swift_fastmtp.data.chat_template import load_tokenizer
from swift_fastmtp.data.distill import distill
from swift_fastmtp.errors import FastMTPError
from swift_fastmtp.files.copies import file_hash
from swift_fastmtp.files.rows import read_rows
from swift_fastmtp.method.token_map import read_token_map
from swift_fastmtp.vocab.build import make_parts, part_of, vocab
from swift_fastmtp.vocab.counts import Counts, CountSettings, cell_of, count_chunk, count_files
from swift_fastmtp.vocab.coverage import coverage_report
from swift_fastmtp.vocab.maps import verify_map
from swift_fastmtp.vocab.must_keep import read_vocabulary

VOCABULARY = read_vocabulary(TINY)
KEPT = set(VOCABULARY.must_keep)
KINDS = {"en": ("qa", "en"), "zh": ("qa", "zh-Hant"), "code": ("code", "en")}


def rows_of(counts, seed=0, ids=VOCABULARY.size, category=None):
    """Answers whose ids are drawn from a part of the vocabulary of their own kind, low ones more often."""
    rng = random.Random(seed)
    rows = []
    for number, (kind, total) in enumerate(counts.items()):
        for i in range(total):
            token_ids = [int(ids * (number / 4 + rng.random() ** 4 * 0.25)) for _ in range(rng.randint(4, 60))]
            messages = [
                {"role": "user", "content": f"{kind} {i}", "token_ids": [5]},
                {"role": "assistant", "content": "x", "token_ids": token_ids},
            ]
            told = dict(zip(("category", "language"), KINDS[kind], strict=True))
            rows.append(
                {"id": f"{kind}-{i}", **told, **({"category": category} if category else {}), "messages": messages}
            )
    rng.shuffle(rows)
    return rows


def write(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return write(tmp_path_factory.mktemp("rows") / "rows.jsonl", rows_of({"en": 300, "zh": 200, "code": 150}))


@pytest.fixture(scope="module")
def maps(tmp_path_factory, rows):
    """A folder that many tests look at."""
    folder = tmp_path_factory.mktemp("vocab") / "maps"
    vocab([rows], str(TINY), str(folder), sizes=[1024, 2048], held_out=0.1)
    return folder


counted = st.dictionaries(
    st.sampled_from(["en/general", "en/math", "en/code", "zh/general", "zh/code", "fr/general", "unknown/general"]),
    st.tuples(
        st.lists(st.integers(0, VOCABULARY.size - 1), min_size=1, max_size=80),
        st.lists(st.integers(0, VOCABULARY.size - 1), max_size=40),
    ),
    min_size=1,
)


@settings(max_examples=60, deadline=None)
@given(counted, st.sampled_from(["language", "group", "category"]), st.lists(st.integers(len(KEPT), 6087), min_size=2))
def test_what_holds_for_every_map(cells, by, sizes):
    """Size, must-keep, range, no duplicates, nesting; coverage grows with size and is that of a plain count."""
    counts = Counts(VOCABULARY.rows)
    for name, (seen, held) in cells.items():
        for of_V, ids in zip(counts.cell(name), (seen, held), strict=True):
            np.add.at(of_V, ids, 1)
    parts = make_parts(counts, by, VOCABULARY)
    assert len({part.name for part in parts}) == len(parts)
    for part in parts:
        found = [part.map(size, VOCABULARY) for size in sorted(sizes)]
        report = coverage_report(found, {part.name: part.cells}, counts)["maps"]
        for token_map, size, entry in zip(found, sorted(sizes), report, strict=True):
            ids = token_map.ids.tolist()
            assert len(set(ids)) == len(ids) == size and ids == sorted(ids)
            assert set(ids) >= KEPT and ids[0] >= 0 and ids[-1] < VOCABULARY.size
            frequency = Counter(i for cell in part.cells for i in cells[cell][0])
            best = sum(n for _, n in sorted(frequency.items(), key=lambda x: -x[1])[: size - len(KEPT)])
            if part.name != "mixed":  # which goes by the others' shares, not by counts
                assert sum(frequency[i] for i in ids) >= best  # no other choice of the free places holds more
                assert token_map.filled == sum(i not in frequency and i not in KEPT for i in ids)
            for cell, (_, held) in cells.items():
                assert entry["coverage"][cell] == (sum(i in set(ids) for i in held) / len(held) if held else None)
        for smaller, larger, a, b in zip(found, found[1:], report, report[1:], strict=False):
            assert set(smaller.ids.tolist()) <= set(larger.ids.tolist())
            for cell, (_, held) in cells.items():
                assert not held or a["coverage"][cell] <= b["coverage"][cell]


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 1000), st.floats(0.5, 1.0))
def test_coverage_target_is_met_by_the_smallest_multiple_of_64(tmp_path_factory, seed, target):
    folder = tmp_path_factory.mktemp("target")
    path = write(folder / "rows.jsonl", rows_of({"en": 80, "zh": 60}, seed))
    vocab([path], str(TINY), str(folder / "maps"), coverage=target, held_out=0.2)
    counts = Counts.load(folder / "maps" / "counts.safetensors")
    parts = {part.name: part for part in make_parts(counts, "language", VOCABULARY)}
    sizes = {m["name"]: m["size"] for m in json.loads((folder / "maps" / "coverage.json").read_text())["maps"]}
    assert set(sizes) == {"en", "zh", "mixed"}
    for name, size in sizes.items():
        assert size % 64 == 0 or size == VOCABULARY.size
        of = [parts[name]] if name != "mixed" else [parts["en"], parts["zh"]]

        def worst(n, name=name, of=of):
            chosen = set(parts[name].map(n, VOCABULARY).ids.tolist())
            held = [counts.held_out[part.cells[0]] for part in of]
            return min(sum(int(h[i]) for i in chosen) / int(h.sum()) for h in held)

        assert worst(size) >= target
        assert size <= len(KEPT) + 64 or worst(64 * ((size - 1) // 64)) < target


def test_files_are_what_engines_read(maps):
    for name in ("en", "zh", "code", "mixed"):
        for size in (1024, 2048):
            stem = f"{name}-{size}"
            ids = torch.load(maps / f"{stem}.pt", weights_only=True)  # as SGLang's spec_utils.load_token_map
            assert type(ids) is list and {type(i) for i in ids} == {int} and len(ids) == size
            assert torch.tensor(ids, dtype=torch.int64).tolist() == json.loads((maps / f"{stem}.json").read_text())
            assert read_token_map(maps / f"{stem}.pt", VOCABULARY.rows).tolist() == ids
            tensors = load_file(maps / f"{stem}-d2t.safetensors")
            assert (torch.arange(size) + tensors["d2t"]).tolist() == ids
            assert tensors["t2d"].dtype == torch.bool and tensors["t2d"].shape == (VOCABULARY.rows,)
            assert tensors["t2d"].nonzero().flatten().tolist() == ids
            assert not verify_map(maps / f"{stem}.pt", TINY)
            about = json.loads((maps / f"{stem}.meta.json").read_text())
            assert (about["name"], about["size"], about["vocab_size"]) == (name, size, 6144)
            assert about["tokenizer_sha256"] == file_hash(TINY / "tokenizer.json")
            assert about["coverage"]["zh/general"] > (0.6 if name in ("zh", "mixed") else 0)
    assert (maps / "coverage.png").read_bytes()[:4] == b"\x89PNG"
    assert "out of its domain" in (maps / "coverage.md").read_text()


def test_counts_are_those_of_a_plain_loop(tmp_path, rows, maps):
    counts = Counts.load(maps / "counts.safetensors")
    plain, held_rows = Counter(), 0
    for row in read_rows(rows):
        cell = f"{KINDS[row['id'].split('-')[0]][1][:2]}/{'code' if row['category'] == 'code' else 'general'}"
        assert cell_of(row) == cell
        one = count_chunk([("", row)], CountSettings(held_out=0.1), VOCABULARY)
        ((name, held),) = one.tokens
        assert name == cell
        held_rows += held
        for i in row["messages"][1]["token_ids"]:
            plain[cell, held, i] += 1
    assert 0.05 < held_rows / 650 < 0.16
    for held, of in ((False, counts.counted), (True, counts.held_out)):
        found = {(cell, held, int(i)): int(of_V[i]) for cell, of_V in of.items() for i in np.flatnonzero(of_V)}
        assert found == {key: n for key, n in plain.items() if key[1] == held}


def test_any_number_of_processes_gives_the_same_bytes(tmp_path, rows, maps, monkeypatch):
    # Files of different size, a bad row in each, small chunks.
    monkeypatch.setattr("swift_fastmtp.vocab.counts.CHUNK_ROWS", 20)
    lines = (ROOT / "examples" / "prompts" / "train.jsonl").read_text().splitlines()
    for name, part in (("a", lines[:500]), ("b", lines[500:])):
        bad = ['{"messages": 1}', "not JSON", json.dumps({"prompt": "?", "language": "en"} | {"messages": []})]
        (tmp_path / f"{name}.jsonl").write_text("\n".join([*part[:30], *bad, *part[30:]]) + "\n")
    inputs = [str(tmp_path / f"{name}.jsonl") for name in "ab"]
    options = {"sizes": [1024], "count": "all", "on_bad_row": "skip", "held_out": 0.1}
    for jobs in (1, 3):
        vocab(inputs, str(TINY), str(tmp_path / f"maps{jobs}"), jobs=jobs, **options)
    assert contents(tmp_path / "maps1") == contents(tmp_path / "maps3")
    report = json.loads((tmp_path / "maps1" / "coverage.json").read_text())
    assert report["bad_rows"]["not JSON"]["count"] == 2
    assert report["messages_whose_tokens_come_from"]["tokenizer"] == 832
    # The same rows again, in the folder of another run: the same bytes.
    vocab([rows], str(TINY), str(tmp_path / "again"), sizes=[1024, 2048], held_out=0.1)
    assert contents(tmp_path / "again") == contents(maps)


def test_the_first_bad_row_stops_the_run_whatever_is_read_ahead(tmp_path, monkeypatch):
    rows = rows_of({"en": 40})
    rows[9]["messages"][1]["token_ids"][2] = VOCABULARY.size  # a padded row of the matrix
    path = tmp_path / "rows.jsonl"
    write(path, rows)
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:14], "not JSON", *lines[14:]]))
    for jobs, chunk in ((1, 4), (2, 4), (1, 1024)):
        monkeypatch.setattr("swift_fastmtp.vocab.counts.CHUNK_ROWS", chunk)
        with pytest.raises(FastMTPError, match=r"rows\.jsonl:10: token_ids of another tokenizer.*no token 6087"):
            vocab([str(path)], str(TINY), str(tmp_path / "maps"), sizes=[1024], jobs=jobs)
    assert not (tmp_path / "maps").exists()


@pytest.mark.matrix
def test_kill_9_and_again(tmp_path, rows, maps):
    """A file that was counted is not read again, and the maps are those of a run that nobody killed."""
    second = write(tmp_path / "b.jsonl", rows_of({"en": 20_000}, seed=1))
    inputs, out, parts = [rows, second], tmp_path / "maps", tmp_path / "maps.parts"
    call = f"vocab({inputs!r}, {str(TINY)!r}, {str(out)!r}, sizes=[1024], jobs=2)"
    code = f"from swift_fastmtp.vocab.build import vocab\nif __name__ == '__main__': {call}"
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen([sys.executable, "-c", code], **quiet)
    while process.poll() is None and not list(parts.glob("counts-*.safetensors")):
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not out.exists()
    (kept,) = parts.glob("counts-*.safetensors")
    stamp = kept.stat().st_mtime_ns
    settings_ = CountSettings()
    total, _ = count_files([rows], settings_, VOCABULARY, parts)
    assert kept.stat().st_mtime_ns == stamp and sum(int(c.sum()) for c in total.counted.values()) > 10_000
    (parts / "counts-0.safetensors").write_bytes(b"of another job")
    vocab(inputs, str(TINY), f"{out}/", sizes=[1024])
    assert not parts.exists()
    vocab(inputs, str(TINY), str(tmp_path / "quiet"), sizes=[1024])
    assert contents(out) == contents(tmp_path / "quiet")


def test_the_models_own_answers(tmp_path):
    """Prompts of the repository, answered by its model: its token_ids are counted, languages are told from the text."""
    prompts = [json.loads(line) for line in (ROOT / "examples/prompts/train.jsonl").read_text().splitlines()[:60]]
    answers = str(tmp_path / "answers.jsonl")
    distill(str(TINY), write(tmp_path / "prompts.jsonl", prompts), answers, max_new_tokens=24, batch_size=60)
    vocab([answers], str(TINY), str(tmp_path / "maps"), sizes=[1024, 2048], held_out=0.3)
    assert {"en-1024.pt", "zh-2048.pt", "code-1024.pt", "mixed-2048.pt"} <= set(contents(tmp_path / "maps"))
    report = json.loads((tmp_path / "maps" / "coverage.json").read_text())
    assert set(report["messages_whose_tokens_come_from"]) == {"token_ids"}
    tokens = sum(len(m["token_ids"]) for row in read_rows(answers) for m in row["messages"] if "token_ids" in m)
    assert sum(c["counted_tokens"] + c["held_out_tokens"] for c in report["cells"].values()) == tokens


def test_text_is_counted_as_the_tokenizer_encodes_it():
    texts = ["one  two\n\n\tthree 12,5", "计算机是什么？<|im_end|>", "def f(x):\n    return x # é \U0001f600"]
    chunk = [
        (
            str(i),
            {"language": "en", "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": t}]},
        )
        for i, t in enumerate(texts)
    ]
    found = count_chunk(chunk, CountSettings(held_out=0), VOCABULARY).tokens["en/general", False]
    tokenizer = load_tokenizer(str(TINY))
    plain = Counter(i for t in texts for i in tokenizer.encode(t, add_special_tokens=False))
    assert dict(zip(*(a.tolist() for a in found), strict=True)) == plain


def test_what_every_map_keeps():
    tokenizer = load_tokenizer(str(TINY))
    added = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>", "<tool_call>", "</tool_call>"]
    assert {tokenizer.convert_tokens_to_ids(token) for token in added} <= KEPT
    texts = {tokenizer.decode([i]) for i in KEPT}
    assert set("0123456789!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~ \n\t\r") <= texts
    runs = {i for i in range(6080) if tokenizer.decode([i]).isspace()}
    assert runs <= KEPT and len(runs) > 4
    # Whatever text there is can be said byte by byte.
    for text in ("\U0001f9a5", "ᚠᛇᚻ", "\x07"):
        assert all(len(t) == 1 and tokenizer.convert_tokens_to_ids(t) in KEPT
                   for t in tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)[0][0])  # fmt: skip


@pytest.mark.parametrize(
    ("row", "cell"),
    [
        ({"language": "zh-Hant", "category": "code"}, "zh/code"),
        ({"language": "en", "category": "math"}, "en/math"),
        ({"text": "请问计算机是什么？"}, "zh/general"),
        ({"text": "Could you please explain to me why the sky is blue and the grass is green, in simple words?"},
         "en/general"),
        ({"text": "42"}, "unknown/general"),
        ({"language": "../x", "category": ["a"]}, "_.._x/general"),
    ],
)  # fmt: skip
def test_cells(row, cell):
    messages = [{"role": "user", "content": row.pop("text", "q")}, {"role": "assistant", "content": "a"}]
    assert cell_of({**row, "messages": messages}).lstrip("_.") == cell.lstrip("_.")


def test_names_of_maps():
    cells = ["en/general", "en/code", "zh/code", "zh/math", "en/math"]
    assert [part_of(c, "language") for c in cells] == ["en", "code", "code", "zh", "en"]
    assert [part_of(c, "group") for c in cells] == ["general", "code", "zh", "zh", "math"]
    assert [part_of(c, "category") for c in ("en/poems", "zh/poems", "en/mixed")] == ["poems", "poems", "mixed_"]


def test_maps_that_do_not_fit_are_found(tmp_path, maps):
    shutil.copytree(maps, tmp_path / "maps")
    path = tmp_path / "maps" / "zh-1024.pt"
    about = path.with_suffix(".meta.json")
    text = about.read_text()
    about.write_text(text.replace(file_hash(TINY / "tokenizer.json"), "0" * 64))
    (line,) = verify_map(path, TINY)
    assert "another tokenizer.json" in line
    about.write_text(text)
    ids = torch.load(path, weights_only=True)
    torch.save([i for i in ids if i != 6082], path)
    first, second = verify_map(path, TINY)
    assert "not the ids" in first and "lacks 1 special and basic tokens, as 6082" in second
    torch.save([*ids, 6100], path)
    about.unlink()
    first, second = verify_map(path, TINY)
    assert "missing" in first and "holds 1 ids without a token, as 6100" in second
    torch.save([*ids, 6144], path)
    with pytest.raises(FastMTPError, match="holds id 6144"):
        verify_map(path, TINY)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"sizes": [6088]}, "--sizes 6088: the model has 6087 tokens"),
        ({"sizes": [64]}, r"--sizes 64: every map holds \d+ special and basic tokens"),
        ({}, "--sizes: the model has 6087 tokens; say how many"),
        ({"sizes": [1024], "coverage": 0.9}, "give one of them"),
        ({"coverage": 99}, "--coverage 99: must be above 0"),
        ({"by": "topic"}, "--by topic"),
        ({"count": "none"}, "--count none"),
        ({"jobs": 0}, "--jobs 0"),
        ({"held_out": 0}, "--held_out 0"),
        ({"sizes": [1024], "on_bad_row": "fix"}, "--on_bad_row fix"),
        ({"coverage": 0.9, "held_out": 1e-12}, "no held-out row of 'code' to measure on"),
    ],
)
def test_options_that_are_impossible(tmp_path, rows, options, says):
    with pytest.raises(FastMTPError, match=says):
        vocab([rows], str(TINY), str(tmp_path / "maps"), **options)
    assert not (tmp_path / "maps").exists()


def test_counts_that_are_none_are_refused(tmp_path):
    path = tmp_path / "counts.safetensors"
    for content in (b"x", (TINY / "model.safetensors").read_bytes()):
        path.write_bytes(content)
        with pytest.raises(FastMTPError, match="cannot be read as counts"):
            Counts.load(path)


def test_inputs_that_cannot_be_used(tmp_path, rows, maps):
    out = str(tmp_path / "maps")
    with pytest.raises(FastMTPError, match="already exists"):
        vocab([rows], str(TINY), str(maps), sizes=[1024])
    with pytest.raises(FastMTPError, match="named twice"):
        vocab([rows, rows], str(TINY), out, sizes=[1024])
    with pytest.raises(FastMTPError, match=r"none\.jsonl: cannot be read"):
        vocab([str(tmp_path / "none.jsonl")], str(TINY), out, sizes=[1024])
    with pytest.raises(FastMTPError, match=r"config\.json: not found"):
        vocab([rows], str(tmp_path), out, sizes=[1024])
    row = rows_of({"en": 1})[0]
    for ids, says in (
        (["7"], "token_ids must be a list of whole numbers"),
        ("7", "token_ids must be a list of whole numbers"),
        ([True], "token_ids must be a list of whole numbers"),
        ([10**30], "token_ids must be a list of whole numbers"),
        ([-1], "it has no token -1"),
        ([], "has no answer to count"),
    ):
        row["messages"][1]["token_ids"] = ids
        path = write(tmp_path / "bad.jsonl", [row])
        with pytest.raises(FastMTPError, match=f"bad.jsonl:1: .*{says}"):
            vocab([path], str(TINY), out, sizes=[1024])
        with pytest.raises(FastMTPError, match="no tokens to count"):
            vocab([path], str(TINY), out, sizes=[1024], on_bad_row="skip")
    many = rows_of({"en": 300})
    for number, row in enumerate(many):
        row["category"] = f"kind {number}"
    path = write(tmp_path / "many.jsonl", many)
    with pytest.raises(FastMTPError, match="more than 256 kinds of language and category"):
        vocab([path], str(TINY), out, sizes=[1024], by="category")
    vocab([path], str(TINY), out, sizes=[1024])
    broken = tmp_path / "broken"
    shutil.copytree(TINY, broken)
    (broken / "tokenizer.json").unlink()
    with pytest.raises(FastMTPError, match="tokenizer"):
        vocab([path], str(broken), str(tmp_path / "other"), sizes=[1024])
