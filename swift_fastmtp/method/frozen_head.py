"""Loss and hidden-state gradient of rows through the frozen output matrix, a chunk of logits at a time.

The matrix is frozen, so the only gradient that must survive a chunk is the one of its hidden states: the chunk's
logits give loss, argmax and that gradient at once, and are dropped. `losses` has the formulas.
"""

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .config import SOFT_LOSSES, FastMTPConfig


def chunk_size(weight_VD: Tensor, config: FastMTPConfig) -> int:
    """`loss_chunk_size`, or where that is 0 the rows whose fp32 logits fill 64 MiB (CPU) or 512 MiB (others)."""
    room = 2**26 if weight_VD.device.type == "cpu" else 2**29
    return config.loss_chunk_size or max(1, room // (4 * len(weight_VD)))


def block_size(weight_VD: Tensor) -> int:
    """Rows whose fp32 logits fill 1 MiB (CPU, whose cache then holds three such blocks) or 64 MiB (others)."""
    room = 2**20 if weight_VD.device.type == "cpu" else 2**26
    return max(1, room // (4 * len(weight_VD)))


def project(rows: Tensor, weight: Tensor) -> Tensor:
    return rows.to(weight.dtype) @ weight.T


class Chunk(NamedTuple):
    """Rows that are projected together: those of some neighboring positions, of all steps, and their teachers."""

    rows: Tensor
    """Flat indices into [K * N], [C]."""
    positions: Tensor | None = None
    """Of `hidden`, [P]: what projects to p. None for `ce`."""
    place: Tensor | None = None
    """Which of these each row has, [C]."""

    @property
    def size(self) -> int:
        return len(self.rows) + (0 if self.positions is None else len(self.positions))


def chunks(valid_KN: Tensor, rows_N: Tensor | None, size: int) -> Iterator[Chunk]:
    """The valid rows in chunks of at most `size`, with their teachers, or of one position's if that is more.

    All steps' rows whose teacher is one position are in one chunk, so it is projected once. `rows_N` is None where
    there are no teachers. All that the host must know of the rows, how many there are in each chunk, is asked for
    before the first chunk: a GPU is not waited for between.
    """
    if rows_N is None:
        for part in even(valid_KN.flatten().nonzero().squeeze(1), size):
            yield Chunk(part)
        return
    K, N = valid_KN.shape
    step, row = valid_KN.nonzero(as_tuple=True)
    positions, place = (rows_N[row] + step + 1).unique(return_inverse=True)
    # In the order of their positions, the rows of a chunk are a slice.
    place, order = place.sort(stable=True)
    flat = (step * N + row)[order]
    parts = even(positions, max(1, size // (K + 1)))
    firsts = [0, *itertools.accumulate(len(part) for part in parts)][:-1]
    starts = torch.tensor(firsts[1:], dtype=place.dtype, device=place.device)
    splits = torch.searchsorted(place, starts).tolist()
    # Without any position, `tensor_split` still gives one part.
    slices = zip(parts, firsts, flat.tensor_split(splits), place.tensor_split(splits), strict=False)
    for part, first, rows, places in slices:
        yield Chunk(rows, part, places - first)


class Teacher(NamedTuple):
    """p of some positions."""

    probs: Tensor
    """[P, V]."""
    entropy: Tensor
    """-sum p log p, [P, 1]."""
    log_z: Tensor | None = None
    """[P, 1], where `probs` holds logits instead (the GPU's kernels)."""

    def take(self, place: Tensor) -> "Teacher":
        return Teacher(*(None if x is None else x[place] for x in self))  # type: ignore[arg-type]


class FrozenHead:
    """The output matrix and a buffer for the logits of a chunk, which become their softmax (the teachers') or their
    gradient (the drafts').

    A matrix product wants many rows. What follows it reads and writes them several times, so it goes block by block:
    few rows, which stay in a CPU's cache from the first pass to the last; anywhere, products need little memory.
    """

    def __init__(self, weight: Tensor, dtype: torch.dtype, rows: int, config: FastMTPConfig) -> None:
        self.set_sizes(weight, dtype, config)
        self.logits = torch.empty(rows, len(weight), dtype=self.wide, device=weight.device)
        self.block = block_size(weight)
        self.probs = torch.empty_like(self.logits[: self.block])

    def set_sizes(self, weight: Tensor, dtype: torch.dtype, config: FastMTPConfig) -> None:
        """For outputs of `dtype`."""
        self.weight, self.config = weight, config
        self.wide = torch.promote_types(dtype, torch.float32)
        self.temperature = config.temperature if config.loss in SOFT_LOSSES else 1.0

    def project(self, states: Tensor) -> Tensor:
        """Logits [C, V] of states [C, D], in `self.logits`."""
        z = self.logits[: len(states)]
        if self.weight.dtype == self.wide:
            return torch.mm(states.to(self.wide), self.weight.T, out=z)
        return z.copy_(project(states, self.weight))

    def blocks(self, rows: int) -> list[slice]:
        return [slice(first, first + self.block) for first in range(0, rows, self.block)]

    def teacher(self, z: Tensor) -> Teacher:
        """Of logits [P, V], which become probabilities."""
        entropy = z.new_empty(len(z), 1)
        for here in self.blocks(len(z)):
            scaled = z[here].div_(self.temperature)
            probs = torch.softmax(scaled, -1, out=self.probs[: len(scaled)])
            entropy[here] = _entropy(scaled, probs)
            z[here] = probs
        return Teacher(z, entropy)

    def row_losses(
        self, z: Tensor, target: Tensor, teacher: Teacher | None, place: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Loss [C], accept_prob [C] and argmax [C] of logits [C, V], which become d loss / d logits.

        target is [C, 1]; place [C] says which row of the teacher is whose.
        """
        results = []
        for here in self.blocks(len(z)):
            own = None if teacher is None or place is None else teacher.take(place[here])
            results.append(self.block_losses(z[here], target[here], own))
        loss, accept_prob, best = (torch.cat(parts).squeeze(1) for parts in zip(*results, strict=True))
        return loss, accept_prob, best

    def block_losses(self, z: Tensor, target: Tensor, teacher: Teacher | None) -> tuple[Tensor, Tensor, Tensor]:
        """Loss, accept_prob and argmax, each [C, 1], of logits z [C, V], which become their gradient."""
        if self.temperature != 1:
            z.div_(self.temperature)
        best = z.argmax(-1, keepdim=True)
        q = torch.softmax(z, -1, out=self.probs[: len(z)])
        log_z = _log_z(z.gather(1, best), q.gather(1, best))
        if teacher is None:
            loss, accept_prob = label_loss(q, z.gather(1, target), log_z, target)
            z.copy_(q)
            return loss, accept_prob, best
        p = teacher.probs
        accept_prob = _rowsum(torch.minimum(p, q))
        kl = log_z - _rowsum(p * z) - teacher.entropy
        loss, grad = kl, torch.sub(q, p, out=z)
        if self.config.loss == "lk":
            # d (1 - a) / d logits = q (mass - [q < p]), mass = the part of q that lies below p
            below = torch.lt(grad, 0, out=z)
            mass = _rowsum(q * below)
            w = (-self.config.lk_eta * accept_prob).exp()
            loss = w * kl + (1 - w) * (1 - accept_prob)
            grad = below.neg_().add_(mass).mul_(q).mul_(1 - w).addcmul_(q, w).addcmul_(p, -w)
        if self.temperature != 1:
            grad.div_(self.temperature)
        return loss, accept_prob, best


def label_loss(q: Tensor, chosen: Tensor, log_z: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Loss and the target's probability, each [C, 1], of q [C, V] against labels [C, 1].

    `chosen` are the targets' logits; q is overwritten with the logits' gradient.
    """
    q.scatter_add_(1, target, -torch.ones_like(chosen, dtype=q.dtype))
    return log_z - chosen, (chosen - log_z).exp()


def even(rows: Tensor, chunk: int) -> tuple[Tensor, ...]:
    """Parts of at most `chunk` rows and of equal size: a short last one would read all of the matrix for little."""
    return rows.tensor_split(-(-len(rows) // chunk)) if len(rows) else ()


def _log_z(z: Tensor, prob: Tensor) -> Tensor:
    """log sum exp of logits, [C, 1], from one of them and its softmax: log q = z - log_z. The largest is exact."""
    return z - prob.log()


def _entropy(z: Tensor, probs: Tensor) -> Tensor:
    """-sum p log p, [C, 1], of logits and their softmax."""
    log_z = _log_z(z.amax(-1, keepdim=True), probs.amax(-1, keepdim=True))
    return log_z - _rowsum(probs * z)


def _rowsum(x: Tensor) -> Tensor:
    return x.sum(-1, keepdim=True)
