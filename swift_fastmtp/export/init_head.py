"""A head for a backbone that never had one, from the backbone's own last decoder layer.

    block           the last decoder layer: same shapes, same kind of states
    final_norm      the backbone's own, whose scale `lm_head` reads
    the two norms   as the module starts: no scaling
    proj            [I/2, I/2]: the block's input is the average of the hidden state and the next token's embedding,
                    both normed

The average, not the hidden state alone, because a block that does not see the next token can only predict that token
again. It is a place to start training from, not a draft.
"""

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, Protocol

import torch

from ..errors import FastMTPError
from ..families.family import Family


class Tensors(Protocol):
    """The backbone's tensors by name."""

    @property
    def folder(self) -> Path: ...

    @property
    def names(self) -> Collection[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def read(self, name: str) -> torch.Tensor: ...


def initial_head(
    backbone: Tensors, config: Any, family: Family, expected: dict[str, tuple[int, ...]]
) -> Callable[[str], torch.Tensor]:
    """A function that gives each tensor of a head by its checkpoint name, as `mtp_tensors.head_reader` does.

    Args:
        config: its transformers config.
        family: the row whose head it gets.
        expected: name → shape (`loading.head_shapes`).

    Raises `FastMTPError` if the last layer is not of the kind that the head's block is.
    """
    from ..model.head import MTPHead

    with torch.device("meta"):
        head = MTPHead(config, family)
    # Where the last decoder layer is; a vision model's text has its layers behind a longer name.
    number = config.num_hidden_layers - 1
    stems = sorted({n.split(f"layers.{number}.")[0] for n in backbone.names if f"layers.{number}." in n}, key=len)
    stem = stems[0] if stems else "model."
    norm = f"{stem}norm.weight"
    if norm not in backbone.names:
        raise FastMTPError(
            f"{backbone.folder}: {norm} is missing; a head is initialized from it and the last decoder layer"
        )
    # The block is a copy of that layer, the final norm of the backbone's; what fuses is made below.
    sources: dict[str, str] = {}
    for name in expected:
        local = name.removeprefix(family.names.prefix + ".")
        part = local.rsplit(".", 1)[0]
        if part in (family.names.hidden_norm, family.names.token_norm, family.names.proj):
            continue
        own = f"{stem}layers.{number}.{local.removeprefix(f'{family.names.block_path}.')}"
        own = norm if part == family.names.final_norm else own
        if own not in backbone.names:
            raise FastMTPError(f"{backbone.folder}: {own} is missing; the last decoder layer is no {family.name} block")
        if backbone.shape(own) != expected[name]:
            raise FastMTPError(
                f"{backbone.folder}: {own} has shape {list(backbone.shape(own))}, {name} {list(expected[name])}"
            )
        sources[name] = own

    def read(name: str) -> torch.Tensor:
        if name in sources:
            return backbone.read(sources[name])
        local = name.removeprefix(family.names.prefix + ".")
        if local == f"{family.names.proj}.weight":
            half = torch.eye(expected[name][0]) / 2
            return torch.cat([half, half], dim=1)
        if local == f"{family.names.proj}.bias":
            return torch.zeros(expected[name])
        module = head.get_submodule(local.rsplit(".", 1)[0])
        fresh = type(module)(expected[name][0])  # plain norms start at one, Gemma's at zero
        parameter: torch.Tensor = fresh.get_parameter(local.rsplit(".", 1)[1])
        return parameter.detach()

    return read
