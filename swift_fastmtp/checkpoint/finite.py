"""Stops at the first number that is not finite, and says where it comes from.

A NaN equals nothing, and `argmax` takes it for the largest: a model that computes NaN answers token 0 for ever and
"accepts" each of its own drafts, 100 % at every depth. So hidden states, drafts, logits, losses and gradients are
looked at where they are made, before anything is counted, written or saved.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import FastMTPError
from .compat_deepspeed import own_part

BROKEN = "the checkpoint is broken, download it again"
OVERFLOW = "its weights are finite: look at config.json (norms, RoPE), or compute in bfloat16 or float32"


class NotFiniteError(FastMTPError):
    """A NaN or an infinity where a number must be.

    Attributes:
        what: which number, where it comes from, and how to fix it.
        row: of the batch, from 0.
        token: of the row, from 0.
    """

    def __init__(self, what: str, row: int, token: int) -> None:
        super().__init__(f"batch row {row + 1}, token {token + 1}: {what}")
        self.what, self.row, self.token = what, row, token

    def of(self, row: str) -> FastMTPError:
        """The same error where the batch's row has a better name."""
        return FastMTPError(f"{row}, token {self.token + 1}: {self.what}")


def is_finite(tensor: torch.Tensor) -> bool:
    """No NaN, no infinity. In pieces: `torch.isfinite` alone would take several times the tensor's memory."""
    pieces = tensor.reshape(-1).split(2**22)
    if tensor.element_size() == 1:  # FP8, which torch does not look at
        return all(bool(torch.isfinite(piece.float()).all()) for piece in pieces)
    return all(bool(torch.isfinite(piece).all()) for piece in pieces)


def not_finite(tensor: Tensor) -> Tensor:
    """[..., D] → bool [...]: whether a vector holds a NaN or an infinity. Takes no memory of the tensor's size."""
    largest = torch.linalg.vector_norm(tensor.detach(), float("inf"), dim=-1)
    return ~largest.isfinite()


class Source(NamedTuple):
    """Where a number that is not finite comes from."""

    text: str
    """With how to fix it."""
    place: tuple[int, int] | None = None
    """Row and token where it is first; attention spreads it over the row."""


def check_hidden_states(hidden_BTD: Tensor, real_BT: Tensor, source: Callable[[], Source]) -> None:
    """Raises `NotFiniteError` if the backbone's states hold a NaN or an infinity.

    Args:
        hidden_BTD: h.
        real_BT: bool; padding may hold anything, because nothing reads it.
        source: asked only then.
    """
    bad_BT = not_finite(hidden_BTD) & real_BT
    if bool(bad_BT.any()):
        text, place = source()
        row, token = place or bad_BT.nonzero()[0].tolist()
        raise NotFiniteError(f"the backbone's hidden state is not finite: {text}", row, token)


def check_drafts(model: Any, outputs_KND: Tensor, wanted_KN: Tensor, rows_N: Tensor, length: int) -> None:
    """Raises `NotFiniteError` if a draft step puts out a NaN or an infinity.

    Args:
        model: whose MTP layer it is, for the message.
        outputs_KND: g^1..g^K of N positions.
        wanted_KN: bool; the others are never used.
        rows_N: the positions, flat indices into [B * length].
        length: T.
    """
    bad_KN = not_finite(outputs_KND) & wanted_KN
    if bool(bad_KN.any()):
        step, place = bad_KN.nonzero()[0].tolist()
        row, token = divmod(int(rows_N[place]), length)
        source = _weights(model.head_tensors().items())
        what = f"draft step {step + 1} of the MTP layer is not finite: {source}; in training, lower --learning_rate"
        raise NotFiniteError(what, row, token)


def check_losses(model: Any, loss_KBT: Tensor) -> None:
    """Raises `NotFiniteError` if a loss is NaN or infinite. Where states are finite, the output matrix is at fault."""
    bad_KBT = ~loss_KBT.detach().isfinite()
    if bool(bad_KBT.any()):
        step, row, token = bad_KBT.nonzero()[0].tolist()
        raise NotFiniteError(f"the loss of draft step {step + 1} is not finite: {output_matrix(model)}", row, token)


def check_trained(model: nn.Module, step: int) -> None:
    """Raises `FastMTPError` if a parameter that is trained holds a NaN or an infinity. Of a parameter that ZeRO-3
    partitions, this rank's part is looked at."""
    for name, parameter in model.named_parameters():
        here = own_part(parameter)
        if parameter.requires_grad and here.numel() and not is_finite(here.detach()):
            raise FastMTPError(
                f"step {step}: {name} holds NaN or infinite values, so it is not saved; lower --learning_rate and go "
                "on from the checkpoint before"
            )


def output_matrix(model: Any) -> str:
    """What is wrong with logits that finite states gave."""
    return _weights([("lm_head.weight", model.lm_head.weight)])


def first_bad_module(model: Any, run: Callable[[], Any], real_BT: Tensor) -> Source:
    """Runs the backbone again to see which of its modules is the first with an output that is not finite.

    Args:
        model: its backbone is `model.model`.
        run: calls that.
        real_BT: as in `check_hidden_states`.
    """
    first: list[Source] = []

    def look(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, _: Any, output: Any) -> None:
            for tensor in _vectors(output):
                bad = not_finite(tensor) & _real(tensor, real_BT)
                if first or not bool(bad.any()):
                    continue
                place = None
                if bad.shape == real_BT.shape:
                    row, token = bad.nonzero()[0].tolist()
                    place = (row, token)
                weights = _weights(module.state_dict(prefix=f"{name}.").items())
                first.append(Source(f"{name} is the first that is not; {weights}", place))

        return hook

    hooks = [module.register_forward_hook(look(name)) for name, module in _stages(model.model)]
    try:
        run()
    finally:
        for handle in hooks:
            handle.remove()
    if not first:  # an output of the whole, but of none of its parts: it does not happen again
        return Source("it is when it is computed again; the hardware may be faulty")
    return first[0]


def _stages(backbone: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """What runs one after another: embedding, rotary embedding, each decoder layer, the final norm."""
    for name, child in backbone.named_children():
        if isinstance(child, nn.ModuleList):
            for number, layer in enumerate(child):
                yield f"model.{name}.{number}", layer
        else:
            yield f"model.{name}", child


def _vectors(output: Any) -> list[Tensor]:
    parts = output if isinstance(output, tuple | list) else [output]
    return [t for t in parts if isinstance(t, Tensor) and t.is_floating_point() and t.ndim > 1]


def _real(tensor: Tensor, real_BT: Tensor) -> Tensor:
    """`real_BT` where the tensor has such rows; others, as the angles of RoPE, count whole."""
    if tensor.shape[:-1] == real_BT.shape:
        return real_BT.to(tensor.device)
    return torch.ones(tensor.shape[:-1], dtype=torch.bool, device=tensor.device)


def _weights(tensors: Any) -> str:
    """Which of some weights holds a NaN or an infinity, or that none does."""
    for name, tensor in tensors:
        known = tensor.is_floating_point() and not tensor.is_meta and tensor.numel()
        if known and not is_finite(tensor.detach()):
            return f"{name} holds NaN or infinite values; {BROKEN}"
    return OVERFLOW
