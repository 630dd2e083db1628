"""The known single faults of an MTP layer, each with the change that takes it back.

Whoever converts, merges or quantizes a checkpoint may write the MTP layer so that every name and shape is right and
every draft is wrong. Each entry of `known_repairs` undoes one such fault in memory; that its drafts are then accepted
tells which fault it was.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from ..families.family import ENGINE_NAMES, ENGINES, Family, Graph

Tensors = dict[str, torch.Tensor]
"""Tensors of an MTP layer by their names in it, as `MTPHead.state_dict` has them."""


class Repair(NamedTuple):
    """One change, and what it would mean that it helps."""

    name: str
    """What was changed; goes on from "as it is .. %,"."""
    cause: str
    fix: str
    change: Callable[[Tensors], Tensors] | None = None
    """From the layer's tensors to those that are replaced."""
    graph: Graph | None = None
    """What is computed with the layer, instead of what the engine that was asked for computes."""


@contextmanager
def repaired(model: Any, repair: Repair) -> Iterator[None]:
    """The model with the change in its MTP layer, and as it was afterwards."""
    tensors, graph = model.head.state_dict(), model.head.graph
    changed = repair.change(tensors) if repair.change else {}
    before = {name: tensors[name].clone() for name in changed}
    _write(tensors, changed)
    model.head.graph = repair.graph or graph
    try:
        yield
    finally:
        _write(tensors, before)
        model.head.graph = graph


def _write(tensors: Tensors, values: Tensors) -> None:
    """Into the model's own memory, which is what a state dict shows."""
    for name, value in values.items():
        tensors[name].copy_(value)


def known_repairs(model: Any, engine: str) -> list[Repair]:
    """All of them that the model's family can have, for a layer that is served by an engine."""
    family: Family = model.family
    names = list(model.head.state_dict())
    repairs = [*_norm_repairs(family, names), *_input_repairs(family)]
    if family.names.final_norm:
        repairs.append(_backbone_norm(model, f"{family.names.final_norm}.weight"))
    if any(name.endswith(("gate_proj.weight", "gate_up_proj")) for name in names):
        repairs.append(
            Repair(
                "with gate and up projection exchanged",
                "the two halves of the MLP's first matrix were written in the other order",
                "exchange gate_proj and up_proj of the MTP layer",
                _exchange_gates,
            )
        )
    return [*repairs, *_graph_repairs(family, engine)]


# Norms that multiply by 1 + weight, and norms that multiply by the weight.


def norm_names(names: list[str]) -> list[str]:
    """Weights of RMSNorms. The norm of an indexer is another kind, which is written in one way everywhere."""
    return [name for name in names if "norm" in name and name.endswith(".weight") and "indexer." not in name]


def _norm_repairs(family: Family, names: list[str]) -> Iterator[Repair]:
    """Converters know the norms of decoder layers and may miss the three that only an MTP layer has, or the reverse."""
    own = {family.names.hidden_norm, family.names.token_norm, family.names.final_norm}
    norms = norm_names(names)
    beside = [name for name in norms if name.removesuffix(".weight") in own]
    in_block = [name for name in norms if name not in beside]
    form = (
        "the weight w of a norm that multiplies by 1 + w" if family.fusion.zero_centered_norms else "the factor itself"
    )
    groups = {"its norms": norms, "the norms of its block": in_block, "the norms beside its block": beside}
    for which, chosen in groups.items():
        listed = "" if chosen is norms else f" ({_listed(chosen)})"
        yield Repair(
            f"with 1 added to {which}",
            f"{which} were written without their +1",
            f"add 1 to the norm weights of the MTP layer{listed}: {family.name} stores {form}",
            _added(chosen, 1),
        )
        yield Repair(
            f"with 1 taken from {which}",
            f"{which} were written with a +1 too many: the engine adds it again, or has none",
            f"take 1 from the norm weights of the MTP layer{listed}: {family.name} stores {form}",
            _added(chosen, -1),
        )


def _added(names: list[str], number: int) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name: tensors[name] + number for name in names}


def _listed(names: list[str]) -> str:
    return ", ".join(name.removesuffix(".weight") for name in names)


def _backbone_norm(model: Any, name: str) -> Repair:
    return Repair(
        "with the backbone's final norm for its own",
        "the MTP layer's final norm was lost: it is another's, or was never set",
        "take it from the original model, or put the backbone's there",
        lambda _: {name: model.model.norm.weight},
    )


# The two inputs: the hidden state and the token's embedding.


def _input_repairs(family: Family) -> list[Repair]:
    hidden, token = f"{family.names.hidden_norm}.weight", f"{family.names.token_norm}.weight"
    projection = f"{family.names.proj}.weight"
    first, second = "hidden state", "embedding"
    if not family.fusion.hidden_first:
        first, second = second, first

    def exchange_norms(tensors: Tensors) -> Tensors:
        return {hidden: tensors[token].clone(), token: tensors[hidden].clone()}

    def exchange_halves(tensors: Tensors) -> Tensors:
        left, right = tensors[projection].chunk(2, dim=1)
        return {projection: torch.cat([right, left], dim=1)}

    def exchange_both(tensors: Tensors) -> Tensors:
        return {**exchange_norms(tensors), **exchange_halves(tensors)}

    order = f"{family.name} stores [{first}, {second}]"
    return [
        Repair(
            f"with the halves of {family.names.proj} exchanged",
            f"the projection was written for [{second}, {first}]",
            f"exchange the left and the right half of {projection}: {order}",
            exchange_halves,
        ),
        Repair(
            f"with {family.names.hidden_norm} and {family.names.token_norm} exchanged",
            "the norm of the hidden state stands under the name of the embedding's, and the reverse",
            "exchange the two tensors",
            exchange_norms,
        ),
        Repair(
            "with its two inputs exchanged",
            "hidden state and embedding were taken for each other, in the norms and in the projection",
            f"exchange the two norms, and the halves of {projection}: {order}",
            exchange_both,
        ),
    ]


def _exchange_gates(tensors: Tensors) -> Tensors:
    changed: Tensors = {}
    for name, tensor in tensors.items():
        other = name.replace("gate_proj.weight", "up_proj.weight")
        if name.endswith("gate_proj.weight") and other in tensors:
            changed |= {name: tensors[other].clone(), other: tensor.clone()}
        elif name.endswith("gate_up_proj"):  # experts, joined: [E, 2 I, D]
            gate, up = tensor.chunk(2, dim=1)
            changed[name] = torch.cat([up, gate], dim=1)
    return changed


# What is computed with the layer.

_GRAPHS = {
    "hidden_before_norm": ("the hidden state from before the backbone's final norm", "that from after it"),
    "feedback_before_norm": ("the state from before its final norm fed back", "that from after it fed back"),
    "mask_position_zero": ("the embedding zeroed at position 0", "the embedding at position 0 not zeroed"),
}
"""Field of a `Graph` → what is otherwise where it is set now, and where it is not."""


def _graph_repairs(family: Family, engine: str) -> list[Repair]:
    """The other engine's graph, then each part of a graph turned by itself, which no engine may compute."""
    served = family.graph(engine)
    repairs: dict[Graph, Repair] = {}
    for other in ENGINES:
        graph = family.engines.vllm if other == "vllm" else family.engines.sglang
        if graph is None or graph == served:
            continue
        name, was = ENGINE_NAMES[other], ENGINE_NAMES[engine]
        differing = "; ".join(family.differences)
        repairs[graph] = Repair(
            f"with what {name} computes",
            f"it was trained for {name}'s graph, and was measured in {was}'s: {differing}",
            f"serve it with {name}, or train it with fastmtp_engine {engine}",
            graph=graph,
        )
    for field, (set_now, set_before) in _GRAPHS.items():
        if field == "feedback_before_norm" and not family.names.final_norm:
            continue
        turned: dict[str, Any] = {field: not getattr(served, field)}
        graph = replace(served, **turned)
        text = set_before if getattr(served, field) else set_now
        repair = Repair(
            f"with {text}",
            f"it was trained with {text}, which {ENGINE_NAMES[engine]} does not compute",
            f"train it in the graph that serves it: swift sft with fastmtp_engine {engine}",
            graph=graph,
        )
        repairs.setdefault(graph, repair)
    return list(repairs.values())
