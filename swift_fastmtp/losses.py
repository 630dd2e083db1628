"""Losses of the draft steps through the frozen, shared lm_head, a chunk of rows at a time.

The logits of all steps would be K x rows x vocabulary in fp32 (7.5 GB for MiMo at 4096 tokens). lm_head is frozen,
so the only gradient that must survive a chunk is the one of its hidden states: each chunk's logits give the loss,
the match and that gradient at once, and are dropped.

With p the frozen model's own next-token distribution at the position a step predicts, and q the step's:

    ce        -log q(x), x the text's token                                    paper Eq. 1
    kl        KL(p || q) = sum p (log p - log q)                               Hinton et al. 2015
    topk_kl   KL(p' || q), p' = p cut to its top_k tokens and renormalised: what a server samples from with top_k
    tv        TV(p, q) = 1 - a, a = sum min(p, q)                              a: acceptance of speculative sampling,
                                                                               Leviathan et al. 2023, Theorem 3.5
    lk        w KL + (1 - w) TV, w = exp(-eta a), per row, no gradient in w    LK losses, arXiv 2602.23881
    e2e       mean over k of 1 - a_1 .. a_k: drafts not accepted, of K         Bebop, arXiv 2606.12370

p needs no second model: it is the same lm_head on the backbone's hidden state k rows further on, which step 1 of
another row reads anyway. One projection of it serves the K rows that predict that position.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .config import FastMTPConfig

# Losses against the frozen model's distribution instead of the text's token.
SOFT_LOSSES = ("kl", "topk_kl", "tv", "lk", "e2e")


class StepLosses(NamedTuple):
    """Per-row results, [K, N]; rows that are not valid hold 0 and False."""

    loss: Tensor
    """at least fp32, differentiable."""
    match: Tensor
    """bool: the head's argmax is the target."""
    overlap: Tensor | None
    """sum min(p, q): probability that sampled drafts are accepted here. None for `ce`, which has no p."""


def step_losses(
    outputs_KND: Tensor,
    weight_VD: Tensor,
    targets_KN: Tensor,
    valid_KN: Tensor,
    config: FastMTPConfig,
    hidden_RD: Tensor | None = None,
    rows_N: Tensor | None = None,
) -> StepLosses:
    """Loss and match of every step, unweighted and unreduced.

    Args:
        outputs_KND: g^1..g^K of N rows.
        weight_VD: frozen output matrix, or the part of it in a token map.
        targets_KN: row of `weight` each step should predict.
        valid_KN: bool; other rows are never projected.
        config: loss, temperature, top_k, lk_eta and loss_chunk_size count.
        hidden_RD, rows_N: the backbone's hidden states, flat, and which of them the N rows are: `hidden[rows + k]`
            projects to p of step k. Only the soft losses need them.

    With `e2e`, step k holds 1 - a_1 .. a_k, so that the mean over steps is the loss.
    """
    soft = config.loss in SOFT_LOSSES
    teacher = (hidden_RD, rows_N) if soft else (None, None)
    loss, match, overlap = _FrozenHeadLoss.apply(  # type: ignore[no-untyped-call]
        outputs_KND, weight_VD, targets_KN, valid_KN, config, *teacher
    )
    if config.loss == "e2e":
        loss = ((1 - torch.where(valid_KN, 1 - loss, 1).cumprod(0)) * valid_KN).to(loss.dtype)
    return StepLosses(loss, match, overlap if soft else None)


def weighted_loss(loss_KBT: Tensor, step_weights: list[float], num_items: Tensor | int) -> Tensor:
    """sum_k alpha_k sum(loss_k) / num_items (paper Eq. 1).

    `num_items` is the trainer's global count of supervised tokens, the same for every step, so that gradient
    accumulation and data parallelism give exactly the loss of one large batch.
    """
    weights = torch.tensor(step_weights, dtype=loss_KBT.dtype, device=loss_KBT.device)
    return (loss_KBT.flatten(1).sum(1) * weights).sum() / torch.as_tensor(num_items, device=loss_KBT.device).clamp(
        min=1
    )


def chunk_size(weight_VD: Tensor, config: FastMTPConfig) -> int:
    """`loss_chunk_size`, or where that is 0 the rows whose fp32 logits fill 64 MiB (CPU) or 512 MiB (others)."""
    room = 2**26 if weight_VD.device.type == "cpu" else 2**29
    return config.loss_chunk_size or max(1, room // (4 * len(weight_VD)))


@torch.no_grad()
def drafts(rows_ND: Tensor, weight_VD: Tensor, config: FastMTPConfig) -> Tensor:
    """argmax of the logits of every row, [N], a chunk of rows at a time."""
    best = [_project(part, weight_VD).argmax(-1) for part in _even(rows_ND, chunk_size(weight_VD, config))]
    return torch.cat(best) if best else torch.empty(0, dtype=torch.long, device=rows_ND.device)


def _project(rows: Tensor, weight: Tensor) -> Tensor:
    return rows.to(weight.dtype) @ weight.T


class _FrozenHeadLoss(torch.autograd.Function):
    """(outputs [K, N, D], ...) → (loss, match, overlap), each [K, N]; gradient for the outputs only."""

    @staticmethod
    def forward(
        ctx: Any,
        outputs: Tensor,
        weight: Tensor,
        targets: Tensor,
        valid: Tensor,
        config: FastMTPConfig,
        hidden: Tensor | None,
        rows: Tensor | None,
    ) -> Any:
        K, N, D = outputs.shape
        flat, grad = outputs.reshape(K * N, D), None
        if ctx.needs_input_grad[0]:
            grad = torch.zeros_like(flat)
        head = _FrozenHead(weight, outputs.dtype, K * N, config)
        loss, overlap = (torch.zeros(K * N, dtype=head.wide, device=outputs.device) for _ in range(2))
        match = torch.zeros(K * N, dtype=torch.bool, device=outputs.device)
        for part, teacher in head.chunks(valid, hidden, rows):
            target = targets.flatten()[part, None]
            loss[part], overlap[part], best, d_logits = head.row_losses(flat[part], target, teacher)
            match[part] = best == target[:, 0]
            if grad is not None:
                grad[part] = (d_logits.to(weight.dtype) @ weight).to(grad.dtype)
        ctx.save_for_backward(grad)
        ctx.mark_non_differentiable(match, overlap)
        return loss.view(K, N), match.view(K, N), overlap.view(K, N)

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, *_: Any) -> Any:
        (grad,) = ctx.saved_tensors
        out = grad.view(*grad_loss.shape, -1) * grad_loss[..., None]
        return out.to(grad.dtype), None, None, None, None, None, None


class _Teacher(NamedTuple):
    """p of a chunk of rows: dense probabilities [C, V], or those of its top_k tokens [C, k] and their ids."""

    probs: Tensor
    ids: Tensor | None
    entropy: Tensor
    """-sum p log p, [C, 1]."""

    def take(self, rows: Tensor) -> "_Teacher":
        return _Teacher(self.probs[rows], None if self.ids is None else self.ids[rows], self.entropy[rows])


class _FrozenHead:
    """The output matrix and the buffers of a chunk: [chunk, V] of logits and of probabilities, and the teacher's.

    Everything happens in them, in place: on a CPU, fresh memory of this size costs more than the arithmetic.
    """

    def __init__(self, weight: Tensor, dtype: torch.dtype, rows: int, config: FastMTPConfig) -> None:
        self.weight, self.config = weight, config
        self.chunk = chunk = min(rows, chunk_size(weight, config))
        self.wide = torch.promote_types(dtype, torch.float32)
        dense_teacher = config.loss in SOFT_LOSSES and config.loss != "topk_kl"
        self.logits, self.probs, *rest = (
            torch.empty(chunk, len(weight), dtype=self.wide, device=weight.device) for _ in range(2 + dense_teacher)
        )
        self.teacher_probs = rest[0] if rest else None

    def chunks(self, valid: Tensor, hidden: Tensor | None, rows: Tensor | None) -> Any:
        """Yields (flat indices into [K * N] of at most `chunk` valid rows, their teacher)."""
        if hidden is None or rows is None:
            for part in _even(valid.flatten().nonzero().squeeze(1), self.chunk):
                yield part, None
            return
        N = valid.shape[1]
        step, row = valid.nonzero(as_tuple=True)
        positions, place = (rows[row] + step + 1).unique(return_inverse=True)
        row_at = rows.new_full((len(valid), len(positions)), -1)
        row_at[step, place] = row
        for here in _even(torch.arange(len(positions), device=rows.device), self.chunk):
            teacher = self.teacher(hidden[positions[here]])
            for k, at in enumerate(row_at[:, here]):
                has = at >= 0
                if bool(has.all()):
                    yield k * N + at, teacher
                elif bool(has.any()):
                    yield k * N + at[has], teacher.take(has)

    def project(self, rows: Tensor) -> Tensor:
        """Logits [C, V] divided by the temperature, in `self.logits`."""
        z = self.logits[: len(rows)]
        if self.weight.dtype == self.wide:
            torch.mm(rows.to(self.wide), self.weight.T, out=z)
        else:
            z.copy_(_project(rows, self.weight))
        soft = self.config.loss in SOFT_LOSSES
        return z.div_(self.config.temperature) if soft and self.config.temperature != 1 else z

    def teacher(self, rows: Tensor) -> _Teacher:
        z, ids = self.project(rows), None
        if self.teacher_probs is None:
            z, ids = z.topk(min(self.config.top_k, z.shape[-1]))
            probs = z.softmax(-1)
        else:
            probs = torch.softmax(z, -1, out=self.teacher_probs[: len(rows)])
        return _Teacher(probs, ids, _log_z(z, probs, z.argmax(-1, keepdim=True)) - _rowdot(probs, z))

    def row_losses(
        self, rows: Tensor, target: Tensor, teacher: _Teacher | None
    ) -> tuple[Tensor, Tensor | float, Tensor, Tensor]:
        """Loss [C], overlap [C], argmax [C] and d loss / d logits [C, V] of rows [C, D]; target is [C, 1]."""
        z = self.project(rows)
        best = z.argmax(-1, keepdim=True)
        q = torch.softmax(z, -1, out=self.probs[: len(rows)])
        log_z = _log_z(z, q, best)
        if teacher is None:
            loss = log_z - z.gather(1, target)
            grad = q.scatter_add_(1, target, torch.full_like(loss, -1.0))
            return loss.squeeze(1), 0.0, best.squeeze(1), grad
        p, ids, config = teacher.probs, teacher.ids, self.config
        kl = log_z - _rowdot(p, z if ids is None else z.gather(1, ids)) - teacher.entropy
        if ids is not None:
            overlap = torch.minimum(p, q.gather(1, ids)).sum(-1, keepdim=True)
            loss, grad = kl, q.scatter_add_(1, ids, -p)
        else:
            d = torch.sub(q, p, out=z)
            overlap = 1 - d.norm(p=1, dim=-1, keepdim=True) / 2  # sum min(p, q) = 1 - |p - q| / 2
            loss, grad = kl, d
        if config.loss in ("tv", "e2e", "lk"):
            # d TV / d logits = q (mass - [q < p]), mass = the part of q that lies below p
            below = torch.lt(d, 0, out=z)
            mass = _rowdot(q, below)
            loss, grad = 1 - overlap, below.neg_().add_(mass).mul_(q)
            if config.loss == "lk":
                w = (-config.lk_eta * overlap).exp()
                loss = w * kl + (1 - w) * loss
                grad = grad.mul_(1 - w).addcmul_(q, w).addcmul_(p, -w)
        if config.temperature != 1:
            grad = grad.div_(config.temperature)
        return loss.squeeze(1), overlap.squeeze(1), best.squeeze(1), grad


def _even(rows: Tensor, chunk: int) -> tuple[Tensor, ...]:
    """Parts of at most `chunk` rows and of equal size: a short last one would read all of the matrix for little."""
    return rows.tensor_split(-(-len(rows) // chunk)) if len(rows) else ()


def _log_z(z: Tensor, probs: Tensor, best: Tensor) -> Tensor:
    """log sum exp of the logits z, [C, 1], from their softmax: log q = z - log_z at any entry; the largest is exact."""
    return z.gather(1, best) - probs.gather(1, best).log()


def _rowdot(a: Tensor, b: Tensor) -> Tensor:
    """sum over the last dimension of a * b, [C, 1], without the product in memory."""
    return (a[:, None] @ b[:, :, None]).squeeze(2)
