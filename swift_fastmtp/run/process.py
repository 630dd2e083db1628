"""One stage's command as a process, which ends with us however we end.

A `fastmtp run` that is killed must not leave a training behind that goes on writing beside the one that is started
again. The command runs below `bench/watchdog.py`, as the servers of a benchmark do; the watchdog also inherits the
folder's lock, so the next run waits until everything of this one has ended.
"""

import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from ..bench.watched import STOP_SECONDS, give_order, start_watchdog
from ..errors import FastMTPError


def run_command(
    words: Sequence[str], lock: int, environment: dict[str, str] | None = None, seconds: float | None = None
) -> int | None:
    """Run a command with our standard output and error.

    Args:
        lock: open file that is held until the command has ended.
        environment: variables beside ours.
        seconds: it is ended after so many.

    Returns its exit status, None if it was ended. Raises `FastMTPError` if it cannot be started.
    """
    # The commands that belong to this Python, as a virtual environment that is not activated has them.
    own = Path(sys.executable).parent
    path = os.pathsep.join([str(own), os.environ.get("PATH", os.defpath)])
    sys.stdout.flush()
    sys.stderr.flush()
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
    try:
        if failure := give_order(process, order):
            raise FastMTPError(f"{words[0]}: cannot be started ({failure})")
        return process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        return None
    finally:
        # The end of the pipe is the end of the command.
        for pipe in (process.stdin, process.stdout):
            with suppress(OSError):
                pipe.close()
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=3 * STOP_SECONDS)
