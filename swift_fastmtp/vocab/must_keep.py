"""What a draft must always be able to say, however rare it is in a corpus: the ids that every token map holds.

A map without the end token never drafts the end of an answer; one without single bytes stops at every rare character.
FR-Spec's maps keep one end token. Here it is what the tokenizer and the model's own files say.
"""

import string
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..checkpoint.checkpoint import Checkpoint
from ..data.chat_template import load_tokenizer
from ..errors import FastMTPError
from ..families.family import config_value
from ..files.copies import file_hash
from ..files.known_files import read_object

TAGS = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
"""Kept where the vocabulary has them as one token, whether or not the tokenizer says that they were added."""
_KEPT_CHARACTERS = set(string.digits + string.punctuation)
# How byte-level and SentencePiece vocabularies spell white space.
_WHITESPACE = str.maketrans({"Ġ": " ", "Ċ": "\n", "ĉ": "\t", "č": "\r", "▁": " "})


@dataclass(frozen=True)
class Vocabulary:
    """The tokens of a model folder."""

    rows: int
    """V, of the model's output matrix (`vocab_size`); some may be padding."""
    exists_V: NDArray[np.bool_]
    """The rows that the tokenizer has a token for. Padding is never drafted."""
    must_keep: tuple[int, ...]
    """Ascending."""
    tokenizer_sha256: str
    """Of the bytes of tokenizer.json."""
    tokenizer: Any
    """The `tokenizers.Tokenizer`: other processes get it without importing transformers."""

    @property
    def size(self) -> int:
        return int(self.exists_V.sum())


def read_vocabulary(model_dir: str | Path) -> Vocabulary:
    """The vocabulary of a model folder: config.json, generation_config.json and the tokenizer's files.

    Raises `FastMTPError` naming the file and what is wrong with it.
    """
    folder = Path(model_dir)
    checkpoint = Checkpoint(folder)
    config, rows = checkpoint.config, checkpoint.vocab_size
    tokenizer = load_tokenizer(str(folder))
    tokens = all_tokens(tokenizer)
    exists_V = np.zeros(rows, dtype=bool)
    exists_V[[i for i in tokens.values() if i < rows]] = True
    kept = must_keep(tokenizer, _end_ids(folder, config))
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise FastMTPError(f"{folder}: the tokenizer has no fast version; save one with transformers")
    return Vocabulary(rows, exists_V, tuple(sorted(i for i in kept if i < rows)), tokenizer_hash(folder), backend)


def all_tokens(tokenizer: Any) -> dict[str, int]:
    """Token -> id of everything a tokenizer has, added tokens too."""
    return {**tokenizer.get_vocab(), **{str(t): i for i, t in tokenizer.added_tokens_decoder.items()}}


def must_keep(tokenizer: Any, end_ids: set[int]) -> set[int]:
    """Ids of special and added tokens, tags, single bytes, digits, ASCII punctuation (with a space before it, too) and
    runs of white space, of the real tokenizer; and `end_ids`."""
    from tokenizers.pre_tokenizers import ByteLevel

    kept = {*tokenizer.added_tokens_decoder, *tokenizer.all_special_ids}
    vocabulary = all_tokens(tokenizer)
    names = {*TAGS, *ByteLevel.alphabet(), *(f"<0x{byte:02X}>" for byte in range(256))}
    kept |= {vocabulary[name] for name in names if name in vocabulary}
    for token, number in vocabulary.items():
        text = token.translate(_WHITESPACE)
        if not text.strip() or text.removeprefix(" ") in _KEPT_CHARACTERS:
            kept.add(number)
    return kept | (end_ids & set(vocabulary.values()))


def tokenizer_hash(model_dir: str | Path) -> str:
    """SHA-256 of tokenizer.json. Raises `FastMTPError` if there is none."""
    path = Path(model_dir) / "tokenizer.json"
    if not path.is_file():
        raise FastMTPError(f"{path}: not found; maps are tied to this file, save it there")
    return file_hash(path)


def _end_ids(folder: Path, config: dict[str, Any]) -> set[int]:
    values = [read_object(folder / "generation_config.json").get("eos_token_id"), config_value(config, "eos_token_id")]
    stop_ids: set[int] = set()
    for value in values:
        ids = value if isinstance(value, list) else [value]
        stop_ids.update(i for i in ids if isinstance(i, int))
    return stop_ids
