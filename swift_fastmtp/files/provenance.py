"""What a reader needs to repeat a result."""

import os
import platform
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from .. import __version__
from ..redaction import redact_words

_PACKAGE = Path(__file__).resolve().parents[1]


def provenance() -> dict[str, Any]:
    """What a reader needs to repeat a result: versions, command, revision, hardware, and the time.

    To be called before the work: afterwards the code on disk may be another, and nothing may fail any more.
    """
    import torch  # takes seconds, which a command that is refused need not wait for

    return {
        "swift_fastmtp": __version__,
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "python": platform.python_version(),
        "command": command(),
        "git_revision": git_revision(),
        "hardware": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "cpu",
        "num_threads": torch.get_num_threads(),
        "utc": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def command() -> list[str]:
    """The command line of this process, without keys and passwords."""
    # --api_key is the only option of ours that begins so, and argparse takes any beginning.
    return redact_words([Path(sys.argv[0]).name, *sys.argv[1:]], "--a")


def git_revision(package: Path = _PACKAGE) -> str | None:
    """The commit of this package's own checkout; None where it has none, or where there is no git.

    A package installed below somebody's repository (a virtual environment, a vendored copy) is not of that repository:
    the checkout is ours only if its top is the folder that holds the package, and it tracks the package's files.
    """
    top = _git(package, "rev-parse", "--show-toplevel")
    if top is None or not Path(top).is_dir() or not Path(top).samefile(package.parent):
        return None
    if _git(package, "ls-files", "--error-unmatch", "__init__.py") is None:
        return None
    return _git(package, "rev-parse", "HEAD")


def _git(folder: Path, *words: str) -> str | None:
    """What a git command prints; None if it fails."""
    # In a hook git sets variables that point at the repository of the hook, not at that of the folder.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *words],
            capture_output=True,
            text=True,
            check=False,
            timeout=10,
            env=environment,
            stdin=subprocess.DEVNULL,
        )
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None
