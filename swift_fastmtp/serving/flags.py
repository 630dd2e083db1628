"""The words of an engine's command line, each with the reason for it; and the command that people run."""

import shlex
from dataclasses import dataclass

from ..checkpoint.config_file import TOKEN_MAPS_VARIABLE

ENVIRONMENT = "env"
"""The first word of a command that sets a variable; the engine's own follows it."""
REMOTE_CODE = "config.json names a configuration class of its own (auto_map)"
"""Why --trust-remote-code."""


@dataclass(frozen=True)
class Flag:
    """Words of a command line and why they are there."""

    words: tuple[str, ...]
    why: str


def static_map(flags: list[Flag]) -> str | None:
    """The one token map for all requests that a command names."""
    for flag in flags:
        if flag.words[0] == "--speculative-token-map":
            return flag.words[1]
        if flag.words[0] == ENVIRONMENT:
            return flag.words[1].removeprefix(f"{TOKEN_MAPS_VARIABLE}=")
    return None


def command(flags: list[Flag]) -> list[str]:
    """The words of a command line."""
    return [word for flag in flags for word in flag.words]


def explain(flags: list[Flag]) -> str:
    """The command as a shell would take it, then a line per flag that says why."""
    shell = " \\\n  ".join(shlex.join(flag.words) for flag in flags)
    width = max(len(shlex.join(f.words)) for f in flags)
    reasons = "\n".join(f"# {shlex.join(f.words):{width}}  {f.why}" for f in flags)
    return f"{shell}\n\n{reasons}"
