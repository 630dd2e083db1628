"""Hidden states from a server of the model, and training on them without the model's layers."""

import asyncio
import json
import shlex
import shutil
import subprocess
import sys
import time
from unittest import mock

import pytest
import torch
from helpers.adapters import save_adapter
from helpers.engine import HalfServer, Server, VLLMServer
from helpers.hidden import STATES, cache_of, states_of, write_rows
from helpers.models import CHECKPOINTS, quantized, save_dense
from helpers.paths import ROOT, TINY
from helpers.swift_runs import swift
from helpers.tiers import some_now
from safetensors.torch import load_file, save_file

from swift_fastmtp.checkpoint.checkpoint import Checkpoint
from swift_fastmtp.data import client, state_wire
from swift_fastmtp.data.chat_template import load_tokenizer
from swift_fastmtp.data.examples import training_examples
from swift_fastmtp.data.hidden import _documents
from swift_fastmtp.data.state_sources import SGLangStates, VLLMStates
from swift_fastmtp.errors import FastMTPError
from swift_fastmtp.export.graft import graft
from swift_fastmtp.files.rows import read_rows
from swift_fastmtp.method.config import FastMTPConfig
from swift_fastmtp.model.backbone_lora import lora_hash
from swift_fastmtp.model.hidden_cache import EngineStates, HiddenCache, engine_states
from swift_fastmtp.model.loading import load_model
from swift_fastmtp.model.without_backbone import load_without_backbone
from swift_fastmtp.serving.flags import command
from swift_fastmtp.serving.launch import serve_flags

SMALL = [
    *("--torch_dtype", "float32", "--fp16", "false", "--max_length", "256", "--max_steps", "6", "--save_steps", "6"),
    *("--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "1", "--learning_rate", "1e-3"),
    *("--add_version", "false", "--split_dataset_ratio", "0", "--dataloader_num_workers", "0"),
    *("--check_model", "false"),
]


@pytest.mark.parametrize("name", some_now(["tiny", *CHECKPOINTS]))
def test_a_model_without_its_layers_trains_alike(name, tmp_path):
    """Loss and gradients are those of the whole model, to the last bit."""
    base = TINY if name == "tiny" else CHECKPOINTS[name](tmp_path / "base")
    whole = load_model(base, torch.float32)
    part = load_without_backbone(Checkpoint(base), Checkpoint(base), torch.float32)
    assert sum(p.numel() for p in part.parameters()) < sum(p.numel() for p in whole.parameters())
    torch.manual_seed(0)
    ids = torch.randint(0, 6000, (1, 20))
    cache = cache_of(tmp_path / "cache", base, whole.config.hidden_size)
    cache.put([ids[0]], [states_of(whole, ids[0].tolist())])
    part.hidden_cache = cache
    gradients = []
    for model in (whole, part):
        model.freeze_backbone()
        model.train()
        model.fastmtp = FastMTPConfig(num_speculative_steps=2)
        model(input_ids=ids, labels=ids).loss.backward()
        gradients.append({n: p.grad for n, p in model.head_parameters().items()})
    assert gradients[0].keys() == gradients[1].keys()
    for tensor_name, gradient in gradients[0].items():
        if gradient is not None:  # an expert that no token chose
            assert torch.equal(gradient, gradients[1][tensor_name]), tensor_name


def test_what_is_not_in_the_cache_is_an_error(tmp_path):
    model = load_without_backbone(Checkpoint(TINY), Checkpoint(TINY), torch.float32)
    model.hidden_cache = cache_of(tmp_path / "cache", TINY, 192)
    with pytest.raises(FastMTPError, match=r"lacks the hidden states of a row of 8 tokens .*`fastmtp hidden`"):
        states_of(model, list(range(8)))


def test_a_cache_of_other_states_is_refused(tmp_path):
    cache_of(tmp_path / "cache", TINY, 192)
    assert engine_states(tmp_path / "cache").dtype == "float32" and engine_states(tmp_path) is None
    with pytest.raises(
        FastMTPError, match=r"another model \(dtype is 'torch.float32', this run has 'torch.bfloat16'\)"
    ):
        cache_of(tmp_path / "cache", TINY, 192, "bfloat16")
    with pytest.raises(FastMTPError, match="holds hidden states of another model"):  # a run that computes its own
        HiddenCache(tmp_path / "cache", {"backbone": "v2:0"}, 192, torch.float32, 2**30)


def test_a_quantized_matrix_is_an_error(tmp_path):
    shutil.copytree(TINY, tmp_path / "base")
    tensors = load_file(tmp_path / "base" / "model.safetensors")
    tensors["lm_head.weight"] = tensors["lm_head.weight"].to(torch.int8)
    save_file(tensors, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(FastMTPError, match=r"lm_head.weight is stored as torch.int8; embedding and output matrix"):
        load_without_backbone(Checkpoint(TINY), Checkpoint(tmp_path / "base"), torch.float32)


def test_rows_that_cannot_be_asked(tmp_path, capsys):
    """Named with file and row; skipped ones are counted."""
    rows = write_rows(tmp_path / "rows.jsonl", 2)
    with open(rows, "a") as file:
        file.write(json.dumps({"messages": [{"role": "assistant", "content": "", "token_ids": [9999]}]}) + "\n")
    with pytest.raises(FastMTPError, match=r"rows.jsonl:3: .*--on_bad_row skip"):
        list(_documents(str(TINY), [str(rows)], 6144, None, "stop"))
    assert len(list(_documents(str(TINY), [str(rows)], 6144, None, "skip"))) == 2
    assert "skipped: 1 rows" in capsys.readouterr().out


@pytest.mark.parametrize("name", some_now(["tiny", *CHECKPOINTS]))
def test_dtypes_are_those_of_the_whole_model(name, tmp_path):
    """In bfloat16 some of a layer stays float32."""
    base = TINY if name == "tiny" else CHECKPOINTS[name](tmp_path / "base")
    whole = load_model(base, torch.bfloat16)
    part = load_without_backbone(Checkpoint(base), Checkpoint(base), torch.bfloat16)
    expected = {tensor_name: tensor.dtype for tensor_name, tensor in whole.state_dict().items()}
    for tensor_name, tensor in part.state_dict().items():
        assert tensor.dtype == expected[tensor_name], tensor_name


# With real servers.


def hidden_command(model, rows, cache, server):
    paths = {"model": model, "dataset": rows, "hidden_cache": cache, "base_url": f"http://127.0.0.1:{server.port}"}
    options = [word for name, value in paths.items() for word in (f"--{name}", str(value))]
    return [sys.executable, "-m", "swift_fastmtp.cli", "hidden", *options]


def hidden(*where, more=()):
    """The command in a process of its own."""
    command = [*hidden_command(*where), *more]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)


def kill_while_it_writes(command, cache, number):
    """-9, as soon as a few more documents are there than were."""
    index = cache / "index-0.bin"
    size = index.stat().st_size
    with subprocess.Popen([*command, "--concurrency", "1"], stderr=subprocess.DEVNULL, cwd=ROOT) as process:
        while process.poll() is None and index.stat().st_size <= size + 32 * number:
            time.sleep(0.002)
        process.kill()


def ask(source, server, ids):
    """States of a prompt as a source gets them from a real server."""

    async def once():
        one = client.Server(f"http://127.0.0.1:{server.port}", None, 60.0)
        try:
            return await source.ask(one, lambda: None, ids=ids)
        finally:
            await one.close()

    return asyncio.run(once())


@pytest.mark.matrix
def test_states_and_weights_are_ours(installed, tmp_path):
    """In float32 an engine's states are transformers', and a run on them ends with the plain run's weights. From a
    server with our plugin they come as bytes, which are the lists."""
    rows = write_rows(tmp_path / "rows.jsonl")
    launch = ["python", "-m", "sglang.launch_server", "--model-path", str(TINY), "--trust-remote-code", *STATES]
    with Server(launch, tmp_path / "log", {"PYTHONPATH": str(installed[1])}) as server:
        source, ids = SGLangStates(Checkpoint(TINY)), tuple(range(100, 140))
        with mock.patch.object(state_wire, "decode", wraps=state_wire.decode) as decode:
            as_bytes = ask(source, server, ids)
            assert decode.call_count == 1
            with mock.patch.object(state_wire, "PARAMETER", "none_of_ours"):
                assert torch.equal(ask(source, server, ids), as_bytes)
            assert decode.call_count == 1
        first = hidden(TINY, rows, tmp_path / "cache", server, more=["--max_length", "40"])
        assert first.returncode == 0, first.stderr
        for number in range(3):
            kill_while_it_writes(hidden_command(TINY, rows, tmp_path / "cache", server), tmp_path / "cache", number)
        done = hidden(TINY, rows, tmp_path / "cache", server)
        assert done.returncode == 0 and "24 documents" in done.stdout, done.stderr
        assert " 0 of 24 documents were there" not in done.stderr  # it went on from the first
    model = load_model(TINY, torch.float32)
    cache = cache_of(tmp_path / "cache", TINY, 192)
    for row in read_rows(rows):
        (example,) = training_examples(load_tokenizer(str(TINY)), row)
        (states,) = cache.get([torch.tensor(example.ids)])
        torch.testing.assert_close(states, states_of(model, example.ids), atol=5e-5, rtol=0)
    assert_a_run_on_them_is_the_plain_one(rows, tmp_path, within=0.05)


def assert_a_run_on_them_is_the_plain_one(rows, folder, within, base=TINY, beside=TINY, **knobs):
    """`swift sft` of `beside` on the cache loads no backbone, and ends with the weights of a run of `base`, which
    computes the states, to a share of how far they moved: `within`."""
    weights = {}
    cache = {"fastmtp_hidden_cache": str(folder / "cache")}
    for name, model, more in (("plain", base, {}), ("engine", beside, cache)):
        out = folder / f"{name}-{knobs.get('fastmtp_engine', 'sglang')}"
        shared = ["--model_type", "fastmtp", "--model", model, "--dataset", rows, "--output_dir", out]
        done = swift("sft", *shared, *SMALL, "--model_kwargs", json.dumps({**knobs, **more}))
        assert ("no backbone is loaded" in done.stdout + done.stderr) == (name == "engine")
        weights[name] = load_file(out / "checkpoint-6" / "model.safetensors")
    start = Checkpoint(base)
    for name, tensor in weights["plain"].items():
        moved = (tensor - start.read(name).float()).abs().max()
        assert (tensor - weights["engine"][name]).abs().max() < within * moved + 1e-6, name


@pytest.mark.matrix
def test_states_from_vllm_are_ours(installed, tmp_path):
    """Those before the final norm, on a CPU, through its own extraction and a connector of ours."""
    rows, states = write_rows(tmp_path / "rows.jsonl"), tmp_path / "states"
    source = VLLMStates(Checkpoint(TINY), str(states))
    launch = ["vllm", "serve", str(TINY), "--trust-remote-code", *shlex.split(source.start.partition(" with ")[2])]
    more = ["--engine", "vllm", "--states_folder", str(states)]
    launch += ["--max-num-batched-tokens", "128"]  # a long prompt is computed in parts
    torch.manual_seed(0)
    long = tuple(torch.randint(5, 6000, (300,)).tolist())
    with VLLMServer(launch, tmp_path / "log", {"PYTHONPATH": str(installed[1])}) as server:
        done = hidden(TINY, rows, tmp_path / "cache", server, more=more)
        assert done.returncode == 0 and "24 documents" in done.stdout, done.stderr
        twice = [ask(source, server, long) for _ in range(2)]  # the second time most of it is in the prefix cache
        assert list(states.iterdir()) == []
        assert_one_line(hidden(TINY, rows, tmp_path / "none", server, more=["--engine", "vllm"]), "--states_folder")
    origin = engine_states(tmp_path / "cache")
    assert origin == EngineStates("vLLM", "0.32.0", "float32", None, 192, before_norm=True)
    cache = HiddenCache.from_engine(tmp_path / "cache", Checkpoint(TINY).fingerprint, origin, 0)
    model = load_model(TINY, torch.float32)
    model.fastmtp = FastMTPConfig(engine="vllm")
    for row in read_rows(rows):
        (example,) = training_examples(load_tokenizer(str(TINY)), row)
        (found,) = cache.get([torch.tensor(example.ids)])
        torch.testing.assert_close(found, states_of(model, example.ids), atol=2e-4, rtol=1e-5)
    for found in twice:
        torch.testing.assert_close(found, states_of(model, list(long)), atol=2e-4, rtol=1e-5)
    # As vLLM drafts from them, and, with the norm applied as they are read, as SGLang does.
    for engine in ("vllm", "sglang"):
        assert_a_run_on_them_is_the_plain_one(rows, tmp_path, within=0.15, fastmtp_engine=engine)


@pytest.mark.matrix
def test_states_of_a_llama_from_vllm_are_ours(tmp_path, installed):
    """Of another class than MiMo's, which vLLM gives out itself, for the layer beside it."""
    target = save_dense(tmp_path / "target", "llama")
    graft(target, tmp_path / "whole", init_from_last_layer=True)
    graft(target, tmp_path / "draft", init_from_last_layer=True, draft_only=True)
    rows, states = write_rows(tmp_path / "rows.jsonl"), tmp_path / "states"
    flags = shlex.split(VLLMStates(Checkpoint(target), str(states)).start.partition(" with ")[2])
    more = ["--engine", "vllm", "--states_folder", str(states)]
    environment = {"PYTHONPATH": str(installed[1])}
    with VLLMServer(["vllm", "serve", str(target), *flags], tmp_path / "log", environment) as server:
        done = hidden(tmp_path / "draft", rows, tmp_path / "cache", server, more=more)
    assert done.returncode == 0 and "24 documents" in done.stdout, done.stderr
    origin = engine_states(tmp_path / "cache")
    assert origin == EngineStates("vLLM", "0.32.0", "float32", None, 64, before_norm=True)
    cache = HiddenCache.from_engine(tmp_path / "cache", Checkpoint(target).fingerprint, origin, 0)
    model = load_model(tmp_path / "whole", torch.float32)
    for row in read_rows(rows):
        (example,) = training_examples(load_tokenizer(str(target)), row)
        (found,) = cache.get([torch.tensor(example.ids)])
        torch.testing.assert_close(model.model.norm(found), states_of(model, example.ids), atol=5e-5, rtol=0)
    assert_a_run_on_them_is_the_plain_one(rows, tmp_path, 0.15, tmp_path / "whole", tmp_path / "draft")


@pytest.mark.matrix
def test_states_of_base_and_adapter(tmp_path):
    """A server has two adapters, and each request names one. The cache knows which, and a run names it too."""
    adapter, other = (save_adapter(TINY, tmp_path / name, seed) for seed, name in enumerate(("first", "second")))
    rows = write_rows(tmp_path / "rows.jsonl")
    launch = ["python", "-m", "sglang.launch_server", "--model-path", str(TINY), "--trust-remote-code", *STATES]
    launch += ["--enable-lora", "--lora-paths", f"first={adapter}", f"of-another-name={other}"]
    asked = ["--backbone_lora", str(adapter)]
    with Server([*launch, "--lora-backend", "torch_native"], tmp_path / "log") as server:
        done = hidden(TINY, rows, tmp_path / "cache", server, more=asked)
        assert done.returncode == 0 and "24 documents" in done.stdout, done.stderr
        renamed = [*asked, "--served_adapter_name", "of-another-name"]
        done = hidden(TINY, rows, tmp_path / "named", server, more=renamed)
        assert done.returncode == 0, done.stderr
        assert_one_line(hidden(TINY, rows, tmp_path / "cache", server), "engine.backbone_lora")
        unknown = [*asked, "--served_adapter_name", "nobody"]
        assert_one_line(hidden(TINY, rows, tmp_path / "none", server, more=unknown), "nobody")
    origin = engine_states(tmp_path / "cache")
    assert origin == EngineStates("SGLang", "0.5.23", "float32", None, 192, backbone_lora=lora_hash(adapter))
    for folder, whose in (("cache", adapter), ("named", other)):
        cache = HiddenCache.from_engine(tmp_path / folder, Checkpoint(TINY).fingerprint, origin, 0)
        model = load_model(TINY, torch.float32, backbone_lora=whose)
        for row in read_rows(rows):
            (example,) = training_examples(load_tokenizer(str(TINY)), row)
            (found,) = cache.get([torch.tensor(example.ids)])
            torch.testing.assert_close(found, states_of(model, example.ids), atol=1e-4, rtol=0)
    assert_a_run_on_them_is_the_plain_one(rows, tmp_path, within=0.05, fastmtp_backbone_lora=str(adapter))
    shared = ["--model_type", "fastmtp", "--model", TINY, "--dataset", rows, "--output_dir", tmp_path / "refused"]
    for named, held in ((None, "an adapter"), (other, "another adapter")):
        knobs = {"fastmtp_hidden_cache": str(tmp_path / "cache"), "fastmtp_backbone_lora": str(named or "")}
        failed = swift("sft", *shared, *SMALL, "--model_kwargs", json.dumps(knobs), check=False)
        assert failed.returncode == 1 and f"holds an engine's states of {held}" in failed.stderr.splitlines()[-1]


@pytest.mark.matrix
def test_states_of_base_and_adapter_from_vllm(installed, tmp_path):
    adapter, states = save_adapter(TINY, tmp_path / "first"), tmp_path / "states"
    rows = write_rows(tmp_path / "rows.jsonl", 6)
    flags = shlex.split(VLLMStates(Checkpoint(TINY), str(states)).start.partition(" with ")[2])
    launch = ["vllm", "serve", str(TINY), "--trust-remote-code", *flags]
    launch += ["--enable-lora", "--lora-modules", f"first={adapter}"]
    more = ["--engine", "vllm", "--states_folder", str(states), "--backbone_lora", str(adapter)]
    with VLLMServer(launch, tmp_path / "log", {"PYTHONPATH": str(installed[1])}) as server:
        done = hidden(TINY, rows, tmp_path / "cache", server, more=more)
    assert done.returncode == 0, done.stderr
    origin = engine_states(tmp_path / "cache")
    assert origin.before_norm and origin.backbone_lora == lora_hash(adapter)
    cache = HiddenCache.from_engine(tmp_path / "cache", Checkpoint(TINY).fingerprint, origin, 0)
    model = load_model(TINY, torch.float32, backbone_lora=adapter)
    model.fastmtp = FastMTPConfig(engine="vllm")
    for row in read_rows(rows):
        (example,) = training_examples(load_tokenizer(str(TINY)), row)
        (found,) = cache.get([torch.tensor(example.ids)])
        torch.testing.assert_close(found, states_of(model, example.ids), atol=5e-4, rtol=1e-5)


@pytest.mark.matrix
def test_a_head_beside_a_quantized_model_is_trained_on_what_its_server_computes(tmp_path):
    """FP8 target, draft-only folder, states in bfloat16: from graft to a checkpoint that is served."""
    target = quantized(TINY, tmp_path / "target", (64, 64), ("norm", "embed_tokens", "lm_head", "mtp"))
    graft(target, tmp_path / "draft", TINY, draft_only=True)
    rows = write_rows(tmp_path / "rows.jsonl", 8)
    launch = ["python", "-m", "sglang.launch_server", "--model-path", str(target), "--trust-remote-code", *STATES]

    with HalfServer(launch, tmp_path / "log") as server:
        done = hidden(tmp_path / "draft", rows, tmp_path / "cache", server)
        assert done.returncode == 0, done.stderr
    assert engine_states(tmp_path / "cache") == EngineStates("SGLang", "0.5.23", "bfloat16", "fp8", 192)
    knobs = json.dumps({"fastmtp_hidden_cache": str(tmp_path / "cache")})
    out = tmp_path / "out"
    shared = ["--model_type", "fastmtp", "--model", tmp_path / "draft", "--dataset", rows, "--output_dir", out]
    swift("sft", *shared, *SMALL, "--model_kwargs", knobs)
    trained = Checkpoint(out / "checkpoint-6")
    assert trained.settings["base_fingerprint"] == Checkpoint(target).fingerprint
    words = command(serve_flags(out / "checkpoint-6"))
    assert words[words.index("--model-path") + 1] == str(target) and "unquant" in words


@pytest.mark.matrix
def test_servers_that_do_not_do(tmp_path):
    """Each is one line that says how to start it."""
    rows = write_rows(tmp_path / "rows.jsonl", 4)
    launch = ["python", "-m", "sglang.launch_server", "--model-path", str(TINY), "--trust-remote-code"]
    with Server(launch, tmp_path / "log") as server:
        assert_one_line(hidden(TINY, rows, tmp_path / "none", server), "--enable-return-hidden-states")
    with Server([*launch, *STATES[:2], "--chunked-prefill-size", "32"], tmp_path / "log") as server:
        assert_one_line(hidden(TINY, rows, tmp_path / "chunks", server), "--chunked-prefill-size -1")
    with Server([*launch, STATES[0]], tmp_path / "log") as server:
        # Each server is asked for one document first, so a prefix is in its cache by the second time.
        assert_one_line(hidden(TINY, rows, tmp_path / "prefixes", server), "--disable-radix-cache")


def assert_one_line(done, text):
    assert done.returncode == 1 and text in done.stderr and "Traceback" not in done.stderr, done.stderr
