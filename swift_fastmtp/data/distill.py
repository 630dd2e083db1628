"""Self-distillation (paper 2.4): the model's own answers to your prompts, as training rows.

Each row keeps what ms-swift's inference drops: why the answer ended and its exact token ids. A killed run started
again goes on after the last finished batch and ends with the same file: batches are fixed and seeded by number.
"""

import json
import os
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoTokenizer

from ..errors import FastMTPError
from ..modeling import load_model
from .conversation import encode_prompt, without_answer
from .generate import end_token_ids, generate
from .rows import read_rows


def distill(
    model_dir: str,
    prompts: str,
    output: str,
    *,
    batch_size: int = 32,
    max_new_tokens: int = 4096,
    temperature: float = 0.6,
    top_k: int = 20,
    top_p: float = 0.95,
    seed: int = 0,
) -> None:
    """Write `output` (JSONL): per prompt `messages` ending with the answer, `finish_reason`, `token_ids`.

    Raises `FastMTPError` if `output` exists, a prompt row is bad, or the model's layout is unknown.
    """
    target = Path(output)
    if target.exists():
        raise FastMTPError(f"{target}: already exists; name another output or remove it")
    rows = read_rows(prompts)
    model = load_model(model_dir, torch.float32, "cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    ends = end_token_ids(model, tokenizer)
    partial = target.with_name(target.name + ".partial")
    target.parent.mkdir(parents=True, exist_ok=True)
    done = _finished_batches(partial, batch_size)
    with open(partial, "a", encoding="utf-8") as file, tqdm(total=len(rows), initial=min(done * batch_size, len(rows)),
                                                            unit="row", desc="distill") as bar:  # fmt: skip
        tokens = 0
        for start in range(done * batch_size, len(rows), batch_size):
            batch = rows[start : start + batch_size]
            conversations = [without_answer(row["messages"]) for row in batch]
            torch.manual_seed(seed + start)
            answers = generate(
                model,
                tokenizer,
                [encode_prompt(tokenizer, c) for c in conversations],
                max_new_tokens,
                temperature,
                top_k,
                top_p,
            )
            for row, conversation, answer in zip(batch, conversations, answers, strict=True):
                ids = answer.token_ids[:-1] if answer.token_ids[-1] in ends else answer.token_ids
                message = {"role": "assistant", "content": tokenizer.decode(ids)}
                kept = {k: v for k, v in row.items() if k not in ("messages", "prompt", "query", "response")}
                record = {
                    **kept,
                    "messages": [*conversation, message],
                    "finish_reason": answer.finish_reason,
                    "token_ids": answer.token_ids,
                }
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
                tokens += len(answer.token_ids)
            file.flush()
            os.fsync(file.fileno())
            bar.update(len(batch))
            bar.set_postfix_str(f"{tokens / max(bar.format_dict['elapsed'], 1e-9):.0f} tok/s")
    os.replace(partial, target)


def _finished_batches(partial: Path, batch_size: int) -> int:
    """Whole batches in an unfinished output; what a kill left of the next one is cut off."""
    if not partial.exists():
        return 0
    lines = partial.read_bytes().split(b"\n")[:-1]
    batches = len(lines) // batch_size
    kept = b"".join(line + b"\n" for line in lines[: batches * batch_size])
    os.truncate(partial, len(kept))
    return batches
