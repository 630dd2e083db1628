"""After the backbone was fine-tuned: what its head still drafts, and what it takes to heal it.

    python benchmarks/smollm2/drift.py --study output/study --prompts prompts.jsonl --questions questions.jsonl \\
      --original answered.jsonl --work output/drift

`--study` is the folder of `study.py`, whose plain model, head and map are used. For each of `--drifts`,
NAME:STEPS:RATE, of which 0 steps leave the backbone as it is:

    tuned       the plain model, trained with LoRA on `--tune_rows` of the answers of `--original`, and merged
    model       with the head from before, as `fastmtp graft` puts it there
    texts       the tuned model's greedy answers to the questions, on which every head is measured
    healed      the head, trained on from there, for each of `--data`: `original`, the other answers of that file, of
                which the tuned model gives the soft labels; `own`, the tuned model's answers to `--part` prompts
    tables      drift.json and drift.md

Everything finished is a file below `--work`. A run that was killed goes on; the tuning of a backbone begins again.
"""

import argparse
import json
import resource
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, get_cosine_schedule_with_warmup

from swift_fastmtp.data.chat_template import load_tokenizer
from swift_fastmtp.data.generate import padding_id
from swift_fastmtp.export.graft import graft
from swift_fastmtp.files.provenance import provenance
from swift_fastmtp.files.rows import dump_row, read_rows, write_rows
from swift_fastmtp.files.staging import new_folder, write_json
from swift_fastmtp.files.table import markdown_table

sys.path.insert(0, str(Path(__file__).parents[1]))
from common import collate, take_step
from measure import cell_of, tau_interval
from study import DEVICE, Arm, Study, answer_tokens, arguments, clock, order_of_batches, training_texts

OLD = "as it was"
"""The head before it is healed."""


class Drift(NamedTuple):
    name: str
    steps: int
    rate: float


def drift(text):
    name, steps, rate = text.split(":")
    return Drift(name, int(steps), float(rate))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", required=True)
    parser.add_argument("--prompts", required=True)
    parser.add_argument("--questions", required=True)
    parser.add_argument("--every", type=int, default=3, help="of so many questions one is asked")
    parser.add_argument("--original", required=True, help="JSONL whose rows end with an answer")
    parser.add_argument("--work", default="output/smollm2-drift")
    parser.add_argument("--model", help="a plain model, instead of the study's")
    parser.add_argument("--head", help="a checkpoint with its head, instead of the study's")
    parser.add_argument("--map", type=int, default=8192, help="one of the study's, inside which is trained; 0: none")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="matrix products'")
    parser.add_argument("--drifts", type=drift, nargs="+", default=["none:0:0", "small:16:1e-4", "larger:64:1e-3"])
    parser.add_argument("--tune_rows", type=int, default=500)
    parser.add_argument("--tune_tokens", type=int, default=1024, help="of a step's batch, padded")
    parser.add_argument("--data", nargs="+", default=["original", "own"], choices=("original", "own"))
    parser.add_argument("--part", type=int, default=96, help="prompts that are answered to heal")
    parser.add_argument("--answer_tokens", type=int, default=128, help="of an answer, at most")
    parser.add_argument("--steps", type=int, default=40, help="of healing")
    parser.add_argument("--rate", type=float, default=5e-4)
    parser.add_argument("--batch_tokens", type=int, default=2048, help="of a step of healing")
    parser.add_argument("--curve_every", type=int, default=10, help="steps between measurements")
    args = parser.parse_args()
    made_by = provenance()
    study, work = Path(args.study), Path(args.work)
    work.mkdir(parents=True, exist_ok=True)
    args.model, args.head = args.model or str(study / "model"), args.head or str(study / "heads" / "head")
    tune_rows, heal_rows, questions = split(args, work)
    drifts = [each if isinstance(each, Drift) else drift(each) for each in args.drifts]
    models = []
    for each in drifts:
        folder = work / each.name
        record = tune(args, tune_rows, heal_rows, each, folder)
        measured, texts = heal(args, heal_rows, questions, folder)
        models.append({**each._asdict(), "tuning": record, "heads": measured, "texts": texts})
    for model in models:
        model["answers_changed"] = changed(models[0]["texts"], model["texts"])
    for model in models:
        del model["texts"]
    write_json(
        {"provenance": made_by, "settings": {**vars(args), "drifts": drifts}, "models": models}, work / "drift.json"
    )
    (work / "drift.md").write_text(page(models))
    print(page(models))


def split(args, work):
    """Files of the answers to tune on, of those to heal on, and of the questions that are asked."""
    rows = read_rows(args.original)
    parts = {
        "tune": rows[: args.tune_rows],
        "heal": rows[args.tune_rows :],
        "questions": read_rows(args.questions)[:: args.every],
    }
    paths = [work / f"{name}.jsonl" for name in parts]
    for path, part in zip(paths, parts.values(), strict=True):
        if not path.exists():
            with write_rows(path) as file:
                file.writelines(dump_row(row) for row in part)
    return paths


def tune(args, tune_rows, heal_rows, drift, folder):
    """The plain model trained a little, with the old head beside it: a folder, and what is known of the training."""
    done = folder / "tuning.json"
    if done.exists():
        return json.loads(done.read_text())
    shutil.rmtree(folder, ignore_errors=True)
    plain = Path(args.model)
    record = {"tokens": 0}
    if drift.steps:
        record = tune_backbone(args, plain, tune_rows, heal_rows, drift, folder / "tuned")
        plain = folder / "tuned"
    graft(str(plain), str(folder / "model"), donor=args.head, overwrite=True)
    write_json(record, done)
    return record


def tune_backbone(args, plain, tune_rows, heal_rows, drift, folder):
    """LoRA in every layer, AdamW, labels, merged: an ordinary fine-tune on answers that are not the model's."""
    tokenizer = load_tokenizer(str(plain))
    stored = AutoModelForCausalLM.from_pretrained(plain).dtype
    model = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32).to(DEVICE)
    pad = padding_id(model, tokenizer)
    torch.manual_seed(0)
    model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"))
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    batches = order_of_batches(training_texts(tokenizer, tune_rows), drift.steps, 0, args.tune_tokens)
    held_out = order_of_batches(training_texts(tokenizer, heal_rows), 4, 0, args.tune_tokens)

    def loss_of(batch):
        ids, mask, labels = (x.to(DEVICE) for x in collate(batch, pad))
        with torch.autocast(DEVICE, torch.bfloat16, enabled=args.dtype == "bfloat16"):
            return model(input_ids=ids, attention_mask=mask, labels=labels).loss

    @torch.no_grad()
    def held_out_loss():
        return sum(float(loss_of(batch)) for batch in held_out) / len(held_out)

    started, before = clock(), held_out_loss()
    optimizer = torch.optim.AdamW(parameters, lr=drift.rate, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = get_cosine_schedule_with_warmup(optimizer, max(1, drift.steps // 20), drift.steps)
    for batch in batches:
        take_step(loss_of(batch), parameters, optimizer, schedule)
    after = held_out_loss()
    tokens = sum(answer_tokens(batch) for batch in batches)
    print(f"{drift.name}: {drift.steps} steps, loss {before:.3f} to {after:.3f}, {clock() - started:.0f} s", flush=True)
    with new_folder(folder) as out:
        model.merge_and_unload().to(stored).save_pretrained(out)
        for file in plain.iterdir():
            if "safetensors" not in file.name and not (out / file.name).exists():
                shutil.copyfile(file, out / file.name)
    return {"tokens": tokens, "loss_before": before, "loss_after": after, "seconds": round(clock() - started, 1)}


class Drifted(Study):
    """A study of a model that has a head already: nothing is fitted, and the map is given."""

    def fit(self):
        return self.base

    def make_maps(self):
        size = self.args.map
        return {size: Path(self.args.study) / "maps" / f"mixed-{size}.pt"} if size else {}

    def head(self, name):
        return self.fitted if name == OLD else super().head(name)

    def answer(self, number, path, rows):
        before = children_seconds()
        super().answer(number, path, rows)
        write_json(round(children_seconds() - before, 1), path.with_suffix(".seconds.json"))


def children_seconds():
    """CPU time of all processes that this one has started and waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def heal(args, heal_rows, questions, folder):
    """Every head that was measured on the model of a folder, in order, and the answers it was measured on."""
    own = args.part if "own" in args.data else 0
    options = {
        "model": folder / "model",
        "prompts": args.prompts,
        "questions": questions,
        "original": heal_rows,
        "work": folder,
        "dtype": args.dtype,
        "parts": int(own > 0),
        "part": own,
        "train_tokens": args.answer_tokens,
        "answer_tokens": args.answer_tokens,
        "long_tokens": 0,
        "map": args.map,
        "batch_tokens": args.batch_tokens,
        "save_every": args.curve_every,
    }
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    settings = arguments().parse_args([*words, "--temperatures"])
    settings.study = args.study
    study = Drifted(settings)
    study.measure_start(OLD)
    for data in args.data:
        arm = Arm({"loss": "kl"}, OLD, data)
        study.train(f"healed_{data}", arm, args.steps, args.rate, 0, args.curve_every)
    measured = [json.loads(file.read_text()) for file in (folder / "measured").glob("*.json")]
    measured.sort(key=lambda record: record["time"])
    made = folder / "answers" / "000.seconds.json"
    for record in measured:
        if record["name"].startswith("healed_own") and made.exists():
            record["answering_seconds"] = json.loads(made.read_text())
    return measured, [text.ids[: text.end] for text in study.texts]


def changed(before, after):
    """Of greedy answers to the same questions, how many another model writes otherwise."""
    return {"of": len(before), "changed": sum(a != b for a, b in zip(before, after, strict=True))}


def page(models):
    rows = []
    for model in models:
        old = cell_of(model["heads"][0], 0)
        for head in model["heads"]:
            cell = cell_of(head, 0)
            seconds = head["seconds"] + head.get("answering_seconds", 0)
            rates = [f"{100 * rate:.1f} %" for rate in cell["conditional"][:3]]
            taus = [f"{tau:.3f}" for tau in cell["tau"][:3]]
            low, high = tau_interval(cell)
            gain = "{:+.3f} to {:+.3f}".format(*tau_interval(cell, old)) if head["tokens"] else ""
            spent = [str(head["tokens"]), f"{seconds:.0f}"]
            rows.append([model["name"], head["name"], *spent, *rates, *taus, f"{low:.2f} to {high:.2f}", gain])
    columns = ["backbone", "head", "tokens", "seconds", *(f"depth {k}" for k in (1, 2, 3))]
    columns += [*(f"tau K={k}" for k in (1, 2, 3)), "K=3, 95 %", "above the old head"]
    tuned = []
    for model in models:
        tuning, answers = model["tuning"], model["answers_changed"]
        losses = [f"{tuning[key]:.3f}" if key in tuning else "" for key in ("loss_before", "loss_after")]
        cells = [str(model["steps"]), f"{model['rate']:g}", str(tuning["tokens"]), *losses]
        tuned.append([model["name"], *cells, f"{answers['changed']} of {answers['of']}"])
    names = ["backbone", "steps", "rate", "tokens", "loss before", "loss after", "greedy answers changed"]
    return f"{markdown_table(names, tuned, raw=True)}\n\n{markdown_table(columns, rows, raw=True)}\n"


if __name__ == "__main__":
    main()
