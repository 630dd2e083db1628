"""Answers that were generated, kept in a file: the next run on the same prompts takes them from there, and so does one
that goes on after it was killed.

The first line says what they depend on, each further one is an answer, appended when its batch is finished. Answers are
found by their prompts' token ids, so other rows, in another order, take what is there and add what is not.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import FastMTPError, cannot_write
from ..files.inputs import check_file, loads
from ..files.jobs import Part, own_part
from ..files.kinds import is_int
from ..files.show import show

SUFFIX = ".jsonl"
_SCHEMA = "swift_fastmtp.answers/1"


class KeptAnswer(NamedTuple):
    """One answer to a prompt, as token ids."""

    prompt: tuple[int, ...]
    sample: int
    """How many rows with this prompt stand before this one; each has an answer of its own."""
    answer: list[int]
    after: list[int]
    """Tokens that would have followed the answer."""


class KeptAnswers:
    """What a file holds, and the way to add to it."""

    def __init__(self, known: dict[tuple[tuple[int, ...], int], KeptAnswer], part: Part) -> None:
        self._known, self._part = known, part

    def get(self, prompt: list[int], sample: int, num_after: int) -> KeptAnswer | None:
        """The answer, if it is there with so many tokens after it. More are no harm, and the hidden states of the whole
        may be kept."""
        found = self._known.get((tuple(prompt), sample))
        return None if found is None or len(found.after) < num_after else found

    def add(self, answers: list[KeptAnswer]) -> None:
        """Append answers. A kill from now on loses none of them. Raises `FastMTPError` if they cannot be written."""
        self._part.write([kept._asdict() for kept in answers])


@contextmanager
def open_answers(path: str | Path, settings: dict[str, Any], vocab_size: int) -> Iterator[KeptAnswers]:
    """The answers of a file, which is made if it is not there.

    Args:
        path: of the file.
        settings: what answers depend on beside their prompts, as JSON.
        vocab_size: ids are below it.

    Raises `FastMTPError` if the file is of other settings, is none of this kind, or another run has it open.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            check_file(path)
        file = open(path, "a+b")  # noqa: SIM115
    except OSError as error:
        raise cannot_write(path, error) from None
    with own_part(file, f"{path}: another run writes answers here; wait for it, or name another file") as part:
        wanted = {"schema": _SCHEMA, **settings}
        if file.tell() == 0:
            part.write([wanted])
        file.seek(0)
        _check_settings(_parsed(file.readline(), path, 1), wanted, path)
        known = {}
        for number, line in enumerate(file, start=2):
            kept = _kept(_parsed(line, path, number), vocab_size)
            if kept is None:
                raise FastMTPError(f"{path}:{number}: no answer of this model; delete the line")
            known[kept.prompt, kept.sample] = kept
        yield KeptAnswers(known, part)


def _parsed(line: bytes, path: Path, number: int) -> dict[str, Any]:
    try:
        value = loads(line)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise FastMTPError(f"{path}:{number}: not a file of answers; name a new file, which is written")
    return value


def _check_settings(stored: dict[str, Any], wanted: dict[str, Any], path: Path) -> None:
    if stored.get("schema") != _SCHEMA:
        raise FastMTPError(
            f"{path}: not a file of answers of this version; name a new file, which is written, or for answers of "
            "`fastmtp distill` --dataset with --answers given"
        )
    for key in wanted | stored:
        if stored.get(key) != wanted.get(key):
            raise FastMTPError(
                f"{path}: its answers were generated with {key} {show(stored.get(key))}, this run has "
                f"{show(wanted.get(key))}; name another file, which is written"
            )


def _kept(value: dict[str, Any], vocab_size: int) -> KeptAnswer | None:
    """None if it is no answer."""
    for name in ("prompt", "answer", "after"):
        ids = value.get(name)
        if not isinstance(ids, list) or not all(is_int(i) and 0 <= i < vocab_size for i in ids):
            return None
    if not value["prompt"] or not value["answer"] or not is_int(value.get("sample")):
        return None
    return KeptAnswer(tuple(value["prompt"]), value["sample"], value["answer"], value["after"])
