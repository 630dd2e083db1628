"""`device_map="auto"` for a model whose head trains: only decoder layers of the frozen backbone leave the device.

accelerate's own map fills devices in the order of modules, so the head and the output matrix, which lie last, would be
the first to be offloaded. They are read outside any module's forward, trained, and read again by every draft step.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ..errors import FastMTPError
from ..families.family import EMBEDDINGS
from .compat_transformers import uncover_to, unsplit_layers

AUTOMATIC = ("auto", "balanced", "balanced_low_0", "sequential")
# Of a head in fp32: itself, its gradient, Adam's two moments, and a copy in the model's dtype.
_TRAINING_BYTES = 18
_SHARE = 0.8  # of the memory that is free: the rest is for logits, hidden states and the allocator


def device_map(
    cls: Any, config: Any, dtype: torch.dtype, max_memory: dict[Any, Any] | None = None
) -> dict[str, int | str]:
    """Module path → device for `from_pretrained`: layers fill the devices in order, GPUs, then memory, then disk.

    Everything else is on the first device. With `max_memory` (as accelerate takes it) those numbers are filled to the
    last byte; without it, `_SHARE` of what is free.

    Raises `FastMTPError` if what must stay does not fit there.
    """
    from accelerate.utils import get_max_memory

    with torch.device("meta"):
        model = cls(config)
    room = {device: free * (1 if max_memory else _SHARE) for device, free in get_max_memory(max_memory).items()}
    gpus = [d for d in room if isinstance(d, int) and room[d] > 0]
    devices: list[int | str] = [*gpus, *(["cpu"] if "cpu" in room else [])]
    parts = list(pieces(model, unsplit_layers(model)))
    tied = model.config.get_text_config().tie_word_embeddings
    stays = sum(size(m, dtype) for name, m, moves in parts if not moves and not (tied and name == "lm_head"))
    stays += _TRAINING_BYTES * sum(p.numel() for p in model.head_parameters().values())
    layers = {name: size(m, dtype) for name, m, moves in parts if moves}
    main = devices[0]
    room[main] -= stays
    if sum(layers.values()) > room[main]:
        room[main] -= max(layers.values())  # through which the others pass
    if room[main] < 0:
        raise FastMTPError(
            f"the head, its optimizer, the embedding and the output matrix take {stays / 1e9:.1f} GB, which device "
            f"{main} has not; free memory or raise --max_memory"
        )
    device_map: dict[str, int | str] = {name: main for name, _, moves in parts if not moves}
    for name, taken in layers.items():
        while devices and taken > room[devices[0]]:
            devices.pop(0)
        device_map[name] = devices[0] if devices else "disk"
        if devices:
            room[devices[0]] -= taken
    return device_map if len(set(device_map.values())) > 1 else {"": main}


def check_map(mapping: dict[str, Any], roots: tuple[str, ...]) -> None:
    """Raises `FastMTPError` if a map of the user's own offloads what must stay."""
    main = next((d for d in mapping.values() if d not in ("cpu", "disk")), "cpu")
    for part in (*roots, "lm_head", *(f"model.{name}" for name in EMBEDDINGS)):
        keys = [key for key in mapping if not key or f"{part}.".startswith(f"{key}.")]
        device = mapping[max(keys, key=len)] if keys else main
        if device == "disk" or (device == "cpu" and main != "cpu"):
            raise FastMTPError(f"--device_map puts {part} on {device}; only the backbone's layers can be offloaded")


def keep(model: Any, folder: Any) -> None:
    """After loading: trainers move models to their device, which accelerate forbids for one that is already placed, so
    `FastMTPMixin.to` is called instead; and the `folder` of layers that were converted lives as long as the model."""
    uncover_to(model)
    model.offload_folder = folder


def pieces(module: nn.Module, movable: set[str], path: str = "") -> Iterator[tuple[str, nn.Module, bool]]:
    """The model in parts that lie on one device: path, module, and whether it is of a class in `movable`."""
    for name, child in module.named_children():
        where = f"{path}{name}"
        if type(child).__name__ in movable:
            yield where, child, True
        elif any(type(m).__name__ in movable for m in child.modules()):
            yield from pieces(child, movable, where + ".")
        else:
            yield where, child, False


def size(module: nn.Module, dtype: torch.dtype) -> int:
    """Bytes of a module's weights in `dtype`."""
    return sum(t.numel() * dtype.itemsize for t in module.state_dict().values())
