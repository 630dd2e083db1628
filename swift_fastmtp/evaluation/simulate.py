"""Acceptance of a head on a dataset, without a server.

The backbone answers each prompt greedily (or the dataset's answers are taken as they are); then one teacher-forced
pass in the `exact` graph says, for every answer position and depth, whether a greedy server would accept that
draft. Walking those matches as a server's verification rounds do gives tau for every K at once.
"""

import platform
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm
from transformers import AutoTokenizer
from transformers import __version__ as transformers_version

from .. import __version__
from ..checkpoints import read_head, write_json
from ..config import FastMTPConfig
from ..data.conversation import encode_prompt, without_answer
from ..data.generate import generate
from ..data.rows import read_rows
from ..errors import FastMTPError
from ..frozen_head import chunk_size
from ..losses import drafts
from ..modeling import head_shapes, load_head, load_model
from ..rollout import segment_ids, step_targets
from ..vocab.maps import DraftVocabulary, read_token_map
from .metrics import AcceptanceCounts, count_acceptance, macro_tau, micro_tau, verify_rounds


class Text(NamedTuple):
    """One conversation as token ids: prompt, answer, and up to K greedy tokens that would have followed."""

    ids: list[int]
    start: int
    """Length of the prompt."""
    end: int
    """Length of prompt + answer. A server drafts past the end of an answer too, and counts what it would accept."""


@dataclass
class HeadResult:
    """What one head reaches; lists are per depth or per K, 1..num_steps."""

    name: str
    marginal: list[float]
    conditional: list[float]
    tau_micro: list[float]
    tau_macro: list[float]
    histogram: list[int]
    """Rounds of the largest K that accepted 0, 1, .. K drafts (SGLang's `spec_correct_drafts_histogram`)."""


def simulate(
    model_dir: str,
    checkpoints: list[str],
    dataset: str,
    *,
    output_dir: str | None = None,
    num_steps: int = 3,
    max_new_tokens: int = 1024,
    answers: str = "generate",
    token_maps: Sequence[str] = (),
    batch_size: int = 16,
    dtype: str = "float32",
    device: str = "cpu",
) -> list[HeadResult]:
    """Print the table for the model's own head and each checkpoint's; write JSON and PNG to `output_dir`.

    Args:
        answers: `generate` (greedy, by the backbone) or `given` (the dataset's last assistant message).
        token_maps: files for SGLang's `--speculative-token-map`; each gives every head one more row.

    Raises `FastMTPError` for bad rows, checkpoints or an existing `output_dir`.
    """
    if num_steps < 1:
        raise FastMTPError(f"--num_steps {num_steps}: must be at least 1")
    if output_dir and (Path(output_dir) / "simulate.json").exists():
        raise FastMTPError(f"{output_dir}/simulate.json: already exists; name another folder or remove it")
    started = time.time()
    rows = read_rows(dataset)
    model = load_model(model_dir, getattr(torch, dtype), device)
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    model.fastmtp = replace(FastMTPConfig(), num_speculative_steps=num_steps)
    expected = head_shapes(model_dir)
    heads = {"base": read_head(model_dir, model.family, expected)}
    for checkpoint in checkpoints:
        heads[str(checkpoint)] = read_head(checkpoint, model.family, expected)
    maps: dict[str | None, torch.Tensor | None] = {None: None}
    maps.update({path: read_token_map(path, model.config.vocab_size) for path in token_maps})
    texts = make_texts(model, tokenizer, rows, max_new_tokens, answers, batch_size)
    results = []
    for name, tensors in heads.items():
        load_head(model, tensors)
        for path, token_map in maps.items():
            label = name if path is None else f"{name} + {Path(path).name}"
            counts, rounds = draft_rounds(model, texts, tokenizer.pad_token_id, batch_size, token_map, label)
            results.append(_result(label, counts, rounds))
    print(table(results))
    tokens = sum(text.end - text.start for text in texts)
    print(f"{len(texts)} answers, {tokens} tokens; tau: tokens per verification step, K drafts each, greedy")
    if output_dir:
        from .plots import plot_acceptance

        out = Path(output_dir)
        out.mkdir(parents=True, exist_ok=True)
        plot_acceptance(results, out / "simulate.png")
        record = {
            "schema": "swift_fastmtp.simulate/1",
            "provenance": provenance(started),
            "model": model_dir,
            "dataset": dataset,
            "answers": answers,
            "token_maps": list(token_maps),
            "num_answers": len(texts),
            "num_tokens": tokens,
            "max_new_tokens": max_new_tokens,
            "dtype": dtype,
            "heads": [vars(r) for r in results],
        }
        write_json(record, out / "simulate.json")
    return results


def make_texts(
    model: Any,
    tokenizer: Any,
    rows: list[dict[str, Any]],
    max_new_tokens: int,
    answers: str,
    batch_size: int,
    temperature: float = 0.0,
) -> list[Text]:
    """The texts to measure on, without answers so short that nothing is ever drafted."""
    prompts = [encode_prompt(tokenizer, without_answer(row["messages"])) for row in rows]
    texts = []
    if answers == "given":
        for number, (row, prompt) in enumerate(zip(rows, prompts, strict=True), start=1):
            if row["messages"][-1]["role"] != "assistant":
                raise FastMTPError(f"row {number}: has no assistant answer; drop --answers given, or distill first")
            answer = row["messages"][-1]
            ids = answer.get("token_ids") or tokenizer.encode(answer["content"], add_special_tokens=False)
            texts.append(Text(prompt + ids, len(prompt), len(prompt) + len(ids)))
    else:
        K = model.fastmtp.num_speculative_steps
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        found: dict[int, Text] = {}
        for start in tqdm(range(0, len(order), batch_size), desc="answers", unit="batch"):
            batch = order[start : start + batch_size]
            generated = generate(model, tokenizer, [prompts[i] for i in batch], max_new_tokens, temperature)
            whole = [prompts[i] + answer.token_ids for i, answer in zip(batch, generated, strict=True)]
            beyond = generate(model, tokenizer, whole, K, temperature, stop=False)
            for i, ids, more in zip(batch, whole, beyond, strict=True):
                found[i] = Text(ids + more.token_ids, len(prompts[i]), len(ids))
        texts = [found[i] for i in range(len(prompts))]
    kept = [text for text in texts if text.end - text.start > 1]
    if not kept:
        raise FastMTPError("no answer is longer than one token, so nothing is ever drafted; use other prompts")
    return kept


@torch.no_grad()
def draft_rounds(
    model: Any,
    texts: list[Text],
    pad: int,
    batch_size: int,
    token_map: torch.Tensor | None = None,
    label: str = "head",
) -> tuple[AcceptanceCounts, list[list[list[int]]]]:
    """Acceptance of the loaded head on texts.

    Args:
        token_map: ids that the draft may choose from (SGLang's `--speculative-token-map`); None is all.

    Returns the counts over all base rows of the answers, and `rounds[K' - 1][text]`: the verification rounds of a
    greedy server with K' drafts per step, in the order of `texts`.
    """
    K = model.fastmtp.num_speculative_steps
    totals = AcceptanceCounts(*(torch.zeros(K, dtype=torch.long) for _ in range(3)))
    rounds: list[list[list[int]]] = [[[] for _ in texts] for _ in range(K)]
    vocabulary = DraftVocabulary(model.lm_head.weight, token_map)
    for batch in _batches(model, texts, pad, batch_size, label):
        match = torch.zeros_like(batch.exists)
        for k, wanted in enumerate(batch.wanted):
            best = vocabulary.decode(drafts(batch.outputs[k][wanted], vocabulary.weight, model.fastmtp))
            match[k][batch.exists[k]] = best == batch.targets[k][batch.exists[k]]
        counts = count_acceptance(match & batch.inside, batch.inside, batch.base)
        totals.eligible += counts.eligible.cpu()
        totals.reached += counts.reached.cpu()
        totals.accepted += counts.accepted.cpu()
        for row, i in enumerate(batch.places):
            match_KA = match[:, row, texts[i].start - 1 : texts[i].end - 1].cpu()
            for k in range(1, K + 1):
                rounds[k - 1][i] = verify_rounds(match_KA, k)
    return totals, rounds


@torch.no_grad()
def sampled_acceptance(
    model: Any, texts: list[Text], pad: int, batch_size: int, temperature: float, label: str = "head"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Acceptance where drafts are sampled too, at the temperature at which the texts were (speculative sampling).

    Text token x, drawn from p, came from an accepted draft with probability min(1, q(x) / p(x)), so the mean over the
    text of the product of those over depths 1..k is P(the first k drafts are accepted), unbiased (Leviathan et al.
    2023, Theorem 3.5: for k = 1 its mean is sum min(p, q)).

    Returns, per text and depth, the sum of those products and the number of base rows, both [texts, K].
    """
    K, weight = model.fastmtp.num_speculative_steps, model.lm_head.weight
    sums, eligible = (torch.zeros(len(texts), K, dtype=torch.float64) for _ in range(2))
    chunk = chunk_size(weight, model.fastmtp)

    def log_probs(states: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        parts = zip(states.split(chunk), tokens.split(chunk), strict=True)
        found = [((s @ weight.T).float() / temperature).log_softmax(-1).gather(1, t[:, None])[:, 0] for s, t in parts]
        return torch.cat(found)

    for batch in _batches(model, texts, pad, batch_size, label):
        accepted = torch.zeros(batch.exists.shape, dtype=torch.float64, device=batch.exists.device)
        hidden = batch.hidden.flatten(0, 1)
        for k, wanted in enumerate(batch.wanted):
            tokens = batch.targets[k][batch.exists[k]]
            if len(tokens):
                log_q = log_probs(batch.outputs[k][wanted], tokens)
                log_p = log_probs(hidden[batch.rows[wanted] + k + 1], tokens)
                accepted[k][batch.exists[k]] = (log_q - log_p).clamp(max=0).exp().double()
        chain = (batch.inside & batch.base).cumprod(0)
        sums[batch.places] = (accepted.cumprod(0) * chain).sum(2).T.cpu()
        eligible[batch.places] = chain.sum(2).T.double().cpu()
    return sums, eligible


class _Batch(NamedTuple):
    """A teacher-forced pass over some texts."""

    places: list[int]
    """Which of the texts, per batch row."""
    targets: torch.Tensor
    exists: torch.Tensor
    """[K, B, T]: base rows whose target of depth k exists, past the end of the answer too."""
    inside: torch.Tensor
    """[K, B, T]: ... and lies in the answer."""
    base: torch.Tensor
    """[B, T]: the rows where a server starts a draft."""
    hidden: torch.Tensor
    rows: torch.Tensor
    """[N]: the base rows, flat."""
    outputs: torch.Tensor
    """[K, N, D]: g^1..g^K of them."""

    @property
    def wanted(self) -> torch.Tensor:
        """[K, N]: `exists` of the base rows."""
        return self.exists.flatten(1)[:, self.rows]


def _batches(model: Any, texts: list[Text], pad: int, batch_size: int, label: str) -> Iterator[_Batch]:
    K = model.fastmtp.num_speculative_steps
    order = sorted(range(len(texts)), key=lambda i: len(texts[i].ids))
    for first in tqdm(range(0, len(order), batch_size), desc=f"acceptance of {Path(label).name}", unit="batch"):
        places = order[first : first + batch_size]
        width = max(len(texts[i].ids) for i in places)
        ids = torch.full((len(places), width), pad)
        mask, labels, base = torch.zeros_like(ids), torch.full_like(ids, -100), torch.zeros_like(ids, dtype=torch.bool)
        for row, i in enumerate(places):
            text = texts[i]
            ids[row, : len(text.ids)] = torch.tensor(text.ids)
            mask[row, : len(text.ids)] = 1
            labels[row, text.start : text.end] = ids[row, text.start : text.end]
            base[row, text.start - 1 : text.end - 1] = True
        ids, mask, labels, base = (x.to(model.device) for x in (ids, mask, labels, base))
        positions = torch.arange(width, device=ids.device)[None].expand_as(ids)
        segments = segment_ids(positions, mask)
        targets, exists = step_targets(ids, segments, None, K)
        _, inside = step_targets(ids, segments, labels, K)
        exists &= base
        rows = exists.any(0).flatten().nonzero().squeeze(1)
        hidden = model.backbone_states(ids, mask, positions, segments)
        outputs = model.draft_states(hidden, ids, positions, segments, rows)
        yield _Batch(places, targets, exists, inside, base, hidden, rows, outputs)


def _result(name: str, counts: AcceptanceCounts, rounds: list[list[list[int]]]) -> HeadResult:
    histogram = torch.bincount(torch.tensor([c for r in rounds[-1] for c in r]), minlength=len(rounds) + 1)
    return HeadResult(
        name,
        counts.marginal,
        counts.conditional,
        [micro_tau(r) for r in rounds],
        [macro_tau(r) for r in rounds],
        histogram.tolist(),
    )


def table(results: list[HeadResult]) -> str:
    """The terminal's table: marginal and conditional rate per depth, micro tau per K."""
    depths = range(1, len(results[0].marginal) + 1)
    names = [r.name if len(r.name) <= 40 else "…" + r.name[-39:] for r in results]
    width = max(4, *map(len, names))
    header = ["head".ljust(width), "rate".ljust(11), *(f"depth {k}" for k in depths), *(f"tau K={k}" for k in depths)]
    lines = ["  ".join(header)]
    for name, result in zip(names, results, strict=True):
        marginal = [f"{100 * x:6.1f}%" for x in result.marginal]
        conditional = [f"{100 * x:6.1f}%" for x in result.conditional]
        taus = [f"{x:7.2f}" for x in result.tau_micro]
        lines.append("  ".join([name.ljust(width), "marginal   ", *marginal, *taus]))
        lines.append("  ".join([" " * width, "conditional", *conditional]))
    return "\n".join(lines)


def provenance(started: float) -> dict[str, Any]:
    """What a reader needs to repeat a result: versions, command, revision, hardware."""
    revision = subprocess.run(
        ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    )
    return {
        "swift_fastmtp": __version__,
        "torch": torch.__version__,
        "transformers": transformers_version,
        "python": platform.python_version(),
        "command": sys.argv,
        "git_revision": revision.stdout.strip() or None,
        "hardware": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "cpu",
        "num_threads": torch.get_num_threads(),
        "seconds": round(time.time() - started, 1),
        "utc": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
