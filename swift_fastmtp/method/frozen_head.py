"""Loss and hidden-state gradient of rows through the frozen output matrix, a chunk of logits at a time.

The matrix is frozen, so the only gradient that must survive a chunk is the one of its hidden states: the chunk's
logits give loss, argmax and that gradient at once, and are dropped. `losses` has the formulas.
"""

import itertools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .config import SOFT_LOSSES, FastMTPConfig


_BLOCK_BYTES = 2**20
"""Of logits, on a CPU: as much of the probabilities and of the teacher's are in its cache at once."""


def chunk_size(weight_VD: Tensor, config: FastMTPConfig) -> int:
    """`loss_chunk_size`, or where that is 0 the rows whose fp32 logits fill 64 MiB (CPU) or 512 MiB (others)."""
    room = 2**26 if weight_VD.device.type == "cpu" else 2**29
    return config.loss_chunk_size or max(1, room // (4 * len(weight_VD)))


def project(rows: Tensor, weight: Tensor) -> Tensor:
    return rows.to(weight.dtype) @ weight.T


class Teacher(NamedTuple):
    """p of a chunk of rows: dense probabilities [C, V], or those of its top_k tokens [C, k] and their ids."""

    probs: Tensor
    ids: Tensor | None
    entropy: Tensor
    """-sum p log p, [C, 1]."""
    log_z: Tensor | None = None
    """[C, 1], where `probs` holds logits instead (the GPU's kernels)."""

    def take(self, rows: Tensor | slice) -> "Teacher":
        return Teacher(*(None if x is None else x[rows] for x in self))  # type: ignore[arg-type]


class FrozenHead:
    """The output matrix and the buffers of a chunk: [chunk, V] of logits, which become their gradient, and of the
    teacher's probabilities; and a block of probabilities.

    A matrix product wants many rows. What follows it reads and writes them several times, so it goes block by block:
    few rows, which stay in a CPU's cache from the first pass to the last.
    """

    def __init__(self, weight: Tensor, dtype: torch.dtype, rows: int, config: FastMTPConfig) -> None:
        self.allocate(weight, dtype, rows, config)
        self.block = self.chunk
        if weight.device.type == "cpu":
            self.block = min(self.chunk, max(1, _BLOCK_BYTES // (self.wide.itemsize * len(weight))))
        self.logits = self._buffer(self.chunk)
        self.probs = self._buffer(self.block)
        self.teacher_probs = self._buffer(self.chunk) if self.dense_teacher else None

    def _buffer(self, rows: int) -> Tensor:
        return torch.empty(rows, len(self.weight), dtype=self.wide, device=self.weight.device)

    def allocate(self, weight: Tensor, dtype: torch.dtype, rows: int, config: FastMTPConfig) -> None:
        """The sizes: chunks of `rows` rows of outputs of `dtype`."""
        self.weight, self.config = weight, config
        self.chunk = min(rows, chunk_size(weight, config))
        self.wide = torch.promote_types(dtype, torch.float32)
        self.dense_teacher = config.loss in SOFT_LOSSES and config.loss != "topk_kl"
        self.temperature = config.temperature if config.loss in SOFT_LOSSES else 1.0

    def chunks(self, valid: Tensor, hidden: Tensor | None, rows: Tensor | None) -> Any:
        """Yields (flat indices into [K * N] of at most `chunk` valid rows, a teacher, which of its rows are theirs).

        The last is None where the teacher has one row for each. Steps whose rows have one position in common share its
        teacher. All that the host must know of the rows, how
        many there are of each step in each chunk, is asked for before the first chunk: a GPU is not waited for between.
        """
        if hidden is None or rows is None:
            for part in even(valid.flatten().nonzero().squeeze(1), self.chunk):
                yield part, None, None
            return
        N = valid.shape[1]
        step, row = valid.nonzero(as_tuple=True)
        positions, place = (rows[row] + step + 1).unique(return_inverse=True)
        row_at = rows.new_full((len(valid), len(positions)), -1)
        row_at[step, place] = row
        # The table without its gaps, step by step: the rows of one step in one chunk are a slice of these.
        step_M, place_M = (row_at >= 0).nonzero(as_tuple=True)
        flat_M = step_M * N + row_at[step_M, place_M]
        chunks = [len(part) for part in even(positions, self.chunk)]
        counts = _counts(row_at >= 0, chunks)
        starts = [0, *itertools.accumulate(sum(of_step) for of_step in counts)]
        first = 0
        for c, size in enumerate(chunks):
            teacher = self.teacher(hidden[positions[first : first + size]])
            for k in range(len(valid)):
                count = counts[k][c]
                here = slice(starts[k], starts[k] + count)
                starts[k] += count
                if count:
                    yield flat_M[here], teacher, None if count == size else place_M[here] - first
            first += size

    def project(self, rows: Tensor) -> Tensor:
        """Logits [C, V], in `self.logits`."""
        z = self.logits[: len(rows)]
        if self.weight.dtype == self.wide:
            return torch.mm(rows.to(self.wide), self.weight.T, out=z)
        return z.copy_(project(rows, self.weight))

    def blocks(self, rows: int) -> list[slice]:
        return [slice(first, first + self.block) for first in range(0, rows, self.block)]

    def teacher(self, rows: Tensor) -> Teacher:
        z = self.project(rows)
        if self.teacher_probs is None:
            z, ids = z.div_(self.temperature).topk(min(self.config.top_k, z.shape[-1]))
            probs = z.softmax(-1)
            return Teacher(probs, ids, _entropy(z, probs))
        probs, entropy = self.teacher_probs[: len(rows)], z.new_empty(len(rows), 1)
        for here in self.blocks(len(rows)):
            torch.softmax(z[here].div_(self.temperature), -1, out=probs[here])
            entropy[here] = _entropy(z[here], probs[here])
        return Teacher(probs, None, entropy)

    def row_losses(
        self, rows: Tensor, target: Tensor, teacher: Teacher | None, place: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Loss [C], accept_prob [C], argmax [C] and d loss / d logits [C, V] of rows [C, D].

        target is [C, 1]; place [C] says which row of the teacher is whose, None that they are in order.
        """
        z = self.project(rows)
        results = []
        for here in self.blocks(len(rows)):
            own = None if teacher is None else teacher.take(here if place is None else place[here])
            results.append(self.block_losses(z[here], target[here], own))
        loss, accept_prob, best = (torch.cat(parts).squeeze(1) for parts in zip(*results, strict=True))
        return loss, accept_prob, best, z

    def block_losses(self, z: Tensor, target: Tensor, teacher: Teacher | None) -> tuple[Tensor, Tensor, Tensor]:
        """Loss, accept_prob and argmax, each [C, 1], of logits z [C, V], which become their gradient."""
        if self.temperature != 1:
            z.div_(self.temperature)
        best = z.argmax(-1, keepdim=True)
        q = torch.softmax(z, -1, out=self.probs[: len(z)])
        log_z = _log_z(z.gather(1, best), q.gather(1, best))
        config = self.config
        if teacher is None or teacher.ids is not None:
            ids = target if teacher is None or teacher.ids is None else teacher.ids
            loss, accept_prob = sparse_teacher_loss(q, z.gather(1, ids), log_z, ids, teacher)
            torch.div(q, self.temperature, out=z)
            return loss, accept_prob, best
        p = teacher.probs
        accept_prob = _rowsum(torch.minimum(p, q))
        kl = log_z - _rowsum(p * z) - teacher.entropy
        loss, grad = kl, torch.sub(q, p, out=z)
        if config.loss != "kl":
            # d TV / d logits = q (mass - [q < p]), mass = the part of q that lies below p
            below = torch.lt(grad, 0, out=z)
            mass = _rowsum(q * below)
            loss, grad = 1 - accept_prob, below.neg_().add_(mass).mul_(q)
        if config.loss == "lk":
            w = (-config.lk_eta * accept_prob).exp()
            loss = w * kl + (1 - w) * loss
            grad.mul_(1 - w).addcmul_(q, w).addcmul_(p, -w)
        if self.temperature != 1:
            grad.div_(self.temperature)
        return loss, accept_prob, best


def sparse_teacher_loss(
    q: Tensor, chosen: Tensor, log_z: Tensor, ids: Tensor, teacher: Teacher | None
) -> tuple[Tensor, Tensor]:
    """Loss and accept_prob, each [C, 1], of q [C, V] against a teacher on few ids [C, k]: a label (None), or the top_k
    of a distribution.

    `chosen` are the logits at `ids` over the temperature; q is overwritten with the gradient with respect to those.
    """
    if teacher is None:
        loss, p = log_z - chosen, torch.ones_like(chosen)
    else:
        p = teacher.probs
        loss = log_z - _rowsum(p * chosen) - teacher.entropy
    accept_prob = _rowsum(torch.minimum(p, (chosen - log_z).exp()))
    q.scatter_add_(1, ids, -p.to(q.dtype))
    return loss, accept_prob


def even(rows: Tensor, chunk: int) -> tuple[Tensor, ...]:
    """Parts of at most `chunk` rows and of equal size: a short last one would read all of the matrix for little."""
    return rows.tensor_split(-(-len(rows) // chunk)) if len(rows) else ()


def _counts(has_KP: Tensor, chunks: list[int]) -> list[list[int]]:
    """How many there are of each step in each chunk of positions; one wait for a GPU."""
    if not chunks:
        return [[] for _ in has_KP]
    per_chunk = [part.sum(1) for part in has_KP.split(chunks, dim=1)]
    counts: list[list[int]] = torch.stack(per_chunk, dim=1).tolist()
    return counts


def _log_z(z: Tensor, prob: Tensor) -> Tensor:
    """log sum exp of logits, [C, 1], from one of them and its softmax: log q = z - log_z. The largest is exact."""
    return z - prob.log()


def _entropy(z: Tensor, probs: Tensor) -> Tensor:
    """-sum p log p, [C, 1], of logits and their softmax."""
    log_z = _log_z(z.amax(-1, keepdim=True), probs.amax(-1, keepdim=True))
    return log_z - _rowsum(probs * z)


def _rowsum(x: Tensor) -> Tensor:
    return x.sum(-1, keepdim=True)
