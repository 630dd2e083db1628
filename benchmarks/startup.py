"""CPU seconds of the verbs that parse or look at files, before and after a change.

    python benchmarks/startup.py --before REVISION      # writes docs/results/startup.{json,md}

Both versions of the package run each command in a process of its own, by turns; the smallest of the repeats counts. CPU
seconds (user and system, of the command and what it starts), because other work on the machine stretches wall time.
`refused` are commands with one thing wrong: how long until the line that says so.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from swift_fastmtp.files.provenance import provenance
from swift_fastmtp.files.staging import write_json
from swift_fastmtp.files.table import markdown_table

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / "examples/tiny-mimo"
PROMPTS = ROOT / "examples/prompts/eval.jsonl"
RESULTS = ROOT / "docs/results/paper/ablation/results.json"
# `{out}` is a name that does not exist.
COMMANDS = {
    "clean --help": "clean --help",
    "inspect": f"inspect {MODEL}",
    "doctor": f"doctor {MODEL}",
    "serve-args": f"serve-args {MODEL}",
    "compare": f"compare {RESULTS} {RESULTS}",
    "clean": f"clean --inputs {PROMPTS} --output {{out}}",
    "inspect, refused": "inspect {out}",
    "doctor, refused": "doctor {out}",
    "vocab, refused": f"vocab --inputs {{out}} --model {MODEL} --output_dir {{out}}",
    "bench, refused": "bench --plan {out} --output_dir {out}",
    "card, refused": f"card {MODEL} --results {RESULTS}",
}


def checkout(revision, folder):
    """The package as it was at a revision."""
    archive = subprocess.run(
        ["git", "-C", ROOT, "archive", revision, "swift_fastmtp"], stdout=subprocess.PIPE, check=True
    )
    subprocess.run(["tar", "-x", "-C", folder], input=archive.stdout, check=True)
    return folder


def with_package(package):
    """So that Python takes the package of this folder: in a variable too, because the hook for ms-swift, where it is
    installed, imports it before Python looks into the folder that it is started in."""
    return {"cwd": package, "env": {**os.environ, "PYTHONPATH": str(package)}}


def check_package(package):
    code = "import swift_fastmtp; print(swift_fastmtp.__file__)"
    done = subprocess.run(
        [sys.executable, "-c", code], **with_package(package), capture_output=True, text=True, check=True
    )
    if not done.stdout.startswith(str(package)):
        raise SystemExit(f"{done.stdout.strip()} was imported instead of {package}")


def cpu_seconds(command, package, folder):
    """Of one run of `fastmtp`, with the package of a folder; inputs are this checkout's."""
    words = command.format(out=Path(folder) / "nothing").split()
    process = subprocess.Popen(
        [sys.executable, "-m", "swift_fastmtp.cli", *words], **with_package(package),
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode not in (0, 1):
        raise SystemExit(f"{command}: exit status {process.returncode}")
    for left in Path(folder).glob("nothing*"):
        shutil.rmtree(left) if left.is_dir() else left.unlink()
    return used.ru_utime + used.ru_stime


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--before", required=True, help="git revision to compare with")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", nargs="*", default=list(COMMANDS), choices=list(COMMANDS), metavar="COMMAND")
    parser.add_argument("--output", default=ROOT / "docs/results/startup", type=Path)
    args = parser.parse_args()
    started, made_by, seconds = time.time(), provenance(), {}
    with tempfile.TemporaryDirectory() as old, tempfile.TemporaryDirectory() as out:
        packages = {"before": checkout(args.before, old), "after": ROOT}
        for package in packages.values():
            check_package(package)
        for name in args.only:
            runs = {which: [] for which in packages}
            for _ in range(args.repeats):
                for which, package in packages.items():
                    runs[which].append(cpu_seconds(COMMANDS[name], package, out))
            seconds[name] = {which: min(times) for which, times in runs.items()}
            print(name, seconds[name], flush=True)
    made_by["command"] = [Path(made_by["command"][0]).name, *made_by["command"][1:]]
    record = {
        "before": args.before,
        "repeats": args.repeats,
        "seconds": seconds,
        "provenance": {**made_by, "seconds": round(time.time() - started, 1)},
    }
    write_json(record, args.output.with_suffix(".json"))
    args.output.with_suffix(".md").write_text(page(record), encoding="utf-8")


def page(record):
    rows = []
    for name, took in record["seconds"].items():
        ratio = took["before"] / took["after"]
        rows.append((f"`{name}`", f"{took['before']:.2f}", f"{took['after']:.2f}", f"{ratio:.1f}×"))
    table = markdown_table(("command", "before", "after", "ratio"), rows, num_text=1, raw=True)
    return (
        "# Start-up\n\n"
        f"CPU seconds of `fastmtp` verbs that parse or look at files, at revision `{record['before'][:12]}` and now, "
        f"by turns, the smallest of {record['repeats']}; `refused` is until the error line. "
        f"{record['provenance']['hardware']}. Made by `benchmarks/startup.py`.\n\n{table}\n"
    )


if __name__ == "__main__":
    main()
