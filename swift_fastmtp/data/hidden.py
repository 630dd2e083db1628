"""Hidden states from the server that runs the model: `fastmtp hidden`.

A model that is too large for a process of its own, or quantized as only an engine can run it, is served anyway. Its
server computes the hidden states that drafts will see, of the same numbers; here they are asked for and put into the
hidden-state cache (`model/hidden_cache.py`). A run that finds all it needs in there loads embedding, output matrix and
MTP layer, and never the layers of the backbone (`model/without_backbone.py`).

How an engine hands them over stands in `state_sources.py`.
"""

import asyncio
import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from tqdm import tqdm

from ..checkpoint.checkpoint import Checkpoint
from ..errors import FastMTPError
from ..files.rows import BadRows, iter_rows
from ..model.backbone_lora import check_lora, lora_hash
from ..model.hidden_cache import EngineStates, HiddenCache
from ..model.without_backbone import final_norm_factor
from .chat_template import RenderError, load_tokenizer
from .client import Hear, RefusedError, Sampling, Server, Servers, all_or_first_failure
from .examples import check_vocabulary, training_examples
from .state_sources import Adapter, SGLangStates, VLLMStates, check_norm, check_shape


def hidden(  # noqa: PLR0913
    model_dir: str,
    dataset: list[str],
    hidden_cache: str,
    *,
    base_urls: list[str],
    engine: Literal["sglang", "vllm"] = "sglang",
    states_folder: str | None = None,
    backbone_lora: str | None = None,
    served_adapter_name: str | None = None,
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
        base_urls: servers of the model, without drafts
        engine: what they run
        states_folder: where vLLM's servers write states, which is read here and emptied; a folder in memory, as
            /dev/shm/states, or one that both machines see
        backbone_lora: folder of a LoRA adapter that the model is served with
        served_adapter_name: the servers' name of it; default: the folder's
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
    if (engine == "vllm") != (states_folder is not None):
        raise FastMTPError("--states_folder goes with --engine vllm: the folder that its servers write states to")
    draft = Checkpoint(model_dir)
    target = draft.target
    documents = dict.fromkeys(_documents(model_dir, dataset, draft.vocab_size, max_length, on_bad_row))
    if not documents:
        raise FastMTPError(f"{', '.join(dataset)}: no row has an answer that can be trained on, within --max_length")
    adapter = _adapter(backbone_lora, served_adapter_name)
    source = SGLangStates(target, adapter) if states_folder is None else VLLMStates(target, states_folder, adapter)
    factor = final_norm_factor(draft, target)
    servers = Servers(base_urls, Sampling(max_new_tokens=1), None, api_key, timeout, retry_seconds, concurrency)
    filling = _fill(servers, source, factor, list(documents), hidden_cache, hidden_cache_gb, concurrency)
    return asyncio.run(filling)


def _adapter(folder: str | None, name: str | None) -> Adapter | None:
    """What requests name. Raises `FastMTPError` if the folder is no adapter that engines serve beside a draft."""
    if folder is None:
        if name:
            raise FastMTPError("--served_adapter_name goes with --backbone_lora, the adapter's folder")
        return None
    check_lora(folder)
    return Adapter(name or Path(folder).resolve().name, lora_hash(folder))


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
    source: SGLangStates | VLLMStates,
    factor_D: torch.Tensor | None,
    documents: list[tuple[int, ...]],
    folder: str,
    size_gb: float,
    concurrency: int,
) -> int:
    try:
        states = await _what_is_served(servers, source, factor_D, documents[0])
        cache = HiddenCache.from_engine(folder, source.target.fingerprint, states, int(size_gb * 1e9))
        missing = [ids for ids in documents if not cache.has(torch.tensor(ids))]
        tokens = sum(map(len, missing))
        done = len(documents) - len(missing)
        with tqdm(total=tokens, unit="tok", desc="hidden states", unit_scale=True) as bar:
            bar.set_postfix_str(f"{done} of {len(documents)} documents were there")
            stream = iter(missing)
            workers = min(concurrency, len(missing))
            await all_or_first_failure(_work(servers, source, stream, cache, bar) for _ in range(workers))
    finally:
        await servers.close()
    return len(documents)


async def _what_is_served(
    servers: Servers, source: SGLangStates | VLLMStates, factor_D: torch.Tensor | None, ids: tuple[int, ...]
) -> EngineStates:
    """Where the states come from, which all servers have in common. Each is asked for those of one document.

    Raises `FastMTPError` if servers differ, or their states are not those that are wanted.
    """
    found = set()
    for server in servers.all:
        states = await _ask(servers, source, ids, server)
        if factor_D is not None:
            check_norm(source, server.url, states, factor_D)
        if source.adapter:
            base = copy.copy(source)
            base.adapter = None
            if torch.equal(states, await _ask(servers, base, ids, server)):
                raise FastMTPError(
                    f"{server.url}: its states with {source.adapter.name} are those without; serve the model with the "
                    "adapter (docs/adapters.md)"
                )
        found.add(await source.describe(servers, server, states))
    if len(found) != 1:
        raise FastMTPError(f"the servers differ: {', '.join(map(str, sorted(found, key=str)))}; ask one kind of them")
    (one,) = found
    if one.dtype not in ("float32", "bfloat16", "float16"):
        raise FastMTPError(f"{servers.all[0].url}: computes in {one.dtype!r}; states are kept in 32 or 16 bits")
    return one


async def _work(
    servers: Servers,
    source: SGLangStates | VLLMStates,
    stream: Iterator[tuple[int, ...]],
    cache: HiddenCache,
    bar: Any,
) -> None:
    for ids in stream:
        cache.put([torch.tensor(ids)], [await _ask(servers, source, ids)])
        if cache.full:
            raise FastMTPError(
                f"{cache.folder}: full; allow more than --hidden_cache_gb {cache.max_bytes / 1e9:g}, and start again"
            )
        bar.update(len(ids))


async def _ask(
    servers: Servers, source: SGLangStates | VLLMStates, ids: tuple[int, ...], server: Server | None = None
) -> torch.Tensor:
    """States [T, D] of a document, from one server or whichever has its turn."""

    async def ask(of: Server, hear: Hear) -> torch.Tensor:
        states = await source.ask(of, hear, ids=ids)
        check_shape(source, of.url, states, len(ids))
        return states

    try:
        return await servers.ask_any(ask, server)
    except RefusedError as error:
        raise FastMTPError(
            f"the server refuses a prompt of {len(ids)} tokens ({error}); {source.start}, and --max_length for rows "
            "that are longer than it takes"
        ) from None
