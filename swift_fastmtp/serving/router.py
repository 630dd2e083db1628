"""Which language each request drafts in, and the draft's logits accordingly; and how often which map was used.

One `Router` per draft worker, that is per tensor-parallel rank; all ranks see the same tokens and choose alike.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from ..vocab.languages import Languages
from .compat_sglang import count_steps, draft_parts, route_logits
from .maps import AGAIN_EVERY, AGAIN_TOKENS, EVERY, make_head
from .routed_head import NOTHING

FULL = "full"
"""Label of requests that draft with the whole vocabulary."""


class Router:
    """Languages of the requests in SGLang's pool, and the head that computes their maps' logits.

    Args:
        draft: SGLang's `EagleDraftWorker`, its draft model loaded.
        files: language -> file of its map, or `EVERY` -> the one map of all requests.

    Raises `FastMTPError` for maps that do not belong to the model, or an output matrix whose rows cannot be read.
    """

    def __init__(self, draft: Any, server_args: Any, files: Mapping[str, Path]) -> None:
        parts = draft_parts(draft)
        folder = server_args.tokenizer_path or server_args.model_path
        # Tensor parallelism: this rank's tokens; the logits of all ranks are gathered behind the head, as ever.
        self.head = make_head(files, folder, parts.matrix)
        self.identify = None if EVERY in files else _languages(folder, server_args.trust_remote_code, files)
        self.numbers = {name: i for i, name in enumerate(self.head.languages)}
        # Row 0 of SGLang's pool stands for padded rows of captured graphs.
        self.languages = torch.full((parts.slots,), NOTHING, dtype=torch.int32, device=parts.matrix.weight.device)
        counts = server_args.enable_metrics and parts.matrix.start == 0  # one of the ranks, which all see the same
        self.metrics = LanguageMetrics(server_args) if counts else None
        route_logits(parts.processor, self)

    def begin(self, batch: Any) -> None:
        """A batch of requests whose prompts, or parts of them, have just been read."""
        if self.identify is None:
            names: list[str | None] = [EVERY] * len(batch.reqs)
        else:
            names = [self.identify.of_prompt(req.origin_input_ids) for req in batch.reqs]
        self._assign(batch.reqs, names, batch.req_pool_indices)

    def go_on(self, batch: Any) -> None:
        """A batch of requests that go on answering."""
        if self.identify is None:
            return
        due = []
        for i, req in enumerate(batch.reqs):
            req.fastmtp_steps = getattr(req, "fastmtp_steps", 0) + 1  # lives and ends with the request
            if req.fastmtp_steps % AGAIN_EVERY == 0:
                due.append(i)
        if due:
            reqs = [batch.reqs[i] for i in due]
            self._assign(reqs, [self.identify(r.output_ids[-AGAIN_TOKENS:]) for r in reqs], batch.req_pool_indices[due])

    def _assign(self, reqs: list[Any], names: list[str | None], slots: torch.Tensor) -> None:
        numbers = [self.numbers.get(name or "", self.head.full) for name in names]
        self.languages[slots] = torch.tensor(numbers, dtype=torch.int32).to(self.languages.device, non_blocking=True)
        for req, name in zip(reqs, names, strict=True):
            label = name if name in self.numbers else FULL
            if self.metrics and not hasattr(req, "fastmtp_language"):
                self.metrics.requests.labels(language=label, **self.metrics.labels).inc()
            req.fastmtp_language = label


def _languages(folder: str, trust_remote_code: bool, names: Mapping[str, Path]) -> Languages:
    return Languages(AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code), names)


class LanguageMetrics:
    """Counters in SGLang's own /metrics: requests, verification steps and drafts by the language of the map.

    A step counts for the language that its request has when the step's result is read; with overlapped scheduling that
    is one step late for a request that has just changed its language.
    """

    def __init__(self, server_args: Any) -> None:
        # After SGLang has set PROMETHEUS_MULTIPROC_DIR, which this package looks at when it is imported.
        from prometheus_client import Counter

        self.labels = {"model_name": server_args.served_model_name}
        names = ["model_name", "language"]
        self.requests = Counter("fastmtp:requests", "Requests by the language they began to draft in.", names)
        self.steps = Counter("fastmtp:verify_steps", "Verification steps by language.", names)
        self.drafted = Counter("fastmtp:draft_tokens", "Tokens that were drafted, by language.", names)
        self.accepted = Counter(
            "fastmtp:accepted_draft_tokens", "Drafted tokens that were accepted, by language.", names
        )
        self.num_steps = server_args.speculative_num_steps
        count_steps(lambda req, accepted: self.step(getattr(req, "fastmtp_language", FULL), accepted))

    def step(self, language: str, accepted: int) -> None:
        """One verification step of one request."""
        labels = {"language": language, **self.labels}
        self.steps.labels(**labels).inc()
        self.drafted.labels(**labels).inc(self.num_steps)
        self.accepted.labels(**labels).inc(accepted)
