"""`fastmtp doctor --data`: would a head be trained on what this model is asked? Before hours of training tell."""

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.config_file import vocabulary_size
from ..data.chat_template import check_chat_template, load_tokenizer
from ..data.examples import check_vocabulary, rendered_otherwise, training_examples
from ..errors import FastMTPError
from ..files.rows import BadRows, iter_rows
from .finding import Finding

FOREIGN = "the chat template renders {n} of {rows} rows otherwise than they were asked"
UNUSABLE = "{n} of {rows} rows cannot be trained on"
UNFINISHED = "{n} of {rows} rows have no answer that can be trained on"


def examine_data(folder: str | Path, file: str | Path) -> list[Finding]:
    """All findings about the rows of a data file, for a model folder.

    Raises `FastMTPError` if the file cannot be read.
    """
    tokenizer = load_tokenizer(str(folder))
    try:
        check_chat_template(tokenizer, folder)
    except FastMTPError as error:
        return [Finding("error", str(error), "nothing can be asked, and rows cannot be rendered", "see above")]
    model = Checkpoint(folder)
    vocab_size = vocabulary_size(model.config, model.config_file)

    places: dict[str, list[str]] = defaultdict(list)
    bad = BadRows("skip")
    rows = 0
    for where, row in iter_rows(file, bad):
        rows += 1
        try:
            other = rendered_otherwise(tokenizer, row)
            examples = training_examples(tokenizer, row)
            for example in examples:
                check_vocabulary(example, vocab_size)
        except FastMTPError as error:
            places[UNUSABLE].append(f"{where}: {error}")
            continue
        if other is not None:
            texts = f"asked {other.kept!r}, rendered {other.rendered!r}"
            places[FOREIGN].append(f"{where}: from token {other.token} on: {texts}")
        elif not examples:
            places[UNFINISHED].append(where)
    for what, count in bad.counts.items():
        places[UNUSABLE] += [f"{place}: {what}" for place in bad.places[what]]
        places[UNUSABLE] += [what] * (count - len(bad.places[what]))
    return list(_findings(places, rows + bad.total, str(folder)))


def _findings(places: dict[str, list[str]], rows: int, folder: str) -> Iterator[Finding]:
    texts = {
        FOREIGN: (
            "error",
            "a head that is trained behind other prompts than it is served behind follows states that never occur",
            f"give the folder that the rows were distilled with instead of {folder}, or distill them again",
        ),
        UNUSABLE: (
            "error",
            "training stops at the first of them",
            'fix or remove them, or train with --model_kwargs \'{"fastmtp_on_bad_row": "skip"}\'',
        ),
        UNFINISHED: (
            "warning",
            "an answer that was cut off and has no token_ids is not trained on: as text, its end is not known",
            "use rows as `fastmtp distill` writes them, or distill with a larger --max_new_tokens",
        ),
    }
    for what, (level, why, how_to_fix) in texts.items():
        if rows_of_it := places.get(what):
            first = f"{what.format(n=len(rows_of_it), rows=rows)}; first: {rows_of_it[0]}"
            yield Finding(level, first, why, how_to_fix)
