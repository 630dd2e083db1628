"""A model folder in Hugging Face's form, opened once and passed on as an object.

What is asked for first is read then, and kept: config.json, the family, the headers of the weight files, the identity
of the backbone. Nothing here builds or runs a model, nothing unpickles, and a tensor is read when it is asked for.
"""

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import FastMTPError
from ..families.family import ENGINE_NAMES, Family, config_value, is_embedding
from ..families.table import match_family
from ..files.known_files import read_object
from ..files.show import show
from .config_file import read_config, vocabulary_size
from .fingerprint import fingerprint, first_rows, is_new
from .fp8_config import Blocks, read_blocks
from .headers import Elsewhere, Entry, Headers, find_elsewhere, open_safetensors, read_headers, vocab_size_fault
from .refusals import find_family
from .weight_files import WeightFiles

if TYPE_CHECKING:
    import torch  # takes seconds, and only `read` needs it

SETTINGS_FILE = "fastmtp.json"
WEIGHTS_FILE = "model.safetensors"
_DTYPES = {
    "BF16": "bfloat16",
    "F16": "float16",
    "F32": "float32",
    "F64": "float64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "I8": "int8",
    "U8": "uint8",
    "I32": "int32",
    "I64": "int64",
}


class Checkpoint:
    """One folder. Every member raises `FastMTPError` naming the file where the folder does not have what it needs."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def __str__(self) -> str:
        return str(self.folder)

    # What the model is.

    @property
    def config_file(self) -> Path:
        return self.folder / "config.json"

    @cached_property
    def config(self) -> dict[str, Any]:
        """config.json (`config_file.read_config`)."""
        return read_config(self.folder)

    def value(self, key: str, default: Any = None) -> Any:
        """A key of config.json, or of its text part."""
        return config_value(self.config, key, default)

    @cached_property
    def family(self) -> Family:
        """The row that config.json's architectures name, whether or not it can be trained."""
        return match_family(self.config, self.config_file)

    @property
    def trainable_family(self) -> Family:
        """The row; raises the first of `refusals` against training it."""
        return find_family(self.config, self.config_file)

    @cached_property
    def blocks(self) -> Blocks | None:
        """How its FP8 is laid out; None is an unquantized checkpoint."""
        return read_blocks(self.config, self.config_file)

    @cached_property
    def settings(self) -> dict[str, Any]:
        """`fastmtp.json`: how the MTP layer was trained, and for which backbone; {} where there is none."""
        return read_object(self.folder / SETTINGS_FILE)

    @property
    def target(self) -> "Checkpoint":
        """The model whose backbone it is about: itself, or what a folder with the MTP layer alone names.

        Raises `FastMTPError` if that names none.
        """
        if self.has_backbone():
            return self
        base = self.settings.get("base_model")
        if not base:
            raise FastMTPError(
                f"{self.folder}: holds an MTP layer alone, and its {SETTINGS_FILE} names no model for it"
            )
        return Checkpoint(base)

    @cached_property
    def trained_for(self) -> str | None:
        """Whose graph the MTP layer was trained for (`FastMTPConfig.engine`); None where it was not trained here."""
        return engine_of(self.folder / SETTINGS_FILE)

    @cached_property
    def vocab_size(self) -> int:
        """Tokens by config.json; raises where the matrices, if the folder holds some, have another number of rows."""
        size = vocabulary_size(self.config, self.config_file)
        if self.vocab_size_fault:
            raise FastMTPError(f"{self.config_file}: {self.vocab_size_fault}")
        return size

    @cached_property
    def vocab_size_fault(self) -> str | None:
        """What is wrong with config.json's vocab_size (`headers.vocab_size_fault`)."""
        has_weights = any(self.folder.glob("*.safetensors"))
        return vocab_size_fault(self.headers, self.config) if has_weights else None

    # Which files there are, and which engines load.

    @cached_property
    def headers(self) -> Headers:
        """What the weight files hold by their headers, also where some are damaged."""
        return read_headers(self.folder)

    @property
    def chosen(self) -> WeightFiles:
        """Which files are loaded, by us and by each engine."""
        return self.headers.chosen

    @property
    def files(self) -> list[Path]:
        """Those that are loaded."""
        return self.headers.files

    @property
    def lost(self) -> dict[str, str]:
        """Name → file of tensors that the index lists and no file holds; what is needed says who needs it."""
        return {**self.headers.absent, **self.headers.stale}

    def elsewhere(self, family: Family) -> Elsewhere | None:
        """Tensors of the MTP layer that are in the folder, where no engine finds them."""
        if family.name not in self._elsewhere:
            self._elsewhere[family.name] = find_elsewhere(self.headers, family)
        return self._elsewhere[family.name]

    @cached_property
    def _elsewhere(self) -> dict[str, Elsewhere | None]:
        """What was looked for already, by the family's name."""
        return {}

    # Whose it is.

    @cached_property
    def fingerprint(self) -> str:
        """Identity of the backbone, to tell later whether an MTP layer belongs to it (`fingerprint.py`)."""
        try:
            family = self.family
        except FastMTPError:
            family = None  # a target of another class than its draft, which has no MTP layer of its own
        return fingerprint(self.folder, self.entries, family)

    def has_fingerprint(self, recorded: str) -> bool:
        """Whether the backbone is the one of a fingerprint in a `fastmtp.json`, new or of before there was `v2:`."""
        if is_new(recorded):
            return self.fingerprint == recorded
        return first_rows(self.entries, self.family) == recorded

    def check_backbone(self, base: "Checkpoint") -> None:
        """Raises if this folder says that its MTP layer was trained for another backbone than a model's.

        One without `fastmtp.json` (tuner types `full` and `lora`) does not say.
        """
        recorded = self.settings.get("base_fingerprint")
        if recorded and not base.has_fingerprint(recorded):
            raise FastMTPError(
                f"{self.folder}: this head was trained for another backbone than {base.folder}; pass the right one"
            )

    # Its tensors.

    @cached_property
    def entries(self) -> dict[str, Entry]:
        """Every tensor by name; raises if a file is damaged, or two hold one name."""
        if self.headers.problems:
            raise FastMTPError(f"{self.folder}: {self.headers.problems[0]}")
        return self.headers.entries

    @cached_property
    def file_of(self) -> dict[str, Path]:
        """Name of every tensor → its file."""
        return {name: entry.file for name, entry in self.entries.items()}

    @property
    def names(self) -> list[str]:
        """Of all tensors."""
        return list(self.entries)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.entries[name].shape

    def dtypes(self) -> dict[str, str]:
        """Type of every tensor, as torch calls it; as safetensors does where torch has none."""
        return {name: _DTYPES.get(entry.dtype, entry.dtype) for name, entry in self.entries.items()}

    def sizes(self) -> dict[str, int]:
        """Bytes of every tensor."""
        return {name: entry.size for name, entry in self.entries.items()}

    def under(self, *paths: str) -> list[str]:
        """Names below module paths, sorted."""
        beginnings = tuple(f"{path}." for path in paths)
        return sorted(name for name in self.entries if name.startswith(beginnings))

    def read(self, name: str) -> "torch.Tensor":
        """A tensor as it is stored."""
        tensor: torch.Tensor = open_safetensors(self.entries[name].file).get_tensor(name)
        return tensor

    def has_backbone(self) -> bool:
        """Whether the model is here too, not only its MTP layer: what tells is the output matrix, which may be tied.

        By the index too, so that a download that lacks a shard is not taken for a draft.
        """
        tied = bool(self.value("tie_word_embeddings"))
        names = (*self.entries, *self.lost)
        return any(n == "lm_head.weight" or (tied and is_embedding(n)) for n in names)


def engine_of(settings_file: Path) -> str | None:
    """Whose graph the MTP layer beside a `fastmtp.json` was trained for; None where there is no such file, or one that
    only says whose draft the layer is (`export/graft_draft.py`).

    Raises `FastMTPError` for one that names another engine than the knob knows.
    """
    settings = read_object(settings_file)
    if not set(settings) - {"swift_fastmtp", "base_model"}:
        return None
    engine = settings.get("engine") or "sglang"  # before there was the knob, SGLang's was the only one
    if engine not in ENGINE_NAMES:
        known = ", ".join(ENGINE_NAMES)
        raise FastMTPError(f"{settings_file}: engine is {show(engine)}, it must be one of {known}")
    return str(engine)
