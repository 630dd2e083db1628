"""Token maps of a served model, for the plugins of both engines: which are asked for, and the head that holds them."""

import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..checkpoint.config_file import TOKEN_MAPS_KEY, TOKEN_MAPS_VARIABLE
from ..errors import FastMTPError
from ..files.known_files import read_object
from ..method.map_files import check_map_list, check_tokenizer, read_map_list
from ..method.token_map import read_token_map
from .routed_head import RoutedHead

VARIABLE = TOKEN_MAPS_VARIABLE
EVERY = "*"
"""In place of a language: the one map of all requests."""
AGAIN_EVERY = 16
"""Verification steps after which an answer's language is looked at again: a reasoning model may change it."""
AGAIN_TOKENS = 64
"""Tokens of the answer that are looked at then."""


def or_exit(function: Callable[..., Any], *args: Any) -> Any:
    """What a function returns, or the end of the process with one line if it raises `FastMTPError`.

    Engines may log a plugin's exceptions and serve without it; a server that ignores its maps is worse than none.
    """
    try:
        return function(*args)
    except FastMTPError as error:
        print(f"fastmtp: error: {error}", file=sys.stderr, flush=True)
        os._exit(1)


def variable(name: str = VARIABLE) -> str:
    """An environment variable of a plugin, "" for `none`."""
    value = os.environ.get(name, "")
    return "" if value.lower() == "none" else value


def maps_of(model_path: str, draft_path: str | None) -> dict[str, Path]:
    """Language -> file of its map, or nothing if none are asked for: those of the environment variable, else of the
    config.json of the draft's or the model's folder. Raises `FastMTPError` for a list that cannot be used."""
    if os.environ.get(VARIABLE):
        return maps_of_variable()
    for name in (draft_path, model_path):
        config = file_of(name, "config.json") if name else None
        if name and config and TOKEN_MAPS_KEY in (values := read_object(config)):
            for file in values[TOKEN_MAPS_KEY].values() if isinstance(values[TOKEN_MAPS_KEY], dict) else ():
                file_of(name, str(file))
            return check_map_list(values[TOKEN_MAPS_KEY], config)
    return {}


def maps_of_variable() -> dict[str, Path]:
    """The maps that the environment variable asks for: a JSON list of languages and files, or the file of one map for
    all requests. Raises as `maps_of`."""
    value = variable()
    if not value:
        return {}
    if Path(value).suffix != ".pt":
        return read_map_list(value)
    if not os.path.isfile(value):
        raise FastMTPError(f"{VARIABLE}: {value}: no such file")
    return {EVERY: Path(value)}


def file_of(model: str, name: str) -> Path | None:
    """A file of a model's folder, or of its repository on the hub, from where it is fetched as engines do the rest."""
    if Path(model).is_dir():
        return Path(model) / name
    from transformers.utils import cached_file

    try:
        return Path(cached_file(model, name))
    except OSError:
        return None


class OutputMatrix(NamedTuple):
    """The part of a draft's output matrix that one tensor-parallel rank has."""

    weight: Any
    """[end - start, D] of numbers; None where an engine has packed it."""
    start: int
    """First token of this rank's part of the vocabulary."""
    end: int
    """The token after its last."""
    vocab_size: int


def make_head(files: Mapping[str, Path], tokenizer_folder: str, matrix: OutputMatrix) -> RoutedHead:
    """The maps beside a rank's part of the output matrix.

    Raises `FastMTPError` for maps that do not belong to the model, or an output matrix whose rows cannot be read.
    """
    check_weight(matrix.weight)
    maps = {}
    for name, file in files.items():
        check_tokenizer(file, tokenizer_folder)
        maps[name] = read_token_map(file, matrix.vocab_size)
    rank = {"vocab_start": matrix.start, "vocab_end": matrix.end}
    return RoutedHead(maps, matrix.vocab_size, **rank, device=matrix.weight.device)


def check_weight(weight: torch.Tensor | None) -> None:
    """Raises `FastMTPError` if an output matrix is quantized: its rows are no plain numbers to multiply with."""
    if weight is None or not weight.is_floating_point() or weight.element_size() < 2:
        dtype = "packed" if weight is None else weight.dtype
        raise FastMTPError(f"the output matrix is quantized ({dtype}); leave lm_head out of the quantization")
