"""Above temperature 0: predicted against served acceptance, for every regime that an engine has on a CPU.

    python benchmarks/serving/sampled.py

The tiny model with its own MTP layer, K = 3, answers to examples/prompts/eval.jsonl, sampled with top-k 20 and top-p
0.95. The real vLLM drafts and verifies as it does anywhere. SGLang's verification takes the branch of GPUs, its kernel
in Triton's interpreter (`tests/helpers/sglang_sampled`). Each is measured by `fastmtp bench`; what is predicted follows
from the answers that it gave. Writes docs/results/sampling.{md,json} after every server, and goes on where it was.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoTokenizer

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "benchmarks")]
from common import write_result  # noqa: E402
from helpers.engine import SampledServer, VLLMServer, engine_version, vllm_version  # noqa: E402
from helpers.paths import TINY  # noqa: E402
from helpers.sampled_bench import STEPS, ask, foretold, interval, tau, texts_of  # noqa: E402

from swift_fastmtp.files.provenance import provenance  # noqa: E402
from swift_fastmtp.method.verification import REGIMES  # noqa: E402
from swift_fastmtp.model.loading import load_model  # noqa: E402
from swift_fastmtp.serving.flags import command  # noqa: E402
from swift_fastmtp.serving.launch import serve_flags  # noqa: E402

QUESTIONS = ROOT / "examples/prompts/eval.jsonl"
SERVED = [("vllm", "greedy"), ("vllm", "rejection"), ("sglang", "rejection"), ("sglang", "block")]
SEEDED = ["--no-enable-chunked-prefill", "--max-num-batched-tokens", "8192"]  # docs/dev/upstream/vllm-seeded-chunks.md
TELLS = ["--per-request-spec-decode-metrics", "summary"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.6, 1.0])
    parser.add_argument("--max_new_tokens", type=int, default=48)
    parser.add_argument("--output", default=str(ROOT / "docs/results/sampling"))
    args = parser.parse_args()
    results = Path(args.output).with_suffix(".json")
    cells = json.loads(results.read_text())["cells"] if results.exists() else []
    done = {(x["engine"], x["regime"], x["temperature"]) for x in cells}
    model, tokenizer = load_model(TINY, torch.float32), AutoTokenizer.from_pretrained(TINY)
    for engine, regime in SERVED:
        left = [t for t in args.temperatures if (engine, regime, t) not in done]
        if not left:
            continue
        with tempfile.TemporaryDirectory() as name, serve(engine, regime, Path(name)) as server:
            for temperature in left:
                out = Path(name) / f"bench-{temperature}"
                url = f"http://127.0.0.1:{server.port}"
                answers = ask(url, TINY, QUESTIONS, temperature, args.max_new_tokens, out)
                cells.append(cell(model, tokenizer, engine, regime, temperature, answers))
                print(json.dumps(cells[-1]), flush=True)
        engines = {"sglang": engine_version(), "vllm": vllm_version()}
        record = {"cells": cells, "engines": engines, "provenance": provenance()}
        write_result(record, page(record), args.output)


def serve(engine, regime, work):
    if engine == "vllm":
        flags = serve_flags(TINY, "vllm", STEPS, temperature=1.0, regime=regime)
        fixed = {"PYTHONPATH": str(ROOT / "tests/helpers/vllm_fix")}
        return VLLMServer([*command(flags), *SEEDED, *TELLS], work / "log", fixed)
    flags = serve_flags(TINY, "sglang", STEPS, temperature=1.0, regime="rejection")
    return SampledServer(command(flags), work, block=regime == "block")


def cell(model, tokenizer, engine, regime, temperature, answers):
    texts = texts_of(model, tokenizer, QUESTIONS, answers, temperature)
    served = [(accepted + rounds, rounds) for *_, accepted, rounds in answers]
    of_regimes = foretold(model, texts, engine, temperature)
    return {
        "engine": engine,
        "regime": regime,
        "temperature": temperature,
        "answers": len(answers),
        "rounds": sum(rounds for _, rounds in served),
        "served": tau(served),
        "served_interval": interval(served),
        "predicted": tau(of_regimes[regime]),
        "difference_interval": interval(served, of_regimes[regime]),
        "of_all_regimes": {name: tau(of) for name, of in of_regimes.items()},
    }


def page(record):
    engines, names = record["engines"], {"vllm": "vLLM", "sglang": "SGLang"}
    lines = [
        "# Above temperature 0: predicted and served",
        "",
        f"The tiny model with its own MTP layer, K = {STEPS}, answers to `examples/prompts/eval.jsonl`, top-k 20, "
        f"top-p 0.95, up to 48 tokens, by `fastmtp bench`. vLLM {engines['vllm']} as it is on a CPU, but for [one fix]"
        f"(../dev/upstream/vllm-expand-kernel.md); SGLang {engines['sglang']} on a CPU with the verification of GPUs, "
        "its kernel in Triton's interpreter. τ is tokens per verification step; predicted from the same answers. "
        "Intervals are 95 %, over answers; that of the difference is of served minus predicted on the same answers. "
        "Made by `benchmarks/serving/sampled.py`.",
        "",
        "| T | engine | regime | answers | rounds | served τ | predicted τ | served − predicted |",
        "|---:|---|---|---:|---:|---:|---:|---:|",
    ]
    for x in sorted(record["cells"], key=lambda x: x["temperature"]):
        low, high = x["served_interval"]
        below, above = x["difference_interval"]
        lines.append(
            f"| {x['temperature']:g} | {names[x['engine']]} | {REGIMES[x['regime']].title} | {x['answers']} | "
            f"{x['rounds']:,} | {x['served']:.2f} [{low:.2f}, {high:.2f}] | {x['predicted']:.2f} | "
            f"{x['served'] - x['predicted']:+.2f} [{below:+.2f}, {above:+.2f}] |"
        )
    lines += [
        "",
        "What the same answers foretell for all regimes: they are other answers for each server, of the same model, "
        "and vLLM gives MiMo's layer [another state](../engines.md) than SGLang.",
        "",
        "| T | engine | answers of | greedy | rejection | block |",
        "|---:|---|---|---:|---:|---:|",
    ]
    for x in sorted(record["cells"], key=lambda x: x["temperature"]):
        taus = " | ".join(f"{x['of_all_regimes'][name]:.2f}" for name in REGIMES)
        lines.append(f"| {x['temperature']:g} | {names[x['engine']]} | {x['regime']} | {taus} |")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    main()
