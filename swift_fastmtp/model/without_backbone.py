"""A model without the layers of its backbone, for training on hidden states that are all in a cache.

Of the backbone a step needs the embedding, the output matrix and the final norm; its layers only make hidden states.
Where an engine has made them (`data/hidden.py`), the layers are never loaded: what is left of a model of hundreds of
gigabytes fits on one GPU, in whatever form its layers are quantized.

The target and the MTP layer may be two folders: a draft-only one names its target in fastmtp.json.
"""

from typing import Any

import torch

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.mtp_tensors import head_reader
from ..errors import FastMTPError
from ..families.family import config_value
from .compat_transformers import kept_in_float32, tied_names
from .config import load_config
from .loading import head_shapes, load_head, model_class, text_name


def load_without_backbone(checkpoint: Checkpoint, target: Checkpoint, dtype: torch.dtype) -> Any:
    """Embedding, output matrix, final norm and MTP layer, frozen and in eval mode.

    Args:
        checkpoint: has the MTP layer.
        target: has the rest.
        dtype: of all of it.

    Raises `FastMTPError` if a tensor is missing, quantized or of another shape than config.json says.
    """
    config = load_config(checkpoint)
    cls: Any = model_class(checkpoint)
    with torch.device("meta"):
        model = cls._from_config(config, dtype=dtype)
    _drop_layers(model, config.num_hidden_layers)
    model.to_empty(device="cpu")
    # As `from_pretrained` has them in a model of any dtype.
    kept = kept_in_float32(model)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if any(part in name for part in kept):
            tensor.data = tensor.data.float()
    model.model.rotary_emb = type(model.model.rotary_emb)(config)  # its buffers are computed, not stored
    names = {text_name(name): name for name in target.names if not model.family.owns(name)}
    if config_value(target.config, "tie_word_embeddings"):
        # A dense target's output matrix is its embedding, where the layer's own class has two (`export/dense.py`).
        names.setdefault("lm_head.weight", names.get("model.embed_tokens.weight", ""))
    tied = tied_names(model)
    for name, parameter in model.named_parameters():
        if model.family.owns(name) or name in tied:
            continue
        parameter.data.copy_(_read(target, names.get(text_name(name)), name, parameter.shape))
    model.tie_weights()
    expected = head_shapes(checkpoint)
    load_head(model, head_reader(checkpoint, model.family, expected), expected)
    model.name_or_path = model.config.name_or_path = str(checkpoint)
    return model.requires_grad_(False).eval()


def final_norm_factor(checkpoint: Checkpoint, target: Checkpoint) -> torch.Tensor | None:
    """What the backbone's final norm multiplies by, [D]; None where no file holds it plain.

    Args:
        checkpoint: has the MTP layer.
        target: has the rest.
    """
    names = {text_name(name): name for name in target.names}
    name = names.get("model.norm.weight")
    weight = target.read(name) if name else None
    if weight is None or not weight.is_floating_point():
        return None
    return weight.float() + (1.0 if checkpoint.family.fusion.zero_centered_norms else 0.0)


def _drop_layers(model: Any, number: int) -> None:
    """The MTP layer may stand behind them, under its number in the list."""
    for name, _ in list(model.model.layers.named_children()):
        if int(name) < number:
            model.model.layers.register_module(name, None)


def _read(target: Checkpoint, name: str | None, wanted: str, shape: torch.Size) -> torch.Tensor:
    if name is None:
        raise FastMTPError(f"{target}: {wanted} is in no file; it is needed beside the MTP layer")
    tensor = target.read(name)
    if not tensor.is_floating_point() or tensor.element_size() < 2:
        raise FastMTPError(f"{target}: {name} is stored as {tensor.dtype}; embedding and output matrix must be plain")
    if tensor.shape != shape:
        raise FastMTPError(f"{target}: {name} has shape {list(tensor.shape)}, config.json says {list(shape)}")
    return tensor
