"""Hidden states of prompts from vLLM, on any device: what `fastmtp hidden --engine vllm` asks a server for.

vLLM keeps hidden states of the target's layers in blocks of its KV cache (`extract_hidden_states`), and a connector
writes those of a finished request to a file. Its own `ExampleHiddenStatesConnector` copies on a CUDA stream; here is
the one method of it that does, for other devices. vLLM imports this file by name (`kv_connector_module_path`).

Tried with vLLM 0.32.0 on a CPU. On a GPU vLLM's own method is called; that was not run.
"""

import os
from typing import Any

import torch
from vllm.distributed.kv_transfer.kv_connector.v1 import example_hidden_states_connector as stock

from ..errors import FastMTPError
from ..files.libraries import Name, check_names
from .maps import or_exit

_CONNECTOR = "vllm.distributed.kv_transfer.kv_connector.v1.example_hidden_states_connector"
NAMES = (
    Name(
        "vllm",
        f"{_CONNECTOR}:ExampleHiddenStatesConnector._submit_async_write",
        "it copies hidden states out of the KV cache",
        first=("self", "pending"),
    ),
    Name(
        "vllm",
        f"{_CONNECTOR}:ExampleHiddenStatesConnector._write_tensors",
        "it writes a file and lets go of its lock",
        first=("tensors", "event", "filename", "lock_fd"),
    ),
    Name(
        "vllm",
        f"{_CONNECTOR}:extract_from_kv_cache",
        "it finds a request's hidden states",
        first=("kv_cache", "slot_mapping", "num_tokens"),
    ),
)


def check() -> None:
    """Raises `FastMTPError` if a name is gone, or takes something else."""
    check_names(NAMES)


def check_layers(vllm_config: Any) -> None:
    """Raises `FastMTPError` if other states are asked for than the last layer's, which nobody could tell later."""
    asked = getattr(
        vllm_config.speculative_config.draft_model_config.hf_config, "eagle_aux_hidden_state_layer_ids", None
    )
    last = vllm_config.model_config.hf_text_config.num_hidden_layers
    if list(asked or []) != [last]:
        raise FastMTPError(
            f"hidden states of layers {asked} are asked for; `fastmtp hidden` takes those of the last alone: "
            f"eagle_aux_hidden_state_layer_ids must be [{last}]"
        )


class _Done:
    """In place of a CUDA event: of a copy that was made at once."""

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass


class HiddenStatesConnector(stock.ExampleHiddenStatesConnector):
    """vLLM's, without CUDA where there is none."""

    def __init__(self, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        or_exit(check)
        super().__init__(vllm_config, *args, **kwargs)
        or_exit(check_layers, vllm_config)

    def _submit_async_write(self, pending: Any) -> None:
        if self._kv_cache is not None and self._kv_cache.is_cuda:
            super()._submit_async_write(pending)
            return
        if not self._is_tp_rank_zero:
            return
        blocks = torch.tensor(pending.block_ids)
        slots = (blocks[:, None] * self._block_size + torch.arange(self._block_size)).flatten()
        states = stock.extract_from_kv_cache(self._kv_cache, slots, len(pending.token_ids))
        tensors = {"hidden_states": states.contiguous(), "token_ids": pending.token_ids.clone()}
        os.makedirs(os.path.dirname(pending.filename), exist_ok=True)
        self._write_tensors(tensors, _Done(), pending.filename, self._lock_fds.pop(pending.req_id, None))
        self._req_copy_events[pending.req_id] = _Done()  # by which vLLM frees the request's blocks
