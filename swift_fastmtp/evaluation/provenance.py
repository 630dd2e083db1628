"""What a reader needs to repeat a result."""

import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import __version__ as transformers_version

from .. import __version__


def provenance(started: float) -> dict[str, Any]:
    """What a reader needs to repeat a result: versions, command, revision, hardware."""
    revision = subprocess.run(
        ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    )
    return {
        "swift_fastmtp": __version__,
        "torch": torch.__version__,
        "transformers": transformers_version,
        "python": platform.python_version(),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "git_revision": revision.stdout.strip() or None,
        "hardware": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "cpu",
        "num_threads": torch.get_num_threads(),
        "seconds": round(time.time() - started, 1),
        "utc": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
