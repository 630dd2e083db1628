"""`fastmtp bench` of a real server above temperature 0, beside what the simulator foretells of the answers it gave.

A text that was drawn from the model says by itself how often each regime accepts (`method.verification`), so served and
foretold counts are of the same answers, and differ by the luck of single drafts only.
"""

import json

import torch

from swift_fastmtp.bench.bench import bench
from swift_fastmtp.data.chat_template import encode_prompt
from swift_fastmtp.data.generate import generate
from swift_fastmtp.files.rows import read_rows
from swift_fastmtp.method.config import FastMTPConfig
from swift_fastmtp.method.metrics import expected_rounds
from swift_fastmtp.method.verification import block_acceptance, rejection_acceptance
from swift_fastmtp.simulate.acceptance import Text, greedy_acceptance, likelihood_ratios

STEPS = 3
TOP_K, TOP_P = 20, 0.95
SAMPLES = 2000


def ask(url, folder, questions, temperature, tokens, out):
    """The served answers: (prompt's id, output ids, drafts accepted, rounds)."""
    asked = {"model": str(folder), "tasks": [f"questions={questions}"], "temperatures": [temperature]}
    asked |= {"max_new_tokens": tokens, "concurrency": [16], "rounds": 1, "warmup": 0, "top_k": TOP_K, "top_p": TOP_P}
    bench(str(out), base_urls=[f"tuned={url}"], **asked)
    records = map(json.loads, (out / "requests.jsonl").read_text().splitlines())
    answers = [r for r in records if "counters" not in r]
    return [(r["id"], r["output_ids"], r["accepted"], r["steps"]) for r in answers if r["completion_tokens"] > 1]


def texts_of(model, tokenizer, questions, answers, temperature):
    """The answers as texts, with tokens that would have followed them: a server drafts past an answer's end."""
    prompts = {row["id"]: encode_prompt(tokenizer, row["messages"]) for row in read_rows(questions)}
    whole = [prompts[id] + output for id, output, *_ in answers]
    torch.manual_seed(0)
    beyond = generate(model, tokenizer, whole, STEPS, temperature, TOP_K, TOP_P, stop=False)
    return [
        Text([*ids, *after.token_ids], len(prompts[id]), len(ids))
        for ids, after, (id, *_) in zip(whole, beyond, answers, strict=True)
    ]


def foretold(model, texts, engine, temperature):
    """Per regime and text: (tokens, rounds) that a server needs on average."""
    model.fastmtp = FastMTPConfig(num_speculative_steps=STEPS, engine=engine)
    given = (model, texts, 0, 16)
    (greedy,) = greedy_acceptance(*given)
    (ratios,) = likelihood_ratios(*given, temperature, top_k=TOP_K, top_p=TOP_P)
    accepted = {
        "greedy": greedy,
        "rejection": list(map(rejection_acceptance, ratios)),
        "block": list(map(block_acceptance, ratios)),
    }
    return {regime: [expected_rounds(of_text, STEPS) for of_text in of] for regime, of in accepted.items()}


def tau(counts):
    """Of (tokens, rounds) of answers."""
    tokens, rounds = torch.tensor(counts, dtype=torch.float64).sum(0)
    return float(tokens / rounds)


def interval(*of_answers):
    """The 95 % interval of the micro tau of answers, or of the difference between two ways to count the same answers,
    by a bootstrap over answers."""
    generator = torch.Generator().manual_seed(0)
    N = len(of_answers[0])
    chosen = torch.randint(N, (SAMPLES, N), generator=generator)
    taus = []
    for counts in of_answers:
        tokens, rounds = torch.tensor(counts, dtype=torch.float64)[chosen].sum(1).unbind(-1)
        taus.append(tokens / rounds)
    values = taus[0] - taus[1] if len(taus) == 2 else taus[0]
    return values.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
