"""Which map each request of a vLLM server drafts with, and the draft's logits accordingly."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..vocab.languages import Languages
from .compat_vllm import ServerParts, draft_parts, route_drafts
from .maps import AGAIN_EVERY, AGAIN_TOKENS, EVERY, make_head


class VLLMRouter:
    """The maps of the requests in a batch.

    Args:
        drafter: vLLM's proposer of the V1 runner, its draft model loaded.
        files: language -> file of its map, or `EVERY` -> the one map of all requests.

    Raises `FastMTPError` for maps that do not belong to the model, or an output matrix whose rows cannot be read.
    """

    def __init__(self, drafter: Any, server: ServerParts, files: Mapping[str, Path]) -> None:
        processor, matrix = draft_parts(drafter.model)
        # Tensor parallelism: this rank's tokens; vLLM gathers the logits of all ranks, which see the same requests.
        self.head = make_head(files, server.tokenizer, matrix)
        self.identify = None if EVERY in files else _languages(server, files)
        self.numbers = {name: i for i, name in enumerate(self.head.languages)}
        self.device = matrix.weight.device
        self.language_N: torch.Tensor | None = None
        route_drafts(drafter, processor, self)

    @property
    def has_begun(self) -> bool:
        """Whether there was any request yet."""
        return self.language_N is not None

    def begin(self, requests: list[Any]) -> None:
        """The requests of a batch that is about to be drafted for, in the order of its rows."""
        numbers = [self._number(request) for request in requests]
        self.language_N = torch.tensor(numbers, dtype=torch.int32).to(self.device, non_blocking=True)

    def logits(self, hidden_ND: torch.Tensor, weight_VD: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """[N, V] of one draft step, a row per request."""
        assert self.language_N is not None
        return self.head(hidden_ND, weight_VD, self.language_N, dtype=dtype)

    def _number(self, request: Any) -> int:
        """The map of a request, which is kept with it: it lives and ends with the request."""
        if self.identify is None:
            return self.numbers[EVERY]
        if not hasattr(request, "fastmtp_map"):
            request.fastmtp_map = self._of_name(self.identify.of_prompt(request.prompt_token_ids or []))
            request.fastmtp_steps = 0
        elif request.output_token_ids:  # not while a long prompt is read in parts
            request.fastmtp_steps += 1
            if request.fastmtp_steps % AGAIN_EVERY == 0:
                # A token that is still being computed is -1 (asynchronous scheduling).
                answer = [id for id in request.output_token_ids[-AGAIN_TOKENS:] if id >= 0]
                request.fastmtp_map = self._of_name(self.identify(answer))
        return request.fastmtp_map

    def _of_name(self, name: str | None) -> int:
        return self.numbers.get(name or "", self.head.full)


def _languages(server: ServerParts, names: Mapping[str, Path]) -> Languages:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(server.tokenizer, trust_remote_code=server.trust_remote_code)
    return Languages(tokenizer, names)
