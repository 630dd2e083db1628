"""How many of the next tokens a request's ids hold, beside static maps of as many ids, in several languages.

This bounds tau from above, and is not tau: a draft cannot be accepted where the set lacks the token, and may be wrong
where it holds it.
"""

import hashlib
import json
import lzma
import random
import re
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
from context_sets import base_of, first_places, mean_sizes, ranking

CHARACTERS = 8000
"""Of a document, which is cut into texts of so many."""
PROMPT_TOKENS = 256
"""Of a document that stand for the prompt; what follows stands for the answer."""
ANSWER_TOKENS = 1024
HELD_OUT = 10
"""One prompt or document in so many is measured on, by its hash; the others are counted."""
MOST = 400
"""Texts of a cell that are measured on."""
WITH_A_TEXT = ("rag", "summarization", "zh_rag")


class Sample(NamedTuple):
    """Token ids, and where the answer begins and ends."""

    ids: list
    start: int
    end: int


def coverage(model, data, translated, sizes):
    """Per cell, as `en, answers`: coverage by size and form, mean sizes being equal.

    Args:
        model: a folder with tokenizer.json.
        data: files of JSONL, or of `.jsonl.xz`: with `messages` and `response`, or documents with `text` and `lang`.
        translated: language -> a folder with gettext's .po files, each of which is a document.
    """
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(Path(model) / "tokenizer.json"))
    V = len(tokenizer)
    counts, measured = defaultdict(lambda: np.zeros(V, dtype=np.int64)), defaultdict(list)
    sources = [_pieces(path) for path in data]
    sources += [_translations(language, folder) for language, folder in translated.items()]
    for source in sources:
        for part in _in_parts(source, 512):
            _take(part, tokenizer, counts, measured)
    languages = sorted(counts)
    by_language = {name: ranking([counts[name]]) for name in languages}
    mixed = ranking([counts[name] for name in languages])
    cells = {}
    for cell, samples in sorted(measured.items()):
        samples = random.Random(0).sample(samples, min(MOST, len(samples)))
        own = by_language[cell.split(",")[0]]
        forms = {}
        for name, (_, rank_V) in (("own", own), ("mixed", mixed)):
            forms |= {f"{form}, {name}": found for form, found in of_texts(samples, rank_V, sizes).items()}
        tokens = sum(sample.end - sample.start - 1 for sample in samples)
        prompts = sum(sample.start for sample in samples) / len(samples)
        cells[cell] = {"texts": len(samples), "tokens": tokens, "mean_prompt": round(prompts), "forms": forms}
    counted = {name: int(counts[name].sum()) for name in languages}
    return {"vocabulary": V, "counted_tokens": counted, "sizes": sizes, "cells": cells}


def _pieces(path):
    """(language, kind, prompt or None, text, whether it is measured on) of a file."""
    opener = lzma.open if str(path).endswith(".xz") else open
    with opener(path, "rt", encoding="utf-8") as file:
        for line in file:
            value = json.loads(line)
            if "text" in value:
                language = value["lang"].split("-")[0]
                yield from _document(language if language in ("en", "zh") else "code", value["text"])
            elif value.get("response"):
                prompt = "\n".join(message["content"] for message in value["messages"])
                language = "code" if value["category"] == "code" else value["language"].split("-")[0]
                kind = "answers from a text" if value["category"] in WITH_A_TEXT else "answers"
                yield language, kind, prompt, value["response"], _held_out(prompt)


def _document(language, text):
    held = _held_out(text[:CHARACTERS])
    for start in range(0, len(text), CHARACTERS):
        yield language, "documents", None, text[start : start + CHARACTERS], held


def _translations(language, folder):
    """As `_pieces`, of a folder of .po files: what is translated in each, in its order."""
    for path in sorted(Path(folder).rglob("*.po")):
        text = "\n\n".join(_messages(path.read_text(encoding="utf-8")))
        if text:
            yield from _document(language, text)


def _messages(text):
    """The `msgstr` of every entry but the header, which is that of an empty `msgid`."""
    for entry in re.split(r"\n\s*\n", text):
        found = {"msgid": [], "msgstr": []}
        key = None
        for line in entry.splitlines():
            name, _, rest = line.partition(" ")
            if name in found:
                key, line = name, rest
            elif not line.startswith('"'):
                key = None
            if key and len(line) > 1:
                found[key].append(re.sub(r"\\(.)", _unescaped, line[1:-1]))
        if any(found["msgid"]) and any(found["msgstr"]):
            yield "".join(found["msgstr"])


def _unescaped(match):
    return {"n": "\n", "t": "\t"}.get(match[1], match[1])


def _held_out(text):
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % HELD_OUT == 0


def _in_parts(pieces, number):
    part = []
    for piece in pieces:
        part.append(piece)
        if len(part) == number:
            yield part
            part = []
    if part:
        yield part


def _take(part, tokenizer, counts, measured):
    """Count texts, or keep those that are measured on."""
    answers = tokenizer([text for _, _, _, text, _ in part], add_special_tokens=False)["input_ids"]
    for (language, kind, prompt, _, held), ids in zip(part, answers, strict=True):
        if not held:
            seen, times = np.unique(np.array(ids, dtype=np.int64), return_counts=True)
            counts[language][seen] += times
            continue
        if prompt is None:
            start = PROMPT_TOKENS
        else:
            before = tokenizer.encode(prompt, add_special_tokens=False)
            start, ids = len(before), [*before, *ids]
        end = min(len(ids), start + ANSWER_TOKENS)
        if end - start > 1:
            measured[f"{language}, {kind}"].append(Sample(ids[:end], start, end))


def of_texts(samples, rank_V, sizes):
    """Coverage by size of static maps, and of bases with the ids of the request that hold as many in the mean."""
    ranks, known = [], []
    for sample in samples:
        ids = np.asarray(sample.ids[: sample.end])
        distinct, first = first_places(ids)
        first_V = dict(zip(distinct.tolist(), first.tolist(), strict=True))
        # The answer's first token comes from the prefill, and is not drafted.
        for place in range(sample.start + 1, sample.end):
            known.append(first_V[int(ids[place])] < place)
        ranks.append(rank_V[ids[sample.start + 1 :]])
    rank_N, known_N = np.concatenate(ranks), np.array(known)
    held = mean_sizes(samples, rank_V)
    found = {"static": {}, "context": {}, "base": {}}
    for size in sizes:
        found["static"][size] = round(float((rank_N < size).mean()), 4)
        base = base_of(size, held)
        found["base"][size] = base
        found["context"][size] = None if base is None else round(float(((rank_N < base) | known_N).mean()), 4)
    found["context alone"] = {"ids": round(float(held[0])), "coverage": round(float(known_N.mean()), 4)}
    found["static for 99 %"] = int(np.quantile(rank_N, 0.99, method="higher")) + 1
    return found
