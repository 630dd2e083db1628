"""A head trained for SGLang's graph and one trained for vLLM's, each served by both real engines: four tau.

    bash examples/quickstart.sh
    python benchmarks/serving/engines.py

Two models, on the quickstart's rows and recipe with half its epochs: the tiny MiMo, whose final norm has nearly equal
weights, and the same model with a final norm whose weights are spread: each channel's weight times a half, one or two,
and its column of the output matrix divided by it. Powers of two are exact, so the second model is the first, bit for
bit; but its state after the final norm is another than the one before it. Its own MTP layer's input norm is divided by
the factors too.

Writes docs/results/engines.{md,json}. Runs that are there are not done again.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests"))
from helpers.engine import Server, VLLMServer, engine_version  # noqa: E402

from swift_fastmtp.data.chat_template import encode_prompt  # noqa: E402
from swift_fastmtp.export.folders import export_full  # noqa: E402
from swift_fastmtp.families.family import ENGINES, READ_IN  # noqa: E402
from swift_fastmtp.files.provenance import provenance  # noqa: E402
from swift_fastmtp.files.rows import read_rows  # noqa: E402
from swift_fastmtp.files.staging import write_json  # noqa: E402
from swift_fastmtp.files.table import markdown_table  # noqa: E402
from swift_fastmtp.serving.flags import command  # noqa: E402
from swift_fastmtp.serving.launch import serve_flags  # noqa: E402

TINY = ROOT / "examples/tiny-mimo"
PROMPTS = ROOT / "examples/prompts/eval.jsonl"
STEPS = 3
EPOCHS = 3
TOKENS = 96
FACTORS = (0.5, 1.0, 2.0)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quickstart", default="output/quickstart", help="its output folder")
    parser.add_argument("--output_dir", default="output/engines", help="of models, runs and answers")
    parser.add_argument("--results", default=str(ROOT / "docs" / "results"))
    args = parser.parse_args()
    started, made_by, out = time.time(), provenance(), Path(args.output_dir)
    out.mkdir(parents=True, exist_ok=True)
    models = {"tiny MiMo": TINY, "norm weights spread": spread_model(out / "spread-mimo")}
    cells = []
    for name, model in models.items():
        heads = {"its own": model}
        for engine in ENGINES:
            heads[f"for {engine}"] = trained(model, engine, args.quickstart, out / f"{model.name}-{engine}")
        for head, folder in heads.items():
            for engine in ENGINES:
                cells.append({"model": name, "head": head, "served_by": engine, **served(folder, engine, out)})
                print(cells[-1], flush=True)
    texts = [cell.pop("texts") for cell in cells]
    equal = sum(len({json.dumps(text[i]) for text in texts}) == 1 for i in range(len(texts[0])))
    record = {
        "cells": cells,
        "prompts": len(texts[0]),
        "texts_equal_everywhere": equal,
        "versions": {**READ_IN, "sglang_run": engine_version()},
        "provenance": {**made_by, "seconds": round(time.time() - started, 1)},
    }
    write_json(record, Path(args.results) / "engines.json")
    (Path(args.results) / "engines.md").write_text(page(record), encoding="utf-8")
    print(page(record))


def spread_model(folder):
    """The tiny MiMo with factors in its final norm, taken out again by the output matrix."""
    if folder.exists():
        return folder
    building = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(building, ignore_errors=True)
    shutil.copytree(TINY, building)
    for path in building.glob("*.safetensors"):
        tensors = load_file(path)
        if "model.norm.weight" in tensors:
            norm, matrix = tensors["model.norm.weight"], tensors["lm_head.weight"]
            own = tensors["model.mtp_layers.0.hidden_layernorm.weight"]
            chosen = torch.randint(len(FACTORS), norm.shape, generator=torch.Generator().manual_seed(0))
            factors = torch.tensor(FACTORS, dtype=norm.dtype)[chosen]
            tensors["model.norm.weight"] = norm * factors
            tensors["lm_head.weight"] = matrix / factors
            tensors["model.mtp_layers.0.hidden_layernorm.weight"] = own / factors
            save_file(tensors, path, {"format": "pt"})
    building.rename(folder)
    return folder


def trained(model, engine, quickstart, folder):
    """A full export of the model's head, trained for an engine with the quickstart's recipe."""
    if not (folder / "train/best").exists():
        shutil.rmtree(folder, ignore_errors=True)
        words = ["swift", "sft", "recipes/quickstart_cpu.yaml", "--model", model]
        words += ["--dataset", f"fastmtp-self-distill:{quickstart}/mixed/train.jsonl"]
        words += ["--val_dataset", f"fastmtp-self-distill:{quickstart}/mixed/val.jsonl"]
        words += ["--model_kwargs", json.dumps({"fastmtp_engine": engine}), "--num_train_epochs", EPOCHS]
        words += ["--output_dir", folder / "train"]
        subprocess.run(list(map(str, words)), check=True)
    if not (folder / "export").exists():
        export_full(folder / "train/best", folder / "export", model)
    return folder / "export"


def served(folder, engine, out):
    """tau of the evaluation prompts on a real server, its verification steps and accepted drafts, and the texts."""
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    prompts = [encode_prompt(tokenizer, row["messages"]) for row in read_rows(PROMPTS)]
    flags, log = command(serve_flags(folder, engine, STEPS)), out / f"{engine}.log"
    if engine == "sglang":
        with Server(flags, log) as server:
            records = server.generate(prompts, TOKENS)
        texts = [record["output_ids"] for record in records]
        rounds = [sum(r["meta_info"]["spec_correct_drafts_histogram"]) for r in records]
        accepted = [r["meta_info"]["spec_num_correct_drafts"] for r in records]
    else:
        with VLLMServer([*flags, "--per-request-spec-decode-metrics", "detailed"], log) as server:
            answers = [server.complete(flags[2], prompt, TOKENS) for prompt in prompts]
        texts = [ids for ids, _ in answers]
        rounds = [len(counts) for _, counts in answers]
        accepted = [sum(counts) for _, counts in answers]
    return {"tau": 1 + sum(accepted) / sum(rounds), "steps": sum(rounds), "accepted": sum(accepted), "texts": texts}


def page(record):
    rows = []
    for model in dict.fromkeys(cell["model"] for cell in record["cells"]):
        for head in dict.fromkeys(cell["head"] for cell in record["cells"]):
            tau = {c["served_by"]: c["tau"] for c in record["cells"] if (c["model"], c["head"]) == (model, head)}
            rows.append((model, head, f"{tau['sglang']:.3f}", f"{tau['vllm']:.3f}"))
    table = markdown_table(("model", "head trained", "SGLang", "vLLM"), rows, num_text=2)
    return (
        "# A head trained for one engine, served by the other\n\n"
        f"τ at K = {STEPS}, greedy, float32, on {record['prompts']} prompts that were never trained on, served by "
        f"{READ_IN['sglang']} and {READ_IN['vllm']} on a CPU; "
        "[what the engines do differently](../engines.md).\n\n"
        f"{table}\n\n"
        f"The answers to {record['texts_equal_everywhere']} of {record['prompts']} prompts are the same tokens in all "
        f"{len(record['cells'])} runs. Both models write the same: the second is the first with a final norm whose "
        "weights are spread (each times 0.5, 1 or 2), and the output matrix divided by the same factors. "
        "`python benchmarks/serving/engines.py` makes this page.\n"
    )


if __name__ == "__main__":
    main()
