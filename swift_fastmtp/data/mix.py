"""`fastmtp mix`: training and validation rows in which each group has its share of the tokens (paper, Appendix A).

The inputs are read once, into one temporary file and a few numbers per row: compressed and Parquet files cannot be
read at random places, and shuffled rows must be. Whatever is random is the order of seeded hashes of rows and
prompts, so the result depends on the rows and the seed, and not on the order of the files.
"""

import hashlib
import os
import platform
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from .. import __version__
from ..errors import FastMTPError
from ..files.copies import file_hash
from ..files.rows import BadRows, Row, dump_row, iter_rows, write_rows
from ..files.staging import new_folder, write_json
from ..redaction import redact_words
from .filters import TokenCounter
from .language_names import language_code
from .mix_groups import Groups, language_of, read_groups
from .mix_index import Index
from .mix_report import make_report, markdown, plot_lengths, table
from .scripts import normalized

Ints = NDArray[np.int64]
Hashes = NDArray[np.uint64]
TokenCount = int
"""As a word of the command line: see `parse_tokens`."""


def mix(  # noqa: PLR0913
    inputs: Sequence[str],
    output_dir: str,
    *,
    shares: Sequence[str] | None = None,
    config: str | None = None,
    tokens: TokenCount | None = None,
    count: Literal["answers", "all"] = "answers",
    max_repeat: int = 1,
    val_ratio: float = 0.005,
    seed: int = 0,
    model: str | None = None,
    on_bad_row: Literal["stop", "skip"] = "stop",
) -> None:
    """Write train.jsonl, val.jsonl, report.md, report.json, lengths.png and manifest.json to a new folder.

    Args:
        inputs: JSONL (.gz, .xz) or Parquet; group=FILE assigns all its rows to a group
        output_dir: folder to write; must not exist
        shares: GROUP=SHARE of the training tokens; default: those of the config, else the paper's
        config: YAML with shares and the rules of the groups, as recipes/data/paper_mix.yaml
        tokens: training tokens, on the command line also as 200M; default: as many as the shares allow
        count: which tokens; those of answers are what the loss is on
        max_repeat: how often a row may be in train.jsonl
        val_ratio: fraction of the prompts that is held out; 0 for no val.jsonl
        seed: of the choice of rows and of their order
        model: folder of the tokenizer that counts where there are no token_ids; default: estimate
        on_bad_row: skipped rows are in the report

    Raises `FastMTPError` if the folder exists, an input cannot be read or changes meanwhile, a row is bad (unless
    `on_bad_row` is "skip"), an option is impossible, or a group cannot fill its share.
    """
    if count not in ("answers", "all"):
        raise FastMTPError(f"--count {count}: must be `answers` or `all`")
    if max_repeat < 1:
        raise FastMTPError(f"--max_repeat {max_repeat}: must be at least 1, which is no repetition")
    if not 0 <= val_ratio <= 0.5:
        raise FastMTPError(f"--val_ratio {val_ratio}: must be from 0 to 0.5")
    if tokens is not None and tokens < 1:
        raise FastMTPError(f"--tokens {tokens}: must be at least 1")
    if not 0 <= seed < 2**64:
        raise FastMTPError(f"--seed {seed}: must be from 0 to 2**64 - 1")
    groups = read_groups(config, shares)
    files = _assigned(inputs, groups)
    bad, counter = BadRows(on_bad_row), TokenCounter(model)
    with new_folder(output_dir) as folder:
        hashes = [file_hash(path) for path, _ in files]
        spool = folder / "rows.tmp"
        index = _read(files, groups, bad, counter, count, seed, spool)
        if hashes != [file_hash(path) for path, _ in files]:
            raise FastMTPError("--inputs: a file changed while it was read; start again when it is complete")
        group_N = np.array(index.group_N, dtype=np.int64)
        row_N = np.array(index.row_N, dtype=np.uint64)
        counted_N = np.array(index.answer_tokens_N if count == "answers" else index.all_tokens_N, dtype=np.int64)
        held_N = held_out(
            np.array(index.prompt_N, dtype=np.uint64), group_N, np.array(index.language_N, dtype=np.int64), val_ratio
        )
        order_N = np.argsort(row_N, kind="stable")  # a random order; only equal rows have equal hashes
        pools = {name: order_N[((group_N == g) & ~held_N)[order_N]] for name, g in index.groups.numbers.items()}
        repeats_N, total = _select(pools, counted_N, groups.shares, tokens, max_repeat)
        val = order_N[held_N[order_N] & np.isin(group_N, _with_share(index, groups))[order_N]]
        val = val[np.unique(row_N[val], return_index=True)[1]]

        _write(folder / "train.jsonl", spool, index, _shuffled(repeats_N, row_N))
        if val_ratio:
            _write(folder / "val.jsonl", spool, index, val)
        spool.unlink()

        val_N = np.zeros(len(row_N), dtype=np.int64)
        val_N[val] = 1
        settings = {
            "shares": groups.shares,
            "languages": groups.languages,
            "categories": groups.categories,
            "other": groups.other,
            "tokens": tokens,
            "count": count,
            "max_repeat": max_repeat,
            "val_ratio": val_ratio,
            "seed": seed,
            "model": model,
            "on_bad_row": on_bad_row,
        }
        report = make_report(index, groups.shares, count, total, repeats_N, val_N)
        report |= {
            "messages_whose_tokens_come_from": dict(counter.how.most_common()),
            "held_out_rows": int(held_N.sum()),
            "identical_rows": len(row_N) - len(np.unique(row_N)),
            "bad_rows": bad.report(),
        }
        write_json({**report, "settings": settings}, folder / "report.json")
        (folder / "report.md").write_text(markdown(report), encoding="utf-8")
        plot_lengths(report, folder / "lengths.png")
        outputs = [path for path in sorted(folder.iterdir()) if path.is_file()]
        manifest = {
            "schema": "swift_fastmtp.mix/1",
            "swift_fastmtp": __version__,
            "python": platform.python_version(),
            "command": redact_words(sys.argv),
            "utc": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "settings": settings,
            "inputs": [
                {"file": path, "group": group, "sha256": digest}
                for (path, group), digest in zip(files, hashes, strict=True)
            ],
            "outputs": [{"file": path.name, "sha256": file_hash(path)} for path in outputs],
        }
        write_json(manifest, folder / "manifest.json")
    print(table(report, "groups"))
    estimated = ""
    if guesses := counter.how["estimate"]:  # often the prompts only: distilled answers have token_ids
        estimated = f"; tokens of {guesses} of {counter.how.total()} messages are estimated, --model counts them"
    print(
        f"{output_dir}: {int(repeats_N.sum())} training rows, {len(val)} validation rows, "
        f"{bad.total} bad rows left out; more: report.md{estimated}"
    )


def parse_tokens(text: str) -> int:
    """A number of tokens: 200000, 300K, 200M, 1.5B. Raises `ValueError` otherwise."""
    factor = {"K": 10**3, "M": 10**6, "B": 10**9}.get(text[-1:].upper(), 1)
    number = float(text[:-1]) * factor if factor > 1 else int(text)
    if not number < 2**63:  # infinite and NaN, too
        raise ValueError
    return round(number)


def _assigned(inputs: Sequence[str], groups: Groups) -> list[tuple[str, str | None]]:
    """(file, the group that all its rows are assigned to, if any)."""
    files: list[tuple[str, str | None]] = []
    for text in inputs:
        group, is_assigned, path = text.partition("=")
        if not is_assigned or Path(text).exists():
            files.append((text, None))
        elif group in groups.shares:
            files.append((path, group))
        else:
            raise FastMTPError(f"--inputs {text}: group {group!r} has no share; there are {', '.join(groups.shares)}")
    if len({os.path.realpath(path) for path, _ in files}) < len(files):
        raise FastMTPError("--inputs: a file is named twice; --max_repeat repeats rows")
    return files


def _read(
    files: list[tuple[str, str | None]],
    groups: Groups,
    bad: BadRows,
    counter: TokenCounter,
    count: str,
    seed: int,
    spool: Path,
) -> Index:
    """All rows, as lines of `spool` and as entries of the index."""
    index, start = Index(), 0
    key = seed.to_bytes(8, "big")
    with open(spool, "wb") as file, tqdm(unit="row", desc="read") as progress:
        for path, assigned in files:
            for where, row in iter_rows(path, bad):
                progress.update()
                try:
                    counter.check(row)
                except FastMTPError as error:
                    bad.add(where, "token ids that no row of this model has", str(error))
                    continue
                counts = counter(row)
                answer = sum(n for n, m in zip(counts, row["messages"], strict=True) if m["role"] == "assistant")
                if not (answer if count == "answers" else sum(counts)):
                    bad.add(where, "has no answer to count" if count == "answers" else "has no text to count",
                            "--count all counts prompts" if count == "answers" else "")  # fmt: skip
                    continue
                line = dump_row(row).encode()
                language = language_of(row)
                source = row.get("source")
                index.group_N.append(index.groups(assigned or groups.group(row, language)))
                index.language_N.append(index.languages(language_code(language)))
                index.source_N.append(index.sources(source if isinstance(source, str) and source else Path(path).name))
                index.answer_tokens_N.append(answer)
                index.all_tokens_N.append(sum(counts))
                index.prompt_N.append(_hash(prompt_text(row).encode(), key))
                index.row_N.append(_hash(line, key))
                index.start_N.append(start)
                index.length_N.append(len(line))
                file.write(line)
                start += len(line)
    if not start:
        raise FastMTPError(f"{', '.join(path for path, _ in files)}: no usable row")
    return index


def prompt_text(row: Row) -> str:
    """The messages before the first answer, but for case, width of characters and white space."""
    parts = []
    for message in row["messages"]:
        if message["role"] == "assistant":
            break
        text = normalized(message["content"]).casefold()
        parts.append(f"{message['role']}\n{' '.join(text.split())}")
    return "\0".join(parts)


def _hash(data: bytes, key: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8, key=key).digest(), "big")


def held_out(prompt_N: Hashes, group_N: Ints, language_N: Ints, ratio: float) -> NDArray[np.bool_]:
    """Which rows are for validation: those whose prompt's hash lies in the first `ratio` of all hashes.

    So each group and language loses its share, and a prompt stays on its side whatever else is added. A group's
    language that would have none, but has two prompts or more, gives the one with the smallest hash.
    """
    if ratio == 0 or not len(prompt_N):
        return np.zeros(len(prompt_N), dtype=bool)
    limit = np.uint64(ratio * 2**64)
    held_N: NDArray[np.bool_] = prompt_N < limit
    # Of each group's language (stratum) the smallest and the largest hash, in one pass over the rows.
    numbers_N = group_N * (language_N.max() + 1) + language_N
    strata_S, stratum_N = np.unique(numbers_N, return_inverse=True)
    smallest_S = np.full(len(strata_S), 2**64 - 1, dtype=np.uint64)
    largest_S = np.zeros(len(strata_S), dtype=np.uint64)
    np.minimum.at(smallest_S, stratum_N, prompt_N)
    np.maximum.at(largest_S, stratum_N, prompt_N)
    # What is held out are the smallest hashes, so a stratum that loses none is one whose smallest stays.
    has_none_S = smallest_S >= limit
    has_two_S = smallest_S != largest_S
    return held_N | np.isin(prompt_N, smallest_S[has_none_S & has_two_S])


def _with_share(index: Index, groups: Groups) -> list[int]:
    return [number for name, number in index.groups.numbers.items() if groups.shares.get(name, 0) > 0]


def _select(
    pools: dict[str, Ints], tokens_N: Ints, shares: dict[str, float], total: int | None, max_repeat: int
) -> tuple[Ints, int]:
    """How often each row is taken, and the tokens aimed at in all. `pools`: each group's rows in random order."""
    wanted = {name: share for name, share in shares.items() if share > 0}
    has = {name: int(tokens_N[pools[name]].sum()) if name in pools else 0 for name in wanted}
    for name in wanted:
        if not has[name]:
            raise FastMTPError(
                f"group {name!r} has a share of {wanted[name]:g} but no training rows; add such rows (--inputs "
                f"{name}=FILE), lower --val_ratio if it took them all, or change --shares"
            )
    largest = int(min(max_repeat * has[name] / share for name, share in wanted.items()))
    if total is None:
        total = largest
    elif total > largest:
        name = min(wanted, key=lambda n: has[n] / wanted[n])
        raise FastMTPError(
            f"group {name!r} has {has[name]} tokens, at most {max_repeat * has[name]} with --max_repeat {max_repeat}, "
            f"and needs {round(wanted[name] * total)} ({wanted[name]:g} of --tokens {total}); raise --max_repeat to "
            f"{-int(-wanted[name] * total // has[name])}, lower --tokens to {largest}, or change --shares"
        )
    repeats_N = np.zeros(len(tokens_N), dtype=np.int64)
    for name, share in wanted.items():
        pool = pools[name]
        repeats_N[pool] = take(tokens_N[pool], share * total)
        if not repeats_N[pool].any():
            raise FastMTPError(
                f"group {name!r}: its share of {total} tokens, {share * total:.4g}, is not half a row; raise --tokens, "
                "or, if the inputs allow no more, add rows or raise --max_repeat"
            )
    return repeats_N, total


def take(tokens_N: Ints, target: float) -> Ints:
    """How often to take each row of a group, in random order, for about `target` tokens: whole passes over all rows,
    then as many rows from the front as come closest, so within half a row of the target."""
    passes, rest = divmod(target, int(tokens_N.sum()))
    sums = np.concatenate(([0], np.cumsum(tokens_N)))
    front = int(np.abs(sums - rest).argmin())
    repeats_N = np.full(len(tokens_N), int(passes), dtype=np.int64)
    repeats_N[:front] += 1
    return repeats_N


def _shuffled(repeats_N: Ints, row_N: Hashes) -> Ints:
    """Row numbers, each as often as it is taken, in an order that depends on the rows' hashes only."""
    rows_M = np.repeat(np.arange(len(repeats_N)), repeats_N)
    first_M = np.repeat(np.cumsum(repeats_N) - repeats_N, repeats_N)
    copy_M = (np.arange(len(rows_M)) - first_M).astype(np.uint64)
    # splitmix64: selection took the smallest hashes, the order of the copies must not show that.
    mixed_M = row_N[rows_M] + (copy_M + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    mixed_M = (mixed_M ^ (mixed_M >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed_M = (mixed_M ^ (mixed_M >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed_M ^= mixed_M >> np.uint64(31)
    return rows_M[np.argsort(mixed_M, kind="stable")]


def _write(path: Path, spool: Path, index: Index, rows_M: Ints) -> None:
    descriptor = os.open(spool, os.O_RDONLY)
    try:
        with write_rows(path) as file:
            for i in tqdm(rows_M, unit="row", desc=path.name):
                file.write(os.pread(descriptor, index.length_N[i], index.start_N[i]).decode())
    finally:
        os.close(descriptor)
