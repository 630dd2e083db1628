"""No key or password is written or printed: every error, recorded command and server log goes through here.

Two things make a word a secret. It is known to be one: `hide` was told (a key that we were given, the password of an
address, a variable that a plan names), or the environment has it under a name like `HF_TOKEN`. Or its place says so:
behind `--api-key`, before the `@` of an address, in an `Authorization` header.
"""

import base64
import json
import os
import re
from collections.abc import Sequence
from urllib.parse import quote, unquote, urlsplit, urlunsplit

HIDDEN = "***"

_SECRET_NAME = re.compile(
    r"(?:(?:^|[_-])(?:key|token|authorization)|api[_-]?key|secret|password|passwd|passphrase)$", re.IGNORECASE
)
_PLACEHOLDERS = ("none", "empty", "null", "dummy")
"""What people give as a key to servers that want none."""
_SHORTEST = 4
"""Characters. A shorter word is everywhere in a text, and no secret."""
_SURE = 8
"""Characters from which a secret is found inside of other words too."""

# Where a secret may stand in any text: each pattern keeps group 1 and hides what follows. Lengths are bounded, so that
# the time is linear in the text.
_PLACES = (
    re.compile(r"(://)(?:[^\s\"'<>@]{0,256}@)+"),  # http://user:password@host
    re.compile(r"(\bAuthorization[\"']?\s{0,4}[:=]\s{0,4}[\"']?(?:Bearer\s|Basic\s)?)[^\s\"',;}]+", re.IGNORECASE),
    re.compile(r"(\b(?:Bearer|Basic)\s)[\w+/=.~-]{16,}"),
    re.compile(
        r"((?<![\w-])--?[\w-]{0,64}(?:api[_-]?key|token|secret|password)(?:\s{1,4}|=))(?!-)[^\s\"')]+", re.IGNORECASE
    ),
    re.compile(
        r"((?:api_?key|secret|password|passwd|access_?token|auth_?token|hf_?token)[\"']?\s{0,4}[:=]\s{0,4}[\"']?)"
        r"[^\s\"',;&)}]+",
        re.IGNORECASE,
    ),
    re.compile(r"(\b(?:sk-|hf_|ghp_))[\w-]{16,}"),  # as their makers write them
)

_known: dict[str, str] = {}
"""Secret -> what stands in its place."""


def hide(secret: str | None, shown: str = HIDDEN) -> None:
    """From now on `shown` stands in the place of `secret`, in every text."""
    if not secret or len(secret) < _SHORTEST or secret.lower() in _PLACEHOLDERS:
        return
    # As a server may repeat it: in JSON, as Python shows it, in an address.
    for form in (secret, json.dumps(secret)[1:-1], repr(secret)[1:-1], quote(secret, safe="")):
        # Where it comes from tells more than that it is hidden.
        if shown != HIDDEN or form not in _known:
            _known[form] = shown


def known_secrets() -> dict[str, str]:
    """Secret -> what stands in its place: those that `hide` was told, and those of the environment."""
    secrets = dict(_known)
    for name, value in os.environ.items():
        if is_secret_name(name) and len(value) >= _SURE:
            secrets.setdefault(value, f"${{{name}}}")
    # The longest first: one may be a part of another.
    return dict(sorted(secrets.items(), key=lambda item: -len(item[0])))


def is_secret_name(name: str) -> bool:
    """Whether a flag or a variable of this name holds a key or a password."""
    return _SECRET_NAME.search(name) is not None


def redact(text: str) -> str:
    """`text` without secrets."""
    return _redact(text, known_secrets())


def _redact(text: str, known: dict[str, str]) -> str:
    for secret, shown in known.items():
        if len(secret) >= _SURE:
            text = text.replace(secret, shown)
        elif secret in text:
            text = re.sub(rf"(?<!\w){re.escape(secret)}(?!\w)", lambda _, shown=shown: shown, text)  # type: ignore[misc]
    for place in _PLACES:
        text = place.sub(_hide_place, text)
    return text


def _hide_place(match: re.Match[str]) -> str:
    """The place without its secret; a variable that stands there tells nothing, and an address keeps its `@`."""
    value = match[0].removeprefix(match[1])
    if re.fullmatch(r"(?:\$\{\w+\}[:@]?)+", value):
        return match[0]
    return match[1] + HIDDEN + ("@" if match[1] == "://" else "")


def redact_words(words: Sequence[str], abbreviated: str = "--api") -> list[str]:
    """A command line without secrets: also what stands behind a flag that is called like one, whatever it is.

    Args:
        abbreviated: the shortest way to write `--api_key` for the command's own parser (argparse takes any beginning
            that fits one flag only).
    """
    known = known_secrets()
    shown = []
    behind_flag = False
    for word in words:
        flag, mark, value = word.partition("=")
        if behind_flag and not word.startswith("--"):
            shown.append(_shown(word))
        elif mark and _is_secret_flag(flag, abbreviated):
            shown.append(f"{flag}={_shown(value)}")
        else:
            shown.append(_redact(word, known))
        behind_flag = not mark and _is_secret_flag(word, abbreviated)
    return shown


def _is_secret_flag(flag: str, abbreviated: str) -> bool:
    if not flag.startswith("-"):
        return False
    plain = flag.replace("-", "_").lower()
    is_beginning = len(flag) >= len(abbreviated) and "__api_key".startswith(plain)
    return is_beginning or is_secret_name(flag.lstrip("-"))


def _shown(value: str) -> str:
    """What a plan wrote instead of a value stays: `${KEY}` tells where the key comes from."""
    return value if re.fullmatch(r"\$\{\w+\}", value) else HIDDEN


def hide_of_command(words: Sequence[str]) -> None:
    """`hide` what stands behind flags that are called like secrets: a server may print its arguments."""
    for word, shown, before in zip(words, redact_words(words), ["", *words], strict=False):
        if word == shown:
            continue
        flag, mark, value = word.partition("=")
        if mark and _is_secret_flag(flag, "--api"):
            hide(value)
        elif _is_secret_flag(before, "--api"):
            hide(word)


def without_login(url: str) -> str:
    """An address without `user:password@`."""
    parts = urlsplit(url)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


def authorization(url: str, api_key: str | None) -> str:
    """The `Authorization` header for an address: the login that it holds, else the key.

    From now on neither is in any text.
    """
    hide(api_key)
    parts = urlsplit(url)
    if not parts.username and not parts.password:
        return f"Bearer {api_key or 'none'}"
    user, password = unquote(parts.username or ""), unquote(parts.password or "")
    # A name without a password is a token, as hubs have them.
    hide(password or user)
    hide(parts.password or parts.username)
    login = base64.b64encode(f"{user}:{password}".encode()).decode()
    hide(login)
    return f"Basic {login}"
