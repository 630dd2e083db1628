"""Dataset `fastmtp-self-distill`: answers that the model generated itself, truncated ones left out.

    --dataset fastmtp-self-distill:distilled.jsonl           all rows
    --dataset fastmtp-self-distill:/data/distilled.jsonl#500 a sample, in ms-swift's own syntax

A row has `messages` ending with the assistant's answer and, from `fastmtp distill`, a `finish_reason`. An answer
that hit the token limit has no end-of-turn; training on it would teach one that the model never produced, so only
`stop` and `tool_calls` rows are kept. Rows without a `finish_reason` (written by `swift infer`) are taken as they are.
"""

from pathlib import Path
from typing import Any

from swift.dataset.loader import DatasetLoader
from swift.dataset.preprocessor import RowPreprocessor

from ..errors import FastMTPError

NAME = "fastmtp-self-distill"
COMPLETE = ("stop", "tool_calls")


class SelfDistillPreprocessor(RowPreprocessor):
    """Keeps complete answers, and of each row only what training reads."""

    def preprocess(self, row: dict[str, Any]) -> dict[str, Any] | None:
        if row.get("finish_reason") not in (None, *COMPLETE):
            return None
        messages = row.get("messages") or []
        if not messages or messages[-1]["role"] != "assistant" or not messages[-1]["content"]:
            return None
        return {k: row[k] for k in ("messages", "tools") if row.get(k)}


class SelfDistillLoader(DatasetLoader):
    """Reads the file named behind the colon, which ms-swift's syntax parses as a list of subsets."""

    def load(self, dataset_syntax: Any = None, dataset_meta: Any = None, *, use_hf: bool | None = None) -> Any:
        path = "/".join(dataset_syntax.subsets)
        if not path:
            raise FastMTPError(f"--dataset {NAME}: name the file, as in {NAME}:distilled.jsonl")
        if not Path(path).is_file():
            raise FastMTPError(f"--dataset {NAME}:{path}: no such file")
        dataset = self._load_dataset_path(path, dataset_meta=dataset_meta)
        if not self.streaming and len(dataset) == 0:
            raise FastMTPError(
                f"--dataset {NAME}:{path}: no row is left; every answer was truncated (finish_reason 'length') or "
                "empty: distill again with a larger --max_new_tokens"
            )
        return dataset
