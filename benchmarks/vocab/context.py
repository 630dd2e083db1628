"""Is a token map per request worth it: a small base, the ids of the prompt, and those answered so far?

    python benchmarks/vocab/context.py tau --study output/smollm2/study       # a real head; study.py's folder
    python benchmarks/vocab/context.py coverage --model MODEL --data texts.jsonl.xz prompts.jsonl --translated es=PO
    python benchmarks/vocab/context.py cost

`tau`: acceptance of the head that benchmarks/smollm2/study.py trained, on the model's greedy answers, exactly as a
server would draft (`context_tau.py`). `coverage`: of the next tokens of real texts (`context_coverage.py`). `cost`: of
a draft step on one thread of a CPU (`context_cost.py`). A map of requests is compared with a static one that holds as
many ids as it does in the mean. Each part writes its section of docs/results/context_maps.json and prints its tables.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import torch
from context_cost import SHAPES, bytes_read, cost, ratios, upkeep
from context_coverage import coverage, of_texts
from context_sets import base_of, mean_sizes, ranking
from context_tau import CONTEXT, STATIC, acceptance, compared

from swift_fastmtp.checkpoint.checkpoint import Checkpoint
from swift_fastmtp.checkpoint.mtp_tensors import read_head
from swift_fastmtp.data.chat_template import load_tokenizer
from swift_fastmtp.data.generate import padding_id
from swift_fastmtp.files.provenance import provenance
from swift_fastmtp.files.rows import read_rows
from swift_fastmtp.files.staging import write_json
from swift_fastmtp.files.table import markdown_table
from swift_fastmtp.method.config import FastMTPConfig
from swift_fastmtp.model.loading import head_shapes, load_head, load_model
from swift_fastmtp.simulate.acceptance import Text
from swift_fastmtp.simulate.states import States
from swift_fastmtp.vocab.build import part_of
from swift_fastmtp.vocab.counts import Counts

ROOT = Path(__file__).parents[2]
DEPTH = 3
BATCH = 16
BATCHES = (1, 4, 8, 16, 32, 64)
"""Requests at once for which a draft step's bytes are computed."""
LANGUAGE_OF = {"code": "code"}
"""The language of a question's kind; English if it is not here."""


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(dest="part", required=True)
    of_tau = parts.add_parser("tau")
    of_tau.add_argument("--study", required=True)
    of_tau.add_argument("--head", default="heads/head", help="below it")
    of_tau.add_argument("--texts", default="texts-256-0.0.json", help="below it")
    of_tau.add_argument("--questions", default="eval.jsonl", help="below it")
    of_tau.add_argument("--every", type=int, default=1, help="the texts answer every so-many-th of them")
    of_tau.add_argument("--name", default="tau", help="of the section")
    of_tau.add_argument("--sizes", type=int, nargs="+", default=[512, 1024, 2048, 4096, 8192])
    of_coverage = parts.add_parser("coverage")
    of_coverage.add_argument("--model", required=True)
    of_coverage.add_argument("--data", nargs="+", required=True)
    of_coverage.add_argument("--translated", nargs="*", default=[], help="LANGUAGE=FOLDER of .po files")
    of_coverage.add_argument("--sizes", type=int, nargs="+", default=[1024, 2048, 4096, 8192, 16384, 32768])
    of_cost = parts.add_parser("cost")
    of_cost.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=SHAPES)
    of_cost.add_argument("--requests", type=int, nargs="+", default=[1, 8])
    of_cost.add_argument("--ids", type=int, default=4096)
    of_cost.add_argument("--own_ids", type=int, nargs="+", default=[64, 256], help="of these, the request's own")
    of_cost.add_argument("--rounds", type=int, default=15)
    for each in (of_tau, of_coverage, of_cost):
        each.add_argument("--output", default=str(ROOT / "docs" / "results" / "context_maps.json"))
    args = parser.parse_args()
    output, started, made_by = Path(args.output), time.time(), provenance()
    measure, tables = {
        "tau": (measure_tau, tau_tables),
        "coverage": (measure_coverage, coverage_tables),
        "cost": (measure_cost, cost_tables),
    }[args.part]
    found = measure(args)
    made_by["command"] = [Path(word).name for word in sys.argv]
    found["provenance"] = {**made_by, "seconds": round(time.time() - started, 1)}
    record = json.loads(output.read_text()) if output.exists() else {}
    section = getattr(args, "name", args.part)
    record[section] = json.loads(json.dumps(found))  # as it is read again: keys are text
    output.parent.mkdir(parents=True, exist_ok=True)
    write_json(dict(sorted(record.items())), output)
    print(tables(record[section]))


def measure_tau(args):
    study = Path(args.study)
    texts = [Text(*text) for text in json.loads((study / args.texts).read_text())]
    questions = read_rows(study / args.questions)[:: args.every]
    kinds = [questions[text.row].get("category", "all") for text in texts]
    groups = {"all": list(range(len(texts)))}
    for kind in sorted(set(kinds)):
        groups[kind] = [i for i, each in enumerate(kinds) if each == kind]
    counted = counts_by_language(study / "maps" / "counts.safetensors")
    mixed = ranking(list(counted.values()))
    head = of_study(study, args.head)
    V = len(mixed[0])

    # Static maps and sets of requests for all questions, by one ranking, beside the whole vocabulary.
    with States(2) as states:
        states.keep_of(head[0])
        forms = {(CONTEXT, 0): (CONTEXT, 0), **forms_of(texts, mixed[1], args.sizes)}  # and without any base
        accepted = acceptance(*head[:1], texts, head[1], BATCH, mixed, [(STATIC, V), *forms.values()])
        whole = accepted[0]
        by_form = {("mixed", *name): of for name, of in zip(forms, accepted[1:], strict=True)}
        bases = {("mixed", *name): [form[1]] * len(texts) for name, form in forms.items()}

        # The same for the questions of each language, by its own ranking.
        for language in sorted(counted):
            places = [i for i, kind in enumerate(kinds) if LANGUAGE_OF.get(kind, "en") == language]
            some = [texts[i] for i in places]
            if not some:
                continue
            own = ranking([counted[language]])
            forms = forms_of(some, own[1], args.sizes)
            accepted = acceptance(head[0], some, head[1], BATCH, own, list(forms.values()))
            for (name, form), of in zip(forms.items(), accepted, strict=True):
                here = by_form.setdefault(("own", *name), [None] * len(texts))
                base = bases.setdefault(("own", *name), [None] * len(texts))
                for place, each in zip(places, of, strict=True):
                    here[place], base[place] = each, form[1]

    # Ids that sets hold, and tau beside the whole vocabulary's, by kind.
    rankings = {"mixed": dict.fromkeys(set(kinds), mixed[1])}
    rankings["own"] = {kind: ranking([counted[LANGUAGE_OF.get(kind, "en")]])[1] for kind in set(kinds)}
    entries = []
    for (source, form, size), of in by_form.items():
        entry = {"ranking": source, "form": form, "size": size, "groups": {}}
        for group, places in groups.items():
            if any(of[i] is None for i in places):
                continue
            by_K = {}
            for K in range(1, DEPTH + 1):
                by_K[K] = compared([of[i] for i in places], [whole[i] for i in places], K)
            held = None
            if form == CONTEXT:
                held = mean_held(texts, places, kinds, bases[source, form, size], rankings[source])
            entry["groups"][group] = {"K": by_K, "ids": held}
        entry["base"] = sorted(set(bases[source, form, size])) if form == CONTEXT else None
        entries.append(entry)
    taus = {}
    for group, places in groups.items():
        some = [whole[i] for i in places]
        taus[group] = [compared(some, some, K)["tau"] for K in range(1, DEPTH + 1)]
    return {
        "answers": {group: len(places) for group, places in groups.items()},
        "answer_tokens": sum(text.end - text.start for text in texts),
        "prompt_tokens": sum(text.start for text in texts),
        "vocabulary": V,
        "coverage": of_texts(texts, mixed[1], args.sizes),
        "whole": taus,
        "forms": entries,
    }


def of_study(study, head):
    """The study's model with one of its heads, and the id to pad with."""
    fitted = study / "fitted"
    model = load_model(fitted, torch.float32)
    load_head(model, read_head(Checkpoint(study / head), model.family, head_shapes(Checkpoint(fitted))))
    model.fastmtp = FastMTPConfig(num_speculative_steps=DEPTH)
    return model, padding_id(model, load_tokenizer(str(fitted)))


def counts_by_language(path):
    """Tokens of the self-distilled responses that the study's maps were made from: of English, and of code."""
    counts = Counts.load(path)
    found = {}
    for cell, of_V in counts.counted.items():
        name = part_of(cell, "language")
        if name in ("en", "code"):
            found[name] = found.get(name, 0) + of_V
    return found


def forms_of(texts, rank_V, sizes):
    """(form, size) -> (form, ids of the map or of the base), for `context_tau.acceptance`."""
    held = mean_sizes(texts, rank_V)
    forms = {}
    for size in sizes:
        forms[STATIC, size] = (STATIC, size)
        base = base_of(size, held)
        if base is not None:
            forms[CONTEXT, size] = (CONTEXT, base)
    return forms


def mean_held(texts, places, kinds, bases, ranks):
    """Ids that the sets of some texts hold, over all their answer tokens."""
    held = drafted = 0
    for i in places:
        tokens = texts[i].end - texts[i].start - 1
        held += tokens * mean_sizes([texts[i]], ranks[kinds[i]])[bases[i]]
        drafted += tokens
    return round(float(held / drafted), 1)


def measure_coverage(args):
    translated = dict(each.split("=", 1) for each in args.translated)
    return coverage(args.model, args.data, translated, args.sizes)


def measure_cost(args):
    found = []
    for name in args.shapes:
        for requests in args.requests:
            for own in args.own_ids:
                seconds = cost(name, requests, args.ids, own, args.rounds)
                entry = {"shape": name, "requests": requests, "ids": args.ids, "own_ids": own, "forms": {}}
                for form, times in seconds.items():
                    entry["forms"][form] = {"microseconds": round(1e6 * sorted(times)[len(times) // 2], 1)}
                    if form != "layer":
                        entry["forms"][form]["matrix"] = ratios(seconds, form, with_layer=False)
                        entry["forms"][form]["step"] = ratios(seconds, form, with_layer=True)
                found.append(entry)
                print(entry, flush=True)
    predicted = []
    for name in args.shapes:
        for own in args.own_ids:
            by_batch = {r: round(bytes_read(name, r, args.ids, own), 3) for r in BATCHES}
            predicted.append({"shape": name, "ids": args.ids, "own_ids": own, "bytes": by_batch})
    added = round(upkeep(max(args.own_ids)), 2)
    return {"rounds": args.rounds, "cases": found, "predicted": predicted, "upkeep_microseconds": added}


def tau_tables(found):
    """Markdown: the whole vocabulary's tau, then of every form what it keeps of that, at K = 3 by kind."""
    kinds = list(found["answers"])
    lines = []
    for entry in found["forms"]:
        cells = []
        for kind in kinds:
            of = entry["groups"].get(kind)
            if of is None:
                cells.append("")
                continue
            share, low, high = (100 * x for x in of["K"]["3"]["share"])
            cells.append(f"{share:.1f} % [{low:.1f}, {high:.1f}]")
        by_K = [f"{entry['groups']['all']['K'][K]['tau']:.3f}" for K in "123"]
        held = entry["groups"]["all"]["ids"]
        base = "" if entry["base"] is None else ", ".join(f"{b:,}" for b in entry["base"])
        ids = f"{entry['size']:,}" if held is None else f"{held:,.0f}"
        lines.append([f"{entry['form']}, {entry['ranking']}", ids, base, *by_K, *cells])
    taus = [f"{tau:.3f}" for tau in found["whole"]["all"]]
    lines.append(
        ["whole vocabulary", f"{found['vocabulary']:,}", "", *taus, *(f"{t[2]:.3f}" for t in found["whole"].values())]
    )
    return markdown_table(["map", "ids", "base", "τ K=1", "τ K=2", "τ K=3", *kinds], lines, raw=True)


def coverage_tables(found):
    """Markdown: coverage by size, a row for each cell and form."""
    lines = []
    for cell, of in found["cells"].items():
        for source in ("own", "mixed"):
            for form in (STATIC, CONTEXT):
                shares = of["forms"][f"{form}, {source}"].values()
                percents = ["" if share is None else f"{100 * share:.1f} %" for share in shares]
                lines.append([cell, f"{form}, {source}", *percents])
    return markdown_table(["text", "map", *(f"{size:,}" for size in found["sizes"])], lines, raw=True, num_text=2)


def cost_tables(found):
    """Markdown: each form's time beside the static map's, of the output matrix alone and of the whole draft step."""
    lines = []
    for case in found["cases"]:
        for form, of in case["forms"].items():
            if form == "layer":
                continue
            matrix, step = ("{:.2f} [{:.2f}, {:.2f}]".format(*of[part]) for part in ("matrix", "step"))
            about = [case["shape"], f"{case['requests']}", f"{case['own_ids']:,}", form]
            lines.append([*about, f"{of['microseconds']:,.0f}", matrix, step])
    header = ["sizes of", "requests", "own ids", "form", "µs", "matrix / static", "draft step / static"]
    measured = markdown_table(header, lines, raw=True)
    lines = []
    for case in found["predicted"]:
        lines.append([case["shape"], f"{case['own_ids']:,}", *(f"{ratio:.2f}" for ratio in case["bytes"].values())])
    predicted = markdown_table(["sizes of", "own ids", *map(str, BATCHES)], lines, raw=True)
    return f"{measured}\n\n{predicted}"


if __name__ == "__main__":
    main()
