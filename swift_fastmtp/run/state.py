"""What a plan's folder knows of its stages, so that no result is a mixture of two plans.

`run.json` holds for each stage the settings that it was begun with, what it took, and what was estimated. A plan that
says something else is refused with the key that changed; `--redo` removes what the changed stage and those after it
have made. What the record does not know, because the user ran the command himself, is taken as it is.
"""

import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from ..errors import FastMTPError, cannot_write
from ..files.known_files import read_object
from ..files.schema import Amount, Count, build
from ..files.show import show
from ..files.staging import exists, lock_file, write_json
from .estimate import Estimate
from .process import Ended
from .stages import Stage

RECORD, LOCK = "run.json", "run.lock"
WAIT_SECONDS = 90.0
"""For what a killed run has started to end; its watchdog ends it within less."""


@contextmanager
def locked(out: Path) -> Iterator[int]:
    """The plan's folder, for one run at a time. Gives the open lock, which what a run starts inherits.

    Raises `FastMTPError` if another run has it, or the folder cannot be written.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        file = open(out / LOCK, "a")  # noqa: SIM115
    except OSError as error:
        raise cannot_write(out, error) from None
    with file:
        deadline = time.monotonic() + WAIT_SECONDS
        told = False
        while not lock_file(file.fileno(), without_locks=True):
            if time.monotonic() > deadline:
                raise FastMTPError(f"{out}: another `fastmtp run` works in it; wait for it, or name another output_dir")
            if not told:
                print(f"{out}: waiting for another `fastmtp run`, or for what a killed one has started", flush=True)
                told = True
            time.sleep(0.2)
        yield file.fileno()


class Entry(BaseModel):
    """What is known of a stage that was begun."""

    settings: dict[str, Any]
    command: str
    starts: Count = 0
    seconds: Amount = 0.0
    memory: Count | None = None
    """Bytes of RAM of its largest process."""
    disk: Count | None = None
    """Bytes of what it has made."""
    ended: bool = False


class State:
    """The record of one folder."""

    def __init__(self, out: Path) -> None:
        self.out = out
        recorded = read_object(out / RECORD)
        self.record = build(dict[str, Entry], recorded.get("stages", {}), str(out / RECORD))
        estimated = recorded.get("estimate")
        self.estimate = None if estimated is None else build(Estimate, estimated, f"{out / RECORD}.estimate")

    def _write(self) -> None:
        stages = {name: entry.model_dump() for name, entry in self.record.items()}
        estimated = {} if self.estimate is None else {"estimate": self.estimate.model_dump()}
        write_json({**estimated, "stages": stages}, self.out / RECORD)

    def is_done(self, stage: Stage) -> bool:
        if stage.output is None:
            entry = self.record.get(stage.name)
            return entry is not None and entry.ended and entry.settings == stage.settings(self.out)
        return exists(stage.output)

    def is_ours(self, stage: Stage) -> bool:
        """Whether a run has begun it, so that its settings are known."""
        return stage.name in self.record

    def keep_estimate(self, made: Estimate) -> None:
        self.estimate = made
        self._write()

    def begin(self, stage: Stage) -> None:
        before = self.record.get(stage.name)
        entry = Entry(settings=stage.settings(self.out), command=stage.line, starts=1)
        if before:
            entry.starts, entry.seconds, entry.memory = before.starts + 1, before.seconds, before.memory
        self.record[stage.name] = entry
        self._write()

    def end(self, stage: Stage, ended: Ended, is_done: bool) -> None:
        entry = self.record[stage.name]
        entry.seconds = round(entry.seconds + ended.seconds, 1)
        entry.memory = max([size for size in (entry.memory, ended.memory) if size is not None], default=None)
        entry.disk = self._size(stage) if stage.pattern else None
        entry.ended = is_done
        self._write()

    def _size(self, stage: Stage) -> int:
        """Bytes of its files; those that are linked to files of others take none."""
        paths: list[Path] = []
        for made in self._files(stage):
            paths += made.rglob("*") if made.is_dir() else [made]
        facts = [path.lstat() for path in paths if path.is_file() and not path.is_symlink()]
        return sum(fact.st_size for fact in facts if fact.st_nlink == 1)

    def check(self, stages: Sequence[Stage], where: str, redo: bool) -> None:
        """Raises `FastMTPError` if the plan is not the one that a stage was begun with, or a stage has to run whose
        result others were made from; with `redo` removes what no longer holds."""
        for place, stage in enumerate(stages):
            why = self._changed(stage) or self._is_missing_below(stages[place:])
            if why and not redo:
                raise FastMTPError(
                    f"{where}: {why}; name another output_dir, or remove what {stage.name} and the stages after it "
                    "made with --redo"
                )
            if why:
                print(f"{why}: made again from here", flush=True)
                self._remove(stages[place:])
                return

    def _changed(self, stage: Stage) -> str | None:
        if stage.name not in self.record or not self._files(stage):
            return None  # there is nothing that was made by another plan
        recorded, now = self.record[stage.name].settings, stage.settings(self.out)
        for key in [*now, *recorded]:
            if recorded.get(key) != now.get(key):
                was, is_now = recorded.get(key, "not given"), now.get(key, "not given")
                return f"{stage.name}.{key} is {show(is_now)}, and {self.out} was begun with {show(was)}"
        return None

    def _is_missing_below(self, stages: Sequence[Stage]) -> str | None:
        """A result that is not there, though a later one is, which was made from it."""
        first = stages[0]
        if first.output is None or exists(first.output):
            return None
        for stage in stages[1:]:
            if self.is_ours(stage) and self._files(stage):
                return f"{first.output} is not there, and {self._files(stage)[0]} was made from it"
        return None

    def _files(self, stage: Stage) -> list[Path]:
        return sorted(self.out.glob(stage.pattern)) if stage.pattern else []

    def _remove(self, stages: Sequence[Stage]) -> None:
        # The last first: a kill in between leaves results whose sources are there.
        for stage in reversed(stages):
            for path in self._files(stage):
                try:
                    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
                except OSError as error:
                    raise FastMTPError(f"{path}: cannot be removed ({error.strerror})") from None
            self.record.pop(stage.name, None)
            if self.estimate is not None:
                self.estimate.needs.pop(stage.name, None)
            if stage.name == "distill":
                self.estimate = None
            self._write()
