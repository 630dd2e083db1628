"""Predicted against measured acceptance of every token map, language and K: the simulator beside the real SGLang.

    bash examples/quickstart.sh
    python benchmarks/serving/token_maps.py

Maps are made from the quickstart's distilled answers, prompts are examples/prompts/eval.jsonl, the head is the one that
the quickstart trained. Each map is served by a real SGLang on the CPU (tests/serving), with `--speculative-token-map`,
and gets all prompts, so every language meets its own map and the others'. Writes docs/results/token_maps.{md,json,png}.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import AutoTokenizer

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests"))
from helpers.engine import Server, engine_version  # noqa: E402

from swift_fastmtp.files.provenance import provenance  # noqa: E402
from swift_fastmtp.files.rows import read_rows  # noqa: E402
from swift_fastmtp.files.staging import write_json  # noqa: E402
from swift_fastmtp.method.config import FastMTPConfig  # noqa: E402
from swift_fastmtp.method.metrics import verify_rounds  # noqa: E402
from swift_fastmtp.method.token_map import read_token_map  # noqa: E402
from swift_fastmtp.model.loading import load_model  # noqa: E402
from swift_fastmtp.serving.flags import command  # noqa: E402
from swift_fastmtp.serving.launch import serve_flags  # noqa: E402
from swift_fastmtp.simulate.acceptance import greedy_acceptance, make_texts  # noqa: E402
from swift_fastmtp.simulate.plots import plot_maps  # noqa: E402
from swift_fastmtp.simulate.simulate import simulate  # noqa: E402
from swift_fastmtp.vocab.build import vocab  # noqa: E402

PROMPTS = ROOT / "examples" / "prompts" / "eval.jsonl"
SIZES = (512, 1024, 2048)
SERVED_AT_EVERY_K = 1024
STEPS = (1, 2, 3)
TOKENS = 64
LANGUAGES = ("en", "zh", "code")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quickstart", default="output/quickstart", help="its output folder")
    parser.add_argument("--results", default=str(ROOT / "docs" / "results"))
    args = parser.parse_args()
    started = time.time()
    export, results = f"{args.quickstart}/export", Path(args.results)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        sizes = list(SIZES)
        vocab([f"{args.quickstart}/distilled.jsonl"], export, str(out / "maps"), sizes=sizes, held_out=0.1)
        maps = {None: None} | {p.stem: p for p in sorted((out / "maps").glob("*.pt"), key=by_kind)}
        files = [str(p) for p in maps.values() if p]
        options = {"max_new_tokens": TOKENS, "token_maps": files, "by": "language"}
        found = simulate(export, [], str(PROMPTS), num_steps=max(STEPS), **options)
        predicted, prompts, languages = predict(export, maps)
        measured = {}
        for name, path in maps.items():
            for K in STEPS if name is None or name.endswith(f"-{SERVED_AT_EVERY_K}") else STEPS[-1:]:
                measured[name, K] = serve(export, K, path, prompts, out / "log")
                print(f"{name} K={K}", flush=True)
    cells, equal, number = [], 0, 0
    for (name, K), records in measured.items():
        pairs = list(zip(languages, predicted[name, K], records, strict=True))
        same = [want == got for _, want, got in pairs]
        equal, number = equal + sum(same), number + len(same)
        tau = {}
        for language in LANGUAGES:
            own = [(want, got) for of, want, got in pairs if of == language]
            tau[language] = [1 + sum(x[i][1] for x in own) / sum(x[i][0] for x in own) for i in (0, 1)]
        cells.append({"map": name, "K": K, "tau": tau})
    record = {
        "cells": cells,
        "answers": {language: languages.count(language) for language in LANGUAGES},
        "requests": number,
        "requests_equal": equal,
        "sglang": engine_version(),
        "provenance": {**provenance(), "seconds": round(time.time() - started, 1)},
    }
    write_json(record, results / "token_maps.json")
    shown = [r for r in found if r.group in LANGUAGES and r.head == "base"]
    plot_maps(shown, max(STEPS), results / "token_maps.png")
    (results / "token_maps.md").write_text(table(record), encoding="utf-8")
    print(table(record))


def by_kind(path):
    kind, _, size = path.stem.rpartition("-")
    return kind, int(size)


def predict(model_dir, maps):
    """Per map and K, per answer: (verification steps, accepted drafts); the prompts; the prompts' languages."""
    rows = read_rows(PROMPTS)
    model, tokenizer = load_model(model_dir, torch.float32), AutoTokenizer.from_pretrained(model_dir)
    model.fastmtp = FastMTPConfig(num_speculative_steps=max(STEPS))
    texts = make_texts(model, tokenizer, rows, TOKENS, "generate", 16)
    ids = [None if path is None else read_token_map(path, model.config.vocab_size) for path in maps.values()]
    found = {}
    for name, accepted in zip(maps, greedy_acceptance(model, texts, tokenizer.pad_token_id, 16, ids), strict=True):
        for K in STEPS:
            rounds = [verify_rounds(a, K) for a in accepted]
            found[name, K] = [(len(r), sum(r)) for r in rounds]
    return found, [t.ids[: t.start] for t in texts], [rows[t.row]["category"] for t in texts]


def serve(model_dir, K, token_map, prompts, log):
    flags = serve_flags(model_dir, num_steps=K, token_map=str(token_map) if token_map else None)
    with Server(command(flags), log) as server:
        records = server.generate(prompts, TOKENS)
    infos = [r["meta_info"] for r in records]
    return [(i["spec_verify_ct"], i["spec_num_correct_drafts"]) for i in infos]


def table(record):
    counts = ", ".join(f"{n} {language}" for language, n in record["answers"].items())
    lines = [
        "# Token maps: predicted and measured",
        "",
        f"The quickstart's head, maps from its distilled answers, greedy, {TOKENS} tokens for {counts} prompts. Every "
        f"map was served by a real SGLang {record['sglang']} on a CPU, to all languages. Steps and accepted drafts are "
        f"equal to the simulator's in {record['requests_equal']} of {record['requests']} requests. Made by "
        "`benchmarks/serving/token_maps.py`.",
        "",
        "τ, tokens per verification step: predicted / measured",
        "",
        f"| map | K | {' | '.join(f'on {x}' for x in LANGUAGES)} |",
        "|---|---:|" + "---:|" * len(LANGUAGES),
    ]
    for cell in sorted(record["cells"], key=lambda c: c["K"]):
        own = (cell["map"] or "").rpartition("-")[0]
        row = []
        for language in LANGUAGES:
            text = " / ".join(f"{x:.2f}" for x in cell["tau"][language])
            row.append(f"**{text}**" if language == own else text)
        lines.append(f"| {cell['map'] or 'whole vocabulary'} | {cell['K']} | {' | '.join(row)} |")
    lines += ["", "![τ and predicted speedup against map size](token_maps.png)", ""]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
