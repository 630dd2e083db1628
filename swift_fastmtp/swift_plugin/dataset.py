"""Dataset `fastmtp-self-distill`: answers that the model generated itself, token by token as it did.

    --dataset fastmtp-self-distill:distilled.jsonl           all rows; also .jsonl.gz, .jsonl.xz, .parquet
    --dataset fastmtp-self-distill:/data/distilled.jsonl#500 a sample, in ms-swift's own syntax

Rows are what `fastmtp distill` writes, or plain `messages`. An answer that hit the token limit has no end-of-turn;
training on it would teach one that the model never produced, so it is left out. Answers with `token_ids` are trained on
exactly these tokens, the end token included: text, encoded again, may be other tokens than the model chose.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, IterableDataset, Json, List
from datasets.exceptions import DatasetGenerationError
from modelscope.hub.utils.utils import get_cache_dir
from swift.dataset.loader import DatasetLoader
from swift.utils import get_logger, safe_ddp_context

from .. import __version__
from ..data.conversation import training_conversations
from ..data.rows import dump_row, iter_rows, write_rows
from ..errors import FastMTPError

NAME = "fastmtp-self-distill"
# A message's content is text or ids, and tools differ from row to row: as plain JSON, Arrow neither pads nor refuses.
FEATURES = Features({"messages": List(Json()), "tools": List(Json()), "chat_template_kwargs": Json()})

logger = get_logger()


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
        source = {"path": str(Path(path).resolve()), "cache_key": key}
        if self.streaming:
            return IterableDataset.from_generator(_conversations, features=FEATURES, gen_kwargs=source)
        try:
            with safe_ddp_context(None, True):
                cache = str(Path(get_cache_dir()) / "datasets")
                return Dataset.from_generator(_conversations, features=FEATURES, gen_kwargs=source, cache_dir=cache)
        except DatasetGenerationError as error:
            raise error.__cause__ if isinstance(error.__cause__, FastMTPError) else error from None
        except ValueError as error:
            if "no data" not in str(error):
                raise
            raise FastMTPError(
                f"--dataset {NAME}:{path}: no row is left; every answer was truncated (finish_reason 'length') or "
                "empty: distill again with a larger --max_new_tokens"
            ) from None


def _conversations(path: str, cache_key: str) -> Iterator[dict[str, Any]]:
    """`cache_key` is there for datasets, which makes the name of its cache of the arguments."""
    rows = unfinished = 0
    for _, row in iter_rows(path):
        conversations = training_conversations(row["messages"], row.get("finish_reason"))
        rows += 1
        unfinished += not conversations
        for conversation in conversations:
            yield {"messages": conversation, **{k: row.get(k) for k in ("tools", "chat_template_kwargs")}}
    logger.info(f"{path}: {unfinished} of {rows} rows left out, without a finished answer")


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
                file.write(dump_row({k: v for k, v in row.items() if v is not None}, default=str))
    except Exception as error:  # whatever a network and somebody's files may do
        what = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise FastMTPError(
            f"swift:{name}: cannot be loaded ({what}); if a row of it is at fault, --on_bad_row skip leaves it out"
        ) from None


def with_features(dataset: Any) -> Any:
    """A streamed dataset whose columns have types again: ms-swift's mapping drops them and would then guess from rows
    that one column holds one type, but a content is text or ids."""
    if not isinstance(dataset, IterableDataset) or dataset.features is not None:
        return dataset
    first: dict[str, Any] = next(iter(dataset), {})
    return dataset.cast(Features({name: FEATURES.get(name, Json()) for name in first})) if first else dataset
