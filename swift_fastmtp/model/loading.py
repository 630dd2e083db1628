"""From a checkpoint folder to a model, and which tensors that takes."""

from collections.abc import Callable, Container, Iterable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, cast

import torch
from transformers import AutoModelForCausalLM

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.compat_deepspeed import is_partitioned, whole_shape
from ..checkpoint.layer_shapes import experts_joined
from ..checkpoint.mtp_tensors import check_head, head_reader
from ..checkpoint.quantization import read_quantization
from ..errors import FastMTPError
from ..families.family import Family
from ..families.refused import known_layout
from ..families.table import FAMILIES, row_of
from .backbone_lora import merge_lora
from .compat_transformers import kept_in_float32, tied_names
from .config import load_config, one_line
from .head import MTPHead, as_stored, fill, import_class, split_experts
from .modeling import build_class


def load_model(
    model_dir: str | Path,
    dtype: torch.dtype,
    device: str | torch.device = "cpu",
    layer: Checkpoint | None = None,
    backbone_lora: str | None = None,
) -> Any:
    """Backbone and head of a checkpoint folder, frozen and in eval mode, outside any trainer.

    Args:
        model_dir: the folder.
        dtype: of the model.
        device: as torch calls it.
        layer: holds the MTP layer of a folder that has none.
        backbone_lora: folder of a LoRA adapter for the backbone.

    Raises as `check_checkpoint` and `merge_lora`.
    """
    if layer is None:
        checkpoint = Checkpoint(model_dir)
        check_checkpoint(checkpoint)
        cls: Any = model_class(checkpoint)
        model = cls.from_pretrained(model_dir, dtype=dtype)
    else:
        _ = Checkpoint(model_dir).blocks  # raises for another quantization, whose numbers would be taken without scales
        expected = head_shapes(layer)
        read = head_reader(layer, layer.trainable_family, expected)
        cls = model_class(layer)
        model = cls.from_pretrained(model_dir, dtype=dtype, without_layer=True)
        load_head(model, read, expected)
    if backbone_lora:
        merge_lora(model, backbone_lora)
    return model.to(device).requires_grad_(False).eval()


def load_to_answer(
    model_dir: str | Path, dtype: torch.dtype, device: str | torch.device = "cpu", backbone_lora: str | None = None
) -> Any:
    """A model whose answers are all that is asked for, with an MTP layer or without: one that lost it, or, as
    transformers' own class, one that no row of the table names, as a Llama.

    Raises as `load_model`, and `FastMTPError` where transformers cannot load the folder or it lacks a tensor.
    """
    checkpoint = Checkpoint(model_dir)
    architectures = checkpoint.config.get("architectures") or []
    if row_of(architectures) and not any(map(checkpoint.family.owns, checkpoint.entries)):
        _ = checkpoint.blocks  # raises for another quantization, whose numbers would be taken without scales
        cls: Any = model_class(checkpoint)
        model = cls.from_pretrained(model_dir, dtype=dtype, without_layer=True)
        if backbone_lora:
            merge_lora(model, backbone_lora)
        return model.to(device).requires_grad_(False).eval()
    if not architectures or row_of(architectures) or known_layout(architectures):
        return load_model(model_dir, dtype, device, backbone_lora=backbone_lora)
    if backbone_lora:
        raise FastMTPError(
            f"{model_dir}: {architectures[0]} has no MTP layer, so nothing drafts beside an adapter; merge it "
            "(swift export --merge_lora true)"
        )
    if quantization := read_quantization(checkpoint.config, checkpoint.folder):
        raise FastMTPError(f"{model_dir}: is quantized ({quantization.method}); ask a server of it: --base_url")
    _ = checkpoint.entries  # raises where a file is damaged
    with one_line(checkpoint):
        model, info = AutoModelForCausalLM.from_pretrained(
            model_dir, dtype=dtype, trust_remote_code=False, use_safetensors=True, output_loading_info=True
        )
    if missing := sorted(info["missing_keys"]):
        raise FastMTPError(f"{model_dir}: tensor {missing[0]} is missing; download the model again")
    return model.to(device).requires_grad_(False).eval()


def model_class(checkpoint: Checkpoint) -> type:
    """The class for a checkpoint. Raises `FastMTPError` if its layout is unknown, or it cannot be trained."""
    family = checkpoint.trainable_family
    return next(build_class(row) for row in FAMILIES if row.name == family.name)


def check_checkpoint(checkpoint: Checkpoint) -> None:
    """Raises `FastMTPError` unless it is a checkpoint that can be trained: a family of ours, as many tokens as
    its matrices have rows, and a whole, finite MTP layer."""
    family = checkpoint.trainable_family
    _ = checkpoint.vocab_size  # raises where it is not that of the matrices
    check_head(checkpoint, family, head_shapes(checkpoint))


def load_head(
    model: Any, tensors: dict[str, torch.Tensor] | Callable[[str], torch.Tensor], stored: Container[str] = ()
) -> None:
    """Put head tensors into a model, one at a time. Works under ZeRO-3 too, where parameters are partitioned.

    Args:
        model: the model.
        tensors: by their names in a checkpoint, or what reads them.
        stored: these names, where `tensors` is a function.
    """
    read, stored = (tensors, stored) if callable(tensors) else (tensors.__getitem__, tensors)
    for name, target in model.head_tensors().items():
        whole = torch.empty(whole_shape(target), device="meta")
        with _gathered([target]), torch.no_grad():
            fill(target, as_stored({name: whole}, stored), read)


def _gathered(parameters: list[torch.Tensor]) -> AbstractContextManager[Any]:
    """Under ZeRO-3 parameters are partitioned; this makes them whole on rank 0, whose changes all ranks get."""
    if not any(is_partitioned(p) for p in parameters):
        return nullcontext()
    from deepspeed import zero

    return cast(AbstractContextManager[Any], zero.GatheredParameters(parameters, modifier_rank=0))


def head_shapes(checkpoint: Checkpoint, weights: Checkpoint | None = None) -> dict[str, tuple[int, ...]]:
    """Name → shape of every tensor that the head of a checkpoint must have.

    `weights` is the one whose tensors show whether experts are stored one by one or joined, by default the same.
    Raises `FastMTPError` if config.json has no known layout, or none that can be built.
    """
    family = checkpoint.family
    config = load_config(checkpoint)
    with one_line(checkpoint), torch.device("meta"):
        head = MTPHead(config, family)
        tensors = {f"{family.names.prefix}.{n}": t for n, t in head.state_dict().items()}
        if not experts_joined(weights or checkpoint, family):
            tensors = split_experts(tensors)
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def needed_tensors(checkpoint: Checkpoint, names: Iterable[str], held: Iterable[str]) -> list[str]:
    """Those of the names that the model, backbone or MTP layer, is loaded from.

    For tensors that an index lists and no file holds: the rest of them is stale and nobody misses it.

    Args:
        checkpoint: its config.json counts.
        names: what is asked about.
        held: the tensors that there are. All are compared without the `language_model.` that checkpoints with a vision
            tower have in their names.

    Raises as `head_shapes`.
    """
    asked = list(names)
    if not asked:
        return []
    family = checkpoint.family
    config = load_config(checkpoint)
    with one_line(checkpoint), torch.device("meta"):
        model: Any = next(build_class(row) for row in FAMILIES if row.name == family.name)(config)
    tied = tied_names(model)
    here = {text_name(n) for n in held}
    stored = here | {text_name(n) for n in asked}
    needed: set[str] = set()
    for name, tensor in model.state_dict().items():
        if name not in tied:
            needed.update(as_stored({name: tensor}, stored))
    if checkpoint.value("quantization_config"):
        # A quantized matrix is several tensors: scales, zero points, packed values, under their module or beside it.
        modules = {name.rpartition(".")[0] for name in needed}
        needed |= {n for n in stored if n.rpartition(".")[0] in modules}
    return sorted(n for n in asked if text_name(n) in needed - here)


def text_name(name: str) -> str:
    """A name without what stands before it in a checkpoint with a vision tower."""
    name = name.replace("language_model.", "", 1)
    return name if not name.startswith("model.model.") else name.removeprefix("model.")


def keeps_float32(family: Family, name: str) -> bool:
    """Whether this tensor is float32 in a model of any dtype: in transformers, as published checkpoints have it, or in
    engines, as they have the norm of an indexer."""
    parts = kept_in_float32(import_class(family.backbone))
    return any(part in name for part in (*parts, "indexer.k_norm."))
