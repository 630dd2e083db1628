"""Acceptance of a head on a dataset, without a server, and what it is worth.

The backbone answers each prompt (or the dataset's answers are taken as they are); then one teacher-forced pass in the
`exact` graph says, for every answer position, depth and token map, whether a server would accept that draft
(`acceptance.py`). Walking those matches as a server's verification rounds do gives tau for every K at once, and the
bytes that a step reads turn tau into speed (`cost.py`).
"""

import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.mtp_tensors import check_head, head_reader
from ..data.chat_template import check_chat_template, load_tokenizer
from ..data.conversation import without_answer
from ..data.generate import padding_id
from ..data.language_names import UNKNOWN
from ..errors import FastMTPError
from ..families.family import Family
from ..files.provenance import provenance
from ..files.rows import read_rows
from ..files.staging import new_files, try_output, write_json
from ..files.table import terminal_table
from ..method.config import FastMTPConfig
from ..method.metrics import expected_rounds, text_counts, verify_rounds
from ..method.token_map import check_tokenizer, copy_maps, read_token_map
from ..model.modeling import head_shapes, load_head, load_model
from ..vocab.build import part_of
from ..vocab.counts import cell_of
from ..vocab.languages import TokenLanguages
from .acceptance import Text, greedy_acceptance, make_texts, sampled_acceptance
from .cost import StepCost, read_cost
from .recommend import advice_line, map_table, recommend, warnings
from .result import HeadResult

RECORD = "simulate.json"
ALL = "all"
MOST_PLOTTED = 8


def simulate(  # noqa: PLR0913
    model_dir: str,
    checkpoints: list[str],
    dataset: str,
    *,
    output_dir: str | None = None,
    num_steps: int = 3,
    max_new_tokens: int = 1024,
    answers: str = "generate",
    token_maps: Sequence[str] = (),
    by: str | None = None,
    temperature: float = 0.0,
    top_k: int = 20,
    top_p: float = 0.95,
    seed: int = 0,
    draft_ms: float | None = None,
    verify_ms: float | None = None,
    decode_ms: float | None = None,
    max_rows: int | None = None,
    batch_size: int = 16,
    dtype: str = "float32",
    device: str = "cpu",
) -> list[HeadResult]:
    """Print the tables for the model's own head and each checkpoint's; write JSON, PNG and `maps.json` to `output_dir`.

    Args:
        answers: `generate` (by the backbone) or `given` (the dataset's last assistant message).
        token_maps: files for SGLang's `--speculative-token-map`; all are measured in one pass.
        by: `language`, `group` or `category`: also a table for each of them, as `fastmtp vocab` tells them apart.
        temperature: at which answers are (or, `given`, were) sampled; if positive, drafts are sampled too, beside the
            greedy ones.
        top_k, top_p: what sampled answers are drawn from, above temperature 0; as in `fastmtp bench`.
        draft_ms, verify_ms: measured times of a draft step, with the whole vocabulary, and of a verification step;
            default: the bytes that they read. decode_ms: of a step without drafts; default: as a verification.
        max_rows: read only so many rows, from the top of the file.

    Raises `FastMTPError` for bad rows, checkpoints, maps or an existing `output_dir`.
    """
    _check_options(num_steps, temperature, draft_ms, verify_ms)
    if output_dir:
        try_output(Path(output_dir) / RECORD)
    started, made_by = time.time(), provenance()
    rows = read_rows(dataset, max_rows)
    cost = read_cost(model_dir)
    if draft_ms is not None and verify_ms is not None:
        cost = cost.measured(draft_ms, verify_ms, decode_ms)
    model = load_model(model_dir, getattr(torch, dtype), device)
    tokenizer = load_tokenizer(model_dir)
    check_chat_template(tokenizer, model_dir)
    model.fastmtp = replace(FastMTPConfig(), num_speculative_steps=num_steps)
    base = Checkpoint(model_dir)
    expected = head_shapes(base)
    heads = _heads(base, checkpoints, model.family, expected)
    maps: dict[str | None, torch.Tensor | None] = {None: None}
    for file in token_maps:
        check_tokenizer(file, model_dir)
        maps[file] = read_token_map(file, model.config.vocab_size)
    torch.manual_seed(seed)
    texts = make_texts(model, tokenizer, rows, max_new_tokens, answers, batch_size, temperature, top_k, top_p)
    groups = {ALL: list(range(len(texts)))}
    if by:
        groups |= _groups(texts, rows, tokenizer, by)
    results: list[HeadResult] = []
    for name, head in heads.items():
        load_head(model, head, expected)
        shared = (model, texts, padding_id(model, tokenizer), batch_size)
        found_by = {"greedy": greedy_acceptance(*shared, list(maps.values()), name)}
        if temperature > 0:
            found_by["sampled"] = sampled_acceptance(*shared, temperature, list(maps.values()), name, top_k, top_p)
        for drafts, accepted in found_by.items():
            for (path, ids), of_map in zip(maps.items(), accepted, strict=True):
                size = cost.vocab_size if ids is None else len(ids)
                for group, places in groups.items():
                    result = HeadResult(
                        name, path, size, drafts, group, *_rates([of_map[i] for i in places], drafts, size, cost)
                    )
                    results.append(result)
    tokens = {group: sum(texts[i].end - texts[i].start for i in places) for group, places in groups.items()}
    whole = [r for r in results if r.group == ALL and not (by and r.token_map)]
    print(table(whole))
    how = "greedy" if temperature == 0 else f"answers sampled at temperature {temperature}"
    print(f"{len(texts)} answers, {tokens[ALL]} tokens; tau: tokens per verification step, K drafts each, {how}")
    print(f"speedup: predicted from {_cost_line(cost)}")
    last = [r for r in results if r.head == name and r.drafts == "greedy" and (r.group != ALL or not by)]
    advice = recommend(last, tokens)
    for group in groups if by else ():
        if group != ALL:
            print(f"\n{group}: {len(groups[group])} answers, {tokens[group]} tokens, head {name}")
            print(map_table([r for r in last if r.group == group], advice))
    print("\n" + advice_line(advice))
    for line in warnings(last, advice, tokens):
        print(line)
    if output_dir:
        from .plots import plot_acceptance, plot_maps

        record = {
            "schema": "swift_fastmtp.simulate/2",
            "provenance": {**made_by, "seconds": round(time.time() - started, 1)},
            "model": model_dir,
            "dataset": dataset,
            "answers": answers,
            "temperature": temperature,
            "top_k": top_k if temperature else None,
            "top_p": top_p if temperature else None,
            "seed": seed,
            "by": by,
            "max_new_tokens": max_new_tokens,
            "dtype": dtype,
            "cost": vars(cost),
            "groups": {g: {"answers": len(places), "tokens": tokens[g]} for g, places in groups.items()},
            "recommended": vars(advice),
            "heads": [vars(r) for r in results],
        }
        out = Path(output_dir)
        with new_files(out, last=RECORD) as folder:
            plotted = [r for r in whole if not r.token_map or len(whole) <= MOST_PLOTTED]
            plot_acceptance(plotted, folder / "simulate.png")
            if by and token_maps:
                plot_maps(last, advice.num_steps, folder / "maps.png")
                chosen = {g: Path(p) for g, p in advice.token_maps.items() if p and g != UNKNOWN}
                write_json(copy_maps(chosen, folder), folder / "maps.json")  # a list names maps beside it
            write_json(record, folder / RECORD)
    return results


def _check_options(num_steps: int, temperature: float, draft_ms: float | None, verify_ms: float | None) -> None:
    if num_steps < 1:
        raise FastMTPError(f"--num_steps {num_steps}: must be at least 1")
    if temperature < 0:
        raise FastMTPError(f"--temperature {temperature}: must not be negative")
    if (draft_ms is None) != (verify_ms is None):
        raise FastMTPError("--draft_ms and --verify_ms: give both or neither")


def _heads(
    base: Checkpoint, checkpoints: list[str], family: Family, expected: dict[str, tuple[int, ...]]
) -> dict[str, Callable[[str], torch.Tensor]]:
    """What reads the tensors of each MTP layer that is measured; all of them are checked before any is."""
    heads = {"base": head_reader(base, family, expected)}
    for run in checkpoints:
        trained = Checkpoint(run)
        trained.check_backbone(base)
        check_head(trained, family, expected)
        heads[run] = head_reader(trained, family, expected)
    return heads


def _groups(texts: list[Text], rows: list[dict[str, Any]], tokenizer: Any, by: str) -> dict[str, list[int]]:
    """Which texts are in which group, by prompt and answer, as `fastmtp vocab` counts rows; or as the server tells
    languages, where that knows none."""
    identify = TokenLanguages(tokenizer)
    found = defaultdict(list)
    for i, text in enumerate(texts):
        row, ids = rows[text.row], text.ids[text.start : text.end]
        answer = {"role": "assistant", "content": tokenizer.decode(ids, skip_special_tokens=True)}
        name = part_of(cell_of({**row, "messages": [*without_answer(row["messages"]), answer]}, by == "category"), by)
        if name == UNKNOWN and by == "language":
            name = identify(ids) or UNKNOWN
        found[name].append(i)
    return dict(sorted(found.items()))


def _rates(accepted: list[torch.Tensor], drafts: str, size: int, cost: StepCost) -> tuple[Any, ...]:
    K, counts = len(accepted[0]), text_counts(accepted)
    micro, macro = [], []
    for k in range(1, K + 1):
        walks = [expected_rounds(a, k) for a in accepted]
        micro.append(sum(tokens for tokens, _ in walks) / sum(steps for _, steps in walks))
        macro.append(sum(tokens / steps for tokens, steps in walks) / len(walks))
    speedup = [cost.speedup(tau, k, size) for k, tau in enumerate(micro, start=1)]
    histogram = None
    if drafts == "greedy":
        rounds = torch.tensor([c for a in accepted for c in verify_rounds(a, K)])
        histogram = torch.bincount(rounds, minlength=K + 1).tolist()
    return counts.marginal, counts.conditional, micro, macro, speedup, histogram


def _cost_line(cost: StepCost) -> str:
    draft = cost.draft_step() / cost.verify
    head = cost.row * cost.vocab_size / cost.draft_step()
    source = "measured times" if cost.unit == "ms" else "the bytes that steps read, one request at a time"
    return f"{source}: a draft step costs {draft:.1%} of a verification, {head:.0%} of it the output matrix"


def table(results: list[HeadResult]) -> str:
    """The terminal's table: marginal and conditional rate per depth, micro tau and speedup per K."""
    depths = range(1, len(results[0].marginal) + 1)
    names = [r.name if len(r.name) <= 40 else "…" + r.name[-39:] for r in results]
    header = ["head", "rate", *(f"depth {k}" for k in depths), *(f"tau K={k}" for k in depths)]
    header += [f"speedup K={k}" for k in depths]
    lines = []
    for name, result in zip(names, results, strict=True):
        marginal = [f"{100 * x:.1f}%" for x in result.marginal]
        conditional = [f"{100 * x:.1f}%" for x in result.conditional]
        taus = [f"{x:.2f}" for x in result.tau_micro]
        speedup = [f"{x:.2f}x" for x in result.speedup]
        lines.append([name, "marginal", *marginal, *taus, *speedup])
        lines.append(["", "conditional", *conditional])
    return terminal_table(header, lines, num_text=2)
