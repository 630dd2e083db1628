"""What the vLLM plugin uses of vLLM's drafting, none of which is documented.

vLLM asks a plugin for nothing once the draft model is there, so the plugin waits for the modules that load it, and
continues where `load_model` has ended. Tried with vLLM 0.32.0: its first model runner ("V1") run on a CPU, its second
("V2", which needs Triton) read.

Everything is changed in the objects of one server: the class of a model, a layer or a drafter becomes a subclass of
what it was. The checks run before that. A changed name would be silent otherwise: the text is the model's own whatever
the draft computes, and only the speed would tell.
"""

import importlib.util
import inspect
import logging
import sys
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from ..errors import FastMTPError
from ..files.libraries import TRIED, Name, changed, check_names, find, installed, owner_of
from .maps import OutputMatrix

logger = logging.getLogger("vllm.swift_fastmtp")  # below vLLM's own, which has the handlers

_V1 = Name(
    "vllm",
    "vllm.v1.spec_decode.llm_base_proposer:SpecDecodeBaseProposer.load_model",
    "the draft model of the V1 runner is there after it",
    first=("self", "target_model"),
)
_V2 = Name(
    "vllm",
    "vllm.v1.worker.gpu.spec_decode.speculator:DraftModelSpeculator.load_model",
    "the draft model of the V2 runner is there after it",
    first=("self", "target_model"),
)
_NEXT_TOKENS = Name(
    "vllm",
    "vllm.v1.spec_decode.llm_base_proposer:SpecDecodeBaseProposer.prepare_next_token_ids_padded",
    "it gets the requests of a batch, in the order of the draft's rows",
    first=("self", "sampled_token_ids", "requests", "gpu_input_batch"),
)
_NEXT_TOKENS_CPU = Name(
    "vllm",
    "vllm.v1.spec_decode.llm_base_proposer:SpecDecodeBaseProposer.prepare_next_token_ids_cpu",
    "the same, where batches are not padded",
    first=("self", "sampled_token_ids", "requests", "gpu_input_batch"),
)
_PROPOSE = Name(
    "vllm",
    "vllm.v1.worker.gpu_model_runner:GPUModelRunner.propose_draft_token_ids",
    "it asks for the next tokens before each draft",
    first=("self", "scheduler_output", "sampled_token_ids"),
)
_APPLY_HEAD = Name(
    "vllm",
    "vllm.model_executor.layers.logits_processor:LogitsProcessor._apply_head",
    "the logits of a draft",
    first=("self", "lm_head", "hidden_states", "embedding_bias"),
)
_GET_LOGITS = Name(
    "vllm", "vllm.model_executor.layers.logits_processor:LogitsProcessor._get_logits", "it gathers and cuts them"
)
_REQUEST = Name("vllm", "vllm.v1.worker.gpu_input_batch:CachedRequestState", "a request's prompt and answer")
MAP_NAMES = (_V1, _NEXT_TOKENS, _NEXT_TOKENS_CPU, _PROPOSE, _APPLY_HEAD, _GET_LOGITS, _REQUEST)
"""Those that token maps need. The graph needs `_V1` or `_V2`, and what `norm_target` and `norm_feedback` look at."""


_MIMO = Name(
    "vllm",
    "vllm.model_executor.models.mimo:MiMoModel.forward",
    "it returns no hidden states of layers",
    first=("self", "input_ids", "positions"),
)


def check_version(use: str) -> None:
    """Raises `FastMTPError` unless vLLM is a version that was tried; `use` is what asks for it."""
    present = installed("vllm").partition("+")[0]  # what it was built for stands behind the plus
    if present not in TRIED["vllm"]:
        raise changed("vllm", f"{use}: it is not among the versions tried")


def warn_if_untried() -> None:
    """A line in the log for a vLLM that was not tried: whatever config.json asks for, it may never come to the place
    where that is read."""
    try:
        check_version("what config.json asks for may not be done")
    except FastMTPError as error:
        logger.warning("swift_fastmtp: %s", error)


def check_maps() -> None:
    """Raises `FastMTPError` if a name is gone, or is not what vLLM itself uses it for."""
    check_names(MAP_NAMES)
    _check_reads(find(_PROPOSE), _NEXT_TOKENS)
    _check_reads(find(_PROPOSE), _NEXT_TOKENS_CPU)
    _check_reads(find(_GET_LOGITS), _APPLY_HEAD)
    for field in ("prompt_token_ids", "output_token_ids"):
        if field not in inspect.signature(find(_REQUEST)).parameters:
            raise changed("vllm", f"{_REQUEST.short} has no {field} any more ({_REQUEST.why})")


def _check_reads(function: Any, name: Name) -> None:
    if not _reads(function, name.path.rpartition(".")[2]):
        raise changed("vllm", f"nothing calls {name.short} ({name.why})")


def _reads(function: Any, name: str) -> bool:
    """Whether a function's code reads an attribute of that name."""
    return name in inspect.unwrap(function).__code__.co_names


def when_loaded(after: Callable[[Any, Any, str], None]) -> None:
    """Call `after(drafter, target model, "V1" or "V2")` in the process that drafts, when its models are loaded.

    Nothing of vLLM is imported for it: most of its processes never import these modules.
    """
    for name, runner in ((_V1, "V1"), (_V2, "V2")):
        module = name.path.partition(":")[0]
        when_imported(module, partial(_after_load, name, runner, after))


def _after_load(name: Name, runner: str, after: Callable[[Any, Any, str], None]) -> None:
    try:
        owner, _ = owner_of(name)
        stock = find(name)
    except FastMTPError as error:  # of a version that was not tried; nobody may have asked for anything
        logger.warning("swift_fastmtp: %s; nothing is done that config.json asks for", error)
        return

    def load_model(self: Any, target_model: Any) -> None:
        stock(self, target_model)
        after(self, target_model, runner)

    owner.load_model = load_model


def when_imported(module: str, function: Callable[[], None]) -> None:
    """Call `function()` after a module has been imported, at once if it has been already."""
    if module in sys.modules:
        function()
    else:
        sys.meta_path.insert(0, _Finder(module, function))


class _Finder:
    """Steps aside for the real finders, and continues behind the loader of one module.

    `swift_plugin/autoload.py` has its own: Python imports that file at every start, and nothing beside it.
    """

    def __init__(self, module: str, function: Callable[[], None]) -> None:
        self.module, self.function = module, function

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != self.module:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        original = spec.loader.exec_module

        def exec_module(module: Any) -> None:
            original(module)
            self.function()

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def give_mimo_layer_states() -> None:
    """Let vLLM's MiMo return the last layer's hidden states beside its output, where they are asked for.

    Its `forward` is a copy of Qwen2's without the final norm, and without the layers' states: with
    `extract_hidden_states` the server dies at the first request ("too many values to unpack"). What it returns is the
    last layer's state before the final norm, which is the one that is wanted.
    """
    when_imported(_MIMO.path.partition(":")[0], _patch_mimo)


def _patch_mimo() -> None:
    try:
        owner, _ = owner_of(_MIMO)
        stock = find(_MIMO)
    except FastMTPError as error:
        logger.warning("swift_fastmtp: %s; no hidden states of MiMo", error)
        return

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = stock(self, *args, **kwargs)
        wanted = tuple(getattr(self, "aux_hidden_state_layers", ()))
        if not wanted or not hasattr(output, "shape"):  # another version, or a rank that passes its layers' output on
            return output
        if wanted != (len(self.layers),):
            raise changed("vllm", f"MiMo's hidden states are asked of layers {wanted}, not of the last alone")
        return output, [output]

    owner.forward = forward


class ServerParts(NamedTuple):
    """What is read of a server's configuration."""

    model: str
    draft: str
    """Where the draft's config.json is; the model's own folder for a head that lies in it."""
    tokenizer: str
    trust_remote_code: bool
    method: str
    lora: bool


def server_parts(drafter: Any) -> ServerParts:
    """Raises `FastMTPError` if vLLM keeps one of them elsewhere."""
    try:
        config = drafter.vllm_config
        return ServerParts(
            model=config.model_config.model,
            draft=config.speculative_config.draft_model_config.model,
            tokenizer=config.model_config.tokenizer,
            trust_remote_code=config.model_config.trust_remote_code,
            method=config.speculative_config.method,
            lora=config.lora_config is not None,
        )
    except AttributeError as error:
        raise changed("vllm", f"servers are configured otherwise ({error})") from None


def draft_parts(draft: Any) -> tuple[Any, OutputMatrix]:
    """vLLM's logits processor of a draft model, and its output matrix.

    Raises `FastMTPError` if vLLM keeps one of them elsewhere.
    """
    kind, _ = owner_of(_APPLY_HEAD)
    processors = [module for module in draft.modules() if isinstance(module, kind)]
    if len(processors) != 1 or getattr(processors[0], "soft_cap", None) is not None:
        raise changed(
            "vllm", f"{type(draft).__name__} has {len(processors)} logits processors, or one that limits them"
        )
    try:
        head = draft.lm_head
        shard = head.shard_indices
        weight = getattr(head, "weight", None)
        matrix = OutputMatrix(weight, shard.org_vocab_start_index, shard.org_vocab_end_index, head.org_vocab_size)
        return processors[0], matrix
    except AttributeError as error:
        raise changed("vllm", f"{type(draft).__name__} has other parts ({error})") from None


def route_drafts(drafter: Any, processor: Any, router: Any) -> None:
    """Let `router` hear of every batch before it is drafted for, and compute the logits of its rows.

    Args:
        drafter: vLLM's proposer of the V1 runner.
        processor: the logits processor of its draft model.
        router: has `begin(requests)` and `logits(hidden, weight, dtype)`.
    """
    stock_drafter, stock_processor = type(drafter), type(processor)

    class Routed(stock_drafter):  # type: ignore[misc,valid-type]
        def prepare_next_token_ids_padded(
            self, sampled_token_ids: Any, requests: Any, gpu_input_batch: Any, *args: Any, **kwargs: Any
        ) -> Any:
            router.begin(_rows(requests, gpu_input_batch))
            return super().prepare_next_token_ids_padded(sampled_token_ids, requests, gpu_input_batch, *args, **kwargs)

        def prepare_next_token_ids_cpu(
            self, sampled_token_ids: Any, requests: Any, gpu_input_batch: Any, *args: Any, **kwargs: Any
        ) -> Any:
            router.begin(_rows(requests, gpu_input_batch))
            return super().prepare_next_token_ids_cpu(sampled_token_ids, requests, gpu_input_batch, *args, **kwargs)

    class RoutedProcessor(stock_processor):  # type: ignore[misc,valid-type]
        def _apply_head(self, lm_head: Any, hidden_states: Any, embedding_bias: Any) -> Any:
            if not router.has_begun:  # vLLM warms up, without requests
                return super()._apply_head(lm_head, hidden_states, embedding_bias)
            logits = router.logits(hidden_states, lm_head.weight, self.head_dtype or hidden_states.dtype)
            return logits if embedding_bias is None else logits + embedding_bias

    _become(drafter, Routed)
    _become(processor, RoutedProcessor)


def _rows(requests: Any, batch: Any) -> list[Any]:
    return [requests[name] for name in batch.req_ids[: batch.num_reqs]]


def _become(thing: Any, kind: Any) -> None:
    """Another class for an object that several places hold, under the name that it had: vLLM looks at names."""
    kind.__name__, kind.__qualname__ = type(thing).__name__, type(thing).__qualname__
    thing.__class__ = kind


def norm_target(target: Any) -> None:
    """Let a target model end with its final norm, which `compute_logits` applied: its draft gets what it puts out."""
    stock = type(target)
    if not _reads(stock.compute_logits, "norm") or not hasattr(getattr(target, "model", None), "norm"):
        raise changed("vllm", f"{stock.__name__}.compute_logits applies no final norm any more")

    class Normed(stock):  # type: ignore[misc,valid-type]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return self.model.norm(super().forward(*args, **kwargs))

        def compute_logits(self, hidden_states: Any) -> Any:
            return self.logits_processor(self.lm_head, hidden_states)

    _become(target, Normed)


def norm_feedback(draft: Any) -> None:
    """Let a draft's layers end with their final norm, which `compute_logits` applied: what they put out is fed back."""
    layers = getattr(getattr(draft, "model", None), "layers", None)
    if not layers or not _reads(type(draft.model).compute_logits, "shared_head"):
        raise changed("vllm", f"{type(draft).__name__}.compute_logits applies no norm of its layers any more")
    for layer in layers.values():
        if not hasattr(layer, "shared_head") or _reads(type(layer).forward, "shared_head"):
            raise changed("vllm", f"{type(layer).__name__} does not end before its norm any more")
        _norm_layer(layer)


def _norm_layer(layer: Any) -> None:
    stock_layer, stock_head = type(layer), type(layer.shared_head)

    class Normed(stock_layer):  # type: ignore[misc,valid-type]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return self.shared_head.norm(super().forward(*args, **kwargs))

    class AfterNorm(stock_head):  # type: ignore[misc,valid-type]
        def forward(self, hidden_states: Any) -> Any:
            return hidden_states

    _become(layer, Normed)
    _become(layer.shared_head, AfterNorm)
