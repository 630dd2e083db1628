"""Flash + chain merge equals one plain softmax, gradients included, for every kernel that runs here."""

import pytest
import torch
from helpers.reference import merged_attention
from hypothesis import given, settings
from hypothesis import strategies as st

from swift_fastmtp.method import attention, flash
from swift_fastmtp.method.flash import Documents

KERNELS = ("cpu", "blocked")


@pytest.fixture
def use(monkeypatch):
    def choose(kernel):
        monkeypatch.setattr(flash, "_BLOCK", 4)
        if kernel == "blocked":
            monkeypatch.setattr(flash, "_cpu_kernel_fits", lambda *_: False)

    return choose


def segments(batch, length, cuts, padding):
    """Segment ids [B, T]: documents that start at `cuts`; the last batch row ends with `padding` rows of padding."""
    ids = torch.zeros(batch, length, dtype=torch.long)
    for cut in cuts:
        ids[:, cut % length :] += 1
    if padding:
        ids[-1, length - padding % length :] = -1
    return ids


def inputs(batch, heads, kv, length, dim, links, dtype, rows=None):
    n = length if rows is None else len(rows)
    chain = (links, batch, kv, n, dim) if rows is None else (links, 1, kv, n, dim)
    shapes = [
        (batch if rows is None else 1, heads, n, dim),
        (batch, kv, length, dim),
        (batch, kv, length, dim),
        chain,
        chain,
    ]
    return [torch.randn(s, dtype=dtype).requires_grad_() for s in shapes]


def plain(q, k, v, ck, cv, rows, segment_ids, scale):
    """The reference on all rows; those not asked for have zero queries and empty chains, and are dropped."""
    B, T = segment_ids.shape
    visible = (segment_ids[:, None, :, None] == segment_ids[:, None, None, :]) & torch.ones(T, T).tril().bool()
    if rows is None:
        return merged_attention(q, k, v, ck, cv, visible, scale)

    def spread(x):  # [.., 1, H, N, d] → [.., B, H, T, d]
        moved = x.movedim(-2, 0).squeeze(-3)
        full = x.new_zeros(B * T, *moved.shape[1:]).index_copy(0, rows, moved)
        return (
            full.unflatten(0, (B, T)).movedim(1, -2)
            if x.ndim == 4
            else full.unflatten(0, (B, T)).permute(2, 0, 3, 1, 4)
        )

    out = merged_attention(spread(q), k, v, spread(ck), spread(cv), visible, scale)
    return out.transpose(1, 2).flatten(0, 1)[rows].transpose(0, 1)[None]


def compare(args, rows, segment_ids, tolerance):
    scale = args[0].shape[-1] ** -0.5
    exact = [a.detach().double().requires_grad_() for a in args]
    links = len(args[3])
    fast = attention._Attention.apply(
        *args[:3], *(args[3:] if links else (None, None)), rows, Documents(segment_ids), scale
    )
    want = plain(*exact, rows, segment_ids, scale)
    real = (segment_ids >= 0).flatten() if rows is None else (segment_ids >= 0).flatten()[rows]
    real = real.view(want.shape[0], 1, -1, 1)  # what padding rows see does not matter
    fast, want = fast * real, want * real
    upstream = torch.randn(want.shape, dtype=torch.float64)
    fast_grads = torch.autograd.grad(fast, args[: 5 if links else 3], upstream.to(fast.dtype))
    want_grads = torch.autograd.grad(want, exact[: 5 if links else 3], upstream.to(fast.dtype).double())
    for a, b in zip((fast, *fast_grads), (want, *want_grads), strict=True):
        assert a.shape == b.shape
        assert float((a.double() - b).detach().abs().max()) <= tolerance * max(1.0, float(b.detach().abs().max()))


@pytest.mark.parametrize("kernel", KERNELS)
@given(
    batch=st.integers(1, 2),
    heads=st.sampled_from([(4, 2), (3, 3), (4, 1)]),
    length=st.integers(2, 21),
    dim=st.sampled_from([2, 8, 16]),
    links=st.integers(0, 3),
    cuts=st.lists(st.integers(1, 20), max_size=2),
    padding=st.integers(0, 3),
    some_rows=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(deadline=None, max_examples=40)
def test_equals_one_softmax_in_float64(kernel, batch, heads, length, dim, links, cuts, padding, some_rows, seed):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flash, "_BLOCK", 4)
        if kernel == "blocked":
            patch.setattr(flash, "_cpu_kernel_fits", lambda *_: False)
        torch.manual_seed(seed)
        rows = torch.randperm(batch * length)[: max(1, length // 2)].sort().values if some_rows and links else None
        args = inputs(batch, *heads, length, dim, links, torch.float64, rows)
        compare(args, rows, segments(batch, length, cuts, padding), 1e-10)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("kernel", KERNELS)
def test_tolerance_in_training_dtypes(use, kernel, dtype, tolerance):
    """Relative to the largest entry; the float64 reference sees the same rounded inputs."""
    use(kernel)
    rows = torch.arange(40, 150)
    args = inputs(1, 8, 2, 160, 64, 2, dtype, rows)
    compare(args, rows, segments(1, 160, [90], 0), tolerance)


def test_value_heads_may_be_narrower_than_query_heads():
    """As in multi-head latent attention: no flash kernel takes it, the plain one does."""
    q, k, v = torch.randn(1, 2, 9, 6), torch.randn(1, 2, 9, 6), torch.randn(1, 2, 9, 4)
    out, _ = flash.flash(q, k, v, Documents(torch.zeros(1, 9, dtype=torch.long)), 0.5)
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.5)
    torch.testing.assert_close(out, want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("cuts", [[], [5, 12]])
def test_shapes_of_the_cuda_kernels(monkeypatch, cuts):
    """On meta tensors: PyTorch's own shape functions of the CUDA kernels take what we hand them. Numbers need a GPU."""
    monkeypatch.setattr(flash, "_cuda_kernel_fits", lambda *_: True)
    documents = Documents(segments(2, 20, cuts, 3 if cuts else 0))
    q, k, v = (torch.empty(2, h, 20, 64, dtype=torch.bfloat16, device="meta") for h in (4, 2, 2))
    if cuts:
        documents.cu_seqlens = documents.cu_seqlens.to("meta")
    out, lse = flash.flash(q, k, v, documents, 0.1)
    assert out.shape == q.shape and lse.shape == (2, 4, 20) and lse.dtype == torch.float32
    grads = flash.flash_backward(torch.empty_like(out), q, k, v, out, lse, documents, 0.1)
    assert [g.shape for g in grads] == [q.shape, k.shape, v.shape]


def test_no_tensor_of_length_squared():
    """32k tokens would need 32k x 32k scores; the largest tensor here must stay linear in the length."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for x in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(x, torch.Tensor):
                    self.elements = max(self.elements, x.numel())
            return out

    args = inputs(1, 2, 1, 2048, 8, 2, torch.float32)
    with Largest() as largest:
        out = attention._Attention.apply(*args, None, Documents(segments(1, 2048, [700], 0)), 0.3)
        out.sum().backward()
    assert largest.elements <= 2 * 2048 * 8 * 2  # two chain keys, two heads
