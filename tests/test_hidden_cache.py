"""The cache gives back what the backbone computed, survives kills, and belongs to one model."""

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.models import packed_positions, random_mimo
from helpers.paths import TINY
from transformers import AutoTokenizer

from swift_fastmtp.data.examples import training_examples
from swift_fastmtp.errors import FastMTPError
from swift_fastmtp.files.rows import read_rows
from swift_fastmtp.method.config import FastMTPConfig
from swift_fastmtp.method.rollout import segment_ids
from swift_fastmtp.model.hidden_cache import _RECORD, HiddenCache
from swift_fastmtp.model.loading import load_model
from swift_fastmtp.simulate.simulate import simulate

KEY = {"backbone": "abc"}


def open_cache(folder, rank=0, *, key=KEY, width=8, dtype=torch.float32, max_bytes=10**6):
    return HiddenCache(folder, key, width, dtype, max_bytes, rank)


def documents(*lengths, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 999, (n,), generator=g) for n in lengths], [
        torch.randn(n, 8, generator=g) for n in lengths
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_states_come_back_bit_for_bit_in_a_later_process(tmp_path, dtype):
    ids, states = documents(5, 1, 12)
    states = [s.to(dtype) for s in states]
    cache = open_cache(tmp_path, dtype=dtype)
    assert cache.get(ids) is None
    cache.put(ids, states)
    del cache
    found = open_cache(tmp_path, dtype=dtype).get([ids[2], ids[0]])
    assert torch.equal(found[0], states[2]) and torch.equal(found[1], states[0])


def test_ranks_read_each_other(tmp_path):
    one, two = open_cache(tmp_path, 0), open_cache(tmp_path, 1)
    ids, states = documents(4, 6)
    one.put(ids[:1], states[:1])
    two.put(ids[1:], states[1:])
    for cache in (one, two):
        assert all(torch.equal(a, b) for a, b in zip(cache.get(ids), states, strict=True))


@pytest.mark.parametrize(
    ("name", "lost"), [("index-0.bin", 1), ("index-0.bin", 31), ("states-0.bin", 1), ("states-0.bin", 40)]
)
def test_a_torn_tail_is_cut_off(tmp_path, name, lost):
    """Whatever a kill or a power cut left of the last document, the ones before it stay, and writing goes on."""
    ids, states = documents(3, 4, 5)
    cache = open_cache(tmp_path)
    cache.put(ids[:2], states[:2])
    del cache
    whole = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(whole[:-lost])
    cache = open_cache(tmp_path)
    assert torch.equal(cache.get(ids[:1])[0], states[0]) and cache.get(ids[1:2]) is None
    cache.put(ids[1:], states[1:])
    assert all(torch.equal(a, b) for a, b in zip(cache.get(ids), states, strict=True))


def test_records_of_states_that_are_not_there_are_passed_over(tmp_path):
    """Of another rank, and of this one: numbers that a broken disk made up, also those whose sum is small again. So are
    those behind them, which the next writer cuts off."""
    one = open_cache(tmp_path, 1)
    ids, states = documents(5, 3)
    one.put(ids[:1], states[:1])
    one._own[1].write(
        np.array([(b"a" * 16, 2**63, 5), (b"b" * 16, 2**64 - 1, 2), (b"c" * 16, 6, 30)], _RECORD).tobytes()
    )
    one.put(ids[1:], states[1:])
    zero = open_cache(tmp_path, 0)
    assert torch.equal(zero.get(ids[:1])[0], states[0]) and zero.get(ids[1:]) is None
    del one
    again = open_cache(tmp_path, 1)
    assert torch.equal(again.get(ids[:1])[0], states[0]) and again.get(ids[1:]) is None
    again.put(ids[1:], states[1:])
    for cache in (zero, again):
        assert all(torch.equal(a, b) for a, b in zip(cache.get(ids), states, strict=True))


def test_what_is_no_file_is_passed_over_or_refused(tmp_path):
    (tmp_path / "index-7.bin").mkdir()
    open_cache(tmp_path)
    os.mkfifo(tmp_path / "states-3.bin")
    with pytest.raises(FastMTPError, match="is a pipe"):
        open_cache(tmp_path)


def test_nothing_beyond_the_limit_is_written(tmp_path):
    ids, states = documents(4, 4, 4)
    cache = open_cache(tmp_path, max_bytes=2 * 4 * 8 * 4)
    with pytest.warns(UserWarning, match="full"):
        cache.put(ids, states)
    assert cache.num_bytes == 2 * 4 * 8 * 4 and cache.get(ids[:2]) is not None and cache.get(ids[2:]) is None


@pytest.mark.parametrize("change", [{"key": {"backbone": "other"}}, {"dtype": torch.bfloat16}, {"width": 16}])
def test_a_folder_of_another_model_is_refused(tmp_path, change):
    open_cache(tmp_path)
    with pytest.raises(FastMTPError, match="hidden states of another model"):
        open_cache(tmp_path, **change)


def test_a_folder_of_an_earlier_version_is_refused(tmp_path):
    """It does not say what its states depend on besides weights and attention."""
    old = {"schema": "swift_fastmtp.hidden_cache/1", **KEY, "width": 8, "dtype": "torch.float32"}
    (tmp_path / "cache.json").write_text(json.dumps(old))
    with pytest.raises(FastMTPError, match=r"of another version of this package .* or delete this one"):
        open_cache(tmp_path)


@pytest.fixture(scope="module")
def attach(tmp_path_factory):
    """Opens the cache of a run on the tiny model as the trainer does, with another config.json or other arguments."""
    datasets = pytest.importorskip("datasets")
    from swift_fastmtp.swift_plugin.cache import attach_hidden_cache

    work = tmp_path_factory.mktemp("attach")

    def open_run(cache, name="base", bf16=False, fp16=False, attention="sdpa", **config):
        folder = work / name
        if not folder.exists():
            shutil.copytree(TINY, folder)
            old = json.loads((folder / "config.json").read_text())
            (folder / "config.json").write_text(json.dumps({k: v for k, v in {**old, **config}.items() if v != "gone"}))
        model = load_model(folder, torch.bfloat16)
        model.set_attn_implementation(attention)
        model.model_dir = folder
        model.fastmtp = FastMTPConfig(hidden_cache=str(cache), hidden_cache_gb=1)
        args = SimpleNamespace(max_steps=0, num_train_epochs=3, bf16=bf16, fp16=fp16)
        attach_hidden_cache(args, model, [datasets.Dataset.from_dict({"lengths": [9, 9]})])
        return model

    return open_run


# What of a run changes the states, and how the refusal names it.
CHANGES = {
    "rope_theta": ({"rope_theta": 5e4}, "rope_theta is 10000, this run has 50000"),
    "rope_scaling": (
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8192}}, "rope"
    ),
    "norms": ({"rms_norm_eps": 1e-3}, "rms_norm_eps is 1e-05, this run has 0.001"),
    "windows": ({"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}, "layer_types|window"),
    "activation": ({"hidden_act": "gelu"}, "hidden_act is 'silu', this run has 'gelu'"),
    "autocast": ({"bf16": True}, "autocast is None, this run has 'torch.bfloat16'"),
    "autocast in fp16": ({"fp16": True}, "autocast is None, this run has 'torch.float16'"),
    "attention": ({"attention": "eager"}, "attention is 'sdpa', this run has 'eager'"),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_a_run_that_would_compute_other_states_is_refused(change, attach, tmp_path):
    changed, message = CHANGES[change]
    attach(tmp_path)
    name = "base" if {"bf16", "fp16", "attention"} & changed.keys() else change
    with pytest.raises(FastMTPError, match=f"holds hidden states of another model .*{message}"):
        attach(tmp_path, name, **changed)


def test_a_run_that_computes_the_same_states_goes_on(attach, tmp_path):
    """Whoever wrote config.json, and in which form; what only heads, tokenizers and generation read."""
    attach(tmp_path)
    attach(tmp_path, "saved", transformers_version="9", use_cache=False, eos_token_id=1, torch_dtype="gone",
           num_nextn_predict_layers=1, _name_or_path="elsewhere")  # fmt: skip
    attach(tmp_path, "new form", rope_theta="gone", rope_parameters={"rope_type": "default", "rope_theta": 10000})


def test_simulate_reads_what_training_kept(attach, rows, tmp_path, monkeypatch):
    """The states of a run's examples are those of `--answers given` on its rows: the backbone computes none."""
    model = attach(tmp_path / "cache")
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    for row in read_rows(rows, 4):
        for example in training_examples(tokenizer, row):
            ids = torch.tensor(example.ids)[None]
            positions = torch.arange(ids.shape[1])[None]
            model.backbone_states(ids, torch.ones_like(ids), positions, segment_ids(positions))
    model.hidden_cache = None
    options = {"answers": "given", "max_rows": 4, "dtype": "bfloat16"}
    (plain,) = simulate(str(model.model_dir), [], str(rows), **options)
    written = (tmp_path / "cache" / "states-0.bin").stat().st_mtime_ns
    monkeypatch.setattr(HiddenCache, "put", lambda *_: pytest.fail("computed again"))
    (cached,) = simulate(str(model.model_dir), [], str(rows), hidden_cache=str(tmp_path / "cache"), **options)
    # bfloat16 rounds in batches of another shape otherwise.
    assert cached.marginal == pytest.approx(plain.marginal, abs=0.05)
    assert (tmp_path / "cache" / "states-0.bin").stat().st_mtime_ns == written


def test_states_under_autocast_are_not_those_without(tmp_path):
    """Whatever the folder says: an evaluation without autocast inside a run with it computes its own."""
    model = random_mimo(2)
    model.hidden_cache = open_cache(tmp_path, width=32)
    ids = torch.randint(0, 97, (1, 12))
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model(input_ids=ids, labels=ids).step_loss
        assert torch.equal(model(input_ids=ids, labels=ids).step_loss, rounded)
    plain = model(input_ids=ids, labels=ids).step_loss
    model.hidden_cache = None
    assert torch.equal(plain, model(input_ids=ids, labels=ids).step_loss)


def test_two_runs_do_not_write_one_file(tmp_path):
    ids, states = documents(5, 7, 9)
    early, writer = open_cache(tmp_path), open_cache(tmp_path)
    writer.put(ids[:1], states[:1])
    with pytest.raises(FastMTPError, match="another run is writing"):
        open_cache(tmp_path)
    with pytest.raises(FastMTPError, match="another run is writing"):
        early.put(ids[1:2], states[1:2])
    assert torch.equal(early.get(ids[:1])[0], states[0])
    del writer
    early.put(ids[1:], states[1:])
    assert all(torch.equal(a, b) for a, b in zip(early.get(ids), states, strict=True))


def read_in_a_process(folder, pipe, more):
    """Says what it has read, or why not, and keeps the cache open until it is told to end."""
    try:
        cache = open_cache(folder)
        if more:
            cache.put(*documents(8, seed=1))
        ids, states = documents(5, 1, 12)
        pipe.send("as computed" if all(map(torch.equal, cache.get(ids), states)) else "others")
    except FastMTPError as error:
        pipe.send(str(error))
    pipe.recv()


def test_a_complete_cache_is_read_by_several_runs_at_once(tmp_path):
    """Real processes, which all have it open; the last adds to it, which readers survive and further runs do not."""
    open_cache(tmp_path).put(*documents(5, 1, 12))
    context = multiprocessing.get_context("fork")
    running = []

    def answer(more=False):
        ours, theirs = context.Pipe()
        process = context.Process(target=read_in_a_process, args=(tmp_path, theirs, more))
        process.start()
        running.append((process, ours))
        assert ours.poll(60)
        return ours.recv()

    assert [answer(), answer(), answer(more=True)] == ["as computed"] * 3
    assert "another run is writing this cache" in answer()
    for process, pipe in running:
        pipe.send("end")
        process.join(60)
        assert process.exitcode == 0
    assert open_cache(tmp_path).get([*documents(5, 1, 12)[0], *documents(8, seed=1)[0]]) is not None


def test_of_runs_that_start_at_once_the_first_has_the_folder(tmp_path):
    """All see an empty folder, and each is of another model."""
    context = multiprocessing.get_context("fork")
    start, opened = context.Event(), context.Queue()

    def run(name):
        start.wait(60)
        try:
            opened.put(open_cache(tmp_path / "new", key={"backbone": name})._named_by)
        except FastMTPError as error:
            opened.put(str(error))

    processes = [context.Process(target=run, args=(name,)) for name in "abcdef"]
    for process in processes:
        process.start()
    start.set()
    answers = [opened.get(timeout=60) for _ in processes]
    for process in processes:
        process.join(60)
    assert sum("hidden states of another model" in answer for answer in answers) == len(processes) - 1


def test_a_complete_cache_is_read_where_nothing_may_be_written(tmp_path, monkeypatch):
    ids, states = documents(5, 7)
    open_cache(tmp_path).put(ids, states)
    monkeypatch.setattr(HiddenCache, "_open_own", lambda self: pytest.fail("opened to write"))
    assert torch.equal(open_cache(tmp_path).get(ids)[1], states[1])


@pytest.mark.matrix
def test_killed_at_any_moment(tmp_path):
    """kill -9 while writing, several times: what is found afterwards is right, and no document is there twice."""
    script = (
        "import sys, torch; sys.path.insert(0, 'tests'); from test_hidden_cache import open_cache, documents\n"
        "cache = open_cache(sys.argv[1], max_bytes=10**9); print('go', flush=True)\n"
        "for seed in range(4000):\n    cache.put(*documents(50, seed=seed))\n"
    )
    for pause in (0.02, 0.1, 0.05):
        child = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        child.stdout.readline()
        time.sleep(pause)
        child.send_signal(signal.SIGKILL)
        child.wait()
    cache = open_cache(tmp_path, max_bytes=10**9)
    cache.put(*documents(50, seed=4000))  # the next writer cuts off states whose record the last kill prevented
    count = 0
    for seed in range(4001):
        ids, states = documents(50, seed=seed)
        found = cache.get(ids)
        if found is not None:
            assert torch.equal(found[0], states[0])
            count += 1
    assert count > 3 and cache.num_bytes == count * 50 * 8 * 4


def test_the_backbone_runs_in_the_first_epoch_only(tmp_path):
    """Losses with the cache equal those without it, padded and packed, and the second epoch computes no backbone."""
    model = random_mimo(2)
    calls = []
    model.model.layers[0].register_forward_hook(lambda *_: calls.append(1))
    docs = [torch.randint(0, 97, (n,)) for n in (9, 14, 5)]
    padded = torch.stack([torch.nn.functional.pad(d, (0, 14 - len(d))) for d in docs])
    mask = torch.stack([torch.arange(14) < len(d) for d in docs]).long()
    labels = padded.masked_fill(mask == 0, -100)
    plain = model(input_ids=padded, attention_mask=mask, labels=labels)
    model.hidden_cache = open_cache(tmp_path, width=32)
    first = model(input_ids=padded, attention_mask=mask, labels=labels)
    assert len(calls) == 2
    second = model(input_ids=padded, attention_mask=mask, labels=labels)
    # Packed documents are found one by one, whatever they were packed or padded with before.
    order = [2, 0, 1]
    packed = model(
        input_ids=torch.cat([docs[i] for i in order])[None],
        position_ids=packed_positions([len(docs[i]) for i in order]),
        labels=torch.cat([torch.cat([torch.tensor([-100]), docs[i][1:]]) for i in order])[None],
    )
    assert len(calls) == 2
    assert torch.equal(plain.step_loss, first.step_loss)
    torch.testing.assert_close(plain.step_loss, second.step_loss, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(plain.loss, packed.loss, atol=1e-5, rtol=1e-5)
