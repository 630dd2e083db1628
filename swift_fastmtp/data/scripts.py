"""Characters of scripts that are written without spaces, for character classes of `re`; and one form for characters
that look alike."""

import re
import unicodedata

KANA = "\u3040-\u30ff"
HAN = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003134f"
CJK = KANA + HAN

_MOST_MARKS = 30
"""Accents on one letter; Unicode's own limit for texts that are read as they come (UAX 15, "stream-safe")."""
# What may be a run of accents; two kana marks are the only letters that become accents.
_MARKS = re.compile(rf"(?:[^\w\s\x00-\x7f]|[\uff9e\uff9f]){{{_MOST_MARKS + 1},}}")
_JOINER = "\u034f"
"""Combining grapheme joiner: ends a run of accents, and is seen by nobody."""


def normalized(text: str) -> str:
    """NFKC: one form for characters that differ in width or in how accents are written.

    Accents are put in order, which takes the square of their number; so a run of more than 30 is cut.
    """
    return unicodedata.normalize("NFKC", _MARKS.sub(_cut, text))


def _cut(match: "re.Match[str]") -> str:
    kept: list[str] = []
    run = 0
    for character in match[0]:
        is_mark = unicodedata.combining(unicodedata.normalize("NFKD", character)[0])
        run = run + 1 if is_mark else 0
        if run > _MOST_MARKS:
            kept.append(_JOINER)
            run = 1
        kept.append(character)
    return "".join(kept)
