"""Files of token maps: lists of maps by language, copies, and which tokenizer a map was made with.

What is in a map is `token_map.py`'s, which needs torch; this module needs none, and starts at once.
"""

import os
import re
import shutil
from pathlib import Path
from typing import Any

from ..errors import FastMTPError
from ..files import inputs
from ..files.copies import file_hash
from ..files.known_files import read_object
from ..files.paths import inside


def read_map_list(path: str | Path) -> dict[str, Path]:
    """Language -> file of its map, from a JSON object of languages and files that stand beside it.

    Raises `FastMTPError` if the file is not such a list, or a map is not there.
    """
    try:
        maps = inputs.read_json(path)
    except FileNotFoundError as error:
        raise inputs.cannot_read(path, error) from None
    return check_map_list(maps, Path(path))


def check_map_list(maps: Any, where: Path) -> dict[str, Path]:
    """The same for an object that was read from `where`."""
    if not isinstance(maps, dict) or not maps or not all(isinstance(v, str) for v in maps.values()):
        raise FastMTPError(f'{where}: must be an object of languages and files, as {{"zh": "zh-16384.pt"}}')
    paths = {name: inside(where.parent, file, f"{where}: {name}") for name, file in maps.items()}
    for name, file in paths.items():
        if not os.path.isfile(file):  # no, too, of a name that is too long for a file
            raise FastMTPError(f"{where}: {name}: {file}: no such file")
    return paths


MAPS_FOLDER = "token_maps"


def copy_maps(maps: dict[str, Path], folder: Path) -> dict[str, str]:
    """Copy maps, with what is known of them, to `token_maps/` of a folder. Returns language -> file, below the folder.

    Raises `OSError` if it cannot.
    """
    (folder / MAPS_FOLDER).mkdir(exist_ok=True)
    copied = {}
    for number, (language, path) in enumerate(maps.items()):
        is_name = re.fullmatch(r"\w[\w-]{0,63}", language)  # groups of rows may be called anything
        copied[language] = f"{MAPS_FOLDER}/{language if is_name else f'map-{number}'}.pt"
        shutil.copyfile(path, folder / copied[language])
        if sidecar(path).exists():
            shutil.copyfile(sidecar(path), sidecar(folder / copied[language]))
    return copied


def sidecar(path: str | Path) -> Path:
    """Where the facts about a map are, if `fastmtp vocab` made it."""
    return Path(path).with_suffix(".meta.json")


def check_tokenizer(path: str | Path, model_dir: str | Path) -> None:
    """Raises `FastMTPError` if a map's sidecar names another tokenizer than the model's: its ids mean other tokens."""
    made_for = read_object(sidecar(path)).get("tokenizer_sha256")
    tokenizer = Path(model_dir) / "tokenizer.json"
    if made_for and tokenizer.exists() and made_for != file_hash(tokenizer):
        raise FastMTPError(f"{path}: made with another tokenizer.json than {model_dir}'s; make it for this model")
