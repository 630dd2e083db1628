"""The chunked cross-entropy equals the plain one, gradients included, and never holds more than a chunk of logits."""

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from swift_fastmtp.losses import step_losses, weighted_loss


def plain(outputs, weight, targets, valid):
    """All logits at once."""
    logits = torch.stack(outputs) @ weight.T
    nll = F.cross_entropy(logits.movedim(-1, 1), targets, reduction="none") * valid
    return nll, (logits.argmax(-1) == targets) & valid


@pytest.mark.parametrize("shape", [(1, 1, 1, 3, 2), (3, 2, 13, 7, 31), (5, 1, 47, 16, 123)])
@pytest.mark.parametrize("chunk", [1, 4, 1000])
def test_equals_plain_cross_entropy_in_float64(shape, chunk):
    steps, batch, length, width, vocab = shape
    weight = torch.randn(vocab, width, dtype=torch.float64)
    targets = torch.randint(0, vocab, (steps, batch, length))
    valid = torch.rand(steps, batch, length) < 0.6
    one = [torch.randn(batch, length, width, dtype=torch.float64, requires_grad=True) for _ in range(steps)]
    two = [g.detach().clone().requires_grad_() for g in one]
    nll, match = step_losses(one, weight, targets, valid, chunk)
    want_nll, want_match = plain(two, weight, targets, valid)
    torch.testing.assert_close(nll, want_nll, atol=1e-12, rtol=1e-12)
    assert torch.equal(match, want_match)
    upstream = torch.randn_like(nll)
    (nll * upstream).sum().backward()
    (want_nll * upstream).sum().backward()
    for a, b in zip(one, two, strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_tolerance_in_training_dtypes(dtype, tolerance):
    weight = torch.randn(201, 24) * 0.3
    g = torch.randn(1, 33, 24)
    targets, valid = torch.randint(0, 201, (1, 1, 33)), torch.ones(1, 1, 33, dtype=torch.bool)
    exact = g.clone().requires_grad_()
    plain([exact], weight, targets, valid)[0].sum().backward()
    fast = g.clone().to(dtype).requires_grad_()
    nll, _ = step_losses([fast], weight.to(dtype), targets, valid, 8)
    nll.sum().backward()
    assert nll.dtype == torch.float32
    assert (fast.grad.float() - exact.grad).abs().max() <= tolerance


class LargestTensor(TorchDispatchMode):
    """Rows of the largest [rows, vocab] tensor that any operation returned."""

    def __init__(self, vocab):
        super().__init__()
        self.vocab, self.rows = vocab, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.ndim == 2 and out.shape[-1] == self.vocab:
            self.rows = max(self.rows, out.shape[0])
        return out


def test_logits_never_exceed_one_chunk():
    outputs = [torch.randn(2, 50, 8, requires_grad=True) for _ in range(3)]
    targets, valid = torch.randint(0, 97, (3, 2, 50)), torch.ones(3, 2, 50, dtype=torch.bool)
    with LargestTensor(97) as largest:
        step_losses(outputs, torch.randn(97, 8), targets, valid, 16)[0].sum().backward()
    assert largest.rows == 16


def test_no_supervised_row_gives_zero_and_a_gradient():
    """A batch without a single target must still take part in a distributed backward pass."""
    g = torch.randn(1, 6, 8, requires_grad=True)
    none = torch.zeros(1, 1, 6, dtype=torch.bool)
    nll, match = step_losses([g], torch.randn(11, 8), torch.zeros(1, 1, 6, dtype=torch.long), none, 4)
    weighted_loss(nll, [1.0], 0).backward()
    assert float(nll.detach().sum()) == 0 and not match.any() and float(g.grad.abs().sum()) == 0


def test_weights_follow_the_papers_equation_2():
    nll = torch.ones(3, 1, 4)
    weights = [1 / 1.96, 0.6 / 1.96, 0.36 / 1.96]
    assert float(weighted_loss(nll, weights, 4)) == pytest.approx(1.0)
    nll[1:] = 0
    assert float(weighted_loss(nll, weights, 4)) == pytest.approx(0.5102, abs=1e-4)
