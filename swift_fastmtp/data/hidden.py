"""Hidden states from the server that runs the model: `fastmtp hidden`.

A model that is too large for a process of its own, or quantized as only an engine can run it, is served anyway. Its
server computes the hidden states that drafts will see, of the same numbers; here they are asked for and put into the
hidden-state cache (`model/hidden_cache.py`). A run that finds all it needs in there loads embedding, output matrix and
MTP layer, and never the layers of the backbone (`model/without_backbone.py`).

SGLang returns the states of a prompt with `return_hidden_states`, after the final norm (`batch_result_processor.py`
`_append_prefill_hidden_states`): those that the last step of the prefill computed. A prefix that it has cached, and
earlier chunks of a long prompt, are missing in them, so its radix cache and chunks must be off.
"""

import asyncio
from collections.abc import Iterator
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from tqdm import tqdm

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.quantization import read_quantization
from ..errors import FastMTPError
from ..files.rows import BadRows, iter_rows
from ..model.hidden_cache import EngineStates, HiddenCache
from .chat_template import RenderError, load_tokenizer
from .client import Hear, RefusedError, Sampling, Server, Servers, all_or_first_failure
from .examples import check_vocabulary, training_examples

_SHORT = {"half": "float16", "float": "float32"}
"""SGLang's other words for its `--dtype`."""
_FLAGS = "--enable-return-hidden-states --disable-radix-cache --chunked-prefill-size -1"


def hidden(  # noqa: PLR0913
    model_dir: str,
    dataset: list[str],
    hidden_cache: str,
    *,
    base_urls: list[str],
    api_key: str | None = None,
    concurrency: int = 32,
    timeout: float = 600.0,
    retry_seconds: float = 600.0,
    max_length: int | None = None,
    hidden_cache_gb: float = 100.0,
    on_bad_row: Literal["stop", "skip"] = "stop",
) -> int:
    """Fill a hidden-state cache from servers of the model, for `swift sft` with fastmtp_hidden_cache.

    Args:
        model_dir: folder of the model that is served; a draft-only folder stands for its target
        dataset: rows to train on, as `swift sft --dataset` gets them; rows for evaluation too
        hidden_cache: folder to fill; one that is not complete is continued
        base_urls: SGLang servers of the model, without drafts
        api_key: default, on the command line, where others on the machine do not see it: $OPENAI_API_KEY
        concurrency: rows at a time
        timeout: seconds of silence until a server must show that it lives
        retry_seconds: a request is repeated so long after its first failure
        max_length: tokens above which a row is left out, as by `swift sft --max_length`
        hidden_cache_gb: the largest size of the folder
        on_bad_row: skipped rows are counted

    Returns how many documents the cache holds of the dataset.

    Raises `FastMTPError` if the servers serve another model or return no states of whole prompts, the folder holds
    states of another model, or a row is bad.
    """
    draft = Checkpoint(model_dir)
    target = draft.target
    documents = dict.fromkeys(_documents(model_dir, dataset, draft.vocab_size, max_length, on_bad_row))
    if not documents:
        raise FastMTPError(f"{', '.join(dataset)}: no row has an answer that can be trained on, within --max_length")
    servers = Servers(base_urls, Sampling(max_new_tokens=1), None, api_key, timeout, retry_seconds, concurrency)
    return asyncio.run(_fill(servers, target, list(documents), hidden_cache, hidden_cache_gb, concurrency))


def _documents(
    model_dir: str, files: list[str], vocab_size: int, max_length: int | None, on_bad_row: str
) -> Iterator[tuple[int, ...]]:
    """Token ids of everything that the rows are trained on. Raises `FastMTPError` naming a bad row."""
    tokenizer = load_tokenizer(model_dir)
    bad = BadRows(on_bad_row)
    for file in files:
        for where, row in iter_rows(file, bad):
            try:
                examples = training_examples(tokenizer, row)
                for example in examples:
                    check_vocabulary(example, vocab_size)
            except (RenderError, FastMTPError) as error:
                bad.add(where, str(error))
                continue
            for example in examples:
                if max_length is None or len(example.ids) <= max_length:
                    yield tuple(example.ids)
    for what, count in bad.counts.most_common():
        print(f"skipped: {count} rows, {what} (as {bad.places[what][0]})")


async def _fill(
    servers: Servers,
    target: Checkpoint,
    documents: list[tuple[int, ...]],
    folder: str,
    size_gb: float,
    concurrency: int,
) -> int:
    try:
        states = await _what_is_served(servers, target)
        cache = HiddenCache.from_engine(folder, target.fingerprint, states, int(size_gb * 1e9))
        missing = [ids for ids in documents if not cache.has(torch.tensor(ids))]
        tokens = sum(map(len, missing))
        done = len(documents) - len(missing)
        with tqdm(total=tokens, unit="tok", desc="hidden states", unit_scale=True) as bar:
            bar.set_postfix_str(f"{done} of {len(documents)} documents were there")
            stream = iter(missing)
            workers = min(concurrency, len(missing))
            await all_or_first_failure(_work(servers, stream, cache, bar) for _ in range(workers))
    finally:
        await servers.close()
    return len(documents)


async def _work(servers: Servers, stream: Iterator[tuple[int, ...]], cache: HiddenCache, bar: Any) -> None:
    for ids in stream:
        try:
            states = await servers.ask_any(partial(_states, ids=ids, width=cache.width))
        except RefusedError as error:
            raise FastMTPError(
                f"the server refuses a prompt of {len(ids)} tokens ({error}); start it with {_FLAGS}"
            ) from None
        cache.put([torch.tensor(ids)], [states])
        if cache.full:
            raise FastMTPError(
                f"{cache.folder}: full; allow more than --hidden_cache_gb {cache.max_bytes / 1e9:g}, and start again"
            )
        bar.update(len(ids))


async def _states(server: Server, _hear: Hear, *, ids: tuple[int, ...], width: int) -> torch.Tensor:
    """States [T, D] of a prompt, float32 as the server's JSON has them."""
    body = {
        "input_ids": list(ids),
        "sampling_params": {"max_new_tokens": 1, "temperature": 0},
        "return_hidden_states": True,
    }
    answer = await server.post("/generate", body)
    prefill = ((answer.get("meta_info") or {}).get("hidden_states") or [[]])[0]
    states = np.asarray(prefill, np.float32)
    if states.shape != (len(ids), width):
        raise FastMTPError(
            f"{server.url}: returns hidden states of shape {list(states.shape)} for a prompt of {len(ids)} tokens and "
            f"width {width}; start SGLang with {_FLAGS}, and the model whose folder is --model"
        )
    return torch.from_numpy(states)


async def _what_is_served(servers: Servers, target: Checkpoint) -> EngineStates:
    """What the states depend on besides the weights. Raises `FastMTPError` if servers differ, or serve otherwise."""
    found = set()
    for server in servers.all:
        info = await servers.ask_one(server, "/server_info")
        if info.get("speculative_algorithm"):
            raise FastMTPError(f"{server.url}: drafts; hidden states are asked from a server without drafts")
        dtype = str(info.get("dtype") or "auto")
        if dtype == "auto":
            stored = target.value("dtype") or target.value("torch_dtype") or "bfloat16"
            dtype = str(stored).removeprefix("torch.")
        dtype = _SHORT.get(dtype, dtype)
        if dtype not in ("float32", "bfloat16", "float16"):
            raise FastMTPError(f"{server.url}: computes in {dtype!r}; hidden states are kept in 32 or 16 bits")
        quantization = info.get("quantization") or _method(target)
        found.add(EngineStates("SGLang", str(info.get("version")), dtype, quantization, target.value("hidden_size")))
    if len(found) != 1:
        raise FastMTPError(f"the servers differ: {', '.join(map(str, sorted(found, key=str)))}; ask one kind of them")
    return found.pop()


def _method(target: Checkpoint) -> str | None:
    quantization = read_quantization(target.config, target.folder)
    return quantization.method if quantization else None
