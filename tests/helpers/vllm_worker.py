"""Run by vLLM's own python, which has none of this project: jobs in, answers out, a line of JSON each.

Engines run inside this process one after another, so that vLLM is imported once. `vllm_jobs.py` is the other end and
says what a job is.
"""

import gc
import json
import os
import sys

# Answers go where stdout was; what vLLM and its kernels print goes to the log.
answers_to = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)

from vllm import LLM, SamplingParams  # noqa: E402 (it prints while it is imported)
from vllm.lora.request import LoRARequest  # noqa: E402


def run(job):
    """The answers of an engine to each of the job's questions, one after another."""
    options = dict(job["options"])
    if job["speculative"]:
        options["speculative_config"] = job["speculative"]
        options["per_request_spec_decode_metrics"] = "detailed"
    engine = LLM(job["folder"], **options)
    try:
        return [ask(engine, question, number) for number, question in enumerate(job["questions"], start=1)]
    finally:
        engine.llm_engine.engine_core.shutdown()
        del engine
        gc.collect()


def ask(engine, question, number):
    """The answers to prompts that are asked at once; `number` is of their adapter, if they have one."""
    prompts = [{"prompt_token_ids": ids} for ids in question["prompts"]]
    sampling = SamplingParams(**question["sampling"])
    lora = LoRARequest(str(number), number, question["lora"]) if question.get("lora") else None
    outputs = engine.generate(prompts, sampling, use_tqdm=False, lora_request=lora)
    return [answer_of(output) for output in outputs]


def answer_of(output):
    completion = output.outputs[0]
    answer = {"ids": list(completion.token_ids), "cached": output.num_cached_tokens}
    metrics = completion.spec_decode_metrics
    if metrics is not None:
        answer["accepted"] = metrics.per_step_accepted
        answer["drafted"] = metrics.per_step_drafted
    if completion.logprobs:
        chosen = zip(completion.token_ids, completion.logprobs, strict=True)
        answer["log_probabilities"] = [of_all[token].logprob for token, of_all in chosen]
    return answer


for line in sys.stdin:
    try:
        result = {"answers": run(json.loads(line))}
    except BaseException as error:
        result = {"error": f"{type(error).__name__}: {error}"}
        sys.excepthook(*sys.exc_info())
    answers_to.write(json.dumps(result) + "\n")
    answers_to.flush()
    if "error" in result:
        break  # what it left behind would be in the way of the next engine
