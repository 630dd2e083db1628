"""Which group a row belongs to, and the share of tokens that each group is to have.

Groups are data: a YAML file (`recipes/data/paper_mix.yaml`) says how they follow from a row's language and category.
What stands here is the same file as a dataclass, for who gives none, and the checks of it.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from ..errors import FastMTPError
from ..files import inputs
from ..files.rows import Row
from .language_names import UNKNOWN, language_tag
from .scripts import HAN, KANA

_HAN = re.compile(f"[{HAN}]")
_KANA = re.compile(f"[{KANA}]")


@dataclass
class Groups:
    """The keys of the YAML file; the defaults are the paper's shares (Appendix A)."""

    shares: dict[str, float] = field(default_factory=lambda: {"general": 0.42, "math": 0.18, "code": 0.13, "zh": 0.27})
    """Group -> its share of the mix's tokens; they sum to 1. A group without a share is left out of the mix."""
    languages: dict[str, list[str]] = field(default_factory=lambda: {"zh": ["zh"]})
    """Group -> languages of its rows, by name or tag; asked first. `zh` is all Chinese, `zh-Hant` what is tagged so."""
    categories: dict[str, list[str]] = field(
        default_factory=lambda: {
            "math": ["math"],
            "code": ["code"],
            "general": ["general", "qa", "rag", "summarization", "writing"],
            "zh": ["zh", "zh_exam", "zh_math", "zh_rag"],
        }
    )
    """Group -> values of `category`; asked next."""
    other: str = "general"
    """The group of every other row."""

    def group(self, row: Row, language: str) -> str:
        """The group of a row whose `language` is a tag of `language_tag`."""
        for group, names in self.languages.items():
            tags = map(language_tag, names)
            if any(language == tag or language.startswith(f"{tag}-") for tag in tags):
                return group
        for group, categories in self.categories.items():
            if row.get("category") in categories:
                return group
        return self.other


def read_groups(config: str | None, shares: Iterable[str] | None) -> Groups:
    """The groups of a YAML file, or the paper's; `shares` (`name=0.3`, ..) replace those of the file.

    Raises `FastMTPError` naming the file or option and the key that is wrong.
    """
    groups, where = Groups(), "--shares"
    if config:
        groups, where = _read_yaml(config), f"{config}: shares"
    if shares is not None:
        groups.shares, where = _parse_shares(shares), "--shares"
    _check_shares(groups.shares, where)
    return groups


def _read_yaml(path: str) -> Groups:
    values = inputs.read_yaml(path)
    keys = [f.name for f in fields(Groups)]
    if not isinstance(values, dict):
        raise FastMTPError(f"{path}: must hold the keys {', '.join(keys)}")
    for key, value in values.items():
        if key not in keys:
            raise FastMTPError(f"{path}: unknown key {key!r}; there are {', '.join(keys)}")
        if key == "other":
            if not isinstance(value, str):
                raise FastMTPError(f"{path}: other: must be the name of a group")
        elif not isinstance(value, dict) or not all(isinstance(name, str) for name in value):
            raise FastMTPError(f"{path}: {key}: must map names of groups, as in recipes/data/paper_mix.yaml")
        elif key != "shares":
            for name, entry in value.items():
                if not isinstance(entry, list) or not all(isinstance(x, str) and x for x in entry):
                    raise FastMTPError(f"{path}: {key}: {name}: must be a list of strings")
    groups = Groups(**values)
    for key, names in (("languages", groups.languages), ("categories", groups.categories), ("other", [groups.other])):
        for name in names:
            if name not in groups.shares:
                raise FastMTPError(f"{path}: {key}: group {name!r} has no share; add it to `shares`, 0 leaves it out")
    return groups


def _parse_shares(texts: Iterable[str]) -> dict[str, float]:
    shares: dict[str, float] = {}
    for text in texts:
        name, _, number = text.partition("=")
        if not name or name in shares:
            raise FastMTPError(f"--shares {text}: must be name=number, each name once, as in math=0.18")
        try:
            shares[name] = float(number)
        except ValueError:
            raise FastMTPError(f"--shares {text}: must be name=number, as in math=0.18") from None
    return shares


def _check_shares(shares: Mapping[str, Any], where: str) -> None:
    for name, share in shares.items():
        if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 <= share <= 1:
            raise FastMTPError(f"{where}: {name}: {share!r} is not a number from 0 to 1")
    total = sum(shares.values())
    if abs(total - 1) > 1e-6:
        raise FastMTPError(f"{where}: sum to {total:.6g}, not 1; they are fractions of the mix's tokens")


def language_of(row: Row) -> str:
    """The tag of the row's `language` (`language_tag`); without it `zh` for Chinese script without kana, else
    `unknown`."""
    tag = language_tag(row.get("language"))
    if tag != UNKNOWN:
        return tag
    text = " ".join(m["content"] for m in row["messages"])
    han, kana = len(_HAN.findall(text)), len(_KANA.findall(text))
    # One ideograph says about what three letters of another script say; some kana make it Japanese.
    chinese = 3 * han >= 0.5 * (sum(map(str.isalpha, text)) + 2 * han) and kana <= 0.1 * han
    return "zh" if han and chinese else UNKNOWN
