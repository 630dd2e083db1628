"""Answers in process: slots that are taken over, against transformers' own ways, alternating in one run.

    python benchmarks/data/generation.py --model output/smollm2/study/last_layer --prompts prompts.jsonl

The same prompts, sampled as the paper does, on one thread: by `model.generate` in fixed batches (as `fastmtp distill`
once did), by transformers' continuous batching (`model.generate_batch`), and by `generate.answer_all`. The
unit is answer tokens per CPU second; ratios are medians over rounds. Draws differ, so texts do; their lengths are
printed.
"""

import argparse
import json
import time
from collections import deque
from pathlib import Path
from statistics import median

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig

from swift_fastmtp.data.chat_template import encode_prompt, load_tokenizer
from swift_fastmtp.data.generate import Decoding, Request, answer_all, end_token_ids, padding_id
from swift_fastmtp.files.provenance import provenance
from swift_fastmtp.files.rows import read_rows
from swift_fastmtp.files.staging import write_json
from swift_fastmtp.model.loading import load_model

TEMPERATURE, TOP_K, TOP_P = 0.6, 20, 0.95


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--prompts", required=True)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--max_new_tokens", type=int, default=192)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--without_continuous", action="store_true", help="leave out generate_batch, the slowest")
    parser.add_argument("--output", default="docs/results/generation.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model, tokenizer = load_model(args.model, torch.float32), load_tokenizer(args.model)
    prompts = [encode_prompt(tokenizer, row["messages"]) for row in read_rows(args.prompts, args.rows)]
    ways = {"fixed batches": fixed_batches, "continuous batching": continuous_batching, "slots": slots}
    if args.without_continuous:
        del ways["continuous batching"]
    rounds = {name: [] for name in ways}
    for number in range(args.rounds):
        for name, way in ways.items():
            torch.manual_seed(number)
            cpu, wall = time.process_time(), time.perf_counter()
            tokens = way(model, tokenizer, prompts, args)
            cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
            rounds[name].append({"tokens": tokens, "cpu_seconds": round(cpu, 1), "seconds": round(wall, 1)})
            print(f"round {number + 1}: {name}: {tokens} tokens, {tokens / cpu:.1f} per CPU second", flush=True)
    speeds = {name: [r["tokens"] / r["cpu_seconds"] for r in found] for name, found in rounds.items()}
    for name, others in speeds.items():
        if name != "slots":
            ratios = [ours / other for ours, other in zip(speeds["slots"], others, strict=True)]
            print(f"slots / {name}: {median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
    record = {
        "provenance": provenance(),
        "settings": vars(args),
        "rounds": rounds,
        "prompt_tokens": [*map(len, prompts)],
    }
    write_json(record, Path(args.output))
    print(json.dumps({name: round(median(s), 1) for name, s in speeds.items()}))


def fixed_batches(model, tokenizer, prompts, args):
    """In the order of the file, left-padded, until the longest answer of each batch ends."""
    pad, ends = padding_id(model, tokenizer), sorted(end_token_ids(model, tokenizer))
    tokens = 0
    for start in range(0, len(prompts), args.batch_size):
        batch = prompts[start : start + args.batch_size]
        width = max(map(len, batch))
        ids = torch.tensor([[pad] * (width - len(p)) + p for p in batch])
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in batch])
        sampling = {"do_sample": True, "temperature": TEMPERATURE, "top_k": TOP_K, "top_p": TOP_P}
        output = model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=args.max_new_tokens,
            eos_token_id=ends,
            pad_token_id=pad,
            **sampling,
        )
        for row in output[:, width:].tolist():
            tokens += next((place + 1 for place, token in enumerate(row) if token in ends), len(row))
    return tokens


def continuous_batching(model, tokenizer, prompts, args):
    sampling = {"do_sample": True, "temperature": TEMPERATURE, "top_k": TOP_K, "top_p": TOP_P}
    ends = sorted(end_token_ids(model, tokenizer))
    config = GenerationConfig(max_new_tokens=args.max_new_tokens, eos_token_id=ends, **sampling)
    # Its cache takes nine tenths of the free memory unless it is told: other processes need some of it.
    share = ContinuousBatchingConfig(max_memory_percent=0.1)
    output = model.generate_batch(inputs=prompts, generation_config=config, continuous_batching_config=share)
    return sum(len(answer.generated_tokens) for answer in output.values())


def slots(model, tokenizer, prompts, args):
    """Short prompts first, as `distill` takes them."""
    ends = frozenset(end_token_ids(model, tokenizer))
    decoding = Decoding(args.max_new_tokens, TEMPERATURE, TOP_K, TOP_P, ends)
    requests = deque(Request(i, prompt, seed=i) for i, prompt in enumerate(sorted(prompts, key=len)))
    found = answer_all(model, tokenizer, requests, decoding, args.batch_size)
    return sum(len(answer.token_ids) for _, answer in found)


if __name__ == "__main__":
    main()
