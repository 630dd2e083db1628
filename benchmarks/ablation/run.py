"""Which loss, which rollout, which data? Every combination at equal data, steps and tuning, on the tiny model.

    python benchmarks/ablation/run.py --data prompts.jsonl

{paper, exact, exact + on-policy} x {ce, kl, topk_kl, lk, tv, e2e} x {self-distilled, original answers}: for each, two
learning rates with one seed, the best by acceptance on development prompts, two more seeds with that one; measured on
test prompts in English, Chinese and code, greedy and at temperatures 0.6 and 1.0. `report.py` makes table and plot.

`--data` is a JSONL with `messages` (one user turn) and `response` (the original answer), `category` and `language`.
Every finished piece is a file below `--output_dir`: an interrupted run goes on, and `--shard 0/2` and `--shard 1/2`
share the work between two processes.
"""

import argparse
import hashlib
import json
import random
import sys
import time
from itertools import product
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, get_cosine_schedule_with_warmup

from swift_fastmtp.checkpoint.checkpoint import Checkpoint
from swift_fastmtp.checkpoint.mtp_tensors import read_head, save_tensors
from swift_fastmtp.data.chat_template import encode_prompt
from swift_fastmtp.data.distill import distill
from swift_fastmtp.files.rows import read_rows
from swift_fastmtp.files.staging import write_json
from swift_fastmtp.method.config import LOSSES, FastMTPConfig
from swift_fastmtp.method.metrics import micro_tau, text_counts, verify_rounds
from swift_fastmtp.model.hidden_cache import HiddenCache
from swift_fastmtp.model.loading import head_shapes, load_head, load_model
from swift_fastmtp.simulate.acceptance import Text, draft_rounds, greedy_acceptance, make_texts, sampled_acceptance

sys.path.insert(0, str(Path(__file__).parents[1]))
from common import collate

MODEL = Path(__file__).parents[2] / "examples" / "tiny-mimo"
LANGUAGES = ("en", "zh", "code")
SPLIT = {"train": 240, "dev": 20, "test": 30}  # prompts per language
ANSWER = 160  # tokens, at most
STEPS, BATCH = 160, 8
RATES = (1e-3, 3e-3)
SEEDS = (0, 1, 2)
TEMPERATURES = (0.0, 0.6, 1.0)
ROLLOUTS = {
    "paper": {"rollout": "paper"},
    "exact": {"rollout": "exact"},
    "on-policy": {"rollout": "exact", "inputs": "draft"},
}
DATA = ("self", "original")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="JSONL with messages, response, category, language")
    parser.add_argument("--output_dir", default="output/ablation")
    parser.add_argument("--shard", default="0/1", help="this process's share of the training runs, i/n")
    args = parser.parse_args()
    shard, shards = map(int, args.shard.split("/"))
    bench = Bench(Path(args.output_dir), args.data, shard)
    names = list(product(DATA, ROLLOUTS, LOSSES))
    bench.shipped_head()
    for data, rollout, loss in names[shard::shards]:
        scores = {rate: bench.tune(data, rollout, loss, rate) for rate in RATES}
        for seed in SEEDS:
            bench.run(data, rollout, loss, max(scores, key=scores.get), seed)


class Bench:
    """Model, texts and hidden states that all runs share."""

    def __init__(self, out, data, shard):
        self.out = out
        out.mkdir(parents=True, exist_ok=True)
        self.model = load_model(MODEL, torch.float32)
        self.tokenizer = AutoTokenizer.from_pretrained(MODEL)
        self.shipped = read_head(Checkpoint(MODEL), self.model.family, head_shapes(Checkpoint(MODEL)))
        self.model.fastmtp = FastMTPConfig()
        prompts = self.split(data)
        self.train = {name: self.training_texts(name, prompts["train"]) for name in DATA}
        self.texts = {
            (split, t, lang): self.evaluation_texts(split, t, lang, prompts[split])
            for split, t, lang in product(("dev", "test"), TEMPERATURES, LANGUAGES)
        }
        width = self.model.config.hidden_size
        self.model.hidden_cache = HiddenCache(out / "hidden", {"model": "tiny"}, width, torch.float32, 2**33, shard)

    def split(self, data):
        """The same prompts in every run and on every machine: by hash of their text, not by order."""
        path = self.out / "prompts.json"
        if not path.exists():
            rows = {lang: [] for lang in LANGUAGES}
            for row in read_rows(data):
                lang = "code" if row["category"] == "code" else row["language"]
                if lang not in rows or not row.get("response") or len(row["messages"]) != 1:
                    continue
                prompt = encode_prompt(self.tokenizer, row["messages"])
                answer = self.tokenizer.encode(row["response"], add_special_tokens=False)
                if len(prompt) <= 100 and 20 <= len(answer) <= 2 * ANSWER:
                    rows[lang].append({"messages": row["messages"], "response": row["response"], "language": lang})
            found, start = {}, 0
            for name, count in SPLIT.items():
                found[name] = []
                for lang in LANGUAGES:
                    rows[lang].sort(key=lambda r: hashlib.sha256(json.dumps(r["messages"]).encode()).digest())
                    found[name] += rows[lang][start : start + count]
                start += count
            write_json(found, path)
        return json.loads(path.read_text())

    def training_texts(self, name, rows):
        if name == "self":
            path = self.out / "self.jsonl"
            if not path.exists():
                prompts = self.out / "train_prompts.jsonl"
                prompts.write_text("".join(json.dumps({"messages": r["messages"]}) + "\n" for r in rows))
                distill(str(MODEL), str(prompts), str(path), max_new_tokens=ANSWER)
            answers = [row["messages"][-1]["token_ids"] for row in read_rows(path)]
        else:
            end = self.tokenizer.eos_token_id
            answers = [[*self.tokenizer.encode(r["response"], add_special_tokens=False), end] for r in rows]
        texts = []
        for row, answer in zip(rows, answers, strict=True):
            prompt = encode_prompt(self.tokenizer, row["messages"])
            texts.append(Text(prompt + answer[:ANSWER], len(prompt), len(prompt) + len(answer[:ANSWER])))
        return texts

    def evaluation_texts(self, split, temperature, lang, rows):
        path = self.out / f"texts-{split}-{temperature}-{lang}.json"
        if not path.exists():
            chosen = [{"messages": r["messages"]} for r in rows if r["language"] == lang]
            made = make_texts(self.model, self.tokenizer, chosen, ANSWER, "generate", 40, temperature, seed=7)
            write_json([list(t) for t in made], path)
        return [Text(*t) for t in json.loads(path.read_text())]

    def tune(self, data, rollout, loss, rate):
        """Mean tau on the development prompts, greedy and at temperature 1, of a head trained with the first seed."""
        path = self.out / "tune" / f"{data}-{rollout}-{loss}-{rate}.json"
        if not path.exists():
            started = time.time()
            record = self.fit(data, rollout, loss, rate, SEEDS[0])
            taus = []
            for t in (0.0, 1.0):
                texts = [text for lang in LANGUAGES for text in self.texts["dev", t, lang]]
                rounds = draft_rounds(self.model, texts, self.tokenizer.pad_token_id, 60)
                taus.append(micro_tau(rounds[-1]))
            record["dev"] = sum(taus) / len(taus)
            save_tensors(dict(self.model.head_parameters()), self.head_path(data, rollout, loss, rate, SEEDS[0]))
            write(record, path)
            print(f"{path.stem}: dev {record['dev']:.3f}, {time.time() - started:.0f} s", flush=True)
        return json.loads(path.read_text())["dev"]

    def run(self, data, rollout, loss, rate, seed):
        """Train one head, or take it from the tuning, and measure it on the test prompts."""
        path = self.out / "runs" / f"{data}-{rollout}-{loss}-{seed}.json"
        if path.exists():
            return
        head = self.head_path(data, rollout, loss, rate, seed)
        if seed == SEEDS[0] and head.exists():
            load_head(self.model, load_file(head))
            record = {"data": data, "rollout": rollout, "loss": loss, "rate": rate, "seed": seed}
        else:
            record = self.fit(data, rollout, loss, rate, seed)
        record["test"] = self.measure("test")
        write(record, path)
        print(path.stem, flush=True)

    def head_path(self, *names):
        (self.out / "heads").mkdir(exist_ok=True)
        return self.out / "heads" / ("-".join(map(str, names)) + ".safetensors")

    def shipped_head(self):
        path = self.out / "runs" / "shipped.json"
        if not path.exists():
            load_head(self.model, self.shipped)
            write({"data": "-", "rollout": "-", "loss": "shipped", "seed": 0, "test": self.measure("test")}, path)

    def fit(self, data, rollout, loss, rate, seed):
        """AdamW, cosine schedule with warm-up, gradient clipping: what recipes/quickstart_cpu.yaml does, in a loop."""
        started = time.time()
        torch.manual_seed(seed)
        model, texts, rng = self.model, self.train[data], random.Random(seed)
        load_head(model, self.shipped)
        model.fastmtp = FastMTPConfig(loss=loss, **ROLLOUTS[rollout])
        model.freeze_backbone()
        model.train()
        parameters = list(model.head_parameters().values())
        optimizer = torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.95), weight_decay=0.1)
        schedule = get_cosine_schedule_with_warmup(optimizer, STEPS // 20, STEPS)
        recent, batches = [], iter(())
        for _ in range(STEPS):
            batch = next(batches, None)
            if batch is None:
                batches = iter(epoch(texts, rng))
                batch = next(batches)
            ids, mask, labels = collate(batch, self.tokenizer.pad_token_id)
            value = model(input_ids=ids, attention_mask=mask, labels=labels).loss
            optimizer.zero_grad()
            value.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            recent.append(float(value.detach()))
        model.requires_grad_(False).eval()
        record = {"data": data, "rollout": rollout, "loss": loss, "rate": rate, "seed": seed}
        return {**record, "final_loss": sum(recent[-20:]) / 20, "train_seconds": round(time.time() - started, 1)}

    def measure(self, split):
        """Per temperature and language: rounds with argmax drafts, and acceptance of sampled drafts."""
        self.model.fastmtp = FastMTPConfig(num_speculative_steps=3)
        pad, found = self.tokenizer.pad_token_id, {}
        for (s, t, lang), texts in self.texts.items():
            if s != split:
                continue
            (accepted,) = greedy_acceptance(self.model, texts, pad, 60)
            rounds, counts = [verify_rounds(a, 3) for a in accepted], text_counts(accepted)
            cell = found[f"{t}-{lang}"] = {
                "rounds": [[sum(r) + len(r), len(r)] for r in rounds],  # tokens, verification steps per text
                "eligible": counts.eligible.tolist(),
                "accepted": counts.accepted.tolist(),
            }
            if t > 0:
                (sampled,) = sampled_acceptance(self.model, texts, pad, 60, t)
                counts = [text_counts([a]) for a in sampled]
                rows = [c.eligible.tolist() for c in counts]
                cell["sampled"] = {"sums": [c.accepted.tolist() for c in counts], "rows": rows}
        return found


def write(record, path):
    path.parent.mkdir(exist_ok=True)
    write_json(record, path)


def epoch(texts, rng):
    """Batches of similar length, shuffled."""
    order = sorted(range(len(texts)), key=lambda i: len(texts[i].ids) + 40 * rng.random())
    batches = [[texts[i] for i in order[start : start + BATCH]] for start in range(0, len(order), BATCH)]
    rng.shuffle(batches)
    return batches


if __name__ == "__main__":
    main()
