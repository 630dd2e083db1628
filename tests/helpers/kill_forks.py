"""Runs commands that are to be killed, each in a fork of a process that has imported what they need.

`Forks().start(words)` starts `fastmtp WORDS`, or for `sft` ms-swift's script. It is a real process of its own, with the
imports done: a kill meets the work, not the imports.

As a script it is the process that forks: a line on stdin is {"words": [...], "folder": for the output}, the answer is
the process id; another line, and the answer is its exit status, when it has ended.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from tqdm import tqdm


class Forks:
    """The process that forks."""

    def __init__(self):
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self._process = subprocess.Popen([sys.executable, __file__], env=environment, **pipes)
        self._folder = tempfile.TemporaryDirectory()

    def start(self, words):
        words = [str(word) for word in words]
        self._process.stdin.write(json.dumps({"words": words, "folder": self._folder.name}) + "\n")
        self._process.stdin.flush()
        return Run(int(self._process.stdout.readline()), self._process, Path(self._folder.name))

    def close(self):
        self._process.stdin.close()
        self._process.wait()
        self._folder.cleanup()


class Run:
    """One command. It must be waited for before the next is started."""

    def __init__(self, pid, forks, folder):
        self.pid = pid
        self._forks = forks
        self._folder = folder

    def lives(self):
        return Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"

    def kill(self):
        os.kill(self.pid, signal.SIGKILL)  # until it is waited for, nobody else has its id

    def wait(self):
        """Exit status, negative if it was killed, and what it wrote."""
        self._forks.stdin.write("\n")
        self._forks.stdin.flush()
        status = int(self._forks.stdout.readline())
        return status, (self._folder / "output").read_text(encoding="utf-8", errors="replace")

    def kill_when(self, happened, delay, deadline=120.0):
        """Kill it `delay` seconds after `happened()`, unless it ends before."""
        end = time.monotonic() + deadline
        while not happened() and self.lives():
            assert time.monotonic() < end
            time.sleep(0.0002)
        until = time.monotonic() + delay
        while time.monotonic() < until and self.lives():
            time.sleep(0.0002)
        self.kill()
        return self.wait()


def _run(words):
    if words[0] != "sft":
        from swift_fastmtp.cli import main

        main(words)
        return
    import runpy
    from sysconfig import get_path

    script = str(Path(get_path("purelib"), "swift/cli/sft.py"))
    sys.argv = [script, *words[1:]]
    runpy.run_path(script, run_name="__main__")


def _child(words, folder):
    output = os.open(Path(folder, "output"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    # tqdm's own lock is a semaphore that forks share: one killed while it holds it would stop all later ones.
    tqdm.set_lock(threading.RLock())
    status = 0
    try:
        _run(words)
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _serve():
    import contextlib
    import importlib

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what imports print is no answer
    for name in (
        *("swift.pipelines.train.sft", "swift.callbacks", "swift.loss_scale", "swift.optimizers"),
        *("swift_fastmtp.swift_plugin.register", "swift_fastmtp.export.graft", "swift_fastmtp.export.folders"),
        *("swift_fastmtp.data.clean", "swift_fastmtp.data.mix", "swift_fastmtp.data.distill"),
        *("matplotlib.style", "matplotlib.backends.backend_agg", "jinja2", "tabulate"),
        *("swift_fastmtp.vocab.build", "swift_fastmtp.simulate.simulate", "swift_fastmtp.simulate.plots"),
    ):
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    for line in sys.stdin:
        job = json.loads(line)
        child = os.fork()
        if not child:
            _child(job["words"], job["folder"])
        print(child, file=answers, flush=True)
        sys.stdin.readline()
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), file=answers, flush=True)


if __name__ == "__main__":
    _serve()
