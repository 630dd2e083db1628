"""A real SGLang HTTP server on a CPU, started and stopped by a test.

Stock SGLang from the environment that `setup_engine.sh` makes; `stand_in/` on PYTHONPATH takes the place of the
GPU-only packages. The server listens on 127.0.0.1 and ends with its own process group.
"""

import importlib.util
import json
import os
import re
import signal
import subprocess
import time
import urllib.request
from contextlib import ExitStack, contextmanager
from pathlib import Path

import yaml

from helpers import swift_runs
from helpers.paths import ROOT
from swift_fastmtp.bench.servers import free_port

SERVING = ROOT / "tests" / "serving"
START_SECONDS = 180
# Versions of SGLang that the stand-in was tried with.
TRIED = ("0.5.19", "0.5.20", "0.5.21", "0.5.22", "0.5.23")
UNTRIED = (
    "SGLang {version} is not among the versions the CPU stand-in was tried with ({tried}). Run "
    "`SGLANG_VERSION={version} pytest -m '' tests/serving`. If a server does not start, its log names the missing "
    "operation: add it to tests/serving/stand_in/sgl_kernel after SGLang's call site. When all other tests pass, add "
    "the version to TRIED in tests/helpers/engine.py and to docs/serving-on-cpu.md."
)

# Small, deterministic, and fp32, so that acceptance can be compared number by number.
_PLAN = yaml.safe_load((SERVING / "cpu_plan.yaml").read_text())
CPU_FLAGS = ["--host", "127.0.0.1", *_PLAN["flags"]]
ENVIRONMENT = {**_PLAN["environment"], "PYTHONPATH": str(SERVING / "stand_in"), "HF_HUB_OFFLINE": "1"}


def engine_folder(script="setup_engine.sh") -> str:
    """An engine's environment, which is made on first use."""
    done = subprocess.run(["bash", SERVING / script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{script} failed:\n{done.stderr[-3000:]}"
    return done.stdout.strip()


def engine_python() -> str:
    return f"{engine_folder()}/bin/python"


def engine_version() -> str:
    code = "from importlib.metadata import version; print(version('sglang'))"
    return subprocess.run([engine_python(), "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def vllm_version() -> str:
    """The one that `setup_vllm.sh` pins: looking at the environment would make it."""
    return re.search(r"^vllm=(\S+)", (SERVING / "setup_vllm.sh").read_text(), re.M)[1]


class Server:
    """`with Server(command) as server:` where `command` is `python -m sglang.launch_server ...`."""

    environment = ENVIRONMENT

    def __init__(self, command, log, environment=None):
        self.log = Path(log)
        self.added = environment or {}
        self.port = free_port()
        self.command = [*self.words(command), "--port", str(self.port)]

    def words(self, command):
        return [engine_python(), "-W", "ignore", *command[1:], *CPU_FLAGS]

    def __enter__(self):
        assert swift_runs.allowed, "a test that starts a server is marked `engine` or `matrix`"
        paths = [self.environment.get("PYTHONPATH"), self.added.get("PYTHONPATH")]
        path = os.pathsep.join(filter(None, paths))
        environment = {**os.environ, **self.added, **self.environment, "PYTHONPATH": path}
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                self.command, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5):
                    return self
            except OSError:
                if self.process.poll() is not None or time.monotonic() > deadline:
                    self.__exit__()
                    raise AssertionError(f"{' '.join(self.command)}\n{self.tail()}") from None
                time.sleep(0.2)

    def __exit__(self, *_):
        for how in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(self.process.pid, how)
                self.process.wait(timeout=20)
            except (ProcessLookupError, subprocess.TimeoutExpired):
                continue

    def tail(self):
        return self.log.read_text(errors="replace")[-6000:]

    @contextmanager
    def busy(self, model, prompts, tokens):
        """Meanwhile the server writes on: one long answer per prompt (lists of token ids), each begun before this
        yields and given up afterwards."""
        with ExitStack() as answers:
            for prompt in prompts:
                fields = {"model": model, "prompt": prompt, "max_tokens": tokens, "ignore_eos": True, "stream": True}
                request = urllib.request.Request(
                    f"http://127.0.0.1:{self.port}/v1/completions",
                    data=json.dumps(fields).encode(),
                    headers={"Content-Type": "application/json"},
                )
                answer = answers.enter_context(urllib.request.urlopen(request, timeout=300))
                assert answer.readline().startswith(b"data:")
            yield

    def generate(self, prompts, max_new_tokens, temperature=0.0, **fields):
        """One answer per prompt (lists of token ids): SGLang's own records with `output_ids` and `meta_info`.

        `max_new_tokens` may be a list, one number per prompt; `fields` are other fields of the request.
        """
        lengths = max_new_tokens if isinstance(max_new_tokens, list) else [max_new_tokens] * len(prompts)
        sampling = [{"temperature": temperature, "max_new_tokens": n} for n in lengths]
        body = json.dumps({"input_ids": prompts, "sampling_params": sampling, **fields}).encode()
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/generate", data=body, headers={"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=300) as response:
            return json.load(response)


class HalfServer(Server):
    """In bfloat16: SGLang computes FP8 in 16 bits only."""

    def words(self, command):
        return [*super().words(command), "--dtype", "bfloat16"]


class SampledServer(Server):
    """With the verification of sampled drafts that SGLang has on GPUs (`sglang_sampled/`), and Triton's interpreter in
    the place of the stand-in for Triton.

    Draws are torch's: by itself SGLang draws with one more kernel, which takes a tenth of a second a token there.

    Args:
        work: an empty folder, for the log too.
        block: verify as with `--speculative-use-block-verification`, which SGLang refuses without a GPU.
    """

    def __init__(self, command, work, environment=None, block=False):
        (work / "modules").mkdir()
        triton = importlib.util.find_spec("triton").origin
        (work / "modules/triton").symlink_to(Path(triton).parent)
        before = [str(work / "modules"), ENVIRONMENT["PYTHONPATH"], str(ROOT / "tests/helpers/sglang_sampled")]
        own = {
            "TRITON_INTERPRET": "1",
            "SGLANG_OPT_USE_GUMBEL_SAMPLE": "0",
            "SGLANG_BLOCK_VERIFICATION": str(int(block)),
        }
        self.environment = {**ENVIRONMENT, **own, "PYTHONPATH": os.pathsep.join(before)}
        super().__init__(command, work / "log", environment)

    def words(self, command):
        return [*super().words(command), "--max-running-requests", "50"]


VLLM_ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_INT4_W4A8": "0",  # some CPUs' kernels would quantize activations too
    "VLLM_HOST_IP": "127.0.0.1",  # else its processes listen at the machine's address
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
}


class VLLMServer(Server):
    """`with VLLMServer(command) as server:` where `command` is `vllm serve ...`. Stock vLLM has a CPU version of every
    kernel: nothing is stood in for."""

    environment = VLLM_ENVIRONMENT

    def words(self, command):
        flags = ["--dtype", "float32", "--enforce-eager", "--max-model-len", "1024", "--max-num-seqs", "32"]
        vllm = f"{engine_folder('setup_vllm.sh')}/bin/{command[0]}"
        return [vllm, *command[1:], "--host", "127.0.0.1", *flags]

    def complete(self, model, prompt, max_tokens):
        """The answer to a prompt of token ids, and the drafts accepted in each round; None without speculation."""
        fields = {"model": model, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0}
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/v1/completions",
            data=json.dumps({**fields, "return_token_ids": True}).encode(),
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=300) as response:
            answer = json.load(response)
        speculative = (answer.get("metrics") or {}).get("speculative_decoding")
        return answer["choices"][0]["token_ids"], speculative and speculative["per_step_accepted"]
