"""Near-duplicates: what is found of planted ones, and time and memory against the number of rows, side by side.

    python benchmarks/data/near_duplicates.py --data rows.jsonl      # writes docs/results/near_duplicates.{json,md,png}

`--data` is any JSONL of rows with answers (`messages`, or `messages` and `response`). Ours is measured alone, and
inside the whole `fastmtp clean`; datasketch, rensa and datatrove where they are installed, with the same units, 3-grams
and threshold, on prompt and answer as one text. Every measurement is a process of its own on one core.
"""

import argparse
import importlib.util
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from swift_fastmtp.data.near_duplicates import NearDuplicates, prompt_and_answer
from swift_fastmtp.data.shingles import _UNIT, runs, units
from swift_fastmtp.files.plot_style import new_figure, plot_style
from swift_fastmtp.files.rows import dump_row, iter_rows
from swift_fastmtp.files.staging import write_json

SHARES = (0.02, 0.05, 0.1, 0.15, 0.2, 0.3)
SIZES = (10_000, 20_000, 50_000, 100_000, 400_000)
SLOW_SIZES = 50_000
NGRAM, SIMILARITY, PERMUTATIONS = 3, 0.6, 128
ORIGINALS, COPIES = 6_000, 500
COLORS = {"ours": "C1", "clean": "C4", "rensa": "C2", "datasketch": "C0", "datatrove": "C3"}
NAMES = {"ours": "ours", "clean": "`fastmtp clean`, all filters", "rensa": "rensa", "datasketch": "datasketch",
         "datatrove": "datatrove"}  # fmt: skip


def ours(path, folder, ngram=NGRAM, similarity=SIMILARITY):
    near = NearDuplicates("row", similarity, ngram, folder)
    for _, row in iter_rows(path):
        near.add(row)
    return [copy for copy, _, _ in near.clusters()]


def clean(path, folder):
    from swift_fastmtp.data.clean import clean

    clean([path], f"{folder}/out.jsonl")
    return []


def _shingles(path):
    for _, row in iter_rows(path):
        yield np.unique(runs(units("\n".join(prompt_and_answer(row))), NGRAM))


def datasketch(path, _folder):
    """MinHashLSH proposes, the signatures decide; the first row stays."""
    import datasketch

    lsh = datasketch.MinHashLSH(threshold=SIMILARITY, num_perm=PERMUTATIONS)
    kept, removed = {}, []
    for number, hashes in enumerate(_shingles(path)):
        minhash = datasketch.MinHash(PERMUTATIONS, hashfunc=lambda h: h)
        minhash.update_batch((hashes >> np.uint64(32)).tolist())
        if any(kept[other].jaccard(minhash) >= SIMILARITY for other in lsh.query(minhash)):
            removed.append(number)
        else:
            kept[number] = minhash
            lsh.insert(number, minhash)
    return removed


def rensa(path, _folder):
    """Its own deduplicator: LSH proposes, the signatures decide."""
    import rensa

    found = rensa.RMinHashDeduplicator(SIMILARITY, PERMUTATIONS, True)
    removed = []
    for number, hashes in enumerate(_shingles(path)):
        minhash = rensa.RMinHash(PERMUTATIONS, 42)
        minhash.update([h.tobytes() for h in hashes])
        if not found.add(str(number), minhash):
            removed.append(number)
    return removed


def datatrove(path, folder):
    """Its four stages with 20 x 6 hashes, (1/20)^(1/6) = 0.61, on our units; it does not compare candidates."""
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.dedup import (
        MinhashDedupBuckets,
        MinhashDedupCluster,
        MinhashDedupFilter,
        MinhashDedupSignature,
    )
    from datatrove.pipeline.dedup.minhash import MinhashConfig
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.writers import JsonlWriter
    from datatrove.utils.text import TextNormConfig
    from datatrove.utils.word_tokenizers import WhitespaceTokenizer

    class Units(WhitespaceTokenizer):
        def word_tokenize(self, text):
            return units(text)

    off = TextNormConfig(False, False, False, False, False, False, False)
    config = MinhashConfig(n_grams=NGRAM, num_buckets=20, hashes_per_bucket=6, norm_config=off)

    def read():
        return JsonlReader(str(Path(path).parent), glob_pattern=Path(path).name, adapter=lambda _r, row, _p, number: {
            "text": "\n".join(prompt_and_answer(row)), "id": str(number)})  # fmt: skip

    removed = JsonlWriter(f"{folder}/removed", "removed.jsonl", compression=None)
    kept = JsonlWriter(f"{folder}/kept", "kept.jsonl", compression=None)
    stages = [
        [read(), MinhashDedupSignature(f"{folder}/signatures", config, Units())],
        [MinhashDedupBuckets(f"{folder}/signatures", f"{folder}/buckets", config=config)],
        [MinhashDedupCluster(f"{folder}/buckets", f"{folder}/remove", config=config)],
        [read(), MinhashDedupFilter(f"{folder}/remove", removed), kept],
    ]
    for number, pipeline in enumerate(stages):
        tasks = config.num_buckets if number == 1 else 1
        LocalPipelineExecutor(pipeline, tasks=tasks, workers=1, logging_dir=f"{folder}/logs{number}").run()
    file = Path(f"{folder}/removed/removed.jsonl")
    return (
        [int(json.loads(line)["id"]) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []
    )


OTHER_SETTINGS = {"ours, 5-grams, 0.7": (5, 0.7), "ours, 2-grams, 0.5": (2, 0.5)}
METHODS = {"ours": ours, "clean": clean, "rensa": rensa, "datasketch": datasketch, "datatrove": datatrove}


def load(path):
    """Rows with an answer."""
    rows = []
    for _, row in iter_rows(path):
        messages = row["messages"]
        if messages[-1]["role"] != "assistant" and isinstance(row.get("response"), str):
            messages = [*messages, {"role": "assistant", "content": row["response"]}]
        if messages[-1]["role"] == "assistant":
            rows.append({"messages": messages, "finish_reason": "stop"})
    return rows


def plant(rows, rng):
    """Real rows, then copies with a share of their units replaced, on both sides: (rows, {place: (of, share)})."""
    long = [r for r in rows if all(len(units(side)) >= 20 for side in prompt_and_answer(r))]
    chosen = rng.sample(long, min(ORIGINALS, len(long)))
    pool = [u for r in rng.sample(chosen, min(500, len(chosen))) for u in units(r["messages"][-1]["content"])]
    planted, result = {}, list(chosen)
    for share in SHARES:
        for of in rng.sample(range(len(chosen)), min(COPIES, len(chosen))):
            planted[len(result)] = of, share
            messages = [{**m, "content": edited(m["content"], share, pool, rng)} for m in chosen[of]["messages"]]
            result.append({**chosen[of], "messages": messages})
    return result, planted


def edited(text, share, pool, rng):
    return _UNIT.sub(lambda unit: rng.choice(pool) if rng.random() < share else unit[0], text)


def jaccard(a, b):
    """By the definition, with sets."""
    sides = [[set(runs(units(side), NGRAM).tolist()) for side in prompt_and_answer(row)] for row in (a, b)]
    return min(len(x & y) / max(len(x | y), 1) for x, y in zip(*sides, strict=True))


def quality(rows, methods, rng):
    rows, planted = plant(rows, rng)
    alike = {place: jaccard(rows[place], rows[of]) >= SIMILARITY for place, (of, _) in planted.items()}
    result = {"rows": len(rows), "planted": len(planted), "similar": by_share(planted, alike), "methods": {}}
    originals = len(rows) - len(planted)
    for name in [*methods, *OTHER_SETTINGS]:
        if name == "clean":
            continue
        removed = set(measured(name, rows)["removed"])
        found = {place: place in removed for place in planted}
        result["methods"][name] = {
            "found": by_share(planted, found),
            "found_of_similar": sum(found[p] for p in planted if alike[p]) / sum(alike.values()),
            "originals_removed": len([r for r in removed if r < originals]),
            "removed_wrongly": len([r for r in removed if r >= originals and not alike[r]]),
            "removed": len(removed),
        }
    return result


def by_share(planted, flags):
    return {str(s): float(np.mean([flags[p] for p, (_, share) in planted.items() if share == s])) for s in SHARES}


def distinct_rows(rows, count, rng):
    """Rows of about 1 KB whose sentences are drawn from real ones."""
    sentences = [
        s.strip() for r in rows for m in r["messages"] for s in m["content"].replace("。", "。\n").splitlines()
    ]
    sentences = [s for s in dict.fromkeys(sentences) if 20 <= len(s.encode()) <= 200]

    def text(size):
        parts = []
        while sum(len(p.encode()) for p in parts) < size:
            parts.append(rng.choice(sentences))
        return "\n".join(parts)

    for _ in range(count):
        yield {"messages": [{"role": "user", "content": text(250)}, {"role": "assistant", "content": text(650)}],
               "finish_reason": "stop"}  # fmt: skip


def measured(name, rows):
    """One method in a process of its own: what it removed, seconds, and MB above what the imports take."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "rows.jsonl")
        with open(path, "w", encoding="utf-8") as file:
            file.writelines(map(dump_row, rows))
        command = [sys.executable, __file__, "--measure", name, str(path), f"{folder}/result.json"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(done.stderr)
        return json.loads(Path(folder, "result.json").read_text())


def measure(name, path, result):
    importlib.import_module(
        "swift_fastmtp.data.clean" if name == "clean" else name.split(",")[0].replace("ours", "numpy")
    )
    before = peak_mb()
    start = cpu_seconds()
    folder = Path(path).parent / "work"
    folder.mkdir()
    settings = OTHER_SETTINGS.get(name, ())
    removed = METHODS[name.split(",")[0]](path, str(folder), *settings)
    seconds = cpu_seconds() - start
    Path(result).write_text(json.dumps({"removed": removed, "seconds": seconds, "mb": peak_mb() - before}))


def cpu_seconds():
    """Of this process and its children: other work on the machine does not count."""
    return sum(os.times()[:4])


def peak_mb():
    """Of this program; what getrusage tells may be its parent's, from before it was started."""
    return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024


@plot_style()
def plot(report, path):
    figure, (axes,) = new_figure(13, 3.8, columns=3)
    shares = [100 * s for s in SHARES]
    axes[0].plot(
        shares,
        [100 * x for x in report["quality"]["similar"].values()],
        "k--",
        lw=1,
        zorder=3,
        label="similar, exactly",
    )
    for name, values in report["quality"]["methods"].items():
        if name in OTHER_SETTINGS:
            continue
        axes[0].plot(shares, [100 * x for x in values["found"].values()], "o-", ms=3, color=COLORS[name], label=name)
    for name, values in report["scale"].items():
        sizes = [int(n) for n in values]
        for axis, key in ((axes[1], "seconds"), (axes[2], "mb")):
            axis.plot(
                sizes,
                [v[key] for v in values.values()],
                "o-",
                ms=3,
                color=COLORS[name],
                label=NAMES[name].replace("`", ""),
            )
    axes[0].set(xlabel="words replaced (%)", ylabel="copies removed (%)", title="Planted near-duplicates")
    axes[1].set(xlabel="rows of 1 KB", ylabel="CPU seconds", title="Time", xscale="log", yscale="log")
    axes[2].set(xlabel="rows of 1 KB", ylabel="peak MB", title="Memory", xscale="log", yscale="log")
    for axis in axes:
        axis.grid(True)
    for axis in axes[1:]:
        axis.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
        axis.yaxis.set_major_formatter(lambda y, _: f"{y:g}")
    axes[0].legend(fontsize=8)
    axes[1].legend(fontsize=8)
    figure.savefig(path)


def markdown(report, name):
    q = report["quality"]
    lines = [
        "# Near-duplicates: found, time, memory",
        "",
        f"Written by `benchmarks/data/near_duplicates.py` ([numbers]({name}.json)); "
        f"{NGRAM}-grams, similarity {SIMILARITY}.",
        "",
        f"![Copies removed, time, memory]({name}.png)",
        "",
        "## Planted copies",
        "",
        f"{q['rows'] - q['planted']} real rows, {q['planted']} copies with words (Chinese: characters) replaced at "
        "random, in prompt and answer. The first line says which copies are near-duplicates by the definition (both "
        "sides, exactly); recall is of those, and wrong is a copy removed that is none.",
        "",
        "| removed of copies with | "
        + " | ".join(f"{s:.0%}" for s in SHARES)
        + " | recall | wrong | real rows removed |",
        "|---|" + "---:|" * (len(SHARES) + 3),
        "| similar, exactly | " + " | ".join(f"{x:.1%}" for x in q["similar"].values()) + " | | | |",
    ]
    for method, v in q["methods"].items():
        found = " | ".join(f"{x:.1%}" for x in v["found"].values())
        lines.append(f"| {NAMES.get(method, method)} | {found} | {v['found_of_similar']:.2%} | {v['removed_wrongly']} "
                     f"| {v['originals_removed']} |")  # fmt: skip
    lines += [
        "",
        "The others see prompt and answer as one text: recall and wrong hold them to a definition that is ours, and "
        "so do the rows with other n-grams. Copies with a tenth or more of their words replaced are mostly kept at the "
        "default settings; `--ngram 2 --similarity 0.5` removes most of them, and more real rows.",
        "",
        "## Time and memory",
        "",
        "Rows of about 1 KB made of real sentences; reading the JSON included. CPU seconds, on one core; MB above "
        "the imports.",
        "",
        "| rows | " + " | ".join(NAMES[m] for m in report["scale"]) + " |",
        "|---:|" + "---:|" * len(report["scale"]),
    ]
    for size in report["sizes"]:
        cells = [v.get(str(size)) for v in report["scale"].values()]
        cells = [f"{c['seconds']:.1f} s, {c['mb']:.0f} MB" if c else "" for c in cells]
        lines.append(f"| {size:,} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="JSONL of rows with answers")
    parser.add_argument("--output", default="docs/results/near_duplicates", help="without suffix")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        return measure(*args.measure)
    from swift_fastmtp.files.provenance import provenance

    started = time.time()
    methods = [m for m in args.methods if m in ("ours", "clean") or importlib.util.find_spec(m)]
    rng = random.Random(0)
    rows = load(args.data)
    report = {"quality": quality(rows, methods, rng), "sizes": list(args.sizes), "scale": {m: {} for m in methods}}
    for size in args.sizes:
        for name in methods:
            if size <= SLOW_SIZES or name in ("ours", "clean"):
                done = measured(name, distinct_rows(rows, size, random.Random(size)))
                report["scale"][name][str(size)] = {k: done[k] for k in ("seconds", "mb")}
                print(size, name, f"{done['seconds']:.1f} s, {done['mb']:.0f} MB", flush=True)
    report["run"] = {**provenance(), "seconds": round(time.time() - started, 1)}
    output = Path(args.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    write_json(report, output.with_suffix(".json"))
    output.with_suffix(".md").write_text(markdown(report, output.name), encoding="utf-8")
    plot(report, output.with_suffix(".png"))


if __name__ == "__main__":
    main()
