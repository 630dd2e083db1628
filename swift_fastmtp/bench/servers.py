"""A server that the benchmark starts and stops itself.

It ends, with everything that it started, when the benchmark ends, however that ends: a normal exit, Ctrl-C, SIGTERM, a
closed terminal, kill -9. That is `watchdog.py`'s work, the process between the two.
"""

import os
import secrets
import shlex
import signal
import socket
import subprocess
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from ..errors import FastMTPError, cannot_write
from ..redaction import hide, hide_of_command, is_secret_name, known_secrets, redact
from .plan import Launch
from .watched import STOP_SECONDS, give_order, start_watchdog

_LAST_BYTES = 2**16
"""Of a log, in which its last line is looked for."""


class Started:
    """A running server: its address, and whether it still runs."""

    def __init__(self, name: str, url: str, process: subprocess.Popen[bytes], log: Path) -> None:
        self.name, self.url, self.process, self.log = name, url, process, log

    def check(self) -> None:
        """Raises `FastMTPError` with the last line of the server's log if it has ended."""
        if (status := self.process.poll()) is not None:
            raise FastMTPError(
                f"{self.name}: the server ended with status {status} ({self.last_line()}); its log: {self.log}; what "
                "is finished is kept, start again to go on"
            )

    def last_line(self) -> str:
        """The last line of the log that says something, an exception's rather than a shell's."""
        with open(self.log, "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _LAST_BYTES))
            text = file.read().decode(errors="replace")
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        telling = [line for line in lines if "Error" in line or "error:" in line]
        return redact((telling or lines or ["it printed nothing"])[-1])[:300]


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
    # The command, and as people may see it: without keys, in the log and in errors.
    port = str(free_port())
    words = [word.replace("{port}", port) for word in launch.command]
    shown = [word.replace("{port}", port) for word in launch.shown_command]
    if words == launch.command:
        added = ["--host", "127.0.0.1", "--port", port]
        words, shown = [*words, *added], [*shown, *added]
    hide_of_command(launch.command)
    for variable, value in launch.environment.items():
        if is_secret_name(variable):
            hide(value)

    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "ab") as file:
            file.write(f"$ {shlex.join(shown)}\n".encode(errors="replace"))
    except OSError as error:
        raise cannot_write(log, error) from None

    # The watchdog starts the server and ends it when this process ends, however it does.
    order = {
        "command": words,
        "environment": {**os.environ, **launch.environment},
        "log": str(log.absolute()),
        "hidden": known_secrets(),
    }
    process = start_watchdog()
    with _terminated_like_interrupted():
        try:
            if failure := give_order(process, order):
                raise FastMTPError(f"{name}: cannot start {shown[0]} ({failure})")
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
                    f"{server.name}: not ready after {start_seconds:.0f} s ({server.last_line()}); its log: "
                    f"{server.log}; wait longer with start_seconds"
                ) from None
            time.sleep(0.2)


def _stop(process: subprocess.Popen[bytes]) -> None:
    """The watchdog ends the server as soon as the pipe is closed; one that has lost its mind is left behind."""
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with suppress(OSError):
                pipe.close()
    with suppress(subprocess.TimeoutExpired):
        process.wait(timeout=3 * STOP_SECONDS)


@contextmanager
def _terminated_like_interrupted() -> Iterator[None]:
    """SIGTERM and SIGHUP (the terminal is closed) end the benchmark as Ctrl-C does: with the server. Where they are
    ignored, as under `nohup`, they still are."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(signum: int, frame: FrameType | None) -> None:  # noqa: ARG001 (the caller's interface)
        raise KeyboardInterrupt

    before = {}
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            before[number] = signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
