"""Stock vLLM engines on a CPU without servers: one process of vLLM's python that runs an engine after another.

A server takes three processes that import vLLM one after another, a test of many settings one for each setting; here
vLLM is imported once (`vllm_worker.py`). The engine is the same, its scheduler too: `VLLM_ENABLE_V1_MULTIPROCESSING=0`
is vLLM's own switch for running it in the caller's process.
"""

import json
import os
import subprocess
import threading
from pathlib import Path
from typing import NamedTuple

from helpers import swift_runs
from helpers.engine import VLLM_ENVIRONMENT, engine_folder

WORKER = Path(__file__).with_name("vllm_worker.py")
JOB_SECONDS = 600
# Small, deterministic, and float32, so that acceptance can be compared number by number.
OPTIONS = {
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 1024,
    "max_num_seqs": 32,
    "enable_prefix_caching": False,
    "kv_cache_memory_bytes": 64 << 20,
}


class Answer(NamedTuple):
    """vLLM's answer to a prompt."""

    ids: list[int]
    cached: int
    """Tokens of the prompt that came from the prefix cache."""
    accepted: list[int] | None = None
    """Drafts accepted in each round; None without speculation."""
    drafted: list[int] | None = None
    """Drafts made in each round."""
    log_probabilities: list[float] | None = None
    """Of `ids`; where `logprobs` was asked for."""


class EngineError(Exception):
    """What vLLM raised."""


class VLLMJobs:
    """`with VLLMJobs(log) as vllm: vllm.run(folder, [prompts], max_tokens=24, steps=3)`."""

    def __init__(self, log):
        self.log = Path(log)
        self.process = None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._stop()

    def run(
        self,
        folder,
        questions,
        max_tokens,
        steps=None,
        *,
        draft=None,
        sampling=None,
        speculative=None,
        loras=None,
        **options,
    ):
        """An engine's answers, one list of `Answer` for each of `questions`.

        Args:
            folder: that the engine serves
            questions: lists of prompts, each a list of token ids; those of a list are asked at once, greedily
            steps: drafts per round; None: no speculation
            draft: folder of the MTP layer alone
            sampling: further fields of vLLM's `SamplingParams`
            speculative: further keys of `--speculative-config`
            loras: for each of the questions, the folder of the LoRA adapter that it is asked with, or None
            options: further arguments of vLLM's `LLM`, which are the flags of `vllm serve`

        Raises `EngineError` for what vLLM raises; the next job starts a new process.
        """
        config = None
        if steps:
            config = {"method": "mtp", "num_speculative_tokens": steps, **(speculative or {})}
            if draft:
                config["model"] = str(draft)
        sampling = {"temperature": 0, "max_tokens": max_tokens, **(sampling or {})}
        asked = []
        for prompts, lora in zip(questions, loras or [None] * len(questions), strict=True):
            asked.append({"prompts": prompts, "sampling": sampling, "lora": lora})
        job = {
            "folder": str(folder),
            "speculative": config,
            "options": {**OPTIONS, **options},
            "questions": asked,
        }
        result = self._send(job)
        if "error" in result:
            self._stop()
            raise EngineError(result["error"])
        answers = []
        for question in result["answers"]:
            answers.append([Answer(**answer) for answer in question])
        return answers

    def _send(self, job):
        if self.process is None:
            self._start()
        watchdog = threading.Timer(JOB_SECONDS, self.process.kill)
        watchdog.start()
        try:
            self.process.stdin.write(json.dumps(job) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        finally:
            watchdog.cancel()
        if not line:
            self._stop()
            raise AssertionError(f"vLLM's process ended:\n{self.log.read_text(errors='replace')[-6000:]}")
        return json.loads(line)

    def _start(self):
        assert swift_runs.allowed, "a test that starts an engine is marked `engine` or `matrix`"
        environment = {**os.environ, **VLLM_ENVIRONMENT, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
        environment.pop("PYTHONPATH", None)  # of this project's environment
        environment["VLLM_LOGGING_LEVEL"] = "WARNING"
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                [f"{engine_folder('setup_vllm.sh')}/bin/python", str(WORKER)],
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )

    def _stop(self):
        if self.process is not None:
            self.process.kill()
            self.process.communicate()
            self.process = None
