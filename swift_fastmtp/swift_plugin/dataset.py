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

from datasets import Dataset, Features, IterableDataset, Json, List, Value
from modelscope.hub.utils.utils import get_cache_dir
from swift.dataset.loader import DatasetLoader
from swift.dataset.preprocessor import RowPreprocessor
from swift.utils import safe_ddp_context

from ..data.conversation import training_conversations
from ..data.rows import iter_rows
from ..errors import FastMTPError

NAME = "fastmtp-self-distill"
# Messages and tools differ from row to row in their keys; as plain JSON, Arrow cannot pad or refuse them.
FEATURES = Features(
    {"messages": List(Json()), "tools": List(Json()), "chat_template_kwargs": Json(), "finish_reason": Value("string")}
)


class SelfDistillPreprocessor(RowPreprocessor):
    """From a row, the conversations to train on: none, one, or one for each turn."""

    def preprocess(self, row: dict[str, Any]) -> list[dict[str, Any]]:
        conversations = training_conversations(row.get("messages") or [], row.get("finish_reason"))
        kept = {k: row[k] for k in ("tools", "chat_template_kwargs") if row.get(k)}
        return [{"messages": conversation, **kept} for conversation in conversations]


class SelfDistillLoader(DatasetLoader):
    """Reads the file named behind the colon, which ms-swift's syntax parses as a list of subsets."""

    def load(self, dataset_syntax: Any = None, dataset_meta: Any = None, *, use_hf: bool | None = None) -> Any:
        path = "/".join(dataset_syntax.subsets)
        if not path:
            raise FastMTPError(f"--dataset {NAME}: name the file, as in {NAME}:distilled.jsonl")
        if not Path(path).is_file():
            raise FastMTPError(f"--dataset {NAME}:{path}: no such file")
        stamp = Path(path).stat()
        source = {"path": str(Path(path).resolve()), "version": (stamp.st_size, stamp.st_mtime_ns)}
        if self.streaming:
            dataset = IterableDataset.from_generator(_rows, features=FEATURES, gen_kwargs=source)
        else:
            with safe_ddp_context(None, True):
                cache = str(Path(get_cache_dir()) / "datasets")
                dataset = Dataset.from_generator(_rows, features=FEATURES, gen_kwargs=source, cache_dir=cache)
        dataset = dataset_meta.preprocess_func(
            dataset,
            num_proc=self.num_proc,
            load_from_cache_file=self.load_from_cache_file,
            strict=self.strict,
            enable_auto_mapping=False,
        )
        if not self.streaming and len(dataset) == 0:
            raise FastMTPError(
                f"--dataset {NAME}:{path}: no row is left; every answer was truncated (finish_reason 'length') or "
                "empty: distill again with a larger --max_new_tokens"
            )
        return dataset


def _rows(path: str, version: tuple[int, int]) -> Iterator[dict[str, Any]]:
    """`version` is only there to be part of the cache's key."""
    for _, row in iter_rows(path):
        yield {k: row.get(k) for k in FEATURES}
