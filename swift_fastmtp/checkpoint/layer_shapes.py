"""The tensors that the MTP layer of a checkpoint must have, as far as config.json alone tells.

So `fastmtp inspect` looks at a folder in a moment. What is trained or served is checked against the layer itself
(`model/loading.head_shapes`), which this must equal.
"""

from ..families.family import Family
from ..families.shapes import NotStatedError, Numbers, Shapes, split_experts
from ..files.known_files import read_object
from .checkpoint import Checkpoint
from .usual_config import is_usual


def stated_shapes(checkpoint: Checkpoint) -> Shapes | None:
    """Name → shape of every tensor of the MTP layer; None where only transformers' configuration class can say.

    Raises `FastMTPError` if config.json has no known layout, or generation_config.json cannot be read.
    """
    family = checkpoint.family
    if not is_usual(checkpoint.config, family):
        return None
    read_object(checkpoint.folder / "generation_config.json")  # transformers loads it with the model
    try:
        shapes = _layer(family, Numbers(checkpoint.config))
    except NotStatedError:
        return None
    shapes = {f"{family.names.prefix}.{name}": shape for name, shape in shapes.items()}
    return shapes if experts_joined(checkpoint, family) else split_experts(shapes)


def _layer(family: Family, numbers: Numbers) -> Shapes:
    """Relative to the prefix, experts joined."""
    names, width = family.names, numbers.size("hidden_size")
    shapes: Shapes = {f"{names.proj}.weight": (width, 2 * width)}
    if family.fusion.proj_bias and numbers.flag(family.fusion.proj_bias):
        shapes[f"{names.proj}.bias"] = (width,)
    block = f"{names.block_path}.".lstrip(".")
    norms = [names.hidden_norm, names.token_norm, f"{block}input_layernorm", f"{block}post_attention_layernorm"]
    if names.final_norm:
        norms.append(names.final_norm)
    shapes |= {f"{norm}.weight": (width,) for norm in norms}
    shapes |= {f"{block}{names.attention}.{name}": shape for name, shape in family.block.attention(numbers).items()}
    return shapes | {f"{block}{names.mlp}.{name}": shape for name, shape in family.block.mlp(numbers).items()}


def experts_joined(checkpoint: Checkpoint, family: Family) -> bool:
    """Whether a layer's experts are one tensor: by the names of the MTP layer, or of the backbone where there is none
    yet."""
    every: list[str] = []
    if any(checkpoint.folder.glob("*.safetensors")):
        headers = checkpoint.headers
        every = [*headers.entries, *headers.absent]  # a missing shard does not make the layer one of another kind
    below = tuple(f"{root}." for root in family.roots)
    names = [name for name in every if name.startswith(below)] or every
    return any(name.endswith(".experts.gate_up_proj") for name in names)
