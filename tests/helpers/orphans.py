"""Processes that a benchmark's servers leave behind, found by a variable in their environment: children inherit it."""

import os
import signal
import time
from pathlib import Path

MARK = "SERVER_OF_A_TEST"


def hear_hangups():
    """In a new process: tests under `nohup` hand down that SIGHUP is ignored, and a benchmark respects that."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def processes(mark):
    """Living processes (a zombie has ended) whose environment has `MARK` = `mark`."""
    wanted = f"{MARK}={mark}".encode()
    found = []
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            if wanted in (folder / "environ").read_bytes().split(b"\0"):
                found.append(int(folder.name))
        except OSError:  # it has ended, or is somebody else's
            continue
    return found


def left_after(mark, seconds):
    """Those that are still there when `seconds` have passed."""
    deadline = time.monotonic() + seconds
    while (found := processes(mark)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return [(process, Path(f"/proc/{process}/cmdline").read_text().replace("\0", " ")) for process in found]


def kill(process, how, group):
    if group:
        os.killpg(process, how)
    else:
        os.kill(process, how)
