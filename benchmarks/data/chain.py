"""The data chain on real prompts with the tiny model: distil, clean, mix, train; self-distilled against original ones.

    python benchmarks/data/chain.py --data prompts.jsonl --base_url http://127.0.0.1:30000

`--data` is a JSONL with `messages` (one user turn), `response` (the original answer), `category` and `language`. Both
sides go through the same commands with the same settings: the same prompts, cleaning, mixing, token budget, training
steps and seeds; only the answers differ. Each step is the command that a user would type; finished ones are not
repeated. Writes docs/results/data_chain.md and .json.
"""

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import time
from itertools import product
from pathlib import Path

import numpy as np
import torch
from transformers import AutoTokenizer

from swift_fastmtp.checkpoint.checkpoint import Checkpoint
from swift_fastmtp.checkpoint.mtp_tensors import read_head
from swift_fastmtp.data.chat_template import encode_prompt
from swift_fastmtp.files.provenance import provenance
from swift_fastmtp.files.rows import dump_row, read_rows, write_rows
from swift_fastmtp.files.staging import write_json
from swift_fastmtp.method.config import FastMTPConfig
from swift_fastmtp.model.loading import head_shapes, load_head, load_model
from swift_fastmtp.simulate.acceptance import draft_rounds, make_texts

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "examples" / "tiny-mimo"
GROUPS = {"general": 1000, "math": 400, "code": 400, "zh": 600}  # prompts
TEST = {"general": 40, "math": 20, "code": 20, "zh": 40}
PROMPT, ANSWER = 100, 160  # tokens, at most
ARMS = ("self", "original")
SEEDS = (0, 1)
STEPS = 160
TOKENS = 60_000  # of answers, in each arm's training set


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--base_url", required=True, help="a server of examples/tiny-mimo")
    parser.add_argument("--output_dir", default="output/chain")
    parser.add_argument("--results", default=str(ROOT / "docs" / "results"))
    args = parser.parse_args()
    started = time.time()
    out = Path(args.output_dir)
    out.mkdir(parents=True, exist_ok=True)
    choose(args.data, out)
    commands = [command for arm in ARMS for command in prepare(arm, args.base_url, out)]
    commands += [command for arm, seed in product(ARMS, SEEDS) for command in train(arm, seed, out)]
    tau, steps = intervals(measure(out)), rows_of_steps(out)
    record = {
        "tau": tau,
        "steps": steps,
        "commands": commands,
        "provenance": {**provenance(), "seconds": round(time.time() - started, 1)},
    }
    write_json(record, Path(args.results) / "data_chain.json")
    text = table(record)
    (Path(args.results) / "data_chain.md").write_text(text, encoding="utf-8")
    print(text)


def choose(data, out):
    """Prompts to train and to test on, by hash of their text: the same on every machine."""
    if (out / "test.jsonl").exists():
        return
    tokenizer = AutoTokenizer.from_pretrained(MODEL, trust_remote_code=False)
    found = {name: [] for name in GROUPS}
    for row in read_rows(data):
        group = "zh" if row["language"].startswith("zh") else row["category"]
        group = group if group in found else "general"
        if row.get("response") and len(row["messages"]) == 1:
            found[group].append(row)
    chosen = {"train": [], "test": []}
    for group, rows in found.items():
        rows.sort(key=lambda row: hashlib.sha256(json.dumps(row["messages"]).encode()).digest())
        fitting = (row for row in rows if len(encode_prompt(tokenizer, row["messages"])) <= PROMPT)
        for split, count in (("test", TEST[group]), ("train", GROUPS[group])):
            chosen[split] += [{**next(fitting), "group": group} for _ in range(count)]
    for split, rows in chosen.items():
        with write_rows(out / f"{split}.jsonl") as file:
            file.writelines(dump_row(row) for row in rows)
    with write_rows(out / "original.jsonl") as file:
        for row in chosen["train"]:
            answer = {"role": "assistant", "content": row.pop("response")}
            file.write(dump_row({**row, "messages": [*row["messages"], answer]}))


def prepare(arm, base_url, out):
    """Rows to train on: self-distilled responses, or original ones; cleaned and mixed alike, and of equal size."""
    steps = []
    if arm == "self":
        command = f"fastmtp distill --model {MODEL} --prompts {out}/train.jsonl --output {out}/self.jsonl"
        steps.append((f"{command} --base_url {base_url} --max_new_tokens {ANSWER}", out / "self.jsonl"))
    command = f"fastmtp clean --inputs {out}/{arm}.jsonl --output {out}/{arm}-clean.jsonl --model {MODEL}"
    steps.append((command, out / f"{arm}-clean.jsonl"))
    command = f"fastmtp mix --inputs {out}/{arm}-clean.jsonl --output_dir {out}/{arm}-mix --model {MODEL}"
    steps.append((f"{command} --max_repeat 2 --val_ratio 0.02 --tokens {TOKENS}", out / f"{arm}-mix"))
    return [run(*step) for step in steps]


def train(arm, seed, out):
    folder = out / f"{arm}-{seed}"
    command = f"swift sft {ROOT}/recipes/quickstart_cpu.yaml --model {MODEL} --output_dir {folder} --seed {42 + seed}"
    command += f" --dataset fastmtp-self-distill:{out}/{arm}-mix/train.jsonl --split_dataset_ratio 0 --max_length 512"
    command += f" --val_dataset fastmtp-self-distill:{out}/{arm}-mix/val.jsonl --max_steps {STEPS} --save_steps {STEPS}"
    command += f" --eval_steps {STEPS}"
    return [run(command, folder / f"checkpoint-{STEPS}")]


def run(command, result):
    """One command of the chain, unless its result is there. Returns the command as a user would type it."""
    if not result.exists():
        print(f"$ {command}", flush=True)
        started = time.monotonic()
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        subprocess.run(command, shell=True, check=True, env={**os.environ, "PATH": path, "HF_HUB_OFFLINE": "1"})
        write_json({"seconds": time.monotonic() - started}, result.with_name(f"{result.name}.time"))
    return re.sub(r"\S*/(?=examples/|recipes/)", "", command)


def measure(out):
    """Drafts accepted in each verification step of each test answer, greedy, K = 3: {head: {group: [answer][step]}}."""
    path = out / "rounds.json"
    if not path.exists():
        model, tokenizer = load_model(MODEL, torch.float32), AutoTokenizer.from_pretrained(MODEL)
        model.fastmtp = FastMTPConfig()
        rows = read_rows(out / "test.jsonl")
        texts = {
            g: make_texts(model, tokenizer, [r for r in rows if r["group"] == g], ANSWER, "generate", 20) for g in TEST
        }
        heads = {"as shipped": MODEL}
        heads |= {
            f"{arm}, seed {seed}": out / f"{arm}-{seed}" / f"checkpoint-{STEPS}" for arm, seed in product(ARMS, SEEDS)
        }
        found = {}
        for name, folder in heads.items():
            load_head(model, read_head(Checkpoint(folder), model.family, head_shapes(Checkpoint(MODEL))))
            found[name] = {g: draft_rounds(model, t, tokenizer.pad_token_id, 20)[-1] for g, t in texts.items()}
        write_json(found, path)
    return json.loads(path.read_text())


def intervals(rounds):
    """tau of each arm, seeds pooled, by group and in all, with 95 % bootstrap intervals over answers; and own minus
    original answers, paired by answer."""
    draws = np.random.default_rng(0)
    found = {}
    for group in (*TEST, "all"):
        groups = list(TEST) if group == "all" else [group]
        counts = {}
        for arm in ("as shipped", *ARMS):
            heads = [rounds[name] for name in rounds if name.startswith(arm)]
            answers = [[head[g][i] for head in heads] for g in groups for i in range(len(heads[0][g]))]
            # Tokens and steps of each answer: every step gives its accepted drafts and one token more.
            counts[arm] = np.array([[sum(map(sum, a)) + sum(map(len, a)), sum(map(len, a))] for a in answers])
        picks = draws.integers(0, len(answers), (2000, len(answers)))
        sampled = {arm: c[picks].sum(1)[:, 0] / c[picks].sum(1)[:, 1] for arm, c in counts.items()}
        exact = {arm: c.sum(0)[0] / c.sum(0)[1] for arm, c in counts.items()}
        sampled["difference"], exact["difference"] = (x["self"] - x["original"] for x in (sampled, exact))
        found[group] = {arm: [exact[arm], *np.quantile(sampled[arm], (0.025, 0.975))] for arm in exact}
    return found


def rows_of_steps(out):
    """What each step left: rows and answer tokens."""
    found = {}
    for arm in ARMS:
        cleaned = json.loads((out / f"{arm}-clean.jsonl.report.json").read_text())
        mixed = json.loads((out / f"{arm}-mix" / "report.json").read_text())
        found[arm] = {
            "answers": cleaned["rows"]["read"],
            "removed": {name: r["rows"] for name, r in cleaned["removed"].items() if r["rows"]},
            "clean": cleaned["rows"]["kept"],
            "train": mixed["all"]["train"]["rows"],
            "train answer tokens": mixed["all"]["train"]["answer_tokens"],
            "validation": mixed["all"]["val"]["rows"],
        }
    return found


def table(record):
    lines = [
        "# The data chain on real prompts",
        "",
        f"{sum(GROUPS.values())} real prompts, answered by the tiny model through a real SGLang server, cleaned, mixed "
        f"to {TOKENS} answer tokens, trained on for {STEPS} steps; beside it the same prompts with their original "
        f"answers. Tested on {sum(TEST.values())} other prompts, greedy, K = 3, {len(SEEDS)} seeds pooled, 95 % "
        "bootstrap intervals over answers. Made by `benchmarks/data/chain.py`.",
        "",
        "| τ | as shipped | original answers | self-distilled | self-distilled − original |",
        "|---|---:|---:|---:|---:|",
    ]
    for group, found in record["tau"].items():
        cells = [found[name] for name in ("as shipped", "original", "self", "difference")]
        lines.append(
            f"| {group} | " + " | ".join(f"{t:.2f} ({low:.2f} to {high:.2f})" for t, low, high in cells) + " |"
        )
    lines += ["", "| rows | original answers | self-distilled |", "|---|---:|---:|"]
    steps = record["steps"]
    for key in ("answers", "removed", "clean", "train", "train answer tokens", "validation"):
        cells = [steps[arm][key] for arm in ("original", "self")]
        cells = [", ".join(f"{n} {name}" for name, n in c.items()) if isinstance(c, dict) else c for c in cells]
        lines.append(f"| {key} | {cells[0]} | {cells[1]} |")
    return "\n".join([*lines, "", "```console", *record["commands"], "```", ""])


if __name__ == "__main__":
    main()
