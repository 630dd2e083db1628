"""Workers of one job that end and begin at the same moment, as real processes: for `test_distill.py`.

    python job_workers.py FOLDER ROUNDS

In every round workers finish their shards, meet at a barrier and merge, while others begin the same job again and
again. Prints a line for whatever must not happen; exit status 1 if there was any.
"""

import multiprocessing
import sys
import traceback
from pathlib import Path

from swift_fastmtp.errors import FastMTPError
from swift_fastmtp.files.jobs import Job

FINISHING, BEGINNING, ROWS = 4, 2, 40


def record(number):
    return {"key": [number, 0], "row": {"messages": [{"role": "user", "content": str(number)}]}}


def finish(output, shard, barrier, results):
    """A worker that ends: every answer of its shard, then the merge."""
    job = Job(output, {"seed": 0})
    with job.part(shard, FINISHING) as part:
        part.write([record(i) for i in range(shard, ROWS, FINISHING)])
    barrier.wait()
    refused = job.merge(ROWS)
    if not output.exists():
        results.put(f"worker {shard}: merge returned {refused}, and there is no output")
    if refused is None and job.missing:
        results.put(f"worker {shard}: {job.missing} answers are missing, and they are not")
    if refused is not None:
        results.put("merged")


def begin(output, number, barrier, results):
    """A worker that comes late, over and over: it finds all answers, or the output."""
    barrier.wait()
    while True:
        try:
            job = Job(output, {"seed": 0})
            with job.part(number, FINISHING + BEGINNING + 1):
                found = job.finished()
        except FastMTPError as error:
            if "already exists" not in str(error):
                results.put(f"latecomer: {error}")
            return
        if len(found) != ROWS:
            results.put(f"latecomer: would answer {ROWS - len(found)} rows again")
            return


def guarded(function, *args):
    try:
        function(*args)
    except BaseException:
        args[-1].put(f"{function.__name__}: {traceback.format_exc()}")


def one_round(folder):
    """What went wrong."""
    context = multiprocessing.get_context("fork")
    output = folder / "o.jsonl"
    barrier, results = context.Barrier(FINISHING + BEGINNING), context.SimpleQueue()
    workers = [context.Process(target=guarded, args=(finish, output, i, barrier, results)) for i in range(FINISHING)]
    workers += [context.Process(target=guarded, args=(begin, output, i, barrier, results)) for i in range(BEGINNING)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    wrong = []
    while not results.empty():
        wrong.append(results.get())
    if wrong.count("merged") != 1:
        wrong.append(f"{wrong.count('merged')} workers merged")
    if sorted(path.name for path in folder.iterdir()) != ["o.jsonl"]:
        wrong.append(f"left behind: {[path.name for path in folder.iterdir()]}")
    elif output.read_text().count("\n") != ROWS:
        wrong.append("the output is not complete")
    return [what for what in wrong if what != "merged"]


def main():
    failures = 0
    for number in range(int(sys.argv[2])):
        folder = Path(sys.argv[1], str(number))
        folder.mkdir()
        for what in one_round(folder):
            print(f"round {number}: {what}")
            failures += 1
    sys.exit(failures > 0)


if __name__ == "__main__":
    main()
