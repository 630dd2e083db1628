"""What an adapter of the backbone costs the base's head, and what a head of its own brings back.

    python benchmarks/adapters/measure.py --output docs/results/adapters

On the tiny MiMo, with its own MTP layer as the base's head. Two LoRA adapters of its backbone are trained: `capitals`
answers as the base does, in capital letters; `chinese` answers whatever is asked in Chinese. For each, from the base's
head, at equal data (the responses of base plus adapter) and steps: a LoRA of the head, and the whole layer. All are
measured on held-out prompts, on the greedy responses of base plus adapter. What is finished for an adapter lies below
`--work`, and a run that was killed goes on with the next.
"""

import argparse
import json
import random
import sys
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import Qwen2ForCausalLM

from swift_fastmtp.checkpoint.checkpoint import Checkpoint
from swift_fastmtp.checkpoint.mtp_tensors import read_head
from swift_fastmtp.data.chat_template import load_tokenizer
from swift_fastmtp.data.generate import padding_id
from swift_fastmtp.files.provenance import provenance
from swift_fastmtp.files.rows import read_rows
from swift_fastmtp.files.staging import write_json
from swift_fastmtp.method.config import FastMTPConfig
from swift_fastmtp.method.metrics import taus_of_answers
from swift_fastmtp.model.config import load_config
from swift_fastmtp.model.loading import head_shapes, load_head, load_model
from swift_fastmtp.simulate.acceptance import greedy_acceptance, make_texts

sys.path.insert(0, str(Path(__file__).parents[1]))
from common import collate, take_step, write_result

ROOT = Path(__file__).parents[2]
TINY = ROOT / "examples" / "tiny-mimo"
K = 3
BATCH = 8


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", default="output/adapters")
    parser.add_argument("--output", required=True, help="of the tables, without .md")
    parser.add_argument("--prompts", type=int, default=96, help="to train on")
    parser.add_argument("--questions", type=int, default=24, help="held out")
    parser.add_argument("--answer_tokens", type=int, default=40)
    parser.add_argument("--adapter_steps", type=int, default=40)
    parser.add_argument("--steps", type=int, default=40, help="of each head")
    args = parser.parse_args()
    study = Study(args)
    tables = {"base": study.of_base()}
    for name in ("capitals", "chinese"):
        tables[name] = study.of_adapter(name)
    settings = {name: value for name, value in vars(args).items() if isinstance(value, int)}
    write_result({"provenance": provenance(), "settings": settings, "tables": tables}, page(tables), args.output)


class Study:
    def __init__(self, args):
        self.args = args
        self.work = Path(args.work)
        self.work.mkdir(parents=True, exist_ok=True)
        self.tokenizer = load_tokenizer(str(TINY))
        # Every second prompt and every second question, so that all kinds are there.
        self.prompts = read_rows(ROOT / "examples/prompts/train.jsonl")[::2][: args.prompts]
        self.questions = read_rows(ROOT / "examples/prompts/eval.jsonl")[::2][: args.questions]

    def of_base(self):
        done = self.work / "base.json"
        if not done.exists():
            model = self.load(None)
            write_json({"the base's": self.measure(model, self.answers(model, self.questions))}, done)
        return json.loads(done.read_text())

    def of_adapter(self, name):
        done = self.work / f"{name}.json"
        if not done.exists():
            model = self.load(self.adapter(name))
            asked, taught = self.answers(model, self.questions), self.answers(model, self.prompts)
            for text in asked[:3]:
                print(name, repr(self.tokenizer.decode(text.ids[text.start : text.end])), flush=True)
            results = {"the base's": self.measure(model, asked)}
            for kind in ("LoRA, rank 16", "whole layer"):
                trained = self.train_head(model, taught, lora="LoRA" in kind)
                results[kind] = {**self.measure(model, asked), "trained_parameters": trained}
            write_json(results, done)
        return json.loads(done.read_text())

    def load(self, adapter):
        model = load_model(TINY, torch.float32, backbone_lora=adapter)
        model.fastmtp = FastMTPConfig(num_speculative_steps=K)
        return model

    def answers(self, model, rows):
        return make_texts(model, self.tokenizer, rows, self.args.answer_tokens, "generate", 32)

    def adapter(self, name):
        """The folder of an adapter, which learns changed answers of the base."""
        folder = self.work / name
        if folder.exists():
            return folder
        base = self.load(None)
        texts = self.answers(base, self.prompts)
        answers = [self.tokenizer.decode(text.ids[text.start : text.end], skip_special_tokens=True) for text in texts]
        chinese = [answer for text, answer in zip(texts, answers, strict=True) if self.is_chinese(text)]
        draw = random.Random(0)
        taught = []
        for text, answer in zip(texts, answers, strict=True):
            changed = answer.upper() if name == "capitals" else draw.choice(chinese)
            ids = [*text.ids[: text.start], *self.tokenizer.encode(changed), self.tokenizer.eos_token_id]
            taught.append(text._replace(ids=ids, end=len(ids)))
        model = Qwen2ForCausalLM.from_pretrained(TINY, config=load_config(Checkpoint(TINY)), dtype=torch.float32)
        wrapped = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
        self.fit(wrapped, taught, padding_id(base, self.tokenizer), self.args.adapter_steps, 4e-3)
        wrapped.save_pretrained(folder)
        return folder

    def is_chinese(self, text):
        return self.prompts[text.row].get("category") == "zh"

    def train_head(self, model, texts, lora):
        """Train the base's head anew, leave it in the model, and return how many numbers were trained."""
        family, base = model.family, Checkpoint(TINY)
        load_head(model, read_head(base, family, head_shapes(base)))
        model.freeze_backbone()
        model.train()
        inner = model
        if lora:
            targets = rf"{family.names.prefix}\..*_proj"
            inner = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules=targets))
        trained = sum(p.numel() for p in inner.parameters() if p.requires_grad)
        pad = padding_id(model, self.tokenizer)
        self.fit(inner, texts, pad, self.args.steps, 4e-3 if lora else 1e-3)
        if lora:
            inner.merge_and_unload()
        model.eval()
        return trained

    def fit(self, model, texts, pad, steps, rate):
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.95))
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.1)
        draw = random.Random(0)
        for step in range(steps):
            ids, mask, labels = collate(draw.sample(texts, BATCH), pad)
            loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
            take_step(loss, parameters, optimizer, schedule)
            if step % 20 == 0 or step + 1 == steps:
                print(f"step {step}: {loss.item():.3f}", flush=True)

    def measure(self, model, texts):
        """tau for every K, of greedy drafts on these texts."""
        model.fastmtp = FastMTPConfig(num_speculative_steps=K)
        accepted = greedy_acceptance(model, texts, padding_id(model, self.tokenizer), 16, [None], "head")[0]
        taus = [taus_of_answers(accepted, k)[0] for k in range(1, K + 1)]
        return {"tokens": sum(text.end - text.start for text in texts), "tau": taus}


def page(tables):
    lines = ["| served | head | trained | tau, K = 1 | K = 2 | K = 3 |", "|---|---|---:|---:|---:|---:|"]
    for name, table in tables.items():
        served = "base" if name == "base" else f"base + `{name}`"
        for head, result in table.items():
            trained = f"{result['trained_parameters']:,}" if "trained_parameters" in result else ""
            taus = " | ".join(f"{tau:.3f}" for tau in result["tau"])
            lines.append(f"| {served} | {head} | {trained} | {taus} |")
    return "\n".join(["# A head for each adapter of the backbone", "", *lines, ""])


if __name__ == "__main__":
    main()
