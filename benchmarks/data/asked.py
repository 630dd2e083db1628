"""What it costs to train behind another prompt than the one that was asked: the tiny model with a thinking template.

    python benchmarks/data/asked.py

The model gets a chat template whose generation prompt opens `<think>`, as Qwen3.5's does, and answers the prompts of
this repository behind it. Two heads are trained on the same answers, with the same settings and seeds: one behind the
prompts that were asked, one behind those that ms-swift's own template renders, which leave the opened `<think>` out.
Both are then measured on held-out prompts, asked as an engine asks them. Each step is the command that a user would
type; finished ones are not repeated. Writes docs/results/asked.md and .json.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

from swift_fastmtp.checkpoint.checkpoint import Checkpoint
from swift_fastmtp.checkpoint.mtp_tensors import read_head
from swift_fastmtp.data.chat_template import load_tokenizer
from swift_fastmtp.files.provenance import provenance
from swift_fastmtp.files.rows import dump_row, read_rows, write_rows
from swift_fastmtp.files.staging import write_json
from swift_fastmtp.method.config import FastMTPConfig
from swift_fastmtp.model.loading import head_shapes, load_head, load_model
from swift_fastmtp.simulate.acceptance import draft_rounds, make_texts

ROOT = Path(__file__).parents[2]
TINY = ROOT / "examples" / "tiny-mimo"
STEPS = 5
SEEDS = (0, 1, 2)
ANSWER = 160  # tokens at most
DRAWS = 2000  # of the bootstrap
OPENED = "<|im_start|>assistant\\n<think>\\n"
TEMPLATE = """
{%- for m in messages -%}
  {%- set text = m.content.split('</think>')[-1].lstrip('\\n') if m.role == 'assistant' else m.content -%}
  {{- '<|im_start|>' ~ m.role ~ '\\n' ~ text ~ '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n<think>\\n' -}}{%- endif -%}"""


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", default="output/asked")
    parser.add_argument("--results", default=str(ROOT / "docs" / "results"))
    parser.add_argument("--epochs", type=int, default=6)
    args = parser.parse_args()
    started = time.time()
    out = Path(args.output_dir)
    out.mkdir(parents=True, exist_ok=True)
    # The same weights in two folders: only the template says what is asked.
    folders = {"asked": model_folder(out / "asked", TEMPLATE)}
    folders["not asked"] = model_folder(out / "not-asked", TEMPLATE.replace(OPENED, "<|im_start|>assistant\\n"))
    rows = answers(folders["asked"], out)
    heads = {}
    for seed in SEEDS:
        for name, folder in folders.items():
            heads[name, seed] = train(name, folder, rows[name], seed, args.epochs, out)
    record = {
        **measure(folders["asked"], heads),
        "provenance": {**provenance(), "seconds": round(time.time() - started, 1)},
    }
    write_json(record, Path(args.results) / "asked.json")
    text = table(record)
    (Path(args.results) / "asked.md").write_text(text, encoding="utf-8")
    print(text)


def model_folder(folder, template):
    """The tiny model with another chat template."""
    if not folder.exists():
        shutil.copytree(TINY, folder)
        path = folder / "tokenizer_config.json"
        config = json.loads(path.read_text())
        config["chat_template"] = template
        path.write_text(json.dumps(config, indent=2))
    return folder


def answers(folder, out):
    """The rows of both ways: one keeps the prompts that were asked, the other has to be rendered."""
    distilled = out / "distilled.jsonl"
    if not distilled.exists():
        prompts = str(ROOT / "examples/prompts/train.jsonl")
        run("fastmtp", "distill", "--model", folder, "--prompts", prompts, "--output", distilled,
            "--max_new_tokens", ANSWER)  # fmt: skip
    bare = out / "without-prompts.jsonl"
    if not bare.exists():
        with write_rows(bare) as file:
            for row in read_rows(distilled):
                for message in row["messages"]:
                    message.pop("prompt_token_ids", None)
                file.write(dump_row(row))
    return {"asked": distilled, "not asked": bare}


def train(name, folder, rows, seed, epochs, out):
    """`swift sft` with the quickstart's settings; returns the last checkpoint."""
    target = out / f"{name.replace(' ', '-')}-{seed}"
    if not list(target.glob("checkpoint-*/fastmtp.json")):
        shutil.rmtree(target, ignore_errors=True)
        run("swift", "sft", ROOT / "recipes/quickstart_cpu.yaml", "--model", folder, "--output_dir", target,
            "--dataset", f"fastmtp-self-distill:{rows}", "--val_dataset", f"fastmtp-self-distill:{rows}#32",
            "--seed", 42 + seed, "--num_train_epochs", epochs, "--eval_steps", 10_000, "--save_steps", 10_000,
            "--create_checkpoint_symlink", "false", "--metric_for_best_model", "mtp_tau")  # fmt: skip
    return max(target.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))


def run(*words):
    words = [str(word) for word in words]
    command = [str(Path(sys.executable).parent / words[0]), *words[1:]]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def measure(folder, heads):
    """Verification rounds of every held-out answer, asked behind the opened `<think>`: tau and its interval."""
    model, tokenizer = load_model(folder, torch.float32), load_tokenizer(str(folder))
    model.fastmtp = FastMTPConfig(num_speculative_steps=STEPS)
    shapes = head_shapes(Checkpoint(folder))
    texts = make_texts(model, tokenizer, read_rows(ROOT / "examples/prompts/eval.jsonl"), ANSWER, "generate", 16)
    tokens = np.array([text.end - text.start - 1 for text in texts])
    rounds = {}
    for place, key in [(folder, ("as shipped", 0)), *((path, key) for key, path in heads.items())]:
        load_head(model, read_head(Checkpoint(place), model.family, shapes))
        found = draft_rounds(model, texts, tokenizer.pad_token_id, 16)
        rounds[key] = np.array([[len(steps) for steps in per_text] for per_text in found])  # [K, texts]
    chosen = np.random.default_rng(0).integers(len(texts), size=(DRAWS, len(texts)))

    def tau(of_name):
        """Pooled over seeds: [K], and the bootstrap's draws [DRAWS, K], of answers."""
        steps = sum(rounds[key] for key in rounds if key[0] == of_name)
        total = tokens * sum(key[0] == of_name for key in rounds)
        return total.sum() / steps.sum(1), total[chosen].sum(1)[:, None] / steps[:, chosen].sum(2).T

    names = ["as shipped", "not asked", "asked"]
    values = {name: tau(name) for name in names}
    gain, draws = (values["asked"][i] - values["not asked"][i] for i in (0, 1))
    low, high = np.percentile(draws, [2.5, 97.5], axis=0)
    return {
        "answers": len(texts),
        "tokens": int(tokens.sum()),
        "seeds": len(SEEDS),
        "tau": {name: values[name][0].tolist() for name in names},
        "gain": {"value": gain.tolist(), "low": low.tolist(), "high": high.tolist()},
    }


def table(record):
    depths = (1, 3, 5)
    lines = [
        "# Trained behind what was asked",
        "",
        f"{record['answers']} held-out answers, {record['tokens']} tokens, greedy, {record['seeds']} seeds pooled, "
        "95 % bootstrap intervals over answers. The tiny model answers behind a prompt that opens `<think>`; the same "
        "answers are trained on behind that prompt, and behind the one that ms-swift's own template renders, which "
        "leaves it out. Made by `benchmarks/data/asked.py`.",
        "",
        "| τ | " + " | ".join(f"K = {k}" for k in depths) + " |",
        "|---|" + "---:|" * len(depths),
    ]
    titles = {
        "as shipped": "as shipped",
        "not asked": "trained behind the prompt that nobody asked",
        "asked": "trained behind the prompt that was asked",
    }
    for name, values in record["tau"].items():
        lines.append(f"| {titles[name]} | " + " | ".join(f"{values[k - 1]:.3f}" for k in depths) + " |")
    gain = record["gain"]
    cells = [f"{gain['value'][k - 1]:+.3f} ({gain['low'][k - 1]:+.3f} to {gain['high'][k - 1]:+.3f})" for k in depths]
    lines.append("| difference | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
