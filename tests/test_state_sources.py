"""What engines hand over as hidden states: bytes are the lists, the wrong ones are refused, and so is a full disk."""

import asyncio
import fcntl
import json
import resource
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest
import torch
from helpers.adapters import save_adapter
from helpers.hidden import cache_of, states_of, write_rows
from helpers.listening import Listening
from helpers.models import CHECKPOINTS
from helpers.paths import ROOT, TINY
from helpers.tiers import some_now
from safetensors.torch import save_file

from swift_fastmtp.checkpoint.checkpoint import Checkpoint
from swift_fastmtp.data import state_sources, state_wire
from swift_fastmtp.data.client import MalformedError
from swift_fastmtp.data.hidden import hidden
from swift_fastmtp.data.state_sources import SGLangStates, VLLMStates, check_norm
from swift_fastmtp.errors import FastMTPError
from swift_fastmtp.method.config import FastMTPConfig
from swift_fastmtp.model.backbone_lora import lora_hash
from swift_fastmtp.model.hidden_cache import EngineStates, HiddenCache, engine_states
from swift_fastmtp.model.loading import load_model
from swift_fastmtp.model.without_backbone import final_norm_factor, load_without_backbone

WIDTH = 192
LIES = {"text": "x", "empty": {}, "another length": {"dtype": "float32", "shape": [2, 3], "base64": "AAAA"}}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_bytes_come_back(dtype):
    states = torch.randn(5, 8).to(dtype)
    assert torch.equal(state_wire.decode(json.loads(json.dumps(state_wire.encode(states[1:])))), states[1:])


@pytest.mark.parametrize("lie", LIES)
def test_bytes_that_are_none(lie):
    with pytest.raises(ValueError, match="cannot be read"):
        state_wire.decode(LIES[lie])


# The final norm


def states_before_norm(model, ids):
    """Of the last layer; what the final norm gets."""
    inputs = []
    hook = model.model.norm.register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
    after = states_of(model, ids)
    hook.remove()
    return inputs[0][0], after


@pytest.mark.parametrize("name", some_now(["tiny", *CHECKPOINTS]))
def test_each_side_of_the_final_norm_is_known(name, tmp_path):
    """In every family, whatever its norm multiplies by, in 16 bits too."""
    base = TINY if name == "tiny" else CHECKPOINTS[name](tmp_path / "base")
    checkpoint = Checkpoint(base)
    model = load_model(base, torch.float32)
    before, after = states_before_norm(model, list(range(5, 25)))
    factor = final_norm_factor(checkpoint, checkpoint.target)
    sglang, vllm = SGLangStates(checkpoint), VLLMStates(checkpoint, str(tmp_path))
    for dtype in (torch.float32, torch.bfloat16):
        check_norm(sglang, "url", after.to(dtype), factor)
        check_norm(vllm, "url", before.to(dtype), factor)
        with pytest.raises(FastMTPError, match="returns hidden states before the final norm, where those after it"):
            check_norm(sglang, "url", before.to(dtype), factor)
        with pytest.raises(FastMTPError, match=r"returns hidden states after the final norm.*eagle_aux_hidden_state"):
            check_norm(vllm, "url", after.to(dtype), factor)


@pytest.mark.parametrize("engine", ["sglang", "vllm"])
def test_states_before_the_norm_train_as_the_whole_model(engine, tmp_path):
    """For the engine that drafts from them and, once the norm is applied, for the one that does not."""
    whole = load_model(TINY, torch.float32)
    part = load_without_backbone(Checkpoint(TINY), Checkpoint(TINY), torch.float32)
    ids = torch.randint(0, 6000, (1, 20))
    origin = EngineStates("vLLM", "0.32.0", "float32", None, WIDTH, before_norm=True)
    cache = HiddenCache.from_engine(tmp_path / "cache", Checkpoint(TINY).fingerprint, origin, 2**30)
    cache.put([ids[0]], [states_before_norm(whole, ids[0].tolist())[0]])
    assert engine_states(tmp_path / "cache") == origin
    part.hidden_cache = cache
    gradients = []
    for model in (whole, part):
        model.freeze_backbone()
        model.train()
        model.fastmtp = FastMTPConfig(num_speculative_steps=2, engine=engine)
        model(input_ids=ids, labels=ids).loss.backward()
        gradients.append({n: p.grad for n, p in model.head_parameters().items()})
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name


def test_states_after_the_norm_are_not_what_vllm_drafts_from(tmp_path):
    from swift_fastmtp.swift_plugin.cache import _of_engine

    cache_of(tmp_path / "cache", TINY, WIDTH)
    model = load_without_backbone(Checkpoint(TINY), Checkpoint(TINY), torch.float32)
    model.model_dir = TINY
    for engine in ("sglang", "vllm"):
        model.fastmtp = FastMTPConfig(engine=engine, hidden_cache=str(tmp_path / "cache"))
        if engine == "sglang":
            assert _of_engine(model, engine_states(tmp_path / "cache")).width == WIDTH
        else:
            with pytest.raises(FastMTPError, match=r"after the final norm, .*`fastmtp hidden --engine vllm`"):
                _of_engine(model, engine_states(tmp_path / "cache"))


def test_a_cache_of_another_quantization_is_refused(tmp_path):
    fingerprint = Checkpoint(TINY).fingerprint
    plain, fp8 = (EngineStates("SGLang", "0.5.23", "bfloat16", method, WIDTH) for method in (None, "fp8"))
    HiddenCache.from_engine(tmp_path / "cache", fingerprint, fp8, 2**30)
    with pytest.raises(FastMTPError, match=r"another model \(engine.quantization is 'fp8', this run has None\)"):
        HiddenCache.from_engine(tmp_path / "cache", fingerprint, plain, 2**30)


# Servers


class Fake(Listening):
    """Answers as SGLang does, with the states that `states(ids)` gives."""

    def __init__(self, states):
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_):
                pass

            def do_GET(self):
                self.reply({"version": "0.5.23", "dtype": "float32"})

            def do_POST(self):
                ids = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["input_ids"]
                self.reply({"meta_info": {"hidden_states": [states(ids).tolist()]}})

            def reply(self, value):
                body = json.dumps(value).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

        fake.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        fake.url = f"http://127.0.0.1:{fake.http.server_port}"


def test_a_server_whose_states_are_before_the_norm(tmp_path):
    """One line, and nothing is kept of them."""
    model = load_model(TINY, torch.float32)
    rows = str(write_rows(tmp_path / "rows.jsonl", 2))
    with (
        Fake(lambda ids: states_before_norm(model, ids)[0]) as fake,
        pytest.raises(FastMTPError, match=r"before the final norm.*--disable-radix-cache"),
    ):
        hidden(str(TINY), [rows], str(tmp_path / "cache"), base_urls=[fake.url])
    assert not (tmp_path / "cache").exists()
    with Fake(lambda ids: states_of(model, ids)) as fake:
        assert hidden(str(TINY), [rows], str(tmp_path / "cache"), base_urls=[fake.url]) == 2


def test_a_server_that_ignores_the_adapter(tmp_path):
    adapter = str(save_adapter(TINY, tmp_path / "adapter"))
    model = load_model(TINY, torch.float32)
    rows = str(write_rows(tmp_path / "rows.jsonl", 2))
    with (
        Fake(lambda ids: states_of(model, ids)) as fake,
        pytest.raises(FastMTPError, match=r"its states with adapter are those without; serve the model with the ada"),
    ):
        hidden(str(TINY), [rows], str(tmp_path / "cache"), base_urls=[fake.url], backbone_lora=adapter)
    with pytest.raises(FastMTPError, match="--served_adapter_name goes with --backbone_lora"):
        hidden(str(TINY), [rows], str(tmp_path / "cache"), base_urls=["http://x"], served_adapter_name="a")
    assert not (tmp_path / "cache").exists()


def test_a_cache_knows_its_adapter(tmp_path):
    from swift_fastmtp.swift_plugin.model import _check_adapter

    first, second = (str(save_adapter(TINY, tmp_path / name, seed)) for seed, name in enumerate(("first", "second")))
    base = EngineStates("SGLang", "0.5.23", "float32", None, WIDTH)
    adapted = base._replace(backbone_lora=lora_hash(first))
    HiddenCache.from_engine(tmp_path / "cache", Checkpoint(TINY).fingerprint, adapted, 2**30)
    assert engine_states(tmp_path / "cache") == adapted
    with pytest.raises(FastMTPError, match=r"holds hidden states of another model \(engine.backbone_lora is"):
        HiddenCache.from_engine(tmp_path / "cache", Checkpoint(TINY).fingerprint, base, 2**30)
    _check_adapter("cache", adapted, first)
    _check_adapter("cache", base, "")
    for states, named, held in (
        (adapted, second, "another adapter"),
        (adapted, "", "an adapter"),
        (base, first, "base"),
    ):
        with pytest.raises(FastMTPError, match=rf"cache holds an engine's states of (the )?{held}"):
            _check_adapter("cache", states, named)


def test_a_disk_that_is_full(tmp_path):
    """The kernel refuses the file's next bytes: one line, and what is there is whole."""
    factor = final_norm_factor(Checkpoint(TINY), Checkpoint(TINY))
    rows = write_rows(tmp_path / "rows.jsonl", 6)
    command = [sys.executable, "-m", "swift_fastmtp.cli", "hidden", "--model", TINY, "--dataset", rows]
    command += ["--hidden_cache", tmp_path / "cache", "--concurrency", "1", "--base_url"]
    with Fake(lambda ids: factor.repeat(len(ids), 1)) as fake:
        done = subprocess.run(
            [*command, fake.url],
            capture_output=True,
            text=True,
            check=False,
            cwd=ROOT,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)),
        )
        line = done.stderr.strip().splitlines()[-1]
        assert done.returncode == 1 and "Traceback" not in done.stderr
        assert f"{tmp_path / 'cache'}: cannot be written" in line
        assert subprocess.run([*command, fake.url], check=False, cwd=ROOT).returncode == 0
    cache = cache_of(tmp_path / "cache", TINY, WIDTH)
    assert len(cache._places) == 6
    assert cache.num_bytes == sum(count for _, _, count in cache._places.values()) * cache.row_bytes


# vLLM's files


def vllm_answer(path, ids):
    """A stand-in for `client.Server`, of a server that answers with a path."""

    async def post(*_):
        return {"kv_transfer_params": {"hidden_states_path": str(path)}} if path else {}

    async def model_names():
        return {"model"}

    server = SimpleNamespace(url="http://vllm", post=post, model_names=model_names)
    return lambda source: asyncio.run(source.ask(server, lambda: None, ids=ids))


def write_states(path, ids, layers=1):
    save_file({"hidden_states": torch.randn(len(ids), layers, WIDTH), "token_ids": torch.tensor(ids)}, path)
    path.with_name(f"{path.name}.lock").touch()


def test_files_are_read_once_they_are_written(tmp_path):
    """Whoever writes holds the lock until then; both files are gone afterwards."""
    path = tmp_path / "states" / "request.safetensors"
    path.parent.mkdir()
    lock = open(f"{path}.lock", "w")  # noqa: SIM115
    fcntl.flock(lock, fcntl.LOCK_EX)

    def write():
        save_file({"hidden_states": torch.ones(3, 1, WIDTH), "token_ids": torch.tensor([1, 2, 3])}, path)
        lock.close()

    threading.Timer(0.3, write).start()
    states = vllm_answer(path, (1, 2, 3))(VLLMStates(Checkpoint(TINY), str(path.parent)))
    assert torch.equal(states, torch.ones(3, WIDTH)) and list(path.parent.iterdir()) == []


def test_files_of_others_are_left_alone(tmp_path):
    """A server names the file that is read and removed."""
    ours, others = tmp_path / "states", tmp_path / "others"
    for folder in (ours, others):
        folder.mkdir()
        write_states(folder / "x.safetensors", [1, 2])
    source = VLLMStates(Checkpoint(TINY), str(ours))
    for path in (others / "x.safetensors", ours / ".." / "others" / "x.safetensors", ours / "x.safetensors.lock"):
        with pytest.raises(FastMTPError, match=r"elsewhere than to .*states; start vLLM with --speculative-config"):
            vllm_answer(path, (1, 2))(source)
    assert (others / "x.safetensors").exists() and (ours / "x.safetensors").exists()
    with pytest.raises(FastMTPError, match=r"returns no hidden states; start vLLM with --speculative-config"):
        vllm_answer(None, (1, 2))(source)


def test_files_that_are_not_these_states(tmp_path):
    source = VLLMStates(Checkpoint(TINY), str(tmp_path))
    with pytest.raises(MalformedError, match="cannot be read"):
        vllm_answer(tmp_path / "gone.safetensors", (1, 2))(source)
    write_states(tmp_path / "x.safetensors", [1, 2, 3])
    with pytest.raises(MalformedError, match="of another prompt"):
        vllm_answer(tmp_path / "x.safetensors", (1, 2))(source)
    write_states(tmp_path / "y.safetensors", [1, 2], layers=2)
    states = vllm_answer(tmp_path / "y.safetensors", (1, 2))(source)
    with pytest.raises(FastMTPError, match=r"shape \[2, 384\] for a prompt of 2 tokens and width 192; start vLLM with"):
        state_sources.check_shape(source, "http://vllm", states, 2)
