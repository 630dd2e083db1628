"""Row losses on a GPU: each row of logits is read two or three times and overwritten with its gradient.

The chunk loop and the matrix products are those of `frozen_head`; only what happens to a chunk's logits between them is
here, in two Triton kernels, without a float32 copy. Liger's and cut-cross-entropy's kernels do not fit: they take
hard labels, one weight for all tokens, and cannot share a teacher's logits between steps. Tested against the plain
form under Triton's interpreter (`tests/test_triton.py`).
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .config import FastMTPConfig
from .frozen_head import FrozenHead, Teacher, label_loss

_BLOCK = 4096


@triton.jit  # type: ignore[untyped-decorator]
def _softmax(logits, log_z_ptr, best_ptr, entropy_ptr, width, scale, WRITE: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """log sum exp, argmax and entropy of one row of logits * scale; WRITE overwrites the row with its softmax."""
    row = tl.program_id(0).to(tl.int64)
    base = logits + row * width
    top, total, weighted = float("-inf"), 0.0, 0.0
    best = 0
    for start in range(0, width, BLOCK):
        at = start + tl.arange(0, BLOCK)
        z = tl.load(base + at, mask=at < width, other=float("-inf")).to(tl.float32) * scale
        here = tl.max(z, 0)
        best = tl.where(here > top, start + tl.argmax(z, 0), best)
        higher = tl.maximum(top, here)
        e = tl.exp(z - higher)
        shrink = tl.exp(top - higher)
        total = total * shrink + tl.sum(e, 0)
        weighted = weighted * shrink + tl.sum(tl.where(at < width, e * z, 0.0), 0)
        top = higher
    log_z = top + tl.log(total)
    tl.store(log_z_ptr + row, log_z)
    tl.store(best_ptr + row, best)
    tl.store(entropy_ptr + row, log_z - weighted / total)
    if WRITE:
        for start in range(0, width, BLOCK):
            at = start + tl.arange(0, BLOCK)
            z = tl.load(base + at, mask=at < width, other=float("-inf")).to(tl.float32) * scale
            tl.store(base + at, tl.exp(z - log_z), mask=at < width)


@triton.jit  # type: ignore[untyped-decorator]
def _soft_loss(  # type: ignore[no-untyped-def]
    logits,
    teacher,
    place_ptr,
    teacher_log_z_ptr,
    entropy_ptr,
    loss_ptr,
    accept_prob_ptr,
    best_ptr,
    width,
    scale,
    eta,
    LK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Loss, accept_prob and argmax of one row against its teacher's logits; the row becomes its gradient."""
    row = tl.program_id(0).to(tl.int64)
    place = tl.load(place_ptr + row)
    base, other = logits + row * width, teacher + place * width
    teacher_log_z = tl.load(teacher_log_z_ptr + place)
    # First pass: log sum exp of the draft's logits (the running form that cannot overflow), and the argmax.
    top, total = float("-inf"), 0.0
    best = 0
    for start in range(0, width, BLOCK):
        at = start + tl.arange(0, BLOCK)
        z = tl.load(base + at, mask=at < width, other=float("-inf")).to(tl.float32) * scale
        here = tl.max(z, 0)
        best = tl.where(here > top, start + tl.argmax(z, 0), best)
        higher = tl.maximum(top, here)
        total = total * tl.exp(top - higher) + tl.sum(tl.exp(z - higher), 0)
        top = higher
    log_z = top + tl.log(total)
    # Second pass: sums over the vocabulary of p log q, min(p, q), and q where q < p. KL's gradient, q - p, needs no
    # sum, and is written at once.
    cross, accept_prob, mass = 0.0, 0.0, 0.0
    for start in range(0, width, BLOCK):
        at = start + tl.arange(0, BLOCK)
        log_q = tl.load(base + at, mask=at < width, other=float("-inf")).to(tl.float32) * scale - log_z
        log_p = tl.load(other + at, mask=at < width, other=float("-inf")).to(tl.float32) * scale - teacher_log_z
        q, p = tl.exp(log_q), tl.exp(log_p)
        cross += tl.sum(tl.where(at < width, p * log_q, 0.0), 0)
        accept_prob += tl.sum(tl.minimum(p, q), 0)
        mass += tl.sum(tl.where(q < p, q, 0.0), 0)
        if not LK:
            tl.store(base + at, (q - p) * scale, mask=at < width)
    kl = -cross - tl.load(entropy_ptr + place)
    weight = 1.0
    # Third pass, for the loss with acceptance in it: the gradient needs the sums of the second.
    if LK:
        weight = tl.exp(-eta * accept_prob)
        for start in range(0, width, BLOCK):
            at = start + tl.arange(0, BLOCK)
            q = tl.exp(tl.load(base + at, mask=at < width, other=float("-inf")).to(tl.float32) * scale - log_z)
            p = tl.exp(tl.load(other + at, mask=at < width, other=float("-inf")).to(tl.float32) * scale - teacher_log_z)
            grad = weight * (q - p) + (1.0 - weight) * q * (mass - tl.where(q < p, 1.0, 0.0))
            tl.store(base + at, grad * scale, mask=at < width)
    tl.store(loss_ptr + row, weight * kl + (1.0 - weight) * (1.0 - accept_prob))
    tl.store(accept_prob_ptr + row, accept_prob)
    tl.store(best_ptr + row, best)


class FusedHead(FrozenHead):
    """`FrozenHead` whose buffer holds logits in the matrix's own dtype, and teachers' stay logits."""

    def __init__(self, weight: Tensor, dtype: torch.dtype, rows: int, config: FastMTPConfig) -> None:
        self.set_sizes(weight, dtype, config)
        self.logits = weight.new_empty(rows, len(weight))

    def project(self, states: Tensor) -> Tensor:
        return torch.mm(states.to(self.weight.dtype), self.weight.T, out=self.logits[: len(states)])

    def softmax(self, z: Tensor, write: bool) -> tuple[Tensor, Tensor, Tensor]:
        """(log_z, argmax, entropy), each [C, 1], of logits z [C, V] over the temperature; z may become the softmax."""
        log_z, entropy = (torch.empty(len(z), 1, dtype=torch.float32, device=z.device) for _ in range(2))
        best = torch.empty(len(z), 1, dtype=torch.long, device=z.device)
        _softmax[(len(z),)](z, log_z, best, entropy, z.shape[1], self.scale, WRITE=write, BLOCK=_block(z))
        return log_z, best, entropy

    @property
    def scale(self) -> float:
        return 1 / self.temperature

    def teacher(self, z: Tensor) -> Teacher:
        log_z, _, entropy = self.softmax(z, write=False)
        return Teacher(z, entropy, log_z)

    def row_losses(self, z: Tensor, target: Tensor, teacher: Teacher | None, place: Tensor | None) -> Any:
        if teacher is None:
            chosen = z.gather(1, target).float()
            log_z, best, _ = self.softmax(z, write=True)
            loss, accept_prob = label_loss(z, chosen, log_z, target)
            return loss.squeeze(1), accept_prob.squeeze(1), best.squeeze(1)
        loss, accept_prob = (torch.empty(len(z), dtype=torch.float32, device=z.device) for _ in range(2))
        best = torch.empty(len(z), dtype=torch.long, device=z.device)
        theirs = (teacher.probs, place, teacher.log_z, teacher.entropy)
        options: dict[str, Any] = {"eta": self.config.lk_eta, "LK": self.config.loss == "lk", "BLOCK": _block(z)}
        _soft_loss[(len(z),)](z, *theirs, loss, accept_prob, best, z.shape[1], self.scale, **options)
        return loss, accept_prob, best


def _block(z: Tensor) -> int:
    return min(_BLOCK, triton.next_power_of_2(z.shape[1]))
