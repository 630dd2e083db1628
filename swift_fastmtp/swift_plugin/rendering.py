"""Rows become token ids before ms-swift encodes them: asked and answered, as `data/examples.py` says.

Of every dataset, ours and ms-swift's. Datasets caches the result under a name made from all that it depends on.
"""

import hashlib
import json
from typing import Any

from datasets import Features, IterableDataset, Json, List, Value
from swift.template import get_template
from swift.utils import get_logger, safe_ddp_context

from .. import __version__
from ..data.chat_template import encode_prompt
from ..data.examples import Difference, check_vocabulary, difference, rendered_otherwise, training_examples
from ..errors import FastMTPError
from ..files.row_forms import UnreadableRowError, normalize
from ..method.config import HOW_TO_SKIP
from .compat_swift import fingerprint_of
from .template import example_messages

CHECKED_ROWS = 16
"""Rows of each dataset whose prompts are rendered both ways before a run."""
SHOWN = 3
UNFINISHED = "without a finished answer"
MESSAGES = List(Json())
"""ms-swift's own feature: a content may be text, or ids."""
FEATURES = Features({"messages": MESSAGES, "left_out": Value("string"), "source": Value("string")})

logger = get_logger()


def as_token_ids(args: Any, template: Any, dataset: Any, on_bad_row: str, compare_with: str | None = None) -> Any:
    """A dataset of rows as one of examples whose contents are token ids (`example_messages`); None stays None.

    Args:
        args: ms-swift's.
        template: a `FolderTemplate`.
        on_bad_row: `stop`, or `skip`: rows that cannot be trained on are counted and named in the log.
        compare_with: ms-swift's template that the user named.

    Raises `FastMTPError` if some of the rows' prompts are rendered otherwise than they were asked, or than by
    `compare_with`; for a row that cannot be trained on, unless told otherwise; and if nothing is left.
    """
    if dataset is None:
        return None
    make = MakeExamples(args, template, on_bad_row)
    first_rows = list(dataset.take(CHECKED_ROWS)) if isinstance(dataset, IterableDataset) else list(_first(dataset))
    make.check(first_rows, compare_with)
    if isinstance(dataset, IterableDataset):
        columns = list(first_rows[0]) if first_rows else []
        examples = dataset.map(make, batched=True, batch_size=16, remove_columns=columns, features=FEATURES)
        return (
            examples.filter(_is_example).remove_columns(["left_out", "source"]).cast(Features({"messages": MESSAGES}))
        )
    with safe_ddp_context(None, True):
        examples = dataset.map(
            make,
            batched=True,
            num_proc=args.dataset_num_proc,
            load_from_cache_file=args.load_from_cache_file,
            remove_columns=dataset.column_names,
            features=FEATURES,
            new_fingerprint=make.fingerprint(dataset),
            desc="prompts and answers as token ids",
        )
    left_out = [i for i, why in enumerate(examples["left_out"]) if why]
    _log_left_out(examples, left_out, len(dataset))
    kept = examples.select([i for i, why in enumerate(examples["left_out"]) if not why]) if left_out else examples
    if not len(kept):
        why = examples[left_out[0]]
        if why["left_out"] != UNFINISHED:
            raise FastMTPError(f"--dataset: no row is left; {why['source']}: {why['left_out']}")
        raise FastMTPError(
            "--dataset: no row is left; every answer is empty, or was truncated (finish_reason 'length') and has no "
            "token_ids: distill again with a larger --max_new_tokens"
        )
    return kept.remove_columns(["left_out", "source"])


class MakeExamples:
    """Batches of rows to batches of examples: a function for `datasets.map`, which sends it to its workers."""

    def __init__(self, args: Any, template: Any, on_bad_row: str) -> None:
        self.tokenizer = template.tokenizer
        self.processor = template.processor  # the same, with what ms-swift adds to it
        self.model_dir = args.model_dir
        self.vocab_size = template.config.vocab_size
        self.on_bad_row = on_bad_row
        self.last_only = template.loss_scale.base_strategy == "last_round"
        self.system = args.system
        self.kwargs = {} if args.enable_thinking is None else {"enable_thinking": args.enable_thinking}

    def __call__(self, batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        made: dict[str, list[Any]] = {"messages": [], "left_out": [], "source": []}
        for number in range(len(batch["messages"])):
            row = {key: column[number] for key, column in batch.items() if column[number] is not None}
            source = row.get("source") or "a row"
            left_out = row.get("left_out") or ""
            examples: list[Any] = []
            if not left_out:
                examples, left_out = self._examples(row, source)
            for example in examples:
                made["messages"].append(example_messages(example))
                made["left_out"].append("")
                made["source"].append(source)
            if left_out:
                made["messages"].append([])
                made["left_out"].append(left_out)
                made["source"].append(source)
        return made

    def _examples(self, row: dict[str, Any], source: str) -> tuple[list[Any], str]:
        """The examples of a row, or why it has none."""
        try:
            examples = training_examples(self.tokenizer, self._prepared(_in_our_form(row)), self.kwargs)
            for example in examples:
                check_vocabulary(example, self.vocab_size)
        except FastMTPError as error:
            if self.on_bad_row == "stop":
                raise FastMTPError(f"{source}: {error}; fix the row, or {HOW_TO_SKIP}") from None
            return [], str(error)
        return examples, "" if examples else UNFINISHED

    def _prepared(self, row: dict[str, Any]) -> dict[str, Any]:
        """The row with what the command says of all rows: `--system`, where it has no system message of its own, and
        `--loss_scale last_round`."""
        messages = [dict(message) for message in row["messages"]]
        if self.last_only:
            last_user = max((i for i, m in enumerate(messages) if m["role"] == "user"), default=0)
            for message in messages[:last_user]:
                message["loss"] = False
        if self.system is not None and messages[0]["role"] != "system":
            if any("prompt_token_ids" in message for message in messages):
                raise FastMTPError("--system: the row keeps the prompts that were asked, without it; drop --system")
            messages.insert(0, {"role": "system", "content": self.system})
        return {**row, "messages": messages}

    def check(self, rows: list[dict[str, Any]], compare_with: str | None) -> None:
        """Render the prompts of some rows in every way there is, and raise if two are not the same."""
        other = self._named_template(compare_with) if compare_with else None
        for row in rows:
            if row.get("left_out"):
                continue
            row = {key: value for key, value in row.items() if value is not None}
            source = row.get("source") or "a row of --dataset"
            try:
                prepared = self._prepared(_in_our_form(row))
                kept = rendered_otherwise(self.tokenizer, prepared, self.kwargs)
                named = self._named_otherwise(other, prepared) if other else None
            except FastMTPError:
                continue  # said when the row's turn comes, where it may be skipped
            if kept is not None:
                raise FastMTPError(
                    f"{source}: was asked with another prompt than the chat template of {self.model_dir} renders, from "
                    f"token {kept.token} on: asked {kept.kept!r}, rendered {kept.rendered!r}; train with the "
                    "folder that the rows were distilled with, or distill them again"
                )
            if named is not None:
                raise FastMTPError(
                    f"--template {compare_with}: renders {source} otherwise than the chat template of "
                    f"{self.model_dir}, which is served, from token {named.token} on: {named.kept!r}, and the folder's "
                    f"{named.rendered!r}; drop --template"
                )

    def _named_template(self, name: str) -> Any:
        template = get_template(self.processor, template_type=name)
        template.set_mode("transformers")  # prompts, as `swift infer` asks them
        return template

    def _named_otherwise(self, template: Any, row: dict[str, Any]) -> Difference | None:
        """Where a template of ms-swift's renders the row's first prompt otherwise than the folder's."""
        messages = row["messages"]
        first = next((i for i, m in enumerate(messages) if m["role"] == "assistant"), len(messages))
        asked = {**row, "messages": [{k: m[k] for k in ("role", "content")} for m in messages[:first]]}
        kwargs = {**self.kwargs, **(row.get("chat_template_kwargs") or {})}
        ours = encode_prompt(self.tokenizer, asked["messages"], row.get("tools"), kwargs)
        theirs = template.encode({**asked, "chat_template_kwargs": kwargs})["input_ids"]
        return None if theirs == ours else difference(self.tokenizer, theirs, ours)

    def fingerprint(self, dataset: Any) -> str:
        """A name for the result in datasets' cache."""
        vocabulary = sorted(self.tokenizer.get_vocab().items())
        what = {
            "dataset": fingerprint_of(dataset),
            "version": __version__,
            "tokenizer": hashlib.sha256(repr(vocabulary).encode()).hexdigest(),
            "chat_template": self.tokenizer.chat_template,
            "vocab_size": self.vocab_size,
            "last_only": self.last_only,
            "system": self.system,
            "kwargs": self.kwargs,
            "on_bad_row": self.on_bad_row,
        }
        return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]


def _in_our_form(row: dict[str, Any]) -> dict[str, Any]:
    """ms-swift's datasets have forms of their own; rows with a `source` were read by our reader."""
    if "source" in row:
        return row
    try:
        return normalize(row)
    except UnreadableRowError as error:
        raise FastMTPError(str(error)) from None


def _is_example(row: dict[str, Any]) -> bool:
    return not row["left_out"]


def _first(dataset: Any) -> Any:
    return (dataset[i] for i in range(min(CHECKED_ROWS, len(dataset))))


def _log_left_out(examples: Any, left_out: list[int], rows: int) -> None:
    """One line that counts what is not trained on, and names the first of it."""
    if not left_out:
        return
    chosen = examples.select(left_out)
    unfinished = sum(why == UNFINISHED for why in chosen["left_out"])
    logger.info(f"--dataset: {unfinished} of {rows} rows left out, {UNFINISHED}")
    bad = [(s, w) for s, w in zip(chosen["source"], chosen["left_out"], strict=True) if w != UNFINISHED]
    if bad:
        first = "; ".join(f"{source}: {why}" for source, why in bad[:SHOWN])
        logger.warning(f"--dataset: {len(bad)} of {rows} rows skipped, which cannot be trained on: {first}")
