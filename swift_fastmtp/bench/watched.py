"""Start `watchdog.py`, which starts a command and ends it with everything below it when we end, however we do."""

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from . import watchdog

STOP_SECONDS = 30
"""Between SIGTERM and SIGKILL."""


def start_watchdog(inherited: Sequence[int] = ()) -> "subprocess.Popen[bytes]":
    """The process, which waits for its order. The end of its standard input is the end of the command.

    Args:
        inherited: open files that it keeps.
    """
    # By itself: neither what a plan sets for its command nor what is installed here has a say in it.
    return subprocess.Popen(
        [sys.executable, "-I", "-S", watchdog.__file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        pass_fds=inherited,
    )


def give_order(process: "subprocess.Popen[bytes]", order: Mapping[str, Any]) -> str:
    """Let it start a command: `watchdog.py` says what an order holds. Returns why it could not be started, or ``."""
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(f"{json.dumps({**order, 'stop_seconds': STOP_SECONDS})}\n".encode())
    process.stdin.flush()
    return process.stdout.readline().decode(errors="replace").strip()
