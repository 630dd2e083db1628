"""Dataset `fastmtp-self-distill`: rows as `fastmtp distill` writes them, or plain `messages`.

    --dataset fastmtp-self-distill:distilled.jsonl           all rows; also .jsonl.gz, .jsonl.xz, .parquet
    --dataset fastmtp-self-distill:/data/distilled.jsonl#500 a sample, in ms-swift's own syntax

A file whose rows have `messages` is read so without the name too (`own_name`). Nothing of a row is lost on the way to
`rendering.py`: ms-swift's own reader would drop token ids, reasoning, tool calls and finish reasons.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, IterableDataset, Json, List, Value
from datasets.exceptions import DatasetGenerationError
from modelscope.hub.utils.utils import get_cache_dir
from swift.dataset.dataset_syntax import DatasetSyntax
from swift.dataset.loader import DatasetLoader
from swift.utils import safe_ddp_context

from .. import __version__
from ..errors import FastMTPError
from ..files.rows import BadRows, as_json, dump_row, iter_rows, iter_values, write_rows
from ..method.config import HOW_TO_SKIP
from .knobs import run_knobs

NAME = "fastmtp-self-distill"
SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.xz", ".parquet")
# Messages and tools differ from row to row: as plain JSON, Arrow neither pads nor refuses.
FEATURES = Features(
    {
        "messages": List(Json()),
        "tools": List(Json()),
        "chat_template_kwargs": Json(),
        "finish_reason": Value("string"),
        "source": Value("string"),
        "left_out": Value("string"),
    }
)


def own_name(dataset: str) -> str:
    """What `--dataset` names, by our loader where it is a file whose first row has `messages`."""
    syntax = DatasetSyntax.parse(dataset)
    path = syntax.dataset
    if syntax.dataset_type != "path" or not path.endswith(SUFFIXES) or "#" in path or syntax.subsets:
        return dataset
    _, first = next(iter_values(path, BadRows("skip")), ("", None))
    if not isinstance(first, dict) or not first.get("messages"):
        return dataset
    sample = "" if syntax.dataset_sample is None else f"#{syntax.dataset_sample}"
    return f"{NAME}:{path}{sample}"


class SelfDistillLoader(DatasetLoader):
    """Reads the file named behind the colon, which ms-swift's syntax parses as a list of subsets."""

    def load(self, dataset_syntax: Any = None, dataset_meta: Any = None, *, use_hf: bool | None = None) -> Any:
        path = "/".join(dataset_syntax.subsets)
        if not path:
            raise FastMTPError(f"--dataset {NAME}: name the file, as in {NAME}:distilled.jsonl")
        if not Path(path).is_file():
            raise FastMTPError(f"--dataset {NAME}:{path}: no such file")
        stamp = Path(path).stat()
        key = f"{__version__} {stamp.st_size} {stamp.st_mtime_ns}"
        policy = run_knobs().on_bad_row
        source = {"path": str(Path(path).resolve()), "shown": path, "on_bad_row": policy, "cache_key": key}
        if self.streaming:
            return IterableDataset.from_generator(_rows, features=FEATURES, gen_kwargs=source)
        try:
            with safe_ddp_context(None, True):
                cache = str(Path(get_cache_dir()) / "datasets")
                return Dataset.from_generator(_rows, features=FEATURES, gen_kwargs=source, cache_dir=cache)
        except DatasetGenerationError as error:
            raise error.__cause__ if isinstance(error.__cause__, FastMTPError) else error from None
        except ValueError:
            if next(_rows(**source), None) is not None:
                raise
            raise FastMTPError(f"--dataset {NAME}:{path}: holds no rows") from None


def _rows(path: str, shown: str, on_bad_row: str, cache_key: str) -> Iterator[dict[str, Any]]:
    """The rows of a file; a bad one as a row that says why it is left out, unless it stops the run.

    `cache_key` is there for datasets, which makes the name of its cache of the arguments.
    """
    bad = BadRows(on_bad_row, how_to_skip=HOW_TO_SKIP)
    for where, row in iter_rows(path, bad):
        kept = {key: row.get(key) for key in ("messages", "tools", "chat_template_kwargs", "finish_reason")}
        yield {**kept, "source": where, "left_out": ""}
    for what, count in bad.counts.items():
        places = bad.places[what]
        for number in range(count):
            place = places[number] if number < len(places) else shown
            yield {"messages": [], "source": place, "left_out": what}


def save_dataset(name: str, path: Path, on_bad_row: str = "stop") -> None:
    """Write the rows of a dataset in ms-swift's syntax (`id[:subset][#count]`, or a file) with `messages`.

    ms-swift deletes rows that its preprocessor cannot read: with `on_bad_row` "stop" the first of them is an error.

    Raises `FastMTPError` if ms-swift cannot load it.
    """
    from swift.dataset import load_dataset

    try:
        # Not from ms-swift's cache: what a run with other options deleted is not in there.
        dataset, _ = load_dataset(
            [name], split_dataset_ratio=0.0, strict=on_bad_row == "stop", load_from_cache_file=False
        )
        with write_rows(path) as file:
            for row in dataset:
                file.write(dump_row(as_json(row)))
    except Exception as error:  # noqa: BLE001 (whatever a network and somebody's files may do)
        what = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise FastMTPError(
            f"swift:{name}: cannot be loaded ({what}); if a row of it is at fault, --on_bad_row skip leaves it out"
        ) from None
