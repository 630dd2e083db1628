"""Acceptance of a head on a dataset, without a server, and what it is worth.

The backbone answers each prompt (or the dataset's answers are taken as they are); then one teacher-forced pass in the
`exact` graph says, for every answer position, depth and token map, whether a server would accept that draft
(`acceptance.py`). Walking those matches as a server's verification rounds do gives tau for every K at once, and the
bytes that a step reads turn tau into speed (`cost.py`).
"""

import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from operator import attrgetter
from pathlib import Path
from typing import Any, Literal

import torch

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.mtp_tensors import check_head, head_reader
from ..data.chat_template import check_chat_template, load_tokenizer
from ..data.conversation import without_answer
from ..data.generate import end_token_ids, padding_id
from ..data.language_names import UNKNOWN
from ..errors import FastMTPError
from ..families.family import ENGINES, Family
from ..files.provenance import provenance
from ..files.rows import read_rows
from ..files.staging import new_files, try_output, write_json
from ..files.table import terminal_table
from ..method.config import FastMTPConfig
from ..method.map_files import check_tokenizer, copy_maps
from ..method.metrics import taus_of_answers, text_counts, verify_rounds
from ..method.token_map import read_token_map
from ..method.verification import (
    BLOCK,
    GREEDY,
    REGIMES,
    REJECTION,
    block_acceptance,
    default_regime,
    rejection_acceptance,
)
from ..model.backbone_lora import check_lora
from ..model.loading import head_shapes, load_head, load_model
from ..vocab.build import part_of
from ..vocab.counts import cell_of
from ..vocab.languages import TokenLanguages
from .acceptance import Text, TokenMap, greedy_acceptance, likelihood_ratios, make_texts
from .answers import SUFFIX, open_answers
from .by_load import best_by_load, check_service, services
from .cost import StepCost, read_cost
from .positions import PartResult, parts_of, parts_table
from .recommend import Recommendation, advice_line, map_table, recommend, warnings
from .request_map import RequestMap, mean_size
from .result import ALL, HeadResult
from .schedule import Depth, schedule
from .service import Offer
from .states import States
from .step_times import StepTimes, check_gpu

RECORD = "simulate.json"
SCHEDULE = "adaptive.json"
"""For SGLang's --speculative-adaptive-config, and `fastmtp serve-args --schedule`."""
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
    hidden_cache: str | None = None,
    token_maps: Sequence[str] = (),
    context_maps: Sequence[str] = (),
    by: Literal["language", "group", "category"] | None = None,
    engine: Literal["sglang", "vllm", "both"] | None = None,
    temperature: float = 0.0,
    top_k: int = 20,
    top_p: float = 0.95,
    seed: int = 0,
    draft_ms: float | None = None,
    verify_ms: float | None = None,
    decode_ms: float | None = None,
    step_times: StepTimes | str | None = None,
    context: int = 1024,
    request_rates: Sequence[float] = (),
    most_at_once: int = 32,
    within: float | None = None,
    max_rows: int | None = None,
    batch_size: int = 16,
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    device: str = "cpu",
    backbone_lora: str | None = None,
) -> list[HeadResult]:
    """Print the tables for the model's own head and each checkpoint's; write JSON, PNG and `maps.json` to `output_dir`.

    Args:
        model_dir: checkpoint folder; its own head is the first row
        checkpoints: trained ones to compare with it
        dataset: JSONL with `messages` (or `prompt`)
        output_dir: folder to write simulate.json, plots and maps.json to
        num_steps: largest draft depth K
        max_new_tokens: paper: 1024
        answers: `generate`d by the backbone, or `given`: the dataset's last assistant messages; or NAME.jsonl, a file
            of generated ones: those to the same prompts are taken from it, others are generated and added
        hidden_cache: folder of the backbone's hidden states, as training keeps them (fastmtp_hidden_cache): those of
            the same texts are read, others are computed and added
        token_maps: files for SGLang's --speculative-token-map that are measured too, in the same pass
        context_maps: files of small maps, to which the ids of each request's prompt and answer so far are added; no
            engine drafts so, and none is recommended
        by: a table and a token map for each, as `fastmtp vocab` tells them apart
        engine: whose server is predicted; both: where they compute something else with the same head, each; default:
            the one that the last checkpoint was trained for
        temperature: at which answers are (or, given, were) sampled; above 0, every regime of drafts is measured
        top_k: of sampled answers, as in bench; 0 is all
        top_p: of sampled answers, as in bench
        seed: of sampled answers
        draft_ms: measured: one draft step with the whole vocabulary; default: predicted from bytes
        verify_ms: measured: one verification step
        decode_ms: measured: one step without drafts; default: as a verification step
        step_times: by load, or a GPU to predict them for: the best K at each load is printed, and written for engines
        context: tokens of each request, on average, where costs are predicted
        request_rates: requests per second of a service, for each the servers and what users see, by the same costs
        most_at_once: answers that one of these servers decodes at once; others wait
        within: seconds in which 95 % of its answers must be whole; default: as many servers as keep up
        max_rows: of the dataset, from its top; default: all
        batch_size: texts at a time
        dtype: of the model and its heads
        device: as torch calls it
        backbone_lora: folder of a LoRA adapter that the model is served with

    Raises `FastMTPError` for bad rows, checkpoints, maps or an existing `output_dir`, for answers of other settings and
    for hidden states of another model, dtype or graph.
    """
    # Before the model is loaded: everything that may be wrong with the command or with what is written.
    _check_options(num_steps, temperature, draft_ms, verify_ms, answers, backbone_lora, step_times)
    check_service(request_rates, most_at_once, within, step_times)
    if output_dir:
        try_output(Path(output_dir) / RECORD)
    started, made_by = time.time(), provenance()
    rows = read_rows(dataset, max_rows)
    cost = read_cost(model_dir)
    if draft_ms is not None and verify_ms is not None:
        cost = cost.measured(draft_ms, verify_ms, decode_ms)
    # The backbone once; heads take turns in it.
    model = load_model(model_dir, getattr(torch, dtype), device, backbone_lora=backbone_lora)
    tokenizer = load_tokenizer(model_dir)
    check_chat_template(tokenizer, model_dir)
    model.fastmtp = replace(FastMTPConfig(), num_speculative_steps=num_steps)
    base = Checkpoint(model_dir)
    expected = head_shapes(base)
    heads = _heads(base, checkpoints, model.family, expected)
    trained_for = Checkpoint(checkpoints[-1]).trained_for if checkpoints else None
    engines = _engines(model.family, engine or trained_for or "sglang")
    shown_engine = _shown(engines, trained_for)
    maps = _read_maps(model_dir, model.config.vocab_size, token_maps, context_maps)
    # Every head, with every map, in every regime and group; the backbone once for all of them.
    passes = len(heads) * len(engines) * (1 + bool(temperature))
    results: list[HeadResult] = []
    positions: dict[str, list[PartResult]] = {}
    with States(passes, hidden_cache) as states:
        for served_by in engines:  # a folder of other states is refused before anything is generated
            model.fastmtp = replace(model.fastmtp, engine=served_by)
            states.keep_of(model)
        # The texts that drafts are measured on: the model's own, since a head follows what the model would say.
        sampling = (max_new_tokens, temperature, top_k, top_p, seed)
        texts = _texts(model, tokenizer, rows, answers, batch_size, sampling)
        groups = {ALL: list(range(len(texts))), **_groups(texts, rows, tokenizer, by)}
        for name, head in heads.items():
            load_head(model, head, expected)
            for served_by in engines:
                model.fastmtp = replace(model.fastmtp, engine=served_by)
                states.keep_of(model)
                shared = (model, texts, padding_id(model, tokenizer), batch_size)
                by_regime = _by_regime(shared, list(maps.values()), name, (temperature, top_k, top_p))
                if served_by == shown_engine:
                    positions[name] = parts_of(texts, by_regime[GREEDY.name][0])
                for regime, accepted in by_regime.items():
                    key = (name, regime, served_by)
                    results += _results(key, maps, accepted, texts, groups, cost)
    # Tables and advice; the last head is the one that is to be served.
    tokens = {group: sum(texts[i].end - texts[i].start for i in places) for group, places in groups.items()}
    whole = [r for r in results if r.group == ALL and (r.by_request or not (by and r.token_map))]
    print(table(whole))
    how = "greedy" if temperature == 0 else f"answers sampled at temperature {temperature}"
    print(f"{len(texts)} answers, {tokens[ALL]} tokens; tau: tokens per verification step, K drafts each, {how}")
    print(f"speedup: predicted from {_cost_line(cost)}")
    for line in [*_engine_lines(model.family, engines, whole), *_request_lines(results)]:
        print(line)
    served_in = default_regime(temperature)
    for line in _regime_lines(temperature):
        print(line)
    of_head = [r for r in results if r.head == name and r.engine == shown_engine and not r.by_request]
    of_last = [r for r in of_head if r.regime == served_in.name]
    last = [r for r in of_last if r.group != ALL or not by]
    _print_positions(name, positions[name], num_steps)
    advice = _advise(last, {group: len(places) for group, places in groups.items()}, tokens)
    depths: list[Depth] = []
    offered: list[Offer] = []
    if step_times is not None:
        depths, served, times = best_by_load(model_dir, [r for r in of_last if r.group == ALL], step_times, context)
        offered = services((request_rates, most_at_once, within), texts, depths, served, times)
    if output_dir:
        from .plots import plot_acceptance, plot_maps

        record = {
            "schema": "swift_fastmtp.simulate/2",
            "provenance": {**made_by, "seconds": round(time.time() - started, 1)},
            "model": model_dir,
            "backbone_lora": backbone_lora,
            "dataset": dataset,
            "answers": answers,
            "temperature": temperature,
            "top_k": top_k if temperature else None,
            "top_p": top_p if temperature else None,
            "seed": seed,
            "regime": served_in.name,
            "by": by,
            "engines": engines,
            "max_new_tokens": max_new_tokens,
            "dtype": dtype,
            "cost": vars(cost),
            "groups": {g: {"answers": len(places), "tokens": tokens[g]} for g, places in groups.items()},
            "recommended": vars(advice),
            "by_load": [vars(depth) for depth in depths],
            "services": [asdict(offer) for offer in offered],
            "heads": [vars(r) for r in results],
            "positions": {head: [vars(part) for part in parts] for head, parts in positions.items()},
        }
        out = Path(output_dir)
        with new_files(out, last=RECORD) as folder:
            plotted = [r for r in whole if not r.token_map or len(whole) <= MOST_PLOTTED]
            plot_acceptance(plotted, folder / "simulate.png")
            if by and token_maps:
                plot_maps(last, advice.num_steps, folder / "maps.png")
                chosen = {g: Path(p) for g, p in advice.token_maps.items() if p and g != UNKNOWN}
                write_json(copy_maps(chosen, folder), folder / "maps.json")  # a list names maps beside it
            if depths:
                write_json(schedule(depths), folder / SCHEDULE)
            write_json(record, folder / RECORD)
    return results


def _read_maps(
    model_dir: str, vocab_size: int, token_maps: Sequence[str], context_maps: Sequence[str]
) -> dict[tuple[str | None, bool], TokenMap]:
    """By file and whether the ids of each request are added to it; the whole vocabulary first."""
    maps: dict[tuple[str | None, bool], TokenMap] = {(None, False): None}
    for by_request, files in ((False, token_maps), (True, context_maps)):
        for file in files:
            check_tokenizer(file, model_dir)
            ids = read_token_map(file, vocab_size)
            maps[file, by_request] = RequestMap(ids) if by_request else ids
    return maps


def _advise(results: list[HeadResult], answers: dict[str, int], tokens: dict[str, int]) -> Recommendation:
    """Which K and token maps; printed, with a table of each group if `results` are of groups.

    Args:
        results: of the head that is to be served.
        answers: in each group.
        tokens: in each group.
    """
    advice = recommend(results, tokens)
    for group in dict.fromkeys(r.group for r in results):
        if group != ALL:
            print(f"\n{group}: {answers[group]} answers, {tokens[group]} tokens, head {results[0].head}")
            print(map_table([r for r in results if r.group == group], advice))
    print("\n" + advice_line(advice))
    for line in warnings(results, advice, tokens):
        print(line)
    return advice


def _engines(family: Family, engine: str) -> list[str]:
    """Those whose graphs are computed; one where both have the same. Raises `FastMTPError` for one without any."""
    if engine == "both" and family.differences:
        return list(ENGINES)
    family.graph(engine)
    return ["sglang" if engine == "both" else engine]


def _shown(engines: list[str], trained_for: str | None) -> str:
    """The engine whose numbers advice is given by."""
    return trained_for if trained_for in engines else engines[0]


def _print_positions(head: str, parts: list[PartResult], num_steps: int) -> None:
    by_position = parts_table(parts, num_steps)
    if by_position:
        print(f"\nwhere acceptance is lost, {head}")
        print(by_position)


def _engine_lines(family: Family, engines: list[str], results: list[HeadResult]) -> list[str]:
    """Where a head does better, if two engines were asked for."""
    if len(engines) < 2:
        return []
    lines = [f"engines: {difference}" for difference in family.differences]
    whole = [r for r in results if not r.token_map and r.regime == GREEDY.name]
    for head in dict.fromkeys(r.head for r in whole):
        by_engine = {r.engine: r.tau_micro[-1] for r in whole if r.head == head}
        sglang, vllm = by_engine["sglang"], by_engine["vllm"]
        better = (
            "does as well in both" if sglang == vllm else f"does better in {'SGLang' if sglang > vllm else 'vLLM'}'s"
        )
        K = len(whole[0].tau_micro)
        lines.append(f"engines: {head} {better}: tau K={K} {sglang:.3f} in SGLang's graph, {vllm:.3f} in vLLM's")
    return lines


def _request_lines(results: list[HeadResult]) -> list[str]:
    """What the ids of requests keep of the whole vocabulary's tau, of every head and group."""
    key = attrgetter("head", "regime", "engine", "group")
    tau = {key(r): r.tau_micro[-1] for r in results if r.token_map is None}
    lines = []
    for r in results:
        if r.by_request:
            share = r.tau_micro[-1] / tau[key(r)]
            lines.append(
                f"{r.name}: {r.group}: {r.num_ids:,} ids on average, tau K={len(r.tau_micro)} {r.tau_micro[-1]:.3f}, "
                f"{share:.1%} of the whole vocabulary's"
            )
    return lines


def _by_regime(
    shared: tuple[Any, list[Text], int, int],
    token_maps: list[TokenMap],
    label: str,
    sampling: tuple[float, int, float],
) -> dict[str, list[list[torch.Tensor]]]:
    """Acceptance of the loaded head per regime, map and text; at temperature 0 there is one regime.

    Args:
        shared: what `greedy_acceptance` takes first.
        sampling: temperature, top_k, top_p.
    """
    by_regime = {GREEDY.name: greedy_acceptance(*shared, token_maps, label)}
    temperature, top_k, top_p = sampling
    if temperature == 0:
        return by_regime
    ratios = likelihood_ratios(*shared, temperature, token_maps, label, top_k, top_p)
    for regime, way in ((REJECTION, rejection_acceptance), (BLOCK, block_acceptance)):
        by_regime[regime.name] = [list(map(way, of_map)) for of_map in ratios]
    return by_regime


def _regime_lines(temperature: float) -> list[str]:
    """What selects each regime, and which of them the advice is for; nothing at temperature 0."""
    if temperature == 0:
        return []
    lines = [f"{regime.title}: {regime.selected_by}" for regime in REGIMES.values()]
    served_in = default_regime(temperature).title
    return [*lines, f"below, and by `fastmtp serve-args --temperature {temperature:g}`: {served_in}"]


def _check_options(
    num_steps: int,
    temperature: float,
    draft_ms: float | None,
    verify_ms: float | None,
    answers: str,
    backbone_lora: str | None,
    step_times: StepTimes | str | None,
) -> None:
    if answers not in ("generate", "given") and not answers.endswith(SUFFIX):
        raise FastMTPError(f"--answers {answers}: must be `generate`, `given`, or a file whose name ends in {SUFFIX}")
    if num_steps < 1:
        raise FastMTPError(f"--num_steps {num_steps}: must be at least 1")
    if temperature < 0:
        raise FastMTPError(f"--temperature {temperature}: must not be negative")
    if (draft_ms is None) != (verify_ms is None):
        raise FastMTPError("--draft_ms and --verify_ms: give both or neither")
    if backbone_lora:
        check_lora(backbone_lora)
    if isinstance(step_times, str):
        check_gpu(step_times)


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


def _texts(
    model: Any,
    tokenizer: Any,
    rows: list[dict[str, Any]],
    answers: str,
    batch_size: int,
    sampling: tuple[int, float, int, float, int],
) -> list[Text]:
    """`make_texts`, with the answers of a file if one is named."""
    max_new_tokens, temperature, top_k, top_p, seed = sampling
    asked = (model, tokenizer, rows, max_new_tokens, answers, batch_size, temperature, top_k, top_p, seed)
    if not answers.endswith(SUFFIX):
        return make_texts(*asked)
    settings = {
        "model": Checkpoint(model.name_or_path).fingerprint,
        "dtype": str(model.dtype),
        "end_tokens": sorted(end_token_ids(model, tokenizer)),
        "max_new_tokens": max_new_tokens,
        "temperature": float(temperature),
    }
    if getattr(model, "backbone_lora", None):
        settings["backbone_lora"] = model.backbone_lora
    if temperature > 0:
        settings |= {"top_k": top_k, "top_p": top_p, "seed": seed}
    with open_answers(answers, settings, model.config.vocab_size) as kept:
        return make_texts(*asked, kept)


def _groups(texts: list[Text], rows: list[dict[str, Any]], tokenizer: Any, by: str | None) -> dict[str, list[int]]:
    """Which texts are in which group, by prompt and answer, as `fastmtp vocab` counts rows; or as the server tells
    languages, where that knows none."""
    if by is None:
        return {}
    identify = TokenLanguages(tokenizer)
    groups = defaultdict(list)
    for i, text in enumerate(texts):
        row, ids = rows[text.row], text.ids[text.start : text.end]
        answer = {"role": "assistant", "content": tokenizer.decode(ids, skip_special_tokens=True)}
        name = part_of(cell_of({**row, "messages": [*without_answer(row["messages"]), answer]}, by == "category"), by)
        if name == UNKNOWN and by == "language":
            name = identify(ids) or UNKNOWN
        groups[name].append(i)
    return dict(sorted(groups.items()))


def _results(
    key: tuple[str, str, str],
    maps: dict[tuple[str | None, bool], TokenMap],
    accepted: list[list[torch.Tensor]],
    texts: list[Text],
    groups: dict[str, list[int]],
    cost: StepCost,
) -> list[HeadResult]:
    """Of one head, regime and engine (`key`): a result for each map and group."""
    head, regime, engine = key
    results = []
    for ((path, by_request), ids), of_map in zip(maps.items(), accepted, strict=True):
        for group, places in groups.items():
            if isinstance(ids, RequestMap):
                size = round(mean_size([texts[i] for i in places], ids.base_M))
            else:
                size = cost.vocab_size if ids is None else len(ids)
            rates = _rates([of_map[i] for i in places], regime, size, cost)
            results.append(HeadResult(head, path, size, regime, group, *rates, engine, by_request))
    return results


def _rates(
    accepted: list[torch.Tensor], regime: str, size: int, cost: StepCost
) -> tuple[list[float], list[float], list[float], list[float], list[float], list[int] | None]:
    K, counts = len(accepted[0]), text_counts(accepted)
    taus = [taus_of_answers(accepted, k) for k in range(1, K + 1)]
    micro = [tau for tau, _ in taus]
    macro = [tau for _, tau in taus]
    speedup = [cost.speedup(tau, k, size) for k, tau in enumerate(micro, start=1)]
    histogram = None
    if regime == GREEDY.name:
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
