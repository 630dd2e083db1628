"""The MTP head: one decoder block that reads a hidden state and the next token, at its native checkpoint path.

    u = proj(cat[norm_h(h), norm_e(embed)])     the order and the names come from the family's row
    g = final_norm(block(u))                    gives the logits and is fed back as the next step's h

The head has no embedding and no output matrix of its own: it shares the backbone's (frozen) ones.

Most checkpoints store each expert of a mixture by itself, transformers computes with all of them in one tensor;
`split_experts` and `join_experts` lead from one to the other, and leave other tensors alone. `as_stored` gives what a
checkpoint has.
"""

import copy
import re
from collections.abc import Callable, Container, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from importlib import import_module
from typing import Any

import torch
from torch import nn

from ..families.family import Family
from ..method import attention
from ..method.indexer import Indexer
from .compat_transformers import use_attention


def import_class(path: str) -> Any:
    """'module:Class' → the class, or function."""
    module, name = path.split(":")
    return getattr(import_module(module), name)


def split_experts(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """transformers' names → checkpoint names: `experts.gate_up_proj` [E, 2I, D] and `experts.down_proj` [E, D, I]
    become `experts.{e}.gate_proj.weight`, `.up_proj.weight` [I, D] and `.down_proj.weight` [D, I]."""
    separate = {}
    for name, tensor in tensors.items():
        if not name.endswith((".experts.gate_up_proj", ".experts.down_proj")):
            separate[name] = tensor
            continue
        path, kind = name.rsplit(".", 1)
        for e, one in enumerate(tensor):
            if kind == "down_proj":
                separate[f"{path}.{e}.down_proj.weight"] = one
            else:
                separate[f"{path}.{e}.gate_proj.weight"], separate[f"{path}.{e}.up_proj.weight"] = one.chunk(2)
    return separate


def join_experts(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The inverse of `split_experts`; every expert must be there."""
    joined: dict[str, torch.Tensor] = {}
    paths: dict[str, int] = {}
    for name, tensor in tensors.items():
        if match := re.fullmatch(r"(.*\.experts)\.(\d+)\.(?:gate|up|down)_proj\.weight", name):
            paths[match[1]] = max(paths.get(match[1], 0), int(match[2]) + 1)
        else:
            joined[name] = tensor
    for path, number in paths.items():
        gate, up, down = (
            torch.stack([tensors[f"{path}.{e}.{kind}_proj.weight"] for e in range(number)])
            for kind in ("gate", "up", "down")
        )
        joined[f"{path}.gate_up_proj"], joined[f"{path}.down_proj"] = torch.cat([gate, up], dim=1), down
    return joined


def fill(parameter: torch.Tensor, names: Iterable[str], read: Callable[[str], torch.Tensor]) -> None:
    """Write a parameter from the checkpoint's tensors that make it, `names` in the order of `split_experts`.

    One of them is in memory at a time.
    """
    flat, start = parameter.detach().view(-1), 0
    for name in names:
        values = read(name).reshape(-1)
        flat[start : start + len(values)] = values
        start += len(values)


def place_module(module: nn.Module, path: str, child: nn.Module) -> None:
    """Make `child` the submodule at a dotted path, with plain modules and lists on the way."""
    *holders, name = parts = path.split(".")
    for holder, after in zip(holders, parts[1:], strict=True):
        if holder not in dict(module.named_children()):
            module.add_module(holder, nn.ModuleList() if after == "0" else nn.Module())
        module = module.get_submodule(holder)
    module.add_module(name, child)


def as_stored(tensors: dict[str, torch.Tensor], names: Container[str]) -> dict[str, torch.Tensor]:
    """transformers' names → those of a checkpoint, which may have its experts joined too."""
    return tensors if all(name in names for name in tensors) else split_experts(tensors)


class MTPHead(nn.Module):
    """One MTP layer whose parameter names equal the checkpoint's (experts joined), relative to `family.names.prefix`.

    Args:
        config: the backbone's transformers config.
        family: the checkpoint's row in `families/table.py`.
    """

    def __init__(self, config: Any, family: Family) -> None:
        super().__init__()
        block_config = copy.deepcopy(config)
        use_attention(block_config, attention.NAME)
        if getattr(config, "layer_types", None):
            # Whatever the backbone's first layer is, engines draft with full attention.
            block_config.layer_types = ["full_attention"] * len(config.layer_types)
        for key, value in family.block.overrides:
            setattr(block_config, key, list(value) if isinstance(value, tuple) else value)
        block = import_class(family.block.layer_class)(block_config, layer_idx=0)
        if family.block.indexer_rope:
            attends = block.get_submodule(family.names.attention)
            attends.indexer = Indexer(attends.indexer, import_class(family.block.indexer_rope))
        norm_type = type(block.input_layernorm)
        width, eps = config.hidden_size, config.rms_norm_eps
        self.family = family
        self.graph = family.engines.sglang
        """What the engine computes that will serve the layer."""
        place_module(self, family.names.hidden_norm, norm_type(width, eps=eps))
        place_module(self, family.names.token_norm, norm_type(width, eps=eps))
        bias = bool(family.fusion.proj_bias and getattr(config, family.fusion.proj_bias))
        place_module(self, family.names.proj, nn.Linear(2 * width, width, bias=bias))
        # The block's parts, not the block: they carry the checkpoint's names; rows can be dropped between attention
        # and MLP; and gradient checkpointing, which wraps blocks, cannot reach them. With a module that is called
        # K times it raises under ZeRO-2 and gives wrong gradients, silently, under ZeRO-3.
        for name, child in block.named_children():
            place_module(self, f"{family.names.block_path}.{name}".lstrip("."), child)
        if family.names.final_norm:
            place_module(self, family.names.final_norm, norm_type(width, eps=eps))
        # So trainers, which read checkpoints with `load_state_dict`, find the experts too: they do not ask for every
        # tensor, and would go on with untrained ones.
        self.register_load_state_dict_pre_hook(_join_experts_on_load)  # type: ignore[no-untyped-call]

    def fuse(self, hidden_BTD: torch.Tensor, embeds_BTD: torch.Tensor) -> torch.Tensor:
        """Block input u from the previous hidden state and the embedding of the next token, [B, T, D]."""
        hidden = self.get_submodule(self.family.names.hidden_norm)(hidden_BTD)
        embeds = self.get_submodule(self.family.names.token_norm)(embeds_BTD)
        pair = (hidden, embeds) if self.family.fusion.hidden_first else (embeds, hidden)
        out: torch.Tensor = self.get_submodule(self.family.names.proj)(torch.cat(pair, dim=-1))
        return out

    def forward(
        self,
        hidden_BTD: torch.Tensor,
        embeds_BTD: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        state: "attention.RolloutState",
        rows: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One draft step for every row. Returns g [B, T, D] after the final norm, where the family has one, and before.

        `state` carries the keys and values of the steps before and gains this step's. With `rows` (flat indices into
        [B * T]) every row gives keys and values, but only those rows are taken further: g is [1, N, D].
        """
        block = self.get_submodule(self.family.names.block_path)
        attends = block.get_submodule(self.family.names.attention)
        u = self.fuse(hidden_BTD, embeds_BTD)
        with ExitStack() as changed:
            if self.graph.rotary_halves and state.rollout == "exact":
                changed.enter_context(rotary_halves(attends))
            attended, *_ = attends(
                hidden_states=block.get_submodule("input_layernorm")(u),
                position_embeddings=position_embeddings,
                attention_mask=u.new_empty(1, 1, 1, 1),  # read by nobody; sparse attention takes a part of it
                rollout=state,
            )
        u = u + attended
        if rows is not None:
            u = u.flatten(0, 1)[rows][None]
        u = u + block.get_submodule(self.family.names.mlp)(block.get_submodule("post_attention_layernorm")(u))
        normed = self.get_submodule(self.family.names.final_norm)(u) if self.family.names.final_norm else u
        return normed, u


@contextmanager
def rotary_halves(attends: Any) -> Iterator[None]:
    """While it lasts, an attention module whose RoPE turns neighbors (2i, 2i + 1) gives what one would whose RoPE turns
    halves (i, i + half): elements i and i + half of each query and key become neighbors. Products of queries and keys
    do not depend on the order of their elements."""

    def pair_halves(_module: Any, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
        heads = output.unflatten(-1, (-1, 2, attends.head_dim // 2))
        return heads.transpose(-1, -2).flatten(-3)

    with ExitStack() as hooks:
        for projection in (attends.q_proj, attends.k_proj):
            hooks.callback(projection.register_forward_hook(pair_halves).remove)
        yield


def _join_experts_on_load(module: nn.Module, state: dict[str, torch.Tensor], prefix: str, *_: Any) -> None:  # noqa: ARG001 (the caller's interface)
    own = {name: state.pop(name) for name in list(state) if name.startswith(prefix) and ".experts." in name}
    state.update(join_experts(own))
