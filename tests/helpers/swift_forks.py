"""Runs `swift` commands that are asked for on stdin, each in a fork of this process: most of a command's time is its
imports.

A line is JSON: {"words": after `swift`, "folder": for its output, "seconds": until it is killed}. What runs is
ms-swift's script of the verb, `swift/cli/VERB.py`, with its output in FOLDER/stdout and FOLDER/stderr; the answer is
its exit status.
"""

import atexit
import contextlib
import importlib
import json
import os
import runpy
import signal
import sys
from pathlib import Path
from sysconfig import get_path

ANSWERS = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # what imports print is no answer

# What the commands import, sooner or later; not all of it need be there.
for name in (
    *("swift.pipelines.export.export", "swift.pipelines.infer.infer", "swift.pipelines.train.sft"),
    *("swift.callbacks", "swift.loss_scale", "swift.optimizers", "swift_fastmtp.swift_plugin.register"),
    "deepspeed",
):
    with contextlib.suppress(ImportError):
        importlib.import_module(name)


def run(words: list[str], folder: Path, seconds: int) -> int:
    """What the interpreter does with a script, in a child; returns its exit status."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    signal.alarm(seconds)
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    script = str(Path(get_path("purelib"), "swift/cli", f"{words[0]}.py"))
    sys.argv, status = [script, *words[1:]], 0
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        status = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


for line in sys.stdin:
    job = json.loads(line)
    print(run(job["words"], Path(job["folder"]), job["seconds"]), file=ANSWERS, flush=True)
