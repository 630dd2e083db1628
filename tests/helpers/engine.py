"""A real SGLang HTTP server on a CPU, started and stopped by a test.

Stock SGLang from the environment that `setup_engine.sh` makes; `stand_in/` on PYTHONPATH takes the place of the
GPU-only packages. The server listens on 127.0.0.1 and ends with its own process group.
"""

import json
import os
import signal
import subprocess
import time
import urllib.request
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


def engine_python() -> str:
    """Python of the engine's environment, which is made on first use."""
    done = subprocess.run(["bash", SERVING / "setup_engine.sh"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"setup_engine.sh failed:\n{done.stderr[-3000:]}"
    return f"{done.stdout.strip()}/bin/python"


def engine_version() -> str:
    code = "from importlib.metadata import version; print(version('sglang'))"
    return subprocess.run([engine_python(), "-c", code], capture_output=True, text=True, check=True).stdout.strip()


class Server:
    """`with Server(command) as server:` where `command` is `python -m sglang.launch_server ...`."""

    def __init__(self, command, log, environment=None):
        self.log = Path(log)
        self.environment = environment or {}
        self.port = free_port()
        self.command = [engine_python(), "-W", "ignore", *command[1:], *CPU_FLAGS, "--port", str(self.port)]

    def __enter__(self):
        assert swift_runs.allowed, "a test that starts a server is marked `engine` or `matrix`"
        paths = [ENVIRONMENT["PYTHONPATH"], *filter(None, [self.environment.get("PYTHONPATH")])]
        environment = {**os.environ, **self.environment, **ENVIRONMENT, "PYTHONPATH": os.pathsep.join(paths)}
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
