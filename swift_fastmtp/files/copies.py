"""Files that are copied as they are, and the hash that says which file it was."""

import hashlib
import os
import shutil
from pathlib import Path

from . import inputs


def file_hash(path: str | Path) -> str:
    """SHA-256 of a file's bytes, for manifests."""
    digest = hashlib.sha256()
    try:
        with inputs.open_file(path) as file:
            while block := file.read(2**20):
                digest.update(block)
        return digest.hexdigest()
    except OSError as error:
        raise inputs.cannot_read(path, error) from None


def link_or_copy(source: Path, target: Path) -> None:
    """Put a file into a new folder: a hard link for `*.safetensors` where the file system allows it, else a copy.

    Weights are large, and nothing edits them in place. Everything else is small, and people do edit it: through a link
    they would edit the model that it came from.
    """
    source = Path(os.path.realpath(source))  # hub caches are folders of symbolic links
    if target.suffix == ".safetensors":
        try:
            os.link(source, target)
            return
        except OSError:  # another file system, or one without links
            pass
    shutil.copyfile(source, target)
