"""`fastmtp vocab`: token maps, each the ids that a draft may choose from, by language or domain (paper 2.2, FR-Spec).

A map is a prefix of a ranking, so larger maps of a name hold the smaller ones. Ids are stored in ascending order:
between equal logits the draft then takes the token that the full matrix would take, and `d2t` is that of EAGLE3
checkpoints.
"""

import math
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from .. import __version__
from ..data.language_names import UNKNOWN
from ..data.mix_groups import Groups
from ..errors import FastMTPError
from ..files.inputs import check_file
from ..files.jobs import parts_folder
from ..files.staging import exists, new_folder, remove_at_once, take_away_leftovers, try_output, write_json
from .counts import COUNTS, Counts, CountSettings, count_files
from .coverage import TokenMap, coverage_report, coverage_table, covered, markdown, outside_lines, plot_coverage
from .must_keep import Vocabulary, read_vocabulary

Ints = NDArray[np.int64]

SIZES = (8192, 16384, 32768, 65536)
ROUND = 64
"""Sizes that are computed are multiples of it, for the sake of matrix kernels."""
MIN_SHARE = 0.01
"""A language or group with a smaller share of the counted tokens gets no map of its own."""
MIXED = "mixed"
SCHEMA = "swift_fastmtp.token_map/1"


@dataclass(frozen=True)
class Part:
    """What maps are made for: a language, a group, or all of them mixed."""

    name: str
    cells: tuple[str, ...]
    """Its own."""
    order: Ints
    """[all ids that exist], the ranking; maps are its prefixes."""
    counted_V: NDArray[Any]
    """What it is ranked by."""

    def map(self, size: int, vocabulary: Vocabulary) -> TokenMap:
        ids = self.order[:size]
        kept = set(vocabulary.must_keep)
        filled = sum(int(i) not in kept for i in ids[self.counted_V[ids] == 0])
        return TokenMap(self.name, np.sort(ids), filled)


def vocab(  # noqa: PLR0913
    inputs: Sequence[str],
    model: str,
    output_dir: str,
    *,
    sizes: Sequence[int] | None = None,
    coverage: float | None = None,
    by: Literal["language", "group", "category"] = "language",
    count: Literal["answers", "all"] = "answers",
    held_out: float = 0.05,
    jobs: int = 1,
    on_bad_row: Literal["stop", "skip"] = "stop",
) -> None:
    """Write token maps with their sidecars, counts.safetensors and coverage.{json,md,png} to a new folder.

    Args:
        inputs: JSONL (.gz, .xz) or Parquet of rows with answers
        model: folder with config.json and the tokenizer
        output_dir: folder to write; must not exist
        sizes: ids in each map; default: those of 8192 16384 32768 65536 that fit the vocabulary
        coverage: instead of sizes: share of held-out tokens that each map is to hold, as 0.99
        by: what has maps; code is a language, and groups are those of `fastmtp mix`
        count: which tokens
        held_out: fraction of prompts that are not counted; coverage is measured on them
        jobs: processes that count
        on_bad_row: skipped rows are in the report

    Raises `FastMTPError` if the folder exists, an input or the tokenizer cannot be read, a row is bad (unless
    `on_bad_row` is "skip"), or an option is impossible.
    """
    if by not in ("language", "group", "category"):
        raise FastMTPError(f"--by {by}: must be `language`, `group` or `category`")
    if count not in ("answers", "all"):
        raise FastMTPError(f"--count {count}: must be `answers` or `all`")
    if on_bad_row not in ("stop", "skip"):
        raise FastMTPError(f"--on_bad_row {on_bad_row}: must be `stop` or `skip`")
    if not 0 < held_out <= 0.5:
        raise FastMTPError(
            f"--held_out {held_out}: must be above 0 and at most 0.5; coverage is measured on these rows"
        )
    if jobs < 1:
        raise FastMTPError(f"--jobs {jobs}: must be at least 1")
    if sizes is not None and coverage is not None:
        raise FastMTPError("--sizes and --coverage: give one of them")
    if coverage is not None and not 0 < coverage <= 1:
        raise FastMTPError(f"--coverage {coverage}: must be above 0 and at most 1, as in 0.99")
    # Counting is what takes long: each file's counts are kept until the maps are there.
    unfinished = parts_folder(Path(output_dir))
    if exists(Path(output_dir)):
        _take_away_counts(unfinished)
    try_output(output_dir)
    for path in inputs:
        check_file(path)  # before the tokenizer's library, which takes seconds to import
    vocabulary = read_vocabulary(model)
    sizes = _check_sizes(sizes, vocabulary) if coverage is None else None
    settings = CountSettings(count, by == "category", held_out, on_bad_row)
    counts, hashes = count_files(inputs, settings, vocabulary, unfinished, jobs)
    # Which ids: those each part uses most, as many as asked for, or as many as reach the coverage asked for.
    parts = make_parts(counts, by, vocabulary)
    sizes_of = {
        part.name: sizes
        if sizes is not None
        else [_size_for(coverage or 0, part, parts, counts, len(vocabulary.must_keep))]
        for part in parts
    }
    maps = [part.map(size, vocabulary) for part in parts for size in sizes_of[part.name]]
    own = {part.name: list(part.cells) for part in parts}
    report = coverage_report(maps, own, counts)
    # Coverage is measured on the rows that were held out, for every map and every cell.
    about = {
        "schema": SCHEMA,
        "swift_fastmtp": __version__,
        "by": by,
        "count": count,
        "held_out": held_out,
        "coverage_aimed_at": coverage,
        "tokenizer_sha256": vocabulary.tokenizer_sha256,
        "tokenizer_size": vocabulary.size,
        "vocab_size": vocabulary.rows,
        "must_keep": len(vocabulary.must_keep),
        "corpus": [{"file": path, "sha256": digest} for path, digest in zip(inputs, hashes, strict=True)],
        "messages_whose_tokens_come_from": dict(counts.how.most_common()),
    }
    from .maps import write_map  # torch's format; it takes seconds to import, which a bad input need not wait for

    with new_folder(output_dir) as folder:
        for token_map, entry in zip(maps, report["maps"], strict=True):
            write_map(token_map, vocabulary, folder, {**about, **entry})
        counts.save(folder / "counts.safetensors")
        write_json({**about, "bad_rows": counts.bad, **report}, folder / "coverage.json")
        (folder / "coverage.md").write_text(markdown(report, {**about, "bad_rows": counts.bad}), encoding="utf-8")
        plot_coverage(
            [(part.name, part.cells, part.order) for part in parts], counts, sizes_of, folder / "coverage.png"
        )
    _take_away_counts(unfinished)
    print(coverage_table(report))
    for line in outside_lines(report):
        print(line)
    bad = sum(kind["count"] for kind in counts.bad.values())
    print(f"{output_dir}: {len(maps)} maps, {bad} bad rows left out; more: coverage.md")


def _take_away_counts(unfinished: Path) -> None:
    """Remove the counts of single files, when the maps are there; also those that a killed run left beside them."""
    take_away_leftovers(unfinished)
    with suppress(OSError):
        # Nobody else's: a job of `fastmtp distill` may have a folder of that name.
        if all(fnmatch(name.removeprefix("."), f"{COUNTS}*") for name in os.listdir(unfinished)):
            remove_at_once(unfinished)


def _check_sizes(sizes: Sequence[int] | None, vocabulary: Vocabulary) -> list[int]:
    kept = len(vocabulary.must_keep)
    if sizes is None:
        sizes = [size for size in SIZES if kept <= size < vocabulary.size]
        if not sizes:
            raise FastMTPError(f"--sizes: the model has {vocabulary.size} tokens; say how many a map is to hold")
    for size in sizes:
        if size > vocabulary.size:
            raise FastMTPError(f"--sizes {size}: the model has {vocabulary.size} tokens; name a smaller size")
        if size < kept:
            raise FastMTPError(f"--sizes {size}: every map holds {kept} special and basic tokens; name a larger size")
    return sorted(set(sizes))


def make_parts(counts: Counts, by: str, vocabulary: Vocabulary) -> list[Part]:
    """The names that get maps, and how each ranks the ids.

    First what every map holds, then by the name's own counts, then by all counts, then lower ids first, which are the
    merges that the tokenizer learnt first. `mixed` goes by the mean of the other names' shares, so that each weighs the
    same whatever there is of it.
    """
    cells: dict[str, list[str]] = {}
    for cell in sorted(counts.counted):
        cells.setdefault(part_of(cell, by), []).append(cell)
    total_V = np.sum([counts.counted[cell] for cell in sorted(counts.counted)], axis=0)
    counted = {name: np.sum([counts.counted[cell] for cell in of], axis=0) for name, of in cells.items()}
    if not total_V.any():
        raise FastMTPError("--held_out: every row is held out, none is left to count; lower it or add rows")
    large = [name for name in counted if counted[name].sum() >= MIN_SHARE * total_V.sum()]
    names = [name for name in large if name != UNKNOWN] or large
    parts = [
        Part(name, tuple(cells[name]), _ranking(counted[name], total_V, vocabulary), counted[name]) for name in names
    ]
    if len(parts) > 1:
        mean_V = np.mean([counted[name] / counted[name].sum() for name in names], axis=0)
        own = tuple(cell for part in parts for cell in part.cells)
        parts.append(Part(MIXED, own, _ranking(mean_V, total_V, vocabulary), mean_V))
    return parts


def part_of(cell: str, by: str) -> str:
    """The name whose maps a cell is counted for."""
    language, domain = cell.split("/")
    if by == "category":
        name = domain
    elif by == "group":
        name = Groups().group({"category": domain}, language)
    else:
        name = "code" if domain == "code" else language
    return f"{name}_" if name == MIXED else name


def _ranking(own_V: NDArray[Any], total_V: Ints, vocabulary: Vocabulary) -> Ints:
    ids = np.flatnonzero(vocabulary.exists_V)
    optional = ~np.isin(ids, vocabulary.must_keep)
    return ids[np.lexsort((ids, -total_V[ids], -own_V[ids], optional))]


def _size_for(target: float, part: Part, parts: list[Part], counts: Counts, least: int) -> int:
    """The smallest multiple of `ROUND` whose map holds that share of the held-out tokens; for `mixed`, of each name's.

    `least`: what every map holds."""
    size = least
    for wanted in parts if part.name == MIXED else [part]:
        held_V = np.sum([counts.held_out[cell] for cell in wanted.cells], axis=0)
        if not held_V.any():
            raise FastMTPError(
                f"--coverage: no held-out row of {wanted.name!r} to measure on; raise --held_out, add rows, or --sizes"
            )
        shares = covered(part.order, held_V)
        size = max(size, int(np.argmax(shares >= target)) + 1)
    return min(math.ceil(size / ROUND) * ROUND, len(part.order))
