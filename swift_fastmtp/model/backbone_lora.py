"""A backbone that is served with a LoRA adapter: the adapter merged in memory, while nothing is written.

Engines apply an adapter to the target's layers and leave the draft as it is (docs/adapters.md). So states, labels and
responses are those of base plus adapter, and embedding, output matrix and MTP layer are the base's. An adapter that
reaches one of these is refused: what would be trained here is not what engines draft with.
"""

import re
from pathlib import Path
from typing import Any

from transformers.integrations import is_deepspeed_zero3_enabled

from ..checkpoint.headers import entries_of
from ..errors import FastMTPError, detail
from ..files.copies import file_hash
from ..files.inputs import check_folder
from ..files.known_files import read_object
from .compat_transformers import is_dispatched

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_SHARED = ("embed_tokens", "lm_head")
# (key of adapter_config.json, values that mean W + scale * B A, why others do not work)
_PLAIN: tuple[tuple[str, tuple[Any, ...], str], ...] = (
    ("peft_type", ("LORA",), "only LoRA can be merged"),
    ("use_dora", (None, False), "engines serve no DoRA"),
    ("bias", (None, "none"), "engines serve no biases of adapters"),
    ("modules_to_save", (None, []), "engines serve no whole modules of adapters"),
    ("trainable_token_indices", (None, [], {}), "engines draft with the base's embedding"),
)


def merge_lora(model: Any, folder: str | Path) -> None:
    """Merge the adapter of `folder` into a model's backbone; the MTP layer stays as it is.

    The model keeps what `states_depend_on` tells caches by: `backbone_lora`, the SHA-256 of the adapter's tensors.

    Raises `FastMTPError` if it is no plain LoRA adapter of this backbone, or reaches embedding, output matrix or MTP
    layer, or if the model's weights are not all in this process.
    """
    folder = Path(folder)
    names = check_lora(folder)
    if head := [name for name in names if model.family.owns(name)]:
        raise FastMTPError(
            f"{folder}: {head[0]} lies in the MTP layer; name the adapter of the backbone, and this one with --adapters"
        )
    if is_deepspeed_zero3_enabled() or is_dispatched(model):
        raise FastMTPError(
            f"{folder}: an adapter is merged where the whole model lies on one device; merge it before "
            "(swift export --merge_lora true) and train on that folder"
        )
    from peft import LoraConfig, PeftModel, get_peft_model_state_dict

    try:
        config = LoraConfig.from_pretrained(folder)
        # Its targets may be named as parts of the MTP layer are. Elsewhere B is zero where the adapter has no tensors.
        config.exclude_modules = rf"({'|'.join(map(re.escape, model.family.roots))})\..*"
        config.init_lora_weights = True
        wrapped = PeftModel.from_pretrained(model, folder, config=config)
        known = {name.removeprefix(_PREFIX) for name in get_peft_model_state_dict(wrapped)}
        wrapped.merge_and_unload()
    except Exception as error:  # noqa: BLE001 (peft raises whatever a key of adapter_config.json makes it stumble over)
        raise FastMTPError(
            f"{folder}: does not fit {model.name_or_path} ({detail(error)}); name an adapter of this model"
        ) from None
    if foreign := sorted(set(names) - known):
        raise FastMTPError(
            f"{folder}: {model.name_or_path} has no place for {foreign[0]}; name an adapter of this model"
        )
    model.requires_grad_(False)
    model.backbone_lora = lora_hash(folder)


def check_lora(folder: str | Path) -> list[str]:
    """The names of an adapter's tensors, without loading a model.

    Raises `FastMTPError` if it is no adapter, none that engines serve beside a draft, or one that changes what target
    and draft share.
    """
    folder = Path(folder)
    check_folder(folder)
    for file in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / file).exists():
            raise FastMTPError(f"{folder}: holds no {file}; name the folder of a LoRA adapter, as peft saves it")
    config = read_object(folder / CONFIG_FILE)
    for key, plain, why in _PLAIN:
        if config.get(key) not in plain:
            raise FastMTPError(f"{folder / CONFIG_FILE}: {key} is {config.get(key)!r}: {why}; train a plain LoRA")
    names = [name.removeprefix(_PREFIX) for name in entries_of(folder / WEIGHTS_FILE)]
    for name in names:
        if any(part in name.split(".") for part in _SHARED):
            raise FastMTPError(
                f"{folder}: {name} changes what target and draft share, and engines draft with the base's; train the "
                "adapter without it, or merge it and serve that model"
            )
    return names


def lora_hash(folder: str | Path) -> str:
    """Identity of an adapter: of its tensors and of what scales them."""
    config = read_object(Path(folder) / CONFIG_FILE)
    scale = [config.get(key) for key in ("r", "lora_alpha", "use_rslora", "alpha_pattern", "rank_pattern")]
    return f"{file_hash(Path(folder) / WEIGHTS_FILE)}:{scale}"
