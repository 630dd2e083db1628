"""SGLang plugin: every request drafts with the token map of its language (paper 2.2), in one server and one batch.

SGLang's own `--speculative-token-map` is one map for all requests, copied out of the output matrix. Here the maps are
only ids: the draft's logits processor computes, for each row, the columns of that row's map from the live matrix
(`routed_head.py`), so ids stay global, batches mix languages and verification does not know about it.

Loaded by SGLang through the entry point `sglang.srt.plugins`, in every process. It does nothing unless the model's
config.json has the key `fastmtp_token_maps`, an object of languages and files below the model's folder, or the
environment variable SWIFT_FASTMTP_MAPS names a JSON file with such an object, paths beside it; `none` leaves out the
model's own.
"""

import os
import sys
from pathlib import Path
from typing import Any

from ..checkpoint.config_file import TOKEN_MAPS_KEY
from ..errors import FastMTPError
from ..files.known_files import read_object
from ..method.token_map import check_map_list, read_map_list
from .compat_sglang import (
    check,
    check_arguments,
    check_version,
    hook_worker_choice,
    routed_draft,
    routed_worker,
    worker_module,
)
from .router import Router

VARIABLE = "SWIFT_FASTMTP_MAPS"
USE = "token maps per language"
UNSUPPORTED = ("enable_dp_attention", "enable_dp_lm_head", "enable_lora")
"""Server arguments that change what the draft's output matrix is, or which rows a rank has."""


def register() -> None:
    """Entry point. Stops the server with one line if it cannot do what the environment variable asks for."""
    if _variable():
        _or_exit(read_map_list, _variable())
        _or_exit(check_version, USE)
    hook_worker_choice(_after_create_worker)


def _variable() -> str:
    value = os.environ.get(VARIABLE, "")
    return "" if value.lower() == "none" else value


def _or_exit(function: Any, *args: Any) -> Any:
    # SGLang logs a plugin's exceptions and serves without it; a server that ignores its maps is worse than none.
    try:
        return function(*args)
    except FastMTPError as error:
        print(f"fastmtp: error: {error}", file=sys.stderr, flush=True)
        os._exit(1)


def maps_of(model_path: str, draft_path: str | None) -> dict[str, Path]:
    """Language -> file of its map, or nothing if none are asked for: those of the environment variable, else of the
    config.json of the draft's or the model's folder. Raises `FastMTPError` for a list that cannot be used."""
    if os.environ.get(VARIABLE):
        return read_map_list(_variable()) if _variable() else {}
    for name in (draft_path, model_path):
        config = _file(name, "config.json") if name else None
        if name and config and TOKEN_MAPS_KEY in (values := read_object(config)):
            for file in values[TOKEN_MAPS_KEY].values() if isinstance(values[TOKEN_MAPS_KEY], dict) else ():
                _file(name, str(file))
            return check_map_list(values[TOKEN_MAPS_KEY], config)
    return {}


def _file(model: str, name: str) -> Path | None:
    """A file of a model's folder, or of its repository on the hub, from where it is fetched as SGLang does the rest."""
    if Path(model).is_dir():
        return Path(model) / name
    from transformers.utils import cached_file

    try:
        return Path(cached_file(model, name))
    except OSError:
        return None


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
    files = _or_exit(maps_of, server_args.model_path, server_args.speculative_draft_model_path)
    if not files:
        return result
    _or_exit(check_version, USE)
    _or_exit(check)
    _or_exit(check_arguments, server_args)
    module = worker_module()
    is_eagle = result is module.EAGLEWorkerV2 and not algorithm.is_eagle3()
    _or_exit(refuse_unsupported, algorithm.name, is_eagle, server_args)
    draft = routed_draft(module.EagleDraftWorker, lambda worker: _or_exit(Router, worker, server_args, files))
    return routed_worker(result, module, draft)
