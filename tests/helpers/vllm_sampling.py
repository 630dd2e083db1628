"""Sampled answers by several vLLM engines, one after another in one process.

Run by vLLM's Python with `vllm_fix/` on PYTHONPATH:

    vllm_sampling.py JOB.json

A job has `folder`, a model; `prompt`, token ids; `sampling`, what SamplingParams takes; and `engines`, each with a
`name`, `draft_sample_method`, `temperatures`, `answers` (how many at each), and `fault`, a name in `FAULTS` or null.
The last line printed is JSON: name → temperature → [[tokens, drafts accepted in the first round, how often], ...].
"""

import json
import os
import sys
from collections import Counter

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

import torch
from vllm import LLM, SamplingParams
from vllm.utils import cpu_triton_utils

STEPS = 3


def accept_all(*arguments):
    """Verification that accepts every draft: the random number that each must stay below is 0."""
    before, uniform, after = arguments[:7], arguments[7], arguments[8:]
    verify(*before, torch.zeros_like(uniform), *after)


def recover_without_draft(output, ends, drafts, _, target, noise, vocab, block=None, *rest):
    """What replaces a rejected draft, drawn as if drafts were greedy: from p without the draft, not from p - q."""
    recover(output, ends, drafts, None, target, noise, vocab, block, True)


def verify_without_draft(output, ends, drafts, _, target, *rest):
    """Verification as if drafts were greedy: accepted with probability p, not p / q."""
    *between, _ = rest[:7]
    verify(output, ends, drafts, None, target, *between, None, True)


verify = cpu_triton_utils._rejection_random_sample_kernel_impl
recover = cpu_triton_utils._sample_recovered_tokens_kernel_impl
VERIFY, RECOVER = "_rejection_random_sample_kernel_impl", "_sample_recovered_tokens_kernel_impl"
# Faults of a verification, each as what stands in the place of vLLM's own kernels.
FAULTS = {
    None: {},
    "accepts all": {VERIFY: accept_all},
    "recovers without q": {RECOVER: recover_without_draft},
    "ignores q": {VERIFY: verify_without_draft, RECOVER: recover_without_draft},
}


def answers(engine, job, temperature, count):
    sampling = SamplingParams(n=count, temperature=temperature, **job["sampling"])
    (request,) = engine.generate([{"prompt_token_ids": job["prompt"]}], sampling, use_tqdm=False)
    seen = Counter()
    for answer in request.outputs:
        accepted = answer.spec_decode_metrics.per_step_accepted[0]
        seen[tuple(answer.token_ids), accepted] += 1
    return [[list(tokens), accepted, often] for (tokens, accepted), often in seen.items()]


def run(job, wanted):
    own = {VERIFY: verify, RECOVER: recover}
    for name, kernel in {**own, **FAULTS[wanted["fault"]]}.items():
        setattr(cpu_triton_utils, name, kernel)  # the engine registers them when it starts
    speculative = {"method": "mtp", "num_speculative_tokens": STEPS}
    engine = LLM(
        job["folder"],
        trust_remote_code=True,
        skip_tokenizer_init=True,
        dtype="float32",
        enforce_eager=True,
        max_model_len=64,
        max_num_seqs=256,
        kv_cache_memory_bytes=2**26,
        seed=1,
        speculative_config={**speculative, "draft_sample_method": wanted["draft_sample_method"]},
        per_request_spec_decode_metrics="detailed",
    )
    found = {t: answers(engine, job, t, wanted["answers"]) for t in wanted["temperatures"]}
    engine.llm_engine.engine_core.shutdown()
    return found


if __name__ == "__main__":
    with open(sys.argv[1]) as file:
        job = json.load(file)
    print("\n" + json.dumps({wanted["name"]: run(job, wanted) for wanted in job["engines"]}))
