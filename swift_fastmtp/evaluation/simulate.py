"""Acceptance of a head on a dataset, without a server.

The backbone answers each prompt greedily (or the dataset's answers are taken as they are); then one teacher-forced
pass in the `exact` graph says, for every answer position and depth, whether a greedy server would accept that
draft. Walking those matches as a server's verification rounds do gives tau for every K at once.
"""

import platform
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import AutoTokenizer
from transformers import __version__ as transformers_version

from .. import __version__
from ..checkpoints import read_head, write_json
from ..config import FastMTPConfig
from ..data.generate import Answer, generate
from ..data.prompts import encode_prompt, read_rows, without_answer
from ..errors import FastMTPError
from ..modeling import head_shapes, load_head, load_model
from .metrics import AcceptanceCounts, count_acceptance, macro_tau, micro_tau, verify_rounds


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
    batch_size: int = 16,
    dtype: str = "float32",
    device: str = "cpu",
) -> list[HeadResult]:
    """Print the table for the model's own head and each checkpoint's; write JSON and PNG to `output_dir`.

    Args:
        answers: `generate` (greedy, by the backbone) or `given` (the dataset's last assistant message).

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
    texts = _texts(model, tokenizer, rows, max_new_tokens, answers, batch_size)
    results = []
    for name, tensors in heads.items():
        load_head(model, tensors)
        results.append(_measure(model, name, texts, tokenizer.pad_token_id, batch_size))
    print(table(results))
    tokens = sum(len(ids) - start for ids, start in texts)
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
            "num_answers": len(texts),
            "num_tokens": tokens,
            "max_new_tokens": max_new_tokens,
            "dtype": dtype,
            "heads": [vars(r) for r in results],
        }
        write_json(record, out / "simulate.json")
    return results


def _texts(
    model: Any, tokenizer: Any, rows: list[dict[str, Any]], max_new_tokens: int, answers: str, batch_size: int
) -> list[tuple[list[int], int]]:
    """(token ids of prompt + answer, prompt length) of every row whose answer can hold a draft."""
    prompts = [encode_prompt(tokenizer, without_answer(row["messages"])) for row in rows]
    texts = []
    if answers == "given":
        for number, (row, prompt) in enumerate(zip(rows, prompts, strict=True), start=1):
            if row["messages"][-1]["role"] != "assistant":
                raise FastMTPError(f"row {number}: has no assistant answer; drop --answers given, or distill first")
            ids = row.get("token_ids") or tokenizer.encode(row["messages"][-1]["content"], add_special_tokens=False)
            texts.append((prompt + ids, len(prompt)))
    else:
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        found: dict[int, Answer] = {}
        for start in tqdm(range(0, len(order), batch_size), desc="answers", unit="batch"):
            batch = order[start : start + batch_size]
            generated = generate(model, tokenizer, [prompts[i] for i in batch], max_new_tokens)
            found.update(zip(batch, generated, strict=True))
        texts = [(prompt + found[i].token_ids, len(prompt)) for i, prompt in enumerate(prompts)]
    kept = [(ids, start) for ids, start in texts if len(ids) - start > 1]
    if not kept:
        raise FastMTPError("no answer is longer than one token, so nothing is ever drafted; use other prompts")
    return kept


@torch.no_grad()
def _measure(model: Any, name: str, texts: list[tuple[list[int], int]], pad: int, batch_size: int) -> HeadResult:
    K = model.fastmtp.num_speculative_steps
    totals = AcceptanceCounts(*(torch.zeros(K, dtype=torch.long) for _ in range(3)))
    rounds: list[list[list[int]]] = [[] for _ in range(K)]
    order = sorted(texts, key=lambda text: len(text[0]))
    for first in tqdm(range(0, len(order), batch_size), desc=f"acceptance of {Path(name).name}", unit="batch"):
        batch = order[first : first + batch_size]
        width = max(len(ids) for ids, _ in batch)
        ids = torch.tensor([ids + [pad] * (width - len(ids)) for ids, _ in batch], device=model.device)
        mask = torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids, _ in batch], device=model.device)
        labels = ids.clone()
        base = torch.zeros_like(mask, dtype=torch.bool)
        for row, (text, start) in enumerate(batch):
            labels[row, :start] = -100
            labels[row, len(text) :] = -100
            base[row, start - 1 : len(text) - 1] = True
        output = model(input_ids=ids, attention_mask=mask, labels=labels)
        counts = count_acceptance(output.match, output.valid, base)
        totals.eligible += counts.eligible.cpu()
        totals.reached += counts.reached.cpu()
        totals.accepted += counts.accepted.cpu()
        for row, (text, start) in enumerate(batch):
            match_KA = output.match[:, row, start - 1 : len(text) - 1].cpu()
            for k in range(1, K + 1):
                rounds[k - 1].append(verify_rounds(match_KA, k))
    histogram = torch.bincount(torch.tensor([c for r in rounds[-1] for c in r]), minlength=K + 1).tolist()
    return HeadResult(
        name,
        totals.marginal,
        totals.conditional,
        [micro_tau(r) for r in rounds],
        [macro_tau(r) for r in rounds],
        histogram,
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
