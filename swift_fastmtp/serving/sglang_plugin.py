"""SGLang plugin: every request drafts with the token map of its language (paper 2.2), in one server and one batch.

SGLang's own `--speculative-token-map` is one map for all requests, copied out of the output matrix. Here the maps are
only ids: the draft's logits processor computes, for each row, the columns of that row's map from the live matrix
(`routed_head.py`), so ids stay global, batches mix languages and verification does not know about it.

And a request of `fastmtp hidden` gets its hidden states as bytes (`data/state_wire.py`).

Loaded by SGLang through the entry point `sglang.srt.plugins`, in every process. For drafts it does nothing unless the
model's config.json has the key `fastmtp_token_maps`, an object of languages and files below the model's folder, or the
environment variable SWIFT_FASTMTP_MAPS names a JSON file with such an object, paths beside it, or one map for all
requests; `none` leaves out the model's own. Since drafts keep the whole vocabulary, sampled ones can be verified
(`--speculative-use-rejection-sampling`), which SGLang refuses with its own map.
"""

import logging
from typing import Any

from ..data import state_wire
from ..errors import FastMTPError
from .compat_sglang import (
    check,
    check_arguments,
    check_states,
    check_version,
    hook_states,
    hook_worker_choice,
    routed_draft,
    routed_worker,
    worker_module,
)
from .maps import maps_of, maps_of_variable, or_exit
from .router import Router

logger = logging.getLogger(__name__)
USE = "token maps per language"
UNSUPPORTED = ("enable_dp_attention", "enable_dp_lm_head", "enable_lora")
"""Server arguments that change what the draft's output matrix is, or which rows a rank has."""


def register() -> None:
    """Entry point. Stops the server with one line if it cannot do what the environment variable asks for."""
    if or_exit(maps_of_variable):
        or_exit(check_version, USE)
    hook_worker_choice(_after_create_worker)
    _send_states_as_bytes()


def _send_states_as_bytes() -> None:
    """Where a name has changed, requests are answered in lists, as without the plugin."""
    try:
        check_states()
    except FastMTPError as error:
        logger.info("swift_fastmtp: hidden states are sent as lists of numbers: %s", error)
        return
    hook_states(state_wire.PARAMETER, state_wire.KEY, state_wire.encode)


def refuse_unsupported(algorithm: str, is_eagle: bool, server_args: Any) -> None:
    """Raises `FastMTPError` naming what cannot be combined with maps per language.

    Args:
        algorithm: name of SGLang's speculative algorithm.
        is_eagle: it runs SGLang's one-layer EAGLE worker, with a draft that shares the model's output matrix.
    """
    if not is_eagle:
        raise FastMTPError(
            f"token maps per language: the speculative algorithm {algorithm} has no draft on the model's output matrix"
        )
    if server_args.speculative_token_map:
        raise FastMTPError("--speculative-token-map is one map for all requests; leave it or the maps per language out")
    for option in UNSUPPORTED:
        if getattr(server_args, option, None):
            raise FastMTPError(f"token maps per language: --{option.replace('_', '-')} is not supported")


def _after_create_worker(result: Any, algorithm: Any, server_args: Any) -> Any:
    """The worker class that SGLang is about to use, with routed drafting if maps are asked for."""
    files = or_exit(maps_of, server_args.model_path, server_args.speculative_draft_model_path)
    if not files:
        return result
    or_exit(check_version, USE)
    or_exit(check)
    or_exit(check_arguments, server_args)
    module = worker_module()
    is_eagle = result is module.EAGLEWorkerV2 and not algorithm.is_eagle3()
    or_exit(refuse_unsupported, algorithm.name, is_eagle, server_args)
    draft = routed_draft(module.EagleDraftWorker, lambda worker: or_exit(Router, worker, server_args, files))
    return routed_worker(result, module, draft)
