"""Opens the hidden-state cache of a run, if it was asked for and pays."""

import math
import shutil
from pathlib import Path
from typing import Any

import torch
from swift.utils import get_dist_setting, get_logger
from transformers.integrations import is_deepspeed_zero3_enabled

from ..checkpoint.checkpoint import Checkpoint
from ..errors import FastMTPError
from ..model.hidden_cache import EngineStates, HiddenCache, engine_states, states_depend_on

logger = get_logger()


def attach_hidden_cache(args: Any, model: Any, datasets: list[Any]) -> None:
    """Give `model` its cache.

    Args:
        args: ms-swift's.
        datasets: training and validation data, with a `lengths` column where ms-swift has made one.

    Raises `FastMTPError` if the states would not fit into `hidden_cache_gb` or on the disk, or cannot be cached.
    """
    config = model.fastmtp
    if not config.hidden_cache:
        return
    if is_deepspeed_zero3_enabled():
        raise FastMTPError(
            "fastmtp_hidden_cache does not work with ZeRO-3: ranks would wait for a backbone that others skip; use "
            "ZeRO-2, or drop it"
        )
    if states := engine_states(config.hidden_cache):
        model.hidden_cache = _of_engine(model, states)
        return
    epochs = _epochs(args, datasets[0])
    if epochs is not None and epochs <= 1:
        logger.warning(f"fastmtp_hidden_cache: not used, {epochs:.1f} epochs read each row once; it pays from 2 on")
        return
    tokens = _tokens(datasets)
    width, dtype = model.config.hidden_size, model.dtype
    limit = int(config.hidden_cache_gb * 1e9)
    if tokens is not None:
        _check_room(config.hidden_cache, tokens * width * dtype.itemsize, tokens, limit)
    checkpoint = Checkpoint(model.model_dir)
    key = states_depend_on(
        model,
        checkpoint.fingerprint,
        _autocast(args),
        checkpoint.value("quantization_config"),
    )
    rank = max(0, get_dist_setting()[0])
    model.hidden_cache = HiddenCache(config.hidden_cache, key, width, dtype, limit, rank)
    logger.info(f"hidden-state cache: {config.hidden_cache}, {model.hidden_cache.num_bytes / 1e9:.3f} GB so far")


def _of_engine(model: Any, states: EngineStates) -> HiddenCache:
    """The cache that `fastmtp hidden` filled. Raises `FastMTPError` if it is another model's, or of other states."""
    if model.head.graph.hidden_before_norm and not states.before_norm:
        raise FastMTPError(
            f"{model.fastmtp.hidden_cache}: holds states after the final norm, and fastmtp_engine vllm trains on those "
            "before it; fill a cache from vLLM (`fastmtp hidden --engine vllm`), or set fastmtp_engine to sglang"
        )
    target = Checkpoint(model.model_dir).target
    cache = HiddenCache.from_engine(model.fastmtp.hidden_cache, target.fingerprint, states, max_bytes=0)
    logger.info(
        f"hidden-state cache: {cache.folder}, {cache.num_bytes / 1e9:.3f} GB of {states}; no backbone is loaded"
    )
    return cache


def _autocast(args: Any) -> torch.dtype | None:
    """What transformers' trainer computes in, by its `--bf16` and `--fp16`."""
    if getattr(args, "bf16", False):
        return torch.bfloat16
    return torch.float16 if getattr(args, "fp16", False) else None


def _epochs(args: Any, train: Any) -> float | None:
    """Passes over the training data; None for a stream."""
    if not hasattr(train, "__len__"):
        return None
    if args.max_steps and args.max_steps > 0:
        world = max(1, get_dist_setting()[2])
        rows = args.max_steps * args.per_device_train_batch_size * args.gradient_accumulation_steps * world
        return float(rows / len(train))
    return float(args.num_train_epochs)


def _tokens(datasets: list[Any]) -> int | None:
    """Tokens of all rows, None where ms-swift has not counted them (a stream, --lazy_tokenize)."""
    known = [d for d in datasets if d is not None]
    if not all("lengths" in (getattr(d, "column_names", None) or ()) for d in known):
        return None
    return sum(max(n) if isinstance(n, list) else n for d in known for n in d["lengths"])


def _check_room(folder: str, need: int, tokens: int, limit: int) -> None:
    gb = need / 1e9
    if need > limit:
        raise FastMTPError(
            f"fastmtp_hidden_cache: the hidden states of {tokens} tokens take {gb:.3f} GB; allow that with "
            f"fastmtp_hidden_cache_gb {_round_up(gb)}"
        )
    place = next(p for p in (Path(folder).resolve(), *Path(folder).resolve().parents) if p.exists())
    held = sum(path.stat().st_size for path in Path(folder).glob("states-*.bin"))
    free = shutil.disk_usage(place).free + held
    if need > free:
        raise FastMTPError(f"fastmtp_hidden_cache: needs {gb:.3f} GB, {place} has {free / 1e9:.3f} GB free")


def _round_up(gb: float) -> str:
    """Two significant digits, never below."""
    unit = 10.0 ** (math.floor(math.log10(gb)) - 1)
    return f"{math.ceil(gb / unit) * unit:.12g}"
