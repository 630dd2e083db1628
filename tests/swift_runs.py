"""Several `swift` commands in one process: most of a command's time is its imports.

    swift_runs.py JOBS.json RESULTS.json

Each job is the words after `swift`. They go to ms-swift's own entry points, as `swift/cli/*.py` does; the results are
one error text, or null, per job.
"""

import json
import sys

from swift.pipelines import export_main, sft_main

if __name__ == "__main__":
    source, target = sys.argv[1:]
    with open(source, encoding="utf-8") as file:
        jobs = json.load(file)
    errors = []
    for job in jobs:
        sys.argv = ["swift", *job]
        try:
            {"sft": sft_main, "export": export_main}[job[0]](job[1:])
            errors.append(None)
        except Exception as error:
            errors.append(f"{type(error).__name__}: {error}")
        with open(target, "w", encoding="utf-8") as file:
            json.dump(errors, file)
