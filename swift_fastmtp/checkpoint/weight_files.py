"""Which safetensors files of a checkpoint folder are loaded, by whom, and why: the one place that decides it.

Engines do not read the whole folder. Where `model.safetensors.index.json` exists it selects files, and every tensor of
a selected file counts, listed or not; without an index every `*.safetensors` of the folder itself counts. What is
trained, exported and inspected here is what SGLang would load; where vLLM differs, `refusals` says so.

Read in SGLang 0.5.23 (`model_loader/loader.py` `_prepare_weights`; `model_loader/weight_utils.py`
`filter_duplicate_safetensors_files`, `maybe_add_mtp_safetensors`), vLLM 0.32 (`model_loader/default_loader.py`
`_prepare_weights`, `weight_utils.py` `filter_duplicate_safetensors_files`) and transformers 5.19 (`modeling_utils.py`
`_get_resolved_checkpoint_files`, which takes a lone `model.safetensors` before it looks at an index).
"""

import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import FastMTPError
from ..families.family import ENGINES, config_value
from ..families.table import FAMILIES
from ..files import inputs
from ..files.paths import check_link
from .config_file import read_config

INDEX_FILE = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_MAX_INDEX = 100_000_000  # bytes, as of a file's header; of the largest models a tenth of it
_SIDECAR = "mtp.safetensors"


@dataclass(frozen=True)
class WeightFiles:
    """The safetensors files of one folder, by what becomes of them."""

    folder: Path
    files: tuple[Path, ...]
    """What SGLang loads, in its order: sorted, so of two tensors with one name the later file's stays."""
    index: dict[str, str] | None
    """Tensor → file name, as the index has it; None without an index."""
    missing: dict[str, str]
    """Name of a file that the index lists and that cannot be loaded → what it is: missing, a folder, ..."""
    unlisted: tuple[Path, ...]
    """Left out by the index, and so by every engine."""
    added: tuple[Path, ...]
    """Left out by the index; SGLang loads it all the same (they are in `files` too), vLLM does not."""
    consolidated: tuple[Path, ...]
    """Those in Mistral's own format, to go by their names: where there are some, vLLM loads them and nothing else."""

    def listed_in(self, file: str) -> list[str]:
        """Tensors that the index places in a file."""
        return [name for name, place in (self.index or {}).items() if place == file]

    @property
    def refusals(self) -> dict[str, str]:
        """Engine → why it does not start, or does not load all of `files`; engines that do are not in it."""
        for name, why in self.missing.items():
            text = (
                f"{INDEX_FILE} lists {name}, which is {why}, and the engine stops when it starts; download the file, "
                "or take its tensors out of the index if nothing needs them"
            )
            return dict.fromkeys(ENGINES, text)
        if self.consolidated and self.consolidated != self.files:
            names = ", ".join(path.name for path in self.consolidated)
            return {"vllm": f"it reads {names} instead, as a checkpoint in Mistral's format; move that away"}
        if self.added:
            names = ", ".join(path.name for path in self.added)
            return {"vllm": f"{INDEX_FILE} does not list {names}, so it leaves that out; list its tensors in the index"}
        return {}

    @property
    def read_by_transformers(self) -> bool:
        """Whether transformers, given the folder, reads exactly `files`."""
        if os.path.isfile(self.folder / _SINGLE):
            return self.files == (self.folder / _SINGLE,)
        if self.index is None:
            return False
        metadata = _read_object(self.folder / INDEX_FILE).get("metadata")
        names = {path.name for path in self.files}
        return isinstance(metadata, dict) and names == set(self.index.values())

    def linked(self, weight_map: dict[str, Path]) -> "tempfile.TemporaryDirectory[str]":
        """A folder of links in which transformers finds exactly `files`; it is gone when the object is.

        Args:
            weight_map: every tensor → its file.
        """
        folder = tempfile.TemporaryDirectory(prefix="fastmtp-weights-")
        names = {path: f"weights-{number:05}.safetensors" for number, path in enumerate(self.files)}
        for path, name in names.items():
            Path(folder.name, name).symlink_to(path.absolute())
        for name in ("config.json", "generation_config.json"):
            if (self.folder / name).is_file():
                Path(folder.name, name).symlink_to((self.folder / name).absolute())
        listed = {tensor: names[path] for tensor, path in weight_map.items()}
        Path(folder.name, INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": listed}), encoding="utf-8")
        return folder


def resolve(folder: str | Path) -> WeightFiles:
    """Which files of a checkpoint folder are loaded.

    Nothing but the index and config.json is opened. Raises `FastMTPError` if the folder has no safetensors file, or if
    its index is broken, or lists something that is no file of the folder itself (paths that lead elsewhere, folders
    below), or a file is a link that leads out of it: engines read none of those, or read outside the folder; or if it
    has a pipe or a device in it.
    """
    folder = Path(folder)
    inputs.check_folder(folder)
    here = tuple(sorted(p for p in folder.glob("*.safetensors") if os.path.isfile(p) and not p.name.startswith(".")))
    for path in here:
        check_link(path, folder)
    consolidated = tuple(p for p in here if p.name.startswith("consolidated"))
    index = _read_index(folder / INDEX_FILE)
    if index is None:
        files = here
        if len(here) == 2 and here[0].name.endswith("consolidated.safetensors") and here[1].name.endswith(_SINGLE):
            files = here[1:]
        if not files:
            raise FastMTPError(f"{folder}: holds no *.safetensors file; convert the checkpoint to safetensors")
        return WeightFiles(folder, files, None, {}, (), (), consolidated)
    names = set(index.values())
    files = tuple(p for p in here if p.name in names)
    missing = {name: _why_not(folder / name) for name in sorted(names - {p.name for p in files})}
    if not files:
        name = next(iter(missing))
        raise FastMTPError(f"{folder / name}: listed in the index, but {missing[name]}; download the checkpoint again")
    unlisted = tuple(p for p in here if p.name not in names)
    added = tuple(p for p in unlisted if p.name == _SIDECAR and _is_added(folder))
    files = tuple(sorted({*files, *added}))
    rest = tuple(p for p in unlisted if p not in added)
    return WeightFiles(folder, files, index, missing, rest, added, consolidated)


def _read_index(path: Path) -> dict[str, str] | None:
    if not os.path.isfile(path):  # engines look for a file too: a folder or a dangling link of that name is none
        return None
    index = _read_object(path).get("weight_map")
    if not isinstance(index, dict) or not all(isinstance(name, str) for name in index.values()):
        raise FastMTPError(
            f"{path}: cannot be read as a safetensors index: weight_map must be an object of tensors and files; "
            "download it again"
        )
    names = sorted(set(index.values()))
    if not names:
        raise FastMTPError(f"{path}: lists no tensor; download it again, or remove it")
    for name in names:
        if Path(name).name != name or "\0" in name or not name.endswith(".safetensors"):
            raise FastMTPError(
                f"{path}: lists {name!r}, which is no *.safetensors file of the folder itself; name files without a "
                "path, and put them beside the index"
            )
    return dict(index)


def _read_object(path: Path) -> dict[str, Any]:
    try:
        value = inputs.read_json(path, _MAX_INDEX)
    except FileNotFoundError:
        value = None
    if not isinstance(value, dict):
        raise FastMTPError(f"{path}: cannot be read as a safetensors index, a JSON object; download it again")
    return value


def _why_not(path: Path) -> str:
    # os.path says no to a name that is too long for a file, where pathlib raises.
    if os.path.isdir(path):
        return "a folder, no file"
    if os.path.islink(path):
        return "a link to a missing file"
    return "no file" if os.path.exists(path) else "missing"


def _is_added(folder: Path) -> bool:
    """SGLang's condition for an unlisted `mtp.safetensors`: target or draft class of a model that may have one."""
    try:
        config: dict[str, Any] = read_config(folder)
    except FastMTPError:
        return False
    architectures = config.get("architectures") or [None]
    layers = config_value(config, "num_nextn_predict_layers", 0)
    for family in FAMILIES:
        if family.engines.unlisted_file and architectures[0] in (*family.architectures, family.engines.draft_class):
            return isinstance(layers, int) and layers > 0
    return False
