"""One stage's command as a process, which ends with us however we end.

A `fastmtp run` that is killed must not leave a training behind that goes on writing beside the one that is started
again. The command runs below `bench/watchdog.py`, as the servers of a benchmark do; the watchdog also inherits the
folder's lock, so the next run waits until everything of this one has ended.
"""

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ..bench.watched import STOP_SECONDS, give_order, start_watchdog
from ..errors import FastMTPError

LOOK_SECONDS = 0.1


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    status: int | None
    """None: its time was over."""
    seconds: float
    memory: int | None
    """Bytes of RAM that its largest process has held; None where that is not known."""


def run_command(
    words: Sequence[str],
    lock: int,
    environment: dict[str, str] | None = None,
    seconds: float | None = None,
    since: Path | None = None,
) -> Ended:
    """Run a command with our standard output and error.

    Args:
        lock: open file that is held until the command has ended.
        environment: variables beside ours.
        seconds: it is ended after so many.
        since: which are counted from when this file is there, so not while a model is loaded.

    Raises `FastMTPError` if it cannot be started.
    """
    # The commands that belong to this Python, as a virtual environment that is not activated has them.
    own = Path(sys.executable).parent
    path = os.pathsep.join([str(own), os.environ.get("PATH", os.defpath)])
    sys.stdout.flush()
    sys.stderr.flush()
    start = time.monotonic()
    outputs = [os.dup(1), os.dup(2)]
    try:
        process = start_watchdog([*outputs, lock])
    finally:
        for file in outputs:
            os.close(file)
    order = {
        "command": [str(word) for word in words],
        "environment": {**os.environ, "PATH": path, **(environment or {})},
        "outputs": outputs,
    }
    assert process.stdin is not None and process.stdout is not None
    memory = None
    try:
        if failure := give_order(process, order):
            raise FastMTPError(f"{words[0]}: cannot be started ({failure})")
        status = _wait(process, seconds, since)
    finally:
        # The end of the pipe is the end of the command.
        with suppress(OSError):
            process.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=3 * STOP_SECONDS)
            last = process.stdout.read().strip()
            memory = int(last) if last.isdigit() else None
        process.stdout.close()
    return Ended(status, time.monotonic() - start, memory)


def _wait(process: "subprocess.Popen[bytes]", seconds: float | None, since: Path | None) -> int | None:
    """The exit status; None if the time is over."""
    if seconds is None:
        return process.wait()
    deadline = None
    while deadline is None or time.monotonic() < deadline:
        if deadline is None and (since is None or since.exists()):
            deadline = time.monotonic() + seconds
        with suppress(subprocess.TimeoutExpired):
            return process.wait(timeout=LOOK_SECONDS)
    return None
