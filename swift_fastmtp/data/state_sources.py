"""The engines that hidden states are asked of: what each serves, and how it hands states over.

* **SGLang** returns the states of a prompt in the answer (`return_hidden_states`), after the final norm
  (`batch_result_processor.py` `_append_prefill_hidden_states`): those that the last step of the prefill computed. A
  prefix that it has cached, and earlier chunks of a long prompt, are missing: its radix cache and chunks must be off.
  They come as bytes from a server with our plugin (`state_wire.py`).
* **vLLM** keeps the states of chosen layers in its KV cache (`extract_hidden_states`), cached prefixes and chunks too,
  and a connector writes those of a finished request to a file; the answer has its path. The last layer's are those
  before the final norm.
"""

import asyncio
import fcntl
import json
import os
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.quantization import read_quantization
from ..errors import FastMTPError
from ..model.hidden_cache import EngineStates
from . import state_wire
from .client import Hear, MalformedError, Server, Servers
from .vllm_pages import version_of

_SHORT = {"half": "float16", "float": "float32"}
"""SGLang's other words for its `--dtype`."""
SGLANG_FLAGS = "--enable-return-hidden-states --disable-radix-cache --chunked-prefill-size -1"


class Adapter(NamedTuple):
    """A LoRA adapter that servers have beside the model."""

    name: str
    """As requests name it."""
    identity: str
    """`backbone_lora.lora_hash`."""


class SGLangStates:
    """States from SGLang servers of `target`, with an adapter if one is named."""

    before_norm = False
    start: ClassVar[str] = f"start SGLang with {SGLANG_FLAGS}"

    def __init__(self, target: Checkpoint, adapter: Adapter | None = None) -> None:
        self.target, self.adapter = target, adapter

    async def describe(self, servers: Servers, server: Server, _states_TD: torch.Tensor) -> EngineStates:
        """Where its states come from. Raises `FastMTPError` for a server whose states are no use."""
        info = await servers.ask_one(server, "/server_info")
        if info.get("speculative_algorithm"):
            raise FastMTPError(f"{server.url}: drafts; hidden states are asked from a server without drafts")
        dtype = str(info.get("dtype") or "auto")
        if dtype == "auto":
            stored = self.target.value("dtype") or self.target.value("torch_dtype") or "bfloat16"
            dtype = str(stored).removeprefix("torch.")
        dtype = _SHORT.get(dtype, dtype)
        quantization = info.get("quantization") or _method(self.target)
        width = self.target.value("hidden_size")
        version, lora = str(info.get("version")), _identity(self.adapter)
        return EngineStates("SGLang", version, dtype, quantization, width, self.before_norm, lora)

    async def ask(self, server: Server, _hear: Hear, *, ids: tuple[int, ...]) -> torch.Tensor:
        """States [T, D] of a prompt: in the engine's dtype from a server with our plugin, else float32.

        Raises `MalformedError`, after which a request is repeated.
        """
        sampling = {"max_new_tokens": 1, "temperature": 0, "custom_params": {state_wire.PARAMETER: True}}
        body = {"input_ids": list(ids), "sampling_params": sampling, "return_hidden_states": True}
        if self.adapter:
            body["lora_path"] = self.adapter.name
        meta_info = (await server.post("/generate", body)).get("meta_info") or {}
        try:
            if state_wire.KEY in meta_info:
                return state_wire.decode(meta_info[state_wire.KEY][0])
            return torch.from_numpy(np.asarray((meta_info.get("hidden_states") or [[]])[0], np.float32))
        except (ValueError, TypeError, LookupError) as error:
            raise MalformedError(f"hidden states that are none ({error})") from None


class VLLMStates:
    """States from vLLM servers of `target`, which write them into `folder`; with an adapter if one is named."""

    before_norm = True

    def __init__(self, target: Checkpoint, folder: str, adapter: Adapter | None = None) -> None:
        self.target, self.folder, self.adapter = target, Path(folder).resolve(), adapter
        self._models: dict[str, str] = {}
        """What each server calls its model."""

    @property
    def start(self) -> str:
        layers = {"eagle_aux_hidden_state_layer_ids": [self.target.value("num_hidden_layers")]}
        speculative = {
            "method": "extract_hidden_states",
            "num_speculative_tokens": 1,
            "draft_model_config": {"hf_config": layers},
        }
        transfer = {
            "kv_connector": "HiddenStatesConnector",
            "kv_connector_module_path": "swift_fastmtp.serving.compat_vllm_states",
            "kv_role": "kv_producer",
            "kv_connector_extra_config": {"shared_storage_path": str(self.folder)},
        }
        flags = f"--speculative-config '{json.dumps(speculative)}' --kv-transfer-config '{json.dumps(transfer)}'"
        return f"start vLLM with {flags}"

    async def describe(self, servers: Servers, server: Server, states_TD: torch.Tensor) -> EngineStates:
        """Where its states come from; vLLM says neither dtype nor quantization, the states and the folder do."""
        version = version_of(await servers.ask_one(server, "/version"))
        dtype = str(states_TD.dtype).removeprefix("torch.")
        width = self.target.value("hidden_size")
        method, lora = _method(self.target), _identity(self.adapter)
        return EngineStates("vLLM", str(version), dtype, method, width, self.before_norm, lora)

    async def ask(self, server: Server, _hear: Hear, *, ids: tuple[int, ...]) -> torch.Tensor:
        """States [T, D] of a prompt, in the engine's dtype.

        Raises `MalformedError`, after which a request is repeated, and `FastMTPError` for a path that is not in the
        folder.
        """
        if server.url not in self._models:
            self._models[server.url] = min(await server.model_names(), default="")
        model = self.adapter.name if self.adapter else self._models[server.url]
        body = {"model": model, "prompt": list(ids), "max_tokens": 1, "temperature": 0}
        answer = await server.post("/v1/completions", body)
        path = (answer.get("kv_transfer_params") or {}).get("hidden_states_path")
        if path is None:
            raise FastMTPError(f"{server.url}: returns no hidden states; {self.start}")
        # Whoever answers names the file, which is removed: nothing but the folder that the user named.
        file = Path(str(path))
        if file.suffix != ".safetensors" or file.parent.resolve() != self.folder:
            raise FastMTPError(f"{server.url}: writes hidden states elsewhere than to {self.folder}; {self.start}")
        return await asyncio.to_thread(self._read, file, ids)

    def _read(self, file: Path, ids: tuple[int, ...]) -> torch.Tensor:
        lock = file.with_name(f"{file.name}.lock")
        try:
            with open(lock) as held:
                fcntl.flock(held, fcntl.LOCK_SH)  # until vLLM has written the file
                tensors = load_file(file)
        except (OSError, SafetensorError) as error:
            raise MalformedError(f"hidden states that cannot be read ({error})") from None
        os.unlink(file)
        os.unlink(lock)
        states = tensors.get("hidden_states", torch.empty(0))
        if tensors.get("token_ids", torch.empty(0)).tolist() != list(ids) or states.ndim != 3:
            raise MalformedError("hidden states of another prompt")
        return states.flatten(1)  # one layer


def check_shape(source: SGLangStates | VLLMStates, url: str, states_TD: torch.Tensor, tokens: int) -> None:
    """Raises `FastMTPError`, with how to start the server, if these are not the states of a whole prompt."""
    width = source.target.value("hidden_size")
    if states_TD.shape != (tokens, width):
        raise FastMTPError(
            f"{url}: returns hidden states of shape {list(states_TD.shape)} for a prompt of {tokens} tokens and width "
            f"{width}; {source.start}, and the model whose folder is --model"
        )


def check_norm(source: SGLangStates | VLLMStates, url: str, states_TD: torch.Tensor, factor_D: torch.Tensor) -> None:
    """Raises `FastMTPError` if these states are from the other side of the final norm than the engine's are.

    Args:
        factor_D: what that norm multiplies by.
    """
    if _is_normed(states_TD.float(), factor_D.float()) == source.before_norm:
        sides = ("after", "before") if source.before_norm else ("before", "after")
        raise FastMTPError(
            f"{url}: returns hidden states {sides[0]} the final norm, where those {sides[1]} it are expected; "
            f"{source.start}, and the model whose folder is --model"
        )


def _is_normed(states_TD: torch.Tensor, factor_D: torch.Tensor) -> bool:
    """Without the factor, a row that comes from an RMS norm has a root mean square of 1."""
    used = factor_D.abs() > 1e-3 * factor_D.abs().max()
    rms_T = (states_TD[:, used] / factor_D[used]).square().mean(1).sqrt()
    return bool((rms_T - 1).abs().median() < 0.03)


def _identity(adapter: Adapter | None) -> str | None:
    return adapter.identity if adapter else None


def _method(target: Checkpoint) -> str | None:
    quantization = read_quantization(target.config, target.folder)
    return quantization.method if quantization else None
