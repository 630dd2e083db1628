"""SGLang plugin: every request drafts with the token map of its language (paper 2.2), in one server and one batch.

SGLang's own `--speculative-token-map` is one map for all requests, copied out of the output matrix. Here the maps are
only ids: the draft's logits processor computes, for each row, the columns of that row's map from the live matrix
(`routed_head.py`), so ids stay global, batches mix languages and verification does not know about it.

Loaded by SGLang through the entry point `sglang.srt.plugins`, in every process. It does nothing unless the environment
variable SWIFT_FASTMTP_MAPS names a JSON file: {"zh": "zh-16384.pt", "en": "en-32768.pt", "code": ..}, paths beside it.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

from ..errors import FastMTPError
from ..vocab.languages import TokenLanguages
from ..vocab.maps import check_tokenizer, read_token_map
from .routed_head import NOTHING, RoutedHead

VARIABLE = "SWIFT_FASTMTP_MAPS"
TRIED = ("0.5.23",)
"""SGLang versions whose workers look as this file expects; with others it refuses to start."""
AGAIN_EVERY = 16
"""Verification steps after which an answer's language is looked at again: a reasoning model may change it."""
AGAIN_TOKENS = 64
"""Tokens of the answer that are looked at then."""


def register() -> None:
    """Entry point. Stops the server with one line if it cannot do what it is asked to."""
    if os.environ.get(VARIABLE):
        _or_exit(_register)


def _register() -> None:
    from importlib.metadata import version

    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    found = version("sglang")
    if found not in TRIED:
        raise FastMTPError(
            f"{VARIABLE}: SGLang {found} is not among the versions it was tried with ({', '.join(TRIED)})"
        )
    read_maps(os.environ[VARIABLE])
    target = "sglang.srt.speculative.spec_info.SpeculativeAlgorithm.create_worker"
    HookRegistry.register(target, _after_create_worker, HookType.AFTER)


def _or_exit(function: Any, *args: Any) -> Any:
    # SGLang logs a plugin's exceptions and serves without it; a server that ignores its maps is worse than none.
    try:
        return function(*args)
    except FastMTPError as error:
        print(f"fastmtp: error: {error}", file=sys.stderr, flush=True)
        os._exit(1)


def read_maps(path: str) -> dict[str, str]:
    """Language -> file of its map. Raises `FastMTPError` if the file is not such a list."""
    try:
        maps = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FastMTPError(f"{VARIABLE}={path}: cannot be read as JSON ({error})") from None
    if not isinstance(maps, dict) or not maps or not all(isinstance(v, str) for v in maps.values()):
        raise FastMTPError(f'{path}: must be an object of languages and files, as {{"zh": "zh-16384.pt"}}')
    found = {name: str(Path(path).parent / file) for name, file in maps.items()}
    for name, file in found.items():
        if not Path(file).is_file():
            raise FastMTPError(f"{path}: {name}: {file}: no such file")
    return found


def _after_create_worker(result: Any, algorithm: Any, server_args: Any) -> Any:
    """The worker class that SGLang is about to use, with routed drafting."""
    from sglang.srt.speculative import eagle_worker_v2 as module

    if result is not module.EAGLEWorkerV2 or algorithm.is_eagle3():
        _or_exit(
            _refuse, f"the speculative algorithm {algorithm.name} has no draft that shares the model's output matrix"
        )
    if server_args.speculative_token_map:
        _or_exit(_refuse, "--speculative-token-map is one map for all requests; leave one of the two out")
    for option in ("enable_dp_attention", "enable_dp_lm_head", "enable_lora"):
        if getattr(server_args, option, None):
            _or_exit(_refuse, f"--{option.replace('_', '-')} is not supported")
    draft_class, router = module.EagleDraftWorker, Router

    class Draft(draft_class):  # type: ignore[misc,valid-type]
        def init_lm_head(self) -> None:
            super().init_lm_head()
            self.router = _or_exit(router, self, server_args)

        def _draft_extend_for_prefill(self, batch: Any, *args: Any, **kwargs: Any) -> Any:
            if not batch.forward_mode.is_idle():
                self.router.begin(batch)
            return super()._draft_extend_for_prefill(batch, *args, **kwargs)

        def _draft_extend_for_decode(self, batch: Any, *args: Any, **kwargs: Any) -> Any:
            if not batch.forward_mode.is_idle():
                self.router.go_on(batch)
            return super()._draft_extend_for_decode(batch, *args, **kwargs)

    class Worker(result):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            # The worker makes its draft by this name of its module.
            module.EagleDraftWorker = Draft
            try:
                super().__init__(*args, **kwargs)
            finally:
                module.EagleDraftWorker = draft_class

    return Worker


def _refuse(why: str) -> None:
    raise FastMTPError(f"{VARIABLE}: {why}")


class Router:
    """Which language each request drafts in, and the draft's logits accordingly."""

    def __init__(self, draft: Any, server_args: Any) -> None:
        from transformers import AutoTokenizer

        model = draft.draft_runner.model
        weight = model.lm_head.weight
        if not weight.is_floating_point() or weight.element_size() < 2:
            _refuse(f"the output matrix is quantised ({weight.dtype}); leave lm_head out of the quantisation")
        V = draft.draft_runner.model_config.vocab_size
        files = read_maps(os.environ[VARIABLE])
        folder = server_args.tokenizer_path or server_args.model_path
        maps = {}
        for name, file in files.items():
            check_tokenizer(file, folder)
            maps[name] = read_token_map(file, V)
        # Tensor parallelism: this rank's tokens; the logits of all ranks are gathered behind the head, as ever.
        shard = model.lm_head.shard_indices
        start, end = shard.org_vocab_start_index, shard.org_vocab_end_index
        self.head = RoutedHead(maps, V, vocab_start=start, vocab_end=end, device=weight.device)
        self.identify = TokenLanguages(
            AutoTokenizer.from_pretrained(folder, trust_remote_code=server_args.trust_remote_code)
        )
        self.numbers = {name: i for i, name in enumerate(self.head.languages)}
        # Row 0 of SGLang's pool stands for padded rows of captured graphs.
        self.languages = torch.full(
            (draft.req_to_token_pool.size + 1,), NOTHING, dtype=torch.int32, device=weight.device
        )
        _route(model.logits_processor, self)

    def begin(self, batch: Any) -> None:
        """A batch of requests whose prompts, or parts of them, have just been read."""
        self._assign([self.identify.of_prompt(req.origin_input_ids) for req in batch.reqs], batch.req_pool_indices)

    def go_on(self, batch: Any) -> None:
        """A batch of requests that go on answering."""
        due = []
        for i, req in enumerate(batch.reqs):
            req.fastmtp_steps = getattr(req, "fastmtp_steps", 0) + 1  # lives and ends with the request
            if req.fastmtp_steps % AGAIN_EVERY == 0:
                due.append(i)
        if due:
            answers = [batch.reqs[i].output_ids[-AGAIN_TOKENS:] for i in due]
            self._assign([self.identify(answer) for answer in answers], batch.req_pool_indices[due])

    def _assign(self, names: list[str | None], slots: torch.Tensor) -> None:
        numbers = [self.numbers.get(name or "", self.head.full) for name in names]
        self.languages[slots] = torch.tensor(numbers, dtype=torch.int32).to(self.languages.device, non_blocking=True)


def _route(processor: Any, router: Router) -> None:
    """Give the draft's logits processor a routed output matrix."""
    stock = type(processor)

    class Routed(stock):  # type: ignore[misc,valid-type]
        def forward(
            self, input_ids: Any, hidden_states: Any, lm_head: Any, logits_metadata: Any, *args: Any, **kw: Any
        ) -> Any:
            self._slots = logits_metadata.req_pool_indices
            return super().forward(input_ids, hidden_states, lm_head, logits_metadata, *args, **kw)

        def _compute_lm_head(self, hidden: Any, lm_head: Any, embedding_bias: Any = None, *, out: Any = None) -> Any:
            languages = router.languages[self._slots]
            rows = hidden.shape[0] // len(languages)
            if out is not None and out.shape != (len(hidden), len(lm_head.weight)):
                out = None  # as stock does
            return router.head(hidden, lm_head.weight, languages.repeat_interleave(rows), out=out)

    processor.__class__ = Routed
