"""Token maps of a real vocabulary: coverage at four sizes per language, in and out of their domain; time and memory.

    python benchmarks/vocab/coverage.py --data texts.jsonl.xz prompts.jsonl --model MODEL

Writes docs/results/vocab.md, .json and .png.

`--data`: JSONL with `text` and `lang` (`en`, `zh`, `code-python`, ..), cut into answers of at most 8,000 characters
whose prompt is the document, so that a document is counted or held out whole; or with `messages` and `response`.
`--model`: a folder with config.json and the tokenizer. Every run is a process of its own.
"""

import argparse
import json
import lzma
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

from swift_fastmtp.files.provenance import provenance
from swift_fastmtp.files.rows import dump_row, write_rows
from swift_fastmtp.files.staging import write_json

ROOT = Path(__file__).parents[2]
CHARACTERS = 8000
CALL = """
import json, sys
from swift_fastmtp.vocab.build import vocab
if __name__ == "__main__":
    vocab(**json.loads(sys.argv[1]))
"""


def rows_of(path):
    opener = lzma.open if path.endswith(".xz") else open
    with opener(path, "rt", encoding="utf-8") as file:
        values = [json.loads(line) for line in file]
    for number, value in enumerate(values):
        if "text" in value:
            code = value["lang"].startswith("code")
            told = {"language": "en" if code else value["lang"], "category": "code" if code else "text"}
            for start in range(0, len(value["text"]), CHARACTERS):
                answer = value["text"][start : start + CHARACTERS]
                yield told, [{"role": "user", "content": f"{Path(path).name} {number}"}], answer
        elif value.get("response"):
            yield {k: value[k] for k in ("category", "language") if k in value}, value["messages"], value["response"]


def measure(options):
    """Wall seconds, CPU seconds and peak MiB of the largest process of one run."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    started, before = time.time(), resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", CALL, json.dumps(options)], check=True, env=environment)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"seconds": time.time() - started, "cpu_seconds": cpu, "largest_process_mib": after.ru_maxrss / 1024}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--jobs", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--output_dir", default="output/vocab")
    parser.add_argument("--results", default=str(ROOT / "docs" / "results"))
    args = parser.parse_args()
    started, out, results = time.time(), Path(args.output_dir), Path(args.results)
    shutil.rmtree(out, ignore_errors=True)
    rows = out / "rows.jsonl"
    with write_rows(rows) as file:
        for path in args.data:
            for told, messages, answer in rows_of(path):
                file.write(dump_row({**told, "messages": [*messages, {"role": "assistant", "content": answer}]}))
    runs = {}
    for jobs in args.jobs:
        folder = out / f"maps-{jobs}"
        options = {"inputs": [str(rows)], "model": args.model, "output_dir": str(folder), "jobs": jobs}
        runs[jobs] = measure(options)
    first = out / f"maps-{args.jobs[0]}"
    for jobs in args.jobs[1:]:
        for path in first.iterdir():
            assert path.read_bytes() == (out / f"maps-{jobs}" / path.name).read_bytes(), path.name
    target = out / "target"
    measure({"inputs": [str(rows)], "model": args.model, "output_dir": str(target), "coverage": 0.99})
    report = json.loads((first / "coverage.json").read_text())
    sizes = {m["name"]: m["size"] for m in json.loads((target / "coverage.json").read_text())["maps"]}
    megabytes = rows.stat().st_size / 1e6
    record = {"coverage": {k: report[k] for k in ("cells", "maps", "unions", "must_keep", "tokenizer_sha256")}}
    record |= {
        "sizes_for_99_percent": sizes,
        "megabytes": megabytes,
        "runs": runs,
        "provenance": {**provenance(), "seconds": round(time.time() - started, 1)},
    }
    record["provenance"]["command"] = [Path(word).name for word in sys.argv]
    write_json(record, results / "vocab.json")
    shutil.copyfile(first / "coverage.png", results / "vocab.png")
    text = page(record)
    (results / "vocab.md").write_text(text, encoding="utf-8")
    print(text)


def page(record):
    coverage = record["coverage"]
    cells = [cell for cell, n in coverage["cells"].items() if n["held_out_tokens"]]
    counted = sum(n["counted_tokens"] for n in coverage["cells"].values())
    held = sum(n["held_out_tokens"] for n in coverage["cells"].values())
    text = [
        "# Token maps: coverage\n",
        f"{counted:,} counted tokens, coverage on {held:,} others from held-out documents and prompts; "
        f"{record['megabytes']:.0f} MB of JSONL. Every map holds {coverage['must_keep']} special and basic "
        "tokens. Made by `benchmarks/vocab/coverage.py`; all numbers are in [vocab.json](vocab.json).\n",
        "![Coverage against size](vocab.png)\n",
        f"| map | ids | its own | {' | '.join(cells)} |",
        "|---|" + "---:|" * (2 + len(cells)),
    ]
    for m in coverage["maps"]:
        shares = [m["coverage_of_own"], *(m["coverage"][cell] for cell in cells)]
        text.append(f"| {m['name']} | {m['size']:,} | {' | '.join(f'{100 * share:.2f}%' for share in shares)} |")
    sizes = ", ".join(f"{name} {size:,}" for name, size in record["sizes_for_99_percent"].items())
    text += [
        f"\n`--coverage 0.99` takes {sizes} ids.\n",
        *(
            f"The maps of {u['size']:,} ids ({', '.join(u['names'])}) hold {u['ids']:,} different ids together.\n"
            for u in coverage["unions"]
        ),
        "The texts are natural ones and reference answers, not a model's: the shape of the curves is what they show. "
        "A map for serving is made from self-distilled responses.\n",
        "## Time and memory\n",
        "| processes | seconds | CPU seconds | MiB, largest process |",
        "|---:|---:|---:|---:|",
    ]
    for jobs, run in record["runs"].items():
        text.append(f"| {jobs} | {run['seconds']:.0f} | {run['cpu_seconds']:.0f} | {run['largest_process_mib']:.0f} |")
    text.append("\nThe maps are the same bytes whatever the number of processes. Starting one costs four seconds.")
    return "\n".join(text) + "\n"


if __name__ == "__main__":
    main()
