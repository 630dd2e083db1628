"""`fastmtp clean`: rows that are worth training on, and a report of every row that was not (paper, Appendix A).

The files are read twice. The first pass decides: cheap filters first, duplicates last, so that a row which is removed
never removes another. The second writes the kept rows, in their order and unchanged.

Three files appear, the report first, which has the hash of the removed rows; then these, and the kept ones last. What
is there without the kept rows is of a run that was killed, and the same command goes over it.
"""

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import IO, Any, Literal

from tqdm import tqdm

from .. import __version__
from ..errors import FastMTPError, cannot_write
from ..files.copies import file_hash
from ..files.known_files import read_object
from ..files.rows import EXAMPLES, BadRows, Row, dump_row, iter_rows, write_rows
from ..files.staging import staged, try_output, try_place, write_json
from .filters import (
    Asked,
    Decontaminate,
    Language,
    Length,
    Reasoning,
    Refusals,
    Repetition,
    SpecialTokens,
    TokenCounter,
    Truncated,
)
from .near_duplicates import ExactDuplicates, NearDuplicates

ROW_FILTERS = (Truncated, Reasoning, SpecialTokens, Length, Repetition, Language, Refusals, Decontaminate, Asked)
"""In the order in which they are asked."""
FILTERS = (*(f.name for f in ROW_FILTERS), "exact_duplicates", "near_duplicates")
DEFAULT_FILTERS = tuple(name for name in FILTERS if name != "refusals")
MAX_WHY = 200

Why = tuple[str, str]
"""The filter that removes a row, and why."""


@dataclass
class Removed:
    """What one filter removed."""

    rows: int = 0
    tokens: int = 0
    examples: list[str] = field(default_factory=list)

    def add(self, where: str, why: str, tokens: int) -> None:
        self.rows += 1
        self.tokens += tokens
        if len(self.examples) < EXAMPLES:
            self.examples.append(f"{where}: {why}")


def clean(  # noqa: PLR0913
    inputs: list[str],
    output: str,
    *,
    removed: str | None = None,
    filters: Sequence[str] | None = None,
    skip_filters: Sequence[str] = (),
    model: str | None = None,
    duplicates_of: Literal["row", "prompt"] = "row",
    similarity: float = 0.6,
    ngram: int = 3,
    on_bad_row: Literal["stop", "skip"] = "stop",
    **parameters: Any,
) -> None:
    """Write `output` (JSONL): the rows of `inputs` that pass, and `<output>.report.json`: what did not, and why.

    Args:
        inputs: JSONL (.gz, .xz) or Parquet
        output: JSONL to write, with a report beside it
        removed: JSONL to write of the rows that were removed, with `removed_by` and `why`
        filters: only these; default: all but refusals
        skip_filters: all but these
        model: folder of the tokenizer that counts where there are no token_ids; default: estimate
        duplicates_of: what has to be alike
        similarity: Jaccard similarity of near-duplicates
        ngram: words (Chinese: characters) that are compared together
        on_bad_row: skipped rows are in the report
        parameters: the fields of `ROW_FILTERS`, by name

    Raises `FastMTPError` if an output exists, an input cannot be read or changes meanwhile, a row is bad (unless
    `on_bad_row` is "skip"), a filter or parameter is not known, or no row is left.
    """
    # What would be found out after hours is found out now: options, places, inputs.
    chosen = _choose(filters, skip_filters)
    if duplicates_of not in ("row", "prompt"):
        raise FastMTPError(f"--duplicates_of {duplicates_of}: must be `row` or `prompt`")
    if not 0 < similarity <= 1 or ngram < 1:
        raise FastMTPError("--similarity must be above 0 and at most 1, --ngram at least 1")
    outputs = [output, f"{output}.report.json", *([removed] if removed else [])]
    if len({os.path.realpath(p) for p in [*inputs, *outputs]}) < len(inputs) + len(outputs):
        raise FastMTPError("--inputs, --output and --removed must all be different files")
    try_output(output)
    report_file = Path(f"{output}.report.json")
    try_place(report_file)
    tokens = TokenCounter(model)
    judges, values = _row_filters(chosen, tokens, model, parameters)
    compared = [task for judge in judges if isinstance(judge, Decontaminate) for task in judge.compared]
    # What the output was made from and how: by it a run that was killed between two files is known again.
    hashes = [file_hash(path) for path in inputs]
    settings = {
        "filters": [name for name in FILTERS if name in chosen],
        "duplicates_of": duplicates_of,
        "similarity": similarity,
        "ngram": ngram,
        "model": model,
        "on_bad_row": on_bad_row,
        **values,
    }
    read = [{"file": path, "sha256": digest} for path, digest in zip(inputs, hashes, strict=True)]
    again = removed is not None and _is_of_a_killed_run(removed, report_file, read, settings)
    if removed and not again:
        try_output(removed)

    # First pass: a verdict for each row, in order. Near duplicates need all rows seen; rows are too many to hold.
    bad = BadRows(on_bad_row)
    exact = ExactDuplicates(duplicates_of) if "exact_duplicates" in chosen else None
    try:
        folder = Path(output).parent
        folder.mkdir(parents=True, exist_ok=True)  # of temporary files
        near = NearDuplicates(duplicates_of, similarity, ngram, folder) if "near_duplicates" in chosen else None
        verdicts, read_tokens = _decide(_rows(inputs, bad), tokens, judges, exact, near)
    except OSError as error:
        raise cannot_write(output, error, Path(output).parent) from None
    if not verdicts:
        raise FastMTPError(f"{', '.join(inputs)}: holds no rows")
    token_sources = dict(tokens.how.most_common())

    # Second pass: write. The rows are read again instead of kept.
    counts = {name: Removed() for name in FILTERS if name in chosen}
    with ExitStack() as files:
        # Closed last, the output appears last.
        kept_file = files.enter_context(write_rows(output))
        removed_file: IO[str] | None = None
        if removed:
            removed_file = files.enter_context(_write_over(removed) if again else write_rows(removed))
        # A file that has grown or shrunk is found by its hash, below.
        second_pass = zip(verdicts, _rows(inputs, BadRows(on_bad_row)), strict=False)
        for verdict, (where, row) in tqdm(second_pass, unit="row", desc="write", total=len(verdicts)):
            if verdict is None:
                kept_file.write(dump_row(row))
                continue
            name, text = verdict
            counts[name].add(where, text, sum(tokens(row)))
            if removed_file:
                removed_file.write(dump_row({**row, "removed_by": name, "why": text}))
        if hashes != [file_hash(path) for path in inputs]:
            raise FastMTPError(f"{', '.join(inputs)}: changed while it was read; start again when it is complete")
        kept = len(verdicts) - sum(r.rows for r in counts.values())
        kept_tokens = read_tokens - sum(r.tokens for r in counts.values())
        report = {
            "version": __version__,
            "inputs": read,
            "settings": settings,
            "decontaminated_with": compared,
            "rows": {"read": len(verdicts), "kept": kept, "bad": bad.total},
            "tokens": {"read": read_tokens, "kept": kept_tokens},
            "messages_whose_tokens_come_from": token_sources,
            "removed": {name: vars(r) for name, r in counts.items()},
            "bad_rows": bad.report(),
        }
        kept_file.flush()  # a full disk is noticed before either file appears
        if removed_file:
            removed_file.flush()
            report["removed_file_sha256"] = file_hash(removed_file.name)
        write_json(report, report_file)
        if not kept:
            name, most = max(counts.items(), key=lambda item: item[1].rows)
            raise FastMTPError(
                f"{output}: no row is left; `{name}` removed {most.rows} of {len(verdicts)}, the first: "
                f"{most.examples[0]}; all reasons: {output}.report.json"
            )
    print(_table(counts, len(verdicts), read_tokens, kept, kept_tokens))
    if compared:
        names = ", ".join(task["task"] for task in compared)
        print(f"prompts are compared with the tasks {names} and no others; --decontaminate names more")
    estimated = "; tokens are estimated, --model counts them" if "estimate" in token_sources else ""
    print(f"{output}: {kept} rows, {bad.total} bad rows left out; examples: {output}.report.json{estimated}")


@contextmanager
def _write_over(path: str) -> Iterator[IO[str]]:
    """As `write_rows`, in place of what a killed run left."""
    with staged(Path(path)) as made, open(made, "w", encoding="utf-8") as file:
        yield file


def _is_of_a_killed_run(removed: str, report_file: Path, read: list[dict[str, str]], settings: dict[str, Any]) -> bool:
    """Whether a file of removed rows is what a run with the same inputs and settings left when it was killed before
    its output appeared. Only a file that nobody has changed since is."""
    try:
        report = read_object(report_file)
    except FastMTPError:
        return False
    same = (report.get("inputs"), report.get("settings")) == (read, json.loads(json.dumps(settings)))
    return same and Path(removed).is_file() and report.get("removed_file_sha256") == file_hash(removed)


def _choose(filters: Sequence[str] | None, skip_filters: Sequence[str]) -> set[str]:
    for name in (*(filters or ()), *skip_filters):
        if name not in FILTERS:
            raise FastMTPError(f"no filter is called {name!r}; there are {', '.join(FILTERS)}")
    return set(DEFAULT_FILTERS if filters is None else filters) - set(skip_filters)


def _row_filters(
    chosen: set[str], tokens: TokenCounter, model: str | None, parameters: dict[str, Any]
) -> tuple[list[Any], dict[str, Any]]:
    """The chosen filters that look at one row, and the values of their parameters."""
    unknown = set(parameters) - {f.name for kind in ROW_FILTERS for f in _parameters(kind)}
    if unknown:
        raise FastMTPError(f"--{sorted(unknown)[0]}: no filter has such a parameter")
    judges: list[Any] = []
    values: dict[str, Any] = {}
    for kind in ROW_FILTERS:
        if kind.name not in chosen:
            continue
        own = {f.name: parameters[f.name] for f in _parameters(kind) if f.name in parameters}
        if kind is Length:
            judge: Any = Length(tokens, **own)
        elif kind is Asked:
            judge = Asked(model)
        else:
            judge = kind(**own)
        judges.append(judge)
        values |= {f.name: getattr(judge, f.name) for f in _parameters(kind)}
    return judges, values


def _parameters(kind: Any) -> list[Any]:
    """The fields that users may set: those with a default."""
    return [f for f in fields(kind) if f.default is not MISSING or f.default_factory is not MISSING]


def _rows(inputs: list[str], bad: BadRows) -> Iterator[tuple[str, Row]]:
    for path in inputs:
        yield from iter_rows(path, bad, unique_ids=True)


def _decide(
    rows: Iterator[tuple[str, Row]],
    tokens: TokenCounter,
    judges: list[Any],
    exact: ExactDuplicates | None,
    near: NearDuplicates | None,
) -> tuple[list[Why | None], int]:
    """For each row, why it is removed; and the tokens of all."""
    verdicts: list[Why | None] = []
    candidates: list[tuple[int, str]] = []  # what `near` holds: number and place of each row
    count = 0
    for where, row in tqdm(rows, unit="row", desc="read and filter"):
        count += sum(tokens(row))
        why = _judge(judges, row)
        if why is None and exact and (text := exact(row, where)):
            why = "exact_duplicates", text
        if why is None and near:
            near.add(row)
            candidates.append((len(verdicts), where))
        verdicts.append(why)
    for copy, first, alike in near.clusters() if near else ():
        (number, _), (_, where) = candidates[copy], candidates[first]
        verdicts[number] = "near_duplicates", f"{alike:.2f} similar to {where}"
    return verdicts, count


def _judge(judges: list[Any], row: Row) -> Why | None:
    for judge in judges:
        if why := judge(row):
            return judge.name, why if len(why) <= MAX_WHY else why[: MAX_WHY - 3] + "..."
    return None


def _table(counts: dict[str, Removed], rows: int, tokens: int, kept: int, kept_tokens: int) -> str:
    lines = [("", "rows", "%", "tokens", "%"), ("read", str(rows), "", str(tokens), "")]
    for name, r in [*counts.items(), ("kept", Removed(kept, kept_tokens))]:
        shares = f"{100 * r.rows / rows:.2f}", f"{100 * r.tokens / max(tokens, 1):.2f}"
        lines.append((name, str(r.rows), shares[0], str(r.tokens), shares[1]))
    return "\n".join(f"{a:18}{b:>10}{c:>8}{d:>13}{e:>8}" for a, b, c, d, e in lines)
