"""A head beside a quantized model: does it pay to train it on the quantized model's hidden states?

    python benchmarks/smollm2/quantized.py --study output/smollm2/study --work output/smollm2/quantized

`--study` is a finished folder of `study.py`, of which it is read: the model, the answers to train on, vanilla, and
`exact_kl-SEED`, which was trained from vanilla on the states of the model as it is (**full**). For each of `--forms`
the matrices of the model's layers are rounded, and stored as the numbers that they then stand for:

    fp8     float8_e4m3fn in blocks of 128 x 128, a scale each (`checkpoint/fp8.py`)
    int8    to the nearest of 255 levels, symmetric, in groups of 64 columns of a row, a float16 scale each
    int4    the same, 15 levels: what GPTQ's layout holds, without its choice of roundings
    int3    the same, 7 levels

Embedding, output matrix, norms and the MTP layer stay as they are, as in published checkpoints. From the same vanilla,
with the same answers, batches and steps, a head is then trained on this model's states and its distribution
(**quantized**); all are measured on this model's own greedy answers to `--num_questions` of the study's questions.

Everything finished is a file below `--work`; a run that was killed goes on, as the study does.
"""

import argparse
import json
import sys
from pathlib import Path

import torch

from swift_fastmtp.checkpoint.checkpoint import Checkpoint
from swift_fastmtp.checkpoint.fp8 import dequantize, quantize
from swift_fastmtp.checkpoint.fp8_config import Blocks
from swift_fastmtp.checkpoint.shards import TORCH, write_tensors
from swift_fastmtp.export.folders import write_index
from swift_fastmtp.files.copies import link_or_copy
from swift_fastmtp.files.provenance import provenance
from swift_fastmtp.files.rows import read_rows
from swift_fastmtp.files.staging import new_folder, write_json
from swift_fastmtp.files.table import markdown_table
from swift_fastmtp.model.loading import load_model

sys.path.insert(0, str(Path(__file__).parents[1]))
from common import collate, write_result
from measure import cell_of, tau_interval
from study import ARMS, DEVICE, Study

ARM = "exact_kl"
GROUP = 64
"""Columns that share a scale; 128 does not divide SmolLM2's 576."""
LEVELS = {"int8": 127, "int4": 7, "int3": 3}
FORMS = ("fp8", *LEVELS)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", required=True, help="folder of study.py")
    parser.add_argument("--work", default="output/smollm2/quantized")
    parser.add_argument("--forms", nargs="+", default=["fp8", "int4", "int3"], choices=FORMS)
    parser.add_argument("--num_questions", type=int, default=40, help="of the study's, evenly spaced")
    parser.add_argument("--answer_tokens", type=int, default=128, help="of the answers to them, at most")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of the study's exact_kl")
    parser.add_argument("--output", help="default: quantized in --work; .json and .md are written")
    args = parser.parse_args()
    found = {}
    for form in args.forms:
        found[form] = measure_form(args, form)
    record = {"provenance": provenance(), "settings": vars(args), "arm": ARMS[ARM]._asdict(), "forms": found}
    page = table(found, args.seeds)
    write_result(record, page, args.output or Path(args.work) / "quantized")
    print(page)


def measure_form(args, form):
    """Train and measure everything of a form. Returns how far its states are, and the heads' cells."""
    study = Study(arguments(args, form))
    folder = Path(args.study)
    study.measure_start("vanilla")
    for seed in args.seeds:
        full = f"full-{seed}"
        link_folder(folder / "heads" / f"{ARM}-{seed}", study.head(full))
        study.measure_start(full)
        study.train(f"quantized-{seed}", ARMS[ARM], study.args.steps, study.args.rate / 2, seed)
    heads = {}
    for name in head_names(args.seeds):
        record = json.loads(study.record_file(name).read_text())
        heads[name] = {"tokens": record["tokens"], "greedy": record["greedy"]}
    far = study.work / "distance.json"
    if not far.exists():
        write_json(distance(load_model(folder / "fitted", study.dtype, DEVICE), study), far)
    return {**json.loads(far.read_text()), "heads": heads}


def head_names(seeds):
    names = ["vanilla"]
    for seed in seeds:
        names += [f"full-{seed}", f"quantized-{seed}"]
    return names


def arguments(args, form):
    """Those of the study, of a folder in which the model is the quantized one and answers, maps and vanilla its own."""
    folder, work = Path(args.study), Path(args.work) / form
    settings = json.loads((folder / "study.json").read_text())["settings"]
    work.mkdir(parents=True, exist_ok=True)
    for name in ("answers", "maps", "heads/vanilla"):
        link_folder(folder / name, work / name)
    if not (work / "fitted").exists():
        round_backbone(folder / "fitted", work / "fitted", form)
    questions = read_rows(settings["questions"])
    count = min(args.num_questions, len(questions))
    chosen = [questions[i * len(questions) // count] for i in range(count)]
    (work / "questions.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in chosen))
    own = {"work": str(work), "model": str(work / "fitted"), "questions": str(work / "questions.jsonl")}
    less = {"answer_tokens": args.answer_tokens, "maps": [settings["map"]] if settings["map"] else []}
    none = {"arms": [], "long_tokens": 0, "temperatures": [], "original": None}
    return argparse.Namespace(**{**settings, **own, **less, **none})


def link_folder(source, target):
    """The files of a folder that is only read; nothing where the target is there."""
    if not target.exists():
        with new_folder(target) as out:
            for path in source.iterdir():
                if path.is_file():
                    link_or_copy(path, out / path.name)


def round_backbone(source, target, form):
    """A copy of a checkpoint whose layers' matrices are rounded; its MTP layer is not."""
    base = Checkpoint(source)

    def read(name):
        tensor = base.read(name)
        if tensor.ndim == 2 and ".layers." in name and not base.family.owns(name):
            return rounded(tensor, form)
        return tensor

    with new_folder(target) as out:
        for path in source.iterdir():
            if path.is_file() and not path.name.startswith("model"):
                link_or_copy(path, out / path.name)
        for file in set(base.file_of.values()):
            specs = {n: (TORCH[e.dtype], e.shape) for n, e in base.entries.items() if e.file == file}
            write_tensors(out / file.name, specs, read)
        write_index(out, {name: file.name for name, file in base.file_of.items()})


def rounded(matrix, form):
    """A matrix [rows, columns] as the numbers that its quantized form stands for, in its own dtype."""
    if form == "fp8":
        blocks = Blocks((128, 128), power_of_two=False)
        return dequantize(*quantize(matrix, blocks), blocks).to(matrix.dtype)
    groups = matrix.float().unflatten(-1, (-1, GROUP))
    scale = (groups.abs().amax(-1, keepdim=True) / LEVELS[form]).clamp(min=1e-6).half().float()
    codes = (groups / scale).round().clamp(-LEVELS[form], LEVELS[form])
    return (codes * scale).flatten(-2).to(matrix.dtype)


@torch.no_grad()
def distance(plain, study):
    """How far the states of the quantized model are from those of the plain one, where both read the same texts.

    Returns the error |quantized - plain| / |plain| of a hidden state after the final norm, averaged over the answers'
    positions, and the share of these at which both would go on with the same token.
    """
    errors, same = [], []
    for text in study.texts:
        ids, mask, _ = (x.to(DEVICE) for x in collate([text], study.pad))
        states = [model.model(input_ids=ids, attention_mask=mask).last_hidden_state for model in (plain, study.model)]
        of_answer = [h[0, text.start - 1 : text.end - 1] for h in states]
        first, second = (h.float() for h in of_answer)
        errors.append((second - first).norm(dim=-1) / first.norm(dim=-1))
        tokens = [study.model.lm_head(h).argmax(-1) for h in of_answer]
        same.append((tokens[0] == tokens[1]).float())
    return {"state_error": float(torch.cat(errors).mean()), "same_token": float(torch.cat(same).mean())}


def table(found, seeds):
    """A row for each form and head: rates by depth and tau, and how far tau lies above the head of full states."""
    rows = []
    size = next(iter(next(iter(found.values()))["heads"]["vanilla"]["greedy"]["maps"]), 0)
    for form, of_form in found.items():
        far = f"{100 * of_form['state_error']:.1f} %, {100 * of_form['same_token']:.1f} %"
        for name, head in of_form["heads"].items():
            cell = cell_of(head, size)
            kind, _, seed = name.rpartition("-")
            other = of_form["heads"][f"full-{seed}"] if kind == "quantized" else None
            gain = "{:+.3f} to {:+.3f}".format(*tau_interval(cell, cell_of(other, size))) if other else ""
            rates = [f"{100 * rate:.1f} %" for rate in cell["conditional"][:3]]
            taus = [f"{cell['tau'][k - 1]:.3f}" for k in (1, 3)]
            rows.append([form, far, name, *rates, *taus, gain])
            far = ""
    titles = ["form", "state error, same token", "head", *(f"depth {k}" for k in (1, 2, 3)), "tau K=1", "tau K=3"]
    return markdown_table([*titles, "above full, 95 %"], rows, raw=True) + "\n"


if __name__ == "__main__":
    main()
