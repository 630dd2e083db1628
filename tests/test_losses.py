"""Every loss equals its formula in float64, gradients included, and never holds more than a chunk of logits."""

import math
from unittest import mock

import pytest
import torch
from helpers.loss_cases import case
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from swift_fastmtp.method import frozen_head
from swift_fastmtp.method.chunked_losses import greedy_tokens, step_losses
from swift_fastmtp.method.config import LOSSES, SOFT_LOSSES, FastMTPConfig
from swift_fastmtp.method.frozen_head import chunks
from swift_fastmtp.method.losses import fastmtp_loss, plain_step_losses, weighted_loss


def both(case, config):
    """(loss, match, accept_prob, gradient of a random weighting of the losses) of the fast and of the plain form."""
    outputs, weight, targets, valid, hidden, rows = case
    upstream = torch.rand(valid.shape, generator=torch.Generator().manual_seed(1)) + 0.5
    found = []
    for function in (step_losses, plain_step_losses):
        g = outputs.clone().requires_grad_()
        loss, match, accept_prob = function(g, weight, targets, valid, config, hidden, rows)
        (loss * upstream).sum().backward()
        found.append((loss.detach(), match, accept_prob, g.grad))
    return found


@settings(deadline=None, max_examples=60)
@given(
    loss=st.sampled_from(LOSSES),
    K=st.integers(1, 4),
    N=st.integers(1, 23),
    gap=st.integers(0, 9),
    D=st.integers(1, 9),
    V=st.integers(2, 40),
    chunk=st.sampled_from([1, 3, 1000]),
    block=st.sampled_from([1, 3, 1000]),
    temperature=st.sampled_from([1.0, 0.6, 1.7]),
    seed=st.integers(0, 999),
)
def test_equals_the_formula_in_float64(loss, K, N, gap, D, V, chunk, block, temperature, seed):
    config = FastMTPConfig(num_speculative_steps=K, loss=loss, loss_chunk_size=chunk, temperature=temperature)
    with mock.patch.object(frozen_head, "block_size", lambda _: block):
        fast, want = both(case(K, N, N + gap, D, V, seed), config)
    assert torch.equal(fast[1], want[1])
    for a, b in zip(fast, want, strict=True):
        if b is not None and b.dtype != torch.bool:
            torch.testing.assert_close(a, b, atol=1e-11, rtol=1e-10)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 5e-2)])
def test_tolerance_in_training_dtypes(loss, dtype, tolerance):
    """Error of the gradient relative to its largest entry; float64 on the same rounded inputs is the reference."""
    exact = case(3, 33, 40, 24, 201, 0)
    config = FastMTPConfig(loss=loss, loss_chunk_size=8)
    low = tuple(x.to(dtype) if x.is_floating_point() else x for x in exact)
    rounded = tuple(x.double() if x.is_floating_point() else x for x in low)
    fast, want = both(low, config)[0], both(rounded, config)[1]
    assert fast[0].dtype == torch.float32
    assert float((fast[3].double() - want[3]).abs().max() / want[3].abs().max()) <= tolerance


def test_accept_prob_is_the_acceptance_of_speculative_sampling():
    """Draw from q, accept with min(1, p/q): the accepted share is the reported probability."""
    outputs, weight, targets, valid, hidden, rows = case(1, 1, 2, 6, 12, 4)
    accept_prob = step_losses(
        outputs, weight, targets, valid | True, FastMTPConfig(loss="kl"), hidden, rows
    ).accept_prob
    q, p = (outputs[0] @ weight.T).softmax(-1)[0], (hidden[rows + 1] @ weight.T).softmax(-1)[0]
    drawn = torch.multinomial(q, 200_000, replacement=True, generator=torch.Generator().manual_seed(0))
    accepted = (torch.rand(len(drawn), generator=torch.Generator().manual_seed(1)) < p[drawn] / q[drawn]).double()
    assert float(accept_prob) == pytest.approx(float(accepted.mean()), abs=0.005)


class LargestTensor(TorchDispatchMode):
    """Rows of the largest [rows, vocab] tensor that any operation returned, and rows projected in all."""

    def __init__(self, vocab):
        super().__init__()
        self.vocab, self.rows, self.projected = vocab, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.ndim == 2 and out.shape[-1] == self.vocab:
            self.rows = max(self.rows, out.shape[0])
            self.projected += out.shape[0] if func in (torch.ops.aten.mm.default, torch.ops.aten.mm.out) else 0
        return out


@pytest.mark.parametrize("loss", LOSSES)
def test_logits_never_exceed_a_chunk_and_ignored_rows_are_never_projected(loss):
    outputs, weight, targets, valid, hidden, rows = case(3, 80, 100, 8, 97, 0, torch.float32)
    outputs.requires_grad_()
    with LargestTensor(97) as largest:
        step_losses(
            outputs, weight, targets, valid, FastMTPConfig(loss=loss, loss_chunk_size=16), hidden, rows
        ).loss.sum().backward()
    assert 12 <= largest.rows <= 16  # equal parts of at most a chunk
    step, row = valid.nonzero(as_tuple=True)
    teachers = len((rows[row] + step + 1).unique()) if loss in SOFT_LOSSES else 0
    assert largest.projected == int(valid.sum()) + teachers  # each row once, each teacher once for all steps


def test_no_supervised_row_gives_zero_and_a_gradient():
    """A batch without a single target must still take part in a distributed backward pass."""
    g = torch.randn(1, 6, 8, requires_grad=True)
    none = torch.zeros(1, 6, dtype=torch.bool)
    loss, match, _ = step_losses(
        g, torch.randn(11, 8), torch.zeros(1, 6, dtype=torch.long), none, FastMTPConfig(loss="ce")
    )
    weighted_loss(loss[:, None], [1.0], 0).backward()
    assert float(loss.detach().sum()) == 0 and not match.any() and float(g.grad.abs().sum()) == 0


def test_drafts_are_the_argmax():
    rows, weight = torch.randn(21, 5), torch.randn(13, 5)
    config = FastMTPConfig(loss_chunk_size=4)
    assert torch.equal(greedy_tokens(rows, weight, config), (rows @ weight.T).argmax(-1))
    assert greedy_tokens(rows[:0], weight, config).tolist() == []


def test_weights_follow_the_papers_equation_2():
    nll = torch.ones(3, 1, 4)
    weights = [1 / 1.96, 0.6 / 1.96, 0.36 / 1.96]
    assert float(weighted_loss(nll, weights, 4)) == pytest.approx(1.0)
    nll[1:] = 0
    assert float(weighted_loss(nll, weights, 4)) == pytest.approx(0.5102, abs=1e-4)


def test_equation_1_by_hand():
    """K = 2, one row: alpha is 1/1.6 and 0.6/1.6; of two logits a and b, -log softmax at a is log(1 + e^(b-a))."""
    logits = torch.tensor([[[0.0, 1.0]], [[2.0, 0.0]]])
    targets, valid = torch.tensor([[0], [0]]), torch.tensor([[True], [True]])
    weights = FastMTPConfig(num_speculative_steps=2, beta=0.6).step_weights
    want = (math.log(1 + math.e) + 0.6 * math.log(1 + math.exp(-2))) / 1.6
    assert float(fastmtp_loss(logits, targets, valid, weights, 1)) == pytest.approx(want)
    valid[1] = False
    assert float(fastmtp_loss(logits, targets, valid, weights, 1)) == pytest.approx(math.log(1 + math.e) / 1.6)


def test_the_chunked_loss_is_equation_1():
    outputs, weight, targets, valid, _, _ = case(3, 17, 30, 6, 12, 5)
    config = FastMTPConfig(loss="ce", loss_chunk_size=4)
    loss = step_losses(outputs, weight, targets, valid, config).loss
    want = fastmtp_loss(outputs @ weight.T, targets, valid, config.step_weights, 17)
    assert float(weighted_loss(loss, config.step_weights, 17)) == pytest.approx(float(want), rel=1e-12)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 4), st.integers(1, 9), st.integers(1, 12), st.booleans(), st.integers(0, 99))
def test_chunks_hold_every_valid_row_once_with_its_own_teacher(K, N, size, soft, seed):
    _, _, _, valid, _, rows = case(K, N, N + K + 1, 4, 11, seed)
    seen, projected = [], []
    for chunk in chunks(valid, rows if soft else None, size):
        assert len(chunk.rows) and chunk.size <= max(size, K + 1)
        seen += chunk.rows.tolist()
        if soft:
            step, row = chunk.rows // N, chunk.rows % N
            assert torch.equal(chunk.positions[chunk.place], rows[row] + step + 1)
            projected += chunk.positions.tolist()
    assert sorted(seen) == valid.flatten().nonzero().squeeze(1).tolist()
    assert len(projected) == len(set(projected))


class Waits(TorchDispatchMode):
    """Counts the operations for which the host waits for a GPU: what makes numbers, or shapes, of values."""

    names = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero", "equal")

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__.lstrip("_")
        by_mask = name in ("index", "index_put", "index_put_") and any(
            i is not None and i.dtype == torch.bool for i in args[1]
        )
        self.count += by_mask or name.startswith(tuple(n.lstrip("_") for n in self.names))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("loss", LOSSES)
def test_a_gpu_is_not_waited_for_in_every_chunk(loss):
    """As often with forty chunks as with one."""
    inputs = case(3, 40, 44, 8, 13, 0, torch.float32)
    outputs, weight, targets, valid, hidden, rows = inputs
    counts = []
    for chunk in (1000, 1):
        config = FastMTPConfig(loss=loss, loss_chunk_size=chunk, num_speculative_steps=3)
        with Waits() as waits:
            found = step_losses(outputs.requires_grad_(), weight, targets, valid, config, hidden, rows)
            found[0].sum().backward()
        counts.append(waits.count)
    assert counts[0] == counts[1] <= 6
