"""What the SGLang plugin uses of SGLang's workers, none of which is documented.

Token maps per language need a draft worker that knows each request's language, and a logits processor that computes the
columns of a map. SGLang has no interface for either, so two of its classes are subclassed. Hidden states as bytes need
the method that turns them into lists. Tried with SGLang 0.5.19 to 0.5.23.

`check` runs in every worker process before anything is replaced. A changed name would be silent otherwise: drafts would
come from the whole vocabulary, and only the speed would tell.
"""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

from ..files.libraries import TRIED, Name, changed, check_names, find, installed
from .maps import OutputMatrix

WORKER_CHOICE = "sglang.srt.speculative.spec_info.SpeculativeAlgorithm.create_worker"
"""SGLang's hooks are named by this path; the function returns the class of the worker."""

_WORKER = Name(
    "sglang",
    "sglang.srt.speculative.eagle_worker_v2:EAGLEWorkerV2",
    "the worker of drafts that share the model's output matrix",
)
_DRAFT = Name("sglang", "sglang.srt.speculative.eagle_worker_v2:EagleDraftWorker", "it holds the draft model")
_PREFILL = Name(
    "sglang",
    "sglang.srt.speculative.eagle_worker_v2:EagleDraftWorker._draft_extend_for_prefill",
    "requests begin there",
    first=("self", "batch"),
)
_DECODE = Name(
    "sglang",
    "sglang.srt.speculative.eagle_worker_v2:EagleDraftWorker._draft_extend_for_decode",
    "requests go on there",
    first=("self", "batch"),
)
_FORWARD = Name(
    "sglang",
    "sglang.srt.layers.logits_processor:LogitsProcessor.forward",
    "it knows which requests a batch has",
    first=("self", "input_ids", "hidden_states", "lm_head", "logits_metadata"),
)
_LM_HEAD = Name(
    "sglang",
    "sglang.srt.layers.logits_processor:LogitsProcessor._compute_lm_head",
    "the logits of a draft",
    first=("self", "hidden_states", "lm_head", "embedding_bias"),
)
_HISTOGRAM = Name(
    "sglang",
    "sglang.srt.managers.schedule_batch:Req.update_spec_correct_drafts_histogram",
    "it is called once for each verification step of a request",
    first=("self", "num_correct_drafts"),
)
STATES = Name(
    "sglang",
    "sglang.srt.managers.scheduler_components.batch_result_processor:"
    "SchedulerBatchResultProcessor._append_prefill_hidden_states",
    "it makes lists of hidden states",
    first=("self", "req", "logits_output", "hidden_state_offset", "capture_hidden_mode", "extend_input_len", "store"),
)
_REQUEST = Name("sglang", "sglang.srt.managers.schedule_batch:Req", "what is sent beside the answer of a request")
NAMES = (
    Name(
        "sglang",
        "sglang.srt.speculative.spec_info:SpeculativeAlgorithm.create_worker",
        "it chooses the worker",
        first=("self", "server_args"),
    ),
    _WORKER,
    _DRAFT,
    Name(
        "sglang",
        "sglang.srt.speculative.eagle_worker_v2:EagleDraftWorker.init_lm_head",
        "the draft has its output matrix after it",
        first=("self",),
    ),
    _PREFILL,
    _DECODE,
    _FORWARD,
    _LM_HEAD,
    _HISTOGRAM,
)

SERVER_ARGUMENTS = (
    *("model_path", "tokenizer_path", "trust_remote_code", "served_model_name", "enable_metrics"),
    *("speculative_draft_model_path", "speculative_num_steps", "speculative_token_map"),
    *("enable_dp_attention", "enable_dp_lm_head", "enable_lora"),
)
"""Arguments of a server that are read. One that is not there would read as not asked for."""


def check_version(use: str) -> None:
    """Raises `FastMTPError` unless SGLang is a version that was tried; `use` is what asks for it."""
    present, tried = installed("sglang"), TRIED["sglang"]
    if present not in tried:
        raise changed("sglang", f"{use}: it is not among the versions tried")


def check() -> None:
    """Raises `FastMTPError` if a name is gone, or is not what SGLang itself uses it for."""
    check_names(NAMES)
    worker, processor = find(_WORKER), find(_FORWARD)
    # The worker makes its draft by the name of its module, where ours is put.
    _check_use(worker.__init__, _DRAFT)
    names = _names_in(worker)
    for name in (_PREFILL, _DECODE):
        _check_among(names, name)
    owner = inspect.getmodule(inspect.unwrap(processor))
    _check_among(_names_in(owner.LogitsProcessor), _LM_HEAD)  # type: ignore[union-attr]


def check_arguments(server_args: Any) -> None:
    """Raises `FastMTPError` if a server has not one of the arguments that are read."""
    for argument in SERVER_ARGUMENTS:
        if not hasattr(server_args, argument):
            raise changed("sglang", f"servers have no argument {argument}")


def _names_in(kind: Any) -> set[str]:
    """Every name that the code of a class reads."""
    names: set[str] = set()
    for function in vars(kind).values():
        function = inspect.unwrap(function) if callable(function) else function
        if inspect.isfunction(function):
            names.update(function.__code__.co_names)
    return names


def _check_use(function: Any, name: Name) -> None:
    _check_among(set(inspect.unwrap(function).__code__.co_names), name)


def _check_among(names: set[str], name: Name) -> None:
    last = name.path.rpartition(":")[2].rpartition(".")[2]
    if last not in names:
        raise changed("sglang", f"nothing calls {name.short} ({name.why})")


def worker_module() -> Any:
    """The module in which SGLang's EAGLE worker and its draft are."""
    from sglang.srt.speculative import eagle_worker_v2

    return eagle_worker_v2


def hook_worker_choice(after: Callable[..., Any]) -> None:
    """Call `after(worker class, algorithm, server_args)` when SGLang has chosen a worker, and use what it returns."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register(WORKER_CHOICE, after, HookType.AFTER)


def check_states() -> None:
    """Raises `FastMTPError` if hidden states cannot be sent as bytes."""
    check_names((STATES, _REQUEST))
    if "customized_info" not in find(_REQUEST).__init__.__code__.co_names:
        raise changed("sglang", f"{_REQUEST.short} has no customized_info ({_REQUEST.why})")


def hook_states(parameter: str, key: str, encode: Callable[[Any], Any]) -> None:
    """Send `encode(states [T, D])` under `key` of a request's meta_info, where its custom_params have `parameter`."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    def append(
        stock: Callable[..., int],
        processor: Any,
        *,
        req: Any,
        logits_output: Any,
        hidden_state_offset: int,
        capture_hidden_mode: Any,
        extend_input_len: int,
        store: bool = True,
    ) -> int:
        asked = parameter in (req.sampling_params.custom_params or {})
        if not (asked and capture_hidden_mode.is_full() and req.return_hidden_states is True):
            return stock(
                processor,
                req=req,
                logits_output=logits_output,
                hidden_state_offset=hidden_state_offset,
                capture_hidden_mode=capture_hidden_mode,
                extend_input_len=extend_input_len,
                store=store,
            )
        end = hidden_state_offset + extend_input_len
        if store:
            # One value for each token of the answer; the first has the prompt's.
            req.customized_info = {
                **(req.customized_info or {}),
                key: [encode(logits_output.hidden_states[hidden_state_offset:end].cpu())],
            }
        return end

    HookRegistry.register(STATES.path.replace(":", "."), append, HookType.AROUND)


def routed_draft(draft_class: Any, make_router: Callable[[Any], Any]) -> Any:
    """SGLang's draft worker with a router, which hears of every batch.

    Args:
        draft_class: SGLang's.
        make_router: from the draft worker, its model loaded.
    """

    class Draft(draft_class):
        def init_lm_head(self) -> None:
            super().init_lm_head()
            self.router = make_router(self)

        def _draft_extend_for_prefill(self, batch: Any, *args: Any, **kwargs: Any) -> Any:
            if not batch.forward_mode.is_idle():
                self.router.begin(batch)
            return super()._draft_extend_for_prefill(batch, *args, **kwargs)

        def _draft_extend_for_decode(self, batch: Any, *args: Any, **kwargs: Any) -> Any:
            if not batch.forward_mode.is_idle():
                self.router.go_on(batch)
            return super()._draft_extend_for_decode(batch, *args, **kwargs)

    return Draft


def routed_worker(worker_class: Any, module: Any, draft: Any) -> Any:
    """SGLang's worker with `draft` as the class of its draft worker, which it makes by the name of its module."""
    stock = module.EagleDraftWorker

    class Worker(worker_class):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            module.EagleDraftWorker = draft
            try:
                super().__init__(*args, **kwargs)
            finally:
                module.EagleDraftWorker = stock

    return Worker


class DraftParts(NamedTuple):
    """What a router needs of a draft worker."""

    processor: Any
    """SGLang's logits processor of the draft model."""
    matrix: OutputMatrix
    slots: int
    """Rows of SGLang's pool of requests."""


def draft_parts(draft: Any) -> DraftParts:
    """Raises `FastMTPError` if SGLang keeps one of them elsewhere."""
    try:
        runner = draft.draft_runner
        head = runner.model.lm_head
        shard = head.shard_indices
        first, last = shard.org_vocab_start_index, shard.org_vocab_end_index
        return DraftParts(
            processor=runner.model.logits_processor,
            matrix=OutputMatrix(head.weight, first, last, runner.model_config.vocab_size),
            slots=draft.req_to_token_pool.size + 1,
        )
    except AttributeError as error:
        raise changed("sglang", f"the draft worker has other parts ({error})") from None


def route_logits(processor: Any, router: Any) -> None:
    """Give a draft's logits processor a routed output matrix, by another class: several places hold the object."""
    stock = type(processor)

    class Routed(stock):  # type: ignore[misc,valid-type]
        def forward(
            self, input_ids: Any, hidden_states: Any, lm_head: Any, logits_metadata: Any, *args: Any, **kw: Any
        ) -> Any:
            self._slots = logits_metadata.req_pool_indices
            return super().forward(input_ids, hidden_states, lm_head, logits_metadata, *args, **kw)

        # `out` since 0.5.23.
        def _compute_lm_head(self, hidden: Any, lm_head: Any, embedding_bias: Any = None, *, out: Any = None) -> Any:
            languages = router.languages[self._slots]
            rows = hidden.shape[0] // len(languages)
            if out is not None and out.shape != (len(hidden), len(lm_head.weight)):
                out = None  # as stock does
            return router.head(hidden, lm_head.weight, languages.repeat_interleave(rows), out=out)

    processor.__class__ = Routed


def count_steps(step: Callable[[Any, int], None]) -> None:
    """Call `step(request, accepted drafts)` after each verification step of a request."""
    from sglang.srt.managers.schedule_batch import Req

    stock = find(_HISTOGRAM)

    def count(req: Any, num_correct_drafts: int) -> None:
        stock(req, num_correct_drafts)
        step(req, num_correct_drafts)

    Req.update_spec_correct_drafts_histogram = count
