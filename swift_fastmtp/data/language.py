"""The language a text is written in, for the filter that finds answers in another language than their question.

Chinese is told by its script; other languages by py3langid, which needs no network. Code and formulas are
English to any identifier, so they are taken out first.
"""

import re
from functools import cache
from typing import Any

from .language_names import UNKNOWN, language_code
from .scripts import HAN, KANA

MIN_LETTERS = 60
"""Fewer letters (Chinese characters count three) say too little."""
MIN_CONFIDENCE = 0.9
_LOOKED_AT = 800
# Formulas between brackets, `\[ .. \]` and `\( .. \)`, are only begun here: see `_without_code`.
_NO_PROSE = re.compile(
    r"```.*?(?:```|\Z)|~~~.*?(?:~~~|\Z)|`[^`\n]*`|<think>|</think>|https?://\S+"
    r"|\$\$.*?\$\$|\$[^$\n]*\$|(?P<formula>\\[\[(])|\\\w+|^(?: {4}|\t).*$",
    re.S | re.M,
)
_CLOSED_BY = {"\\[": "\\]", "\\(": "\\)"}
_CODE_LINE = re.compile(r"[{};]\s*$|^\s*(?:#include|import |from \w+ import|def |class |return\b|//|@)", re.M)
_HAN = re.compile(f"[{HAN}]")
_KANA = re.compile(f"[{KANA}]")


def language(text: str) -> str | None:
    """Code (`language_code`) of the language of a text's prose (`zh` for every Chinese), or None if there is too little
    of it or it is not clear."""
    lines = _without_code(text).splitlines()
    prose = " ".join(line for line in lines if not _CODE_LINE.search(line))[:_LOOKED_AT]
    han, kana = len(_HAN.findall(prose)), len(_KANA.findall(prose))
    letters = sum(map(str.isalpha, prose)) + 2 * (han + kana)
    if letters < MIN_LETTERS:
        return None
    if 3 * (han + kana) >= 0.5 * letters:
        return "ja" if kana > 0.1 * (han + kana) else "zh"
    if 3 * han > 0.1 * letters:
        return None  # a mixture
    label, confidence = _identifier().classify(prose)
    if confidence < MIN_CONFIDENCE:
        return None
    # py3langid has labels such as `kik`; a row's `language` is `ki` then, and both must be one name.
    code = language_code(label)
    return None if code == UNKNOWN else code


def _without_code(text: str) -> str:
    """The text with a space for each piece of code, formula or address.

    An expression alone would look for the end of each formula up to the end of the text: of many that nobody closed, in
    the square of their number. Here an end that is once not there is not looked for again.
    """
    kept: list[str] = []
    open_for_good: set[str] = set()
    start = place = 0
    while match := _NO_PROSE.search(text, place):
        place = match.end()
        if begin := match["formula"]:
            end = -1 if begin in open_for_good else text.find(_CLOSED_BY[begin], place)
            if end < 0:
                open_for_good.add(begin)
                continue
            place = end + 2
        kept += [text[start : match.start()], " "]
        start = place
    return "".join(kept) + text[start:]


@cache
def _identifier() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


def known_languages() -> set[str]:
    """The codes that `language` may return."""
    codes = {language_code(str(label)) for label in _identifier().nb_classes}
    return codes - {UNKNOWN}  # `zxx`, which is no language
