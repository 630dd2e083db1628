"""The language of a prompt or an answer, from its token ids: which token map a request drafts with.

A server sees every request and every answer growing, so this has to cost microseconds: each id has a script class,
looked up once per tokenizer, and a language is a share of classes. Text that is nothing clearly has no name; it drafts
with the whole vocabulary.
"""

import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from ..data.language import known_languages, language
from ..data.scripts import HAN, KANA
from ..errors import FastMTPError

CLASSES = ("neutral", "latin", "han", "kana", "hangul", "cyrillic", "arabic", "code")
_NEUTRAL, _LATIN, _HAN, _KANA, _HANGUL, _CYRILLIC, _ARABIC, _CODE = range(len(CLASSES))
# Asked in this order; a token with one such character has the class.
_SCRIPTS = (
    (_KANA, re.compile(f"[{KANA}]")),
    (_HANGUL, re.compile(r"[\uac00-\ud7af\u1100-\u11ff]")),
    (_HAN, re.compile(f"[{HAN}]")),
    (_CYRILLIC, re.compile(r"[\u0400-\u04ff]")),
    (_ARABIC, re.compile(r"[\u0600-\u06ff]")),
)
# What prose hardly has: brackets of blocks, operators, names with underscores, indentation.
_CODE_TOKEN = re.compile(r"[{}\[\]=<>_\\;|&#]|\(\)|\)\.|::|->|//|```|^(?: {3,}|\t+|\s*\n[ \t]+)$")
_LATIN_TOKEN = re.compile(r"[A-Za-z\u00c0-\u024f]")

MIN_TOKENS = 4
"""Fewer tokens with a class say nothing."""
_ROLE_TOKENS = 2
LOOKED_AT = 512
"""Tokens at the end of a text that are looked at."""
SHARES = {"code": 0.2, "ja": 0.15, "ko": 0.3, "zh": 0.5, "ru": 0.5, "ar": 0.5, "en": 0.85}


class TokenLanguages:
    """The script classes of a tokenizer's ids.

    `en` is any Latin script, `ru` any Cyrillic one, `ar` any Arabic one: `Languages` tells others in them.
    """

    def __init__(self, tokenizer: Any) -> None:
        ids = range(len(tokenizer))
        self.special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
        texts = tokenizer.batch_decode([[i] for i in ids])
        classes = [_NEUTRAL if i in self.special else _class(t) for i, t in zip(ids, texts, strict=True)]
        self.classes = np.array(classes, np.uint8)

    def of_prompt(self, ids: Sequence[int]) -> str | None:
        """The language of what was said last: a chat template's system prompt and roles, mostly English, do not
        count."""
        return self(self.last_said(ids))

    def last_said(self, ids: Sequence[int]) -> Sequence[int]:
        """The last part between two special tokens which has more than a role's name; all ids if there is none."""
        end = len(ids)
        while end > 0:
            start = end
            while start > 0 and ids[start - 1] not in self.special:
                start -= 1
            if end - start >= MIN_TOKENS + _ROLE_TOKENS:
                return ids[start:end]
            end = start - 1
        return ids

    def __call__(self, ids: Sequence[int]) -> str | None:
        """`zh`, `en`, `code`, .. or None if the text is short, mixed or of another script."""
        window = np.asarray(ids[-LOOKED_AT:], dtype=np.int64)
        counts = np.bincount(self.classes[window[window < len(self.classes)]], minlength=len(CLASSES))
        counted = int(counts[1:].sum())
        if counted < MIN_TOKENS:
            return None
        share = counts / counted
        asian = share[_HAN] + share[_KANA]
        if share[_CODE] >= SHARES["code"] and asian < SHARES["code"]:
            return "code"
        if share[_KANA] >= SHARES["ja"]:
            return "ja"
        for name, found_share in (
            ("ko", share[_HANGUL]),
            ("zh", share[_HAN]),
            ("ru", share[_CYRILLIC]),
            ("ar", share[_ARABIC]),
            ("en", share[_LATIN]),
        ):
            if found_share >= SHARES[name]:
                return name
        return None


class Languages:
    """What names the language of prompts and answers for token maps of these names.

    Script and code are told by token ids, in microseconds. Languages that share a script with others (`de`, `fr`, `uk`)
    are told by py3langid from the text, once a map of such a name is given; then it has to be sure of `en`, `ru` and
    `ar` as well, so that nothing drafts with the map of a neighbor.

    Raises `FastMTPError` for a name that is no language anybody tells, or if py3langid is needed and not there.
    """

    def __init__(self, tokenizer: Any, names: Iterable[str]) -> None:
        self.by_ids = TokenLanguages(tokenizer)
        self.decode = tokenizer.decode
        self.by_text = check_names(names)

    def of_prompt(self, ids: Sequence[int]) -> str | None:
        """As `TokenLanguages.of_prompt`."""
        return self(self.by_ids.last_said(ids))

    def __call__(self, ids: Sequence[int]) -> str | None:
        """The language of tokens, or None: too short, mixed, or of no name that a map could have."""
        name = self.by_ids(ids)
        if not self.by_text or name not in (None, "en", "ru", "ar"):
            return name
        text = self.decode(ids[-LOOKED_AT:], skip_special_tokens=True)
        return language(text)


def check_names(names: Iterable[str]) -> set[str]:
    """The names that only py3langid tells. Raises as `Languages` does."""
    by_text = set(names) - set(SHARES)
    if by_text:
        try:
            known = known_languages()
        except ImportError:
            raise FastMTPError(f"token maps of {_list(by_text)} need py3langid: pip install py3langid") from None
        if unknown := by_text - known:
            raise FastMTPError(
                f"token maps: no text is ever told to be {_list(unknown)}; known: {_list(SHARES)}, and ISO 639-1 codes "
                "as de, fr, es"
            )
    return by_text


def _list(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))


def _class(text: str) -> int:
    for number, pattern in _SCRIPTS:
        if pattern.search(text):
            return number
    if _CODE_TOKEN.search(text):
        return _CODE
    return _LATIN if _LATIN_TOKEN.search(text) else _NEUTRAL
