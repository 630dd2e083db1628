"""A server that the benchmark starts and stops itself.

It runs in a process group of its own, which ends with the benchmark however that ends: a normal exit, Ctrl-C, SIGTERM,
or kill -9 (on Linux the kernel then ends the server too).
"""

import ctypes
import os
import secrets
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from ..errors import FastMTPError
from .plan import Launch

_SET_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of linux/prctl.h
STOP_SECONDS = 30


class Started:
    """A running server: its address, and whether it still runs."""

    def __init__(self, name: str, url: str, process: subprocess.Popen[bytes], log: Path) -> None:
        self.name, self.url, self.process, self.log = name, url, process, log

    def check(self) -> None:
        """Raises `FastMTPError` with the server's last words if it has ended."""
        if (status := self.process.poll()) is not None:
            raise FastMTPError(
                f"{self.name}: the server ended with status {status} ({self.last_words()}); its log: {self.log}; what "
                "is finished is kept, start again to go on"
            )

    def last_words(self) -> str:
        """The last line of the log that says something, an exception's rather than a shell's."""
        lines = [line.strip() for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        telling = [line for line in lines if "Error" in line or "error:" in line]
        return (telling or lines or ["it said nothing"])[-1][:300]


def free_port() -> int:
    """A port that nobody listens on, below those that systems hand out themselves (from 32768 on Linux): a server binds
    its port only when its model is loaded, and by then one of those may be somebody's."""
    while True:
        port = 20000 + secrets.randbelow(12000)
        with socket.socket() as s:
            try:
                s.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port


@contextmanager
def started(name: str, launch: Launch, log: Path, start_seconds: float) -> Iterator[Started]:
    """The server of a plan, ready to answer. Its output goes to `log`.

    Raises `FastMTPError` if it cannot be started, ends, or is not ready after `start_seconds`.
    """
    port = str(free_port())
    words = [word.replace("{port}", port) for word in launch.command]
    if words == launch.command:
        words += ["--host", "127.0.0.1", "--port", port]
    environment = {**os.environ, **launch.environment}
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "ab") as file:
        file.write(f"$ {shlex.join(words)}\n".encode())
        file.flush()
        try:
            process = subprocess.Popen(
                words,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=_end_with_parent if sys.platform == "linux" else None,
            )
        except OSError as error:
            raise FastMTPError(f"{name}: cannot start {words[0]} ({error})") from None
    with _terminated_like_interrupted():
        try:
            server = Started(name, f"http://127.0.0.1:{port}", process, log)
            _wait(server, start_seconds)
            yield server
        finally:
            _stop(process)


def _wait(server: Started, start_seconds: float) -> None:
    deadline = time.monotonic() + start_seconds
    while True:
        try:
            with urllib.request.urlopen(f"{server.url}/health", timeout=5):
                return
        except OSError:
            server.check()
            if time.monotonic() > deadline:
                raise FastMTPError(
                    f"{server.name}: not ready after {start_seconds:.0f} s ({server.last_words()}); its log: "
                    f"{server.log}; wait longer with start_seconds"
                ) from None
            time.sleep(0.2)


def _stop(process: subprocess.Popen[bytes]) -> None:
    for how in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, how)
            process.wait(timeout=STOP_SECONDS)
        except (ProcessLookupError, PermissionError, subprocess.TimeoutExpired):
            continue


_libc = ctypes.CDLL(None) if sys.platform == "linux" else None


def _end_with_parent() -> None:
    if _libc is not None:
        _libc.prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGKILL)


@contextmanager
def _terminated_like_interrupted() -> Iterator[None]:
    """SIGTERM ends the benchmark as Ctrl-C does: with the server."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(signum: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
