"""A benchmark's folder while it is measured: `plan.json`, and `requests.jsonl` with a line per request as it ends.

So a run that was killed goes on where it was, in its own folder only: another plan is refused with the first
difference, and a line that is not one of ours by its number. Lines of one run have its key (`results.run_key`), its
`round`, and

* an answer (`engines.Answer`), or the `error` with which the server refused the request; or
* `counters`: drafts accepted in all of the round, from a server that tells nothing of single requests; or
* `void`: why the lines of this run and round before this one do not count.
"""

import hashlib
import json
import os
from collections.abc import Container, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import FastMTPError, cannot_write, detail
from ..files.inputs import loads
from ..files.jobs import Part, cut_torn_line
from ..files.provenance import provenance
from ..files.schema import Amount, Count, ListOf, Positive, build, check_values, read_text
from ..files.staging import claim, write_json
from .engines import Answer
from .order import plan_passes
from .plan import Plan
from .results import MAX_BYTES, PassKey, Record, Server, pass_key


@contextmanager
def open_records(folder: Path, plan: Plan) -> Iterator[tuple[list[Record], Part, dict[str, Any]]]:
    """What is finished, the file for more, and `plan.json`. Raises `FastMTPError` if the folder is another plan's."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / "requests.jsonl", "a+b")  # noqa: SIM115
    except OSError as error:
        raise cannot_write(folder, error) from None
    with file:
        claim(file, f"{folder}: another fastmtp bench writes here; name another --output_dir")
        # The plan that the folder was begun with, or this one.
        recorded, wanted = read_plan_record(folder), json.loads(json.dumps(plan.record()))
        wanted["sha256"] = _digest(wanted)
        if not recorded:
            made_by = provenance()
            made_by["started"] = made_by.pop("utc")
            wanted["provenance"] = made_by
            write_json(wanted, folder / "plan.json")
            recorded = wanted
        elif recorded.get("sha256") != wanted["sha256"]:
            where, before, now = _difference(recorded, wanted)
            raise FastMTPError(
                f"{folder / 'plan.json'}: this folder is of a plan with {where} {before}, not {now}; go on with that "
                "plan, or name another --output_dir"
            )
        elif _digest(recorded) != recorded["sha256"]:
            raise FastMTPError(f"{folder / 'plan.json'}: was changed by hand; name another --output_dir")

        # What is finished; a kill may have cut off the last line.
        cut_torn_line(file)
        file.seek(0)
        records = read_records(file, folder / "requests.jsonl", set(plan_passes(recorded)))
        part = Part(file)
        try:
            yield records, part, recorded
        finally:
            part.sync()


@dataclass
class _PlanRecord:
    """What is used of a `plan.json` before its hash is compared."""

    servers: dict[str, Server]
    provenance: dict[str, Any]


def read_plan_record(folder: Path) -> dict[str, Any]:
    """`plan.json`, or {} where there is none. Raises `FastMTPError` if it is none of ours."""
    path = folder / "plan.json"
    if not os.path.lexists(path):
        return {}
    try:
        value = loads(read_text(path, MAX_BYTES))
        check_values(value)
        build(_PlanRecord, value)
    except ValueError as error:  # a FastMTPError is one
        what = detail(error).removeprefix(f"{path}: ")
        raise FastMTPError(f"{path}: not the plan of a benchmark ({what}); name another --output_dir") from None
    record: dict[str, Any] = value
    return record


def _digest(plan: dict[str, Any]) -> str:
    """Of all that must be the same to go on in a folder."""
    kept = {key: value for key, value in plan.items() if key not in ("sha256", "provenance")}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


@dataclass
class _Place:
    """What every line of `requests.jsonl` has: the run that it is of."""

    server: str
    task: str
    temperature: Amount
    concurrency: Positive
    round: Count = 0


@dataclass
class _Request:
    """What the line of a request has besides."""

    id: str
    turn: Count
    engine: ListOf[str]
    cpu_seconds: Amount | None = None
    """Of all the server's processes, since its answer before or the beginning of the round; None of a server that runs
    elsewhere, or was started by others."""


def _check_record(record: Any, passes: Container[PassKey]) -> None:
    """Raises `FastMTPError` if a line of `requests.jsonl` is none that we wrote."""
    build(_Place, record)
    if pass_key(record) not in passes:
        raise FastMTPError("of a run or round that plan.json does not have")
    for kind, type_ in (("void", str), ("counters", ListOf[Count])):
        if kind in record:
            build(type_, record[kind], kind)
            return
    build(_Request, record)
    if len(record["engine"]) != 2:
        raise FastMTPError("engine: must be a name and a version")
    if "error" in record:
        build(str, record["error"], "error")
        return
    answer = build(Answer, record)
    if (answer.steps is None) != (answer.accepted is None) or len(answer.chunk_tokens) != len(answer.chunk_seconds):
        raise FastMTPError("its counts contradict each other")


def read_records(lines: Iterable[bytes], path: Path, passes: Container[PassKey]) -> list[Record]:
    """Lines, without those of a run and round that a later line declares void.

    Raises `FastMTPError` with file and line of the first that is not of this benchmark.
    """
    records: list[Record] = []
    for number, line in enumerate(lines, start=1):
        try:
            record = loads(line.decode())
            _check_record(record, passes)
            key = pass_key(record)
        except ValueError as error:  # no UTF-8, no JSON, or a FastMTPError
            raise FastMTPError(
                f"{path}:{number}: not a line of this run ({detail(error)}); delete it and start again"
            ) from None
        if "void" in record:
            records = [r for r in records if pass_key(r) != key]
        else:
            records.append(record)
    return records


def _difference(recorded: Any, wanted: Any, where: str = "") -> tuple[str, str, str]:
    """The first place where two plans differ, and what each has there."""
    if isinstance(recorded, dict) and isinstance(wanted, dict):
        for key in [*wanted, *recorded]:
            if key not in ("sha256", "provenance") and recorded.get(key) != wanted.get(key):
                return _difference(recorded.get(key), wanted.get(key), f"{where}.{key}".lstrip("."))
    before, now = (json.dumps(x, ensure_ascii=False)[:200] for x in (recorded, wanted))
    return where, before, now


def missing_turns(plan: Plan, record: dict[str, Any], records: list[Record]) -> dict[PassKey, int]:
    """How many turns are missing, of every round of a run that is not finished, in the order in which they are to be
    asked. A conversation ends at a turn that was refused."""
    done: dict[PassKey, dict[str, int]] = {}
    for r in records:
        if "counters" not in r:
            turns = done.setdefault(pass_key(r), {})
            turns[r["id"]] = 10**9 if "error" in r else turns.get(r["id"], 0) + 1
    left = {}
    for key in plan_passes(record):
        turns = done.get(key, {})
        missing = sum(max(0, len(q.turns) - turns.get(q.id, 0)) for q in plan.questions(key[1], key[3]))
        if missing:
            left[key] = missing
    return left
