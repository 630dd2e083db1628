"""Loss and hidden-state gradient of rows through the frozen output matrix, a chunk of logits at a time.

The matrix is frozen, so the only gradient that must survive a chunk is the one of its hidden states: the chunk's
logits give loss, argmax and that gradient at once, and are dropped. `losses` has the formulas.
"""

import itertools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .config import SOFT_LOSSES, FastMTPConfig


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

    def take(self, rows: Tensor) -> "Teacher":
        return Teacher(*(None if x is None else x[rows] for x in self))  # type: ignore[arg-type]


class FrozenHead:
    """The output matrix and the buffers of a chunk: [chunk, V] of logits and of probabilities, and the teacher's.

    Everything happens in them, in place: on a CPU, fresh memory of this size costs more than the arithmetic.
    """

    def __init__(self, weight: Tensor, dtype: torch.dtype, rows: int, config: FastMTPConfig) -> None:
        self.allocate(weight, dtype, rows, config)
        self.logits, self.probs, *rest = (
            torch.empty(self.chunk, len(weight), dtype=self.wide, device=weight.device)
            for _ in range(2 + self.dense_teacher)
        )
        self.teacher_probs = rest[0] if rest else None

    def allocate(self, weight: Tensor, dtype: torch.dtype, rows: int, config: FastMTPConfig) -> None:
        """The sizes: chunks of `rows` rows of outputs of `dtype`."""
        self.weight, self.config = weight, config
        self.chunk = min(rows, chunk_size(weight, config))
        self.wide = torch.promote_types(dtype, torch.float32)
        self.dense_teacher = config.loss in SOFT_LOSSES and config.loss != "topk_kl"
        self.temperature = config.temperature if config.loss in SOFT_LOSSES else 1.0

    def chunks(self, valid: Tensor, hidden: Tensor | None, rows: Tensor | None) -> Any:
        """Yields (flat indices into [K * N] of at most `chunk` valid rows, their teacher).

        Steps whose rows have one position in common share its teacher. All that the host must know of the rows, how
        many there are of each step in each chunk, is asked for before the first chunk: a GPU is not waited for between.
        """
        if hidden is None or rows is None:
            for part in even(valid.flatten().nonzero().squeeze(1), self.chunk):
                yield part, None
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
                if count == size:
                    yield flat_M[here], teacher
                elif count:
                    yield flat_M[here], teacher.take(place_M[here] - first)
            first += size

    def project(self, rows: Tensor) -> Tensor:
        """Logits [C, V] divided by the temperature, in `self.logits`."""
        z = self.logits[: len(rows)]
        if self.weight.dtype == self.wide:
            torch.mm(rows.to(self.wide), self.weight.T, out=z)
        else:
            z.copy_(project(rows, self.weight))
        return z if self.temperature == 1 else z.div_(self.temperature)

    def teacher(self, rows: Tensor) -> Teacher:
        z, ids = self.project(rows), None
        if self.teacher_probs is None:
            z, ids = z.topk(min(self.config.top_k, z.shape[-1]))
            probs = z.softmax(-1)
        else:
            probs = torch.softmax(z, -1, out=self.teacher_probs[: len(rows)])
        return Teacher(probs, ids, _log_z(z, probs, z.argmax(-1, keepdim=True)) - _rowdot(probs, z))

    def row_losses(
        self, rows: Tensor, target: Tensor, teacher: Teacher | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Loss [C], accept_prob [C], argmax [C] and d loss / d logits [C, V] of rows [C, D]; target is [C, 1]."""
        z = self.project(rows)
        best = z.argmax(-1, keepdim=True)
        q = torch.softmax(z, -1, out=self.probs[: len(rows)])
        log_z = _log_z(z, q, best)
        config = self.config
        if teacher is None or teacher.ids is not None:
            ids = target if teacher is None or teacher.ids is None else teacher.ids
            return sparse_teacher_loss(q, z.gather(1, ids), log_z, best, ids, teacher, self.temperature)
        p = teacher.probs
        kl = log_z - _rowdot(p, z) - teacher.entropy
        d = torch.sub(q, p, out=z)
        accept_prob = 1 - d.norm(p=1, dim=-1, keepdim=True) / 2  # sum min(p, q) = 1 - |p - q| / 2
        loss, grad = kl, d
        if config.loss != "kl":
            # d TV / d logits = q (mass - [q < p]), mass = the part of q that lies below p
            below = torch.lt(d, 0, out=z)
            mass = _rowdot(q, below)
            loss, grad = 1 - accept_prob, below.neg_().add_(mass).mul_(q)
        if config.loss == "lk":
            w = (-config.lk_eta * accept_prob).exp()
            loss = w * kl + (1 - w) * loss
            grad = grad.mul_(1 - w).addcmul_(q, w).addcmul_(p, -w)
        if self.temperature != 1:
            grad = grad.div_(self.temperature)
        return loss.squeeze(1), accept_prob.squeeze(1), best.squeeze(1), grad


def sparse_teacher_loss(
    q: Tensor, chosen: Tensor, log_z: Tensor, best: Tensor, ids: Tensor, teacher: Teacher | None, temperature: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`row_losses` of q [C, V] against a teacher on few ids [C, k]: a label (None), or the top_k of a distribution.

    `chosen` are the logits at `ids` over the temperature; q is overwritten with the gradient.
    """
    if teacher is None:
        loss, p = log_z - chosen, torch.ones_like(chosen)
    else:
        p = teacher.probs
        loss = log_z - _rowdot(p, chosen) - teacher.entropy
    accept_prob = torch.minimum(p, (chosen - log_z).exp()).sum(-1, keepdim=True)
    grad = q.scatter_add_(1, ids, -p.to(q.dtype))
    if temperature != 1:
        grad = grad.div_(temperature)
    return loss.squeeze(1), accept_prob.squeeze(1), best.squeeze(1), grad


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


def _log_z(z: Tensor, probs: Tensor, best: Tensor) -> Tensor:
    """log sum exp of the logits z, [C, 1], from their softmax: log q = z - log_z at any entry; the largest is exact."""
    return z.gather(1, best) - probs.gather(1, best).log()


def _rowdot(a: Tensor, b: Tensor) -> Tensor:
    """sum over the last dimension of a * b, [C, 1], without the product in memory."""
    return (a[:, None] @ b[:, :, None]).squeeze(2)
