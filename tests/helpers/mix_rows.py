"""Rows to mix: groups of known sizes, answers of known lengths."""

import json
import random

PLENTY = {"general": 300, "math": 150, "code": 120, "zh": 200}
CATEGORIES = {"general": ("qa", "en"), "math": ("math", "en"), "code": ("code", "en"), "zh": ("math", "zh-Hant")}


def answered(number, group, tokens, prompt=None):
    category, language = CATEGORIES[group]
    answer = {"role": "assistant", "content": "x", "token_ids": list(range(tokens))}
    asked = {"role": "user", "content": prompt or f"question {number}", "token_ids": [1]}
    return {"id": number, "category": category, "language": language, "messages": [asked, answer], "source": group}


def rows_of(counts, seed=0, tokens=(5, 60)):
    rng = random.Random(seed)
    groups = [g for g, n in counts.items() for _ in range(n)]
    return [answered(i, group, rng.randint(*tokens)) for i, group in enumerate(groups)]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)
