"""Runs beside `fastmtp bench`: starts one server, and ends it and everything it started when the benchmark is gone.

A benchmark that is killed (kill -9, a closed terminal, memory that ran out) can stop nothing any more, and a server is
many processes, some in sessions of their own. So the server is a child of this process, which nobody kills along with
the benchmark (it has a session of its own too). It reads a pipe that the benchmark holds open: its end is the
benchmark's. On Linux every process below it that loses its parent becomes its child (a "subreaper"), so that none is
lost sight of; elsewhere the server's process group is all that it can end.

It is started as a script, by any Python, and imports the standard library only. On standard input: one line of JSON
with `command`, `environment`, `log`, `hidden` (what the log must not hold -> what stands there instead) and
`stop_seconds`; then nothing, until the benchmark ends. On standard output: an empty line when the server runs, else why
it does not; at the end a line with the bytes of RAM that its largest process has held. The exit status is the server's.

The stages of `fastmtp run` are run by it too. Their progress is for the terminal: `outputs`, two open files that were
inherited, take the place of `log` and `hidden`, and the command writes there itself.
"""

import ctypes
import json
import os
import resource
import select
import signal
import subprocess
import sys
import threading
import time
from types import FrameType
from typing import IO

IS_LINUX = sys.platform == "linux"
_SET_PARENT_DEATH_SIGNAL, _SET_CHILD_SUBREAPER = 1, 36  # of linux/prctl.h
LOOK_SECONDS = 0.2
GRACE_SECONDS = 2.0
"""For children of a server that has ended."""
LONGEST_LINE = 2**20

_libc = ctypes.CDLL(None) if IS_LINUX else None


def main() -> int:
    """Returns the exit status."""
    order = json.loads(sys.stdin.buffer.readline())
    stopped = _watch_signals()
    if _libc is not None:
        _libc.prctl(_SET_CHILD_SUBREAPER, 1)
    outputs = order.get("outputs") or [subprocess.PIPE, subprocess.STDOUT]
    try:
        server = subprocess.Popen(
            order["command"],
            env=order["environment"],
            stdin=subprocess.DEVNULL,
            stdout=outputs[0],
            stderr=outputs[1],
            start_new_session=True,
            preexec_fn=_end_with_parent if IS_LINUX else None,
        )
    except (OSError, ValueError) as error:
        _tell(str(error))
        return 1
    _tell("")
    copier = None
    if server.stdout is not None:
        copier = threading.Thread(target=copy, args=(server.stdout, order["log"], order["hidden"]), daemon=True)
        copier.start()
    # Until the server has ended, or the benchmark (its end of the pipe is closed), or somebody wants us to end.
    while server.poll() is None and not stopped:
        readable, _, _ = select.select([sys.stdin], [], [], LOOK_SECONDS)
        if readable:
            break
    end(server, order["stop_seconds"])
    if copier is not None:
        copier.join(timeout=5)
    _tell_memory()
    status = server.returncode if server.returncode is not None else 1
    return status if status >= 0 else 128 - status


def _tell(text: str) -> None:
    try:
        print(text, flush=True)
    except OSError:  # the benchmark is gone already, which its other pipe says too
        return


def _tell_memory() -> None:
    # Not by print, whose buffer would change the exit status if nobody reads any more.
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * (1024 if IS_LINUX else 1)
    try:
        os.write(1, f"{peak}\n".encode())
    except OSError:
        return


def _watch_signals() -> list[int]:
    """Signals that somebody sent us. They do not end us: the server would be left behind."""
    seen: list[int] = []

    def note(signum: int, frame: FrameType | None) -> None:  # noqa: ARG001 (the caller's interface)
        seen.append(signum)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, note)
    return seen


def _end_with_parent() -> None:
    """The kernel ends the server if we are killed."""
    if _libc is not None:
        _libc.prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGKILL)


def copy(output: IO[bytes], log: str, hidden: dict[str, str]) -> None:
    """What a server prints, line by line, without what must not be in a log."""
    replaced = [(secret.encode(errors="replace"), shown.encode(errors="replace")) for secret, shown in hidden.items()]
    with open(log, "ab", buffering=0) as file:
        while line := output.readline(LONGEST_LINE):
            for secret, shown in replaced:
                line = line.replace(secret, shown)
            try:
                file.write(line)
            except OSError:  # a full disk: the server goes on, and must not wait for us to read
                continue


def end(server: "subprocess.Popen[bytes]", seconds: float) -> None:
    """End the server and all that it started: SIGTERM, then SIGKILL for what is still there."""
    _signal_all(server, signal.SIGTERM)
    deadline = time.monotonic() + seconds
    while server.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    # The server has ended, or never will. Its children had their signal.
    deadline = time.monotonic() + GRACE_SECONDS
    while _is_anyone_left(server) and time.monotonic() < deadline:
        time.sleep(0.02)
    # Again and again: one may just have started another.
    deadline = time.monotonic() + seconds
    while _is_anyone_left(server) and time.monotonic() < deadline:
        _signal_all(server, signal.SIGKILL)
        time.sleep(0.02)
    server.poll()


def _signal_all(server: "subprocess.Popen[bytes]", number: int) -> None:
    for process in descendants(os.getpid()):
        try:
            os.kill(process, number)
        except OSError:  # it has ended meanwhile
            continue
    if not IS_LINUX:
        try:
            os.killpg(server.pid, number)
        except OSError:
            return


def _is_anyone_left(server: "subprocess.Popen[bytes]") -> bool:
    if not IS_LINUX:
        return server.poll() is None
    server.poll()
    _collect(server)
    return bool(descendants(os.getpid()))


def _collect(server: "subprocess.Popen[bytes]") -> None:
    """Take the exit status of children that became ours; the server's own is `server.poll`'s."""
    for process in descendants(os.getpid()):
        if process == server.pid:
            continue
        try:
            os.waitpid(process, os.WNOHANG)
        except OSError:  # not our child, but its
            continue


def descendants(root: int) -> list[int]:
    """Every process below `root`, from /proc; nothing where there is none."""
    children: dict[int, list[int]] = {}
    for name in os.listdir("/proc") if IS_LINUX else []:
        if not name.isdigit():
            continue
        try:
            with open(f"/proc/{name}/stat", "rb") as file:
                # The name, in brackets, may hold anything: what counts stands behind it.
                parent = int(file.read().rpartition(b")")[2].split()[1])
        except OSError:  # it has ended meanwhile
            continue
        children.setdefault(parent, []).append(int(name))
    processes: list[int] = []
    waiting = [root]
    while waiting:
        below = children.get(waiting.pop(), [])
        processes += below
        waiting += below
    return processes


if __name__ == "__main__":
    sys.exit(main())
