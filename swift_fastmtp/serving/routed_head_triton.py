"""The routed head on a GPU: one launch that reads the weight rows of the maps in the batch, and no others.

A draft step of a few rows is bound by reading the output matrix, so a program reads a block of a map's weight rows
once, for all rows of the batch that use the map, straight from the live matrix. Which maps are in the batch is known
on the GPU only: every map has its programs in the grid, and those whose map no row uses end before they read a
weight. So the launch is the same whatever the batch holds, as a captured CUDA graph needs. Tested against the plain
form under Triton's interpreter (`tests/test_routed_head.py`).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_PROGRAMS = 1024  # per map; each takes every 1024th block of it, so that maps that are not used cost few programs
_SCAN = 128
# Rows computed at once → weight rows, and columns of theirs (of two bytes), read at once. One row alone is a sum; more
# are a product on the tensor cores, which takes no less than 16.
_BLOCKS = {1: (16, 512), 16: (32, 128), 32: (64, 64), 64: (64, 64)}


@triton.jit  # type: ignore[untyped-decorator]
def _route(  # type: ignore[no-untyped-def]
    hidden,
    weight,
    ids,
    offsets,
    language_ptr,
    out,
    N,
    D,
    V,
    maps,
    hidden_stride,
    weight_stride,
    out_stride,
    WIDEN: tl.constexpr,
    SCAN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Program (p, l): blocks p, p + programs, ... of map l for the rows whose language is l; l = maps is all of V."""
    # One program: a language, and every so many ids of its map (or of the whole vocabulary, the language `maps`).
    language = tl.program_id(1)
    full = language == maps
    first = tl.load(offsets + language)
    count = tl.where(full, V, tl.load(offsets + tl.minimum(language + 1, maps)) - first)
    begin = tl.program_id(0) * BLOCK_V
    if begin >= count:
        return
    # No row of the batch is in this language: nothing to compute.
    used = 0
    for start in range(0, N, SCAN):
        n = start + tl.arange(0, SCAN)
        used += tl.sum((tl.load(language_ptr + n, mask=n < N, other=-1) == language).to(tl.int32), 0)
    if used == 0:
        return
    # Rows of the output matrix are read once, and multiplied with every hidden state of the language.
    for block in range(begin, count, tl.num_programs(0) * BLOCK_V):
        at = block + tl.arange(0, BLOCK_V)
        inside = at < count
        row = tl.load(ids + first + at, mask=inside & (not full), other=0)
        row = tl.where(full, at, row).to(tl.int64)  # a matrix may hold more than 2^31 numbers
        weights = weight + row[:, None] * weight_stride
        for start in range(0, N, BLOCK_N):
            n = start + tl.arange(0, BLOCK_N)
            mine = tl.load(language_ptr + n, mask=n < N, other=-1) == language
            n = n.to(tl.int64)
            if tl.sum(mine.to(tl.int32), 0) > 0:
                # A single row is a product of a matrix with a vector, for which `tl.dot` is too small.
                if BLOCK_N == 1:
                    parts = tl.zeros([BLOCK_V, BLOCK_D], tl.float32)
                    for d in range(0, D, BLOCK_D):
                        k = d + tl.arange(0, BLOCK_D)
                        w = tl.load(weights + k[None, :], mask=inside[:, None] & (k < D)[None, :], other=0.0)
                        h = tl.load(hidden + n * hidden_stride + k, mask=k < D, other=0.0)
                        parts += w.to(tl.float32) * h.to(tl.float32)[None, :]
                    logits = tl.sum(parts, 1)[:, None]
                else:
                    logits = tl.zeros([BLOCK_V, BLOCK_N], tl.float32)
                    for d in range(0, D, BLOCK_D):
                        k = d + tl.arange(0, BLOCK_D)
                        w = tl.load(weights + k[None, :], mask=inside[:, None] & (k < D)[None, :], other=0.0)
                        at_h = hidden + n[None, :] * hidden_stride + k[:, None]
                        h = tl.load(at_h, mask=mine[None, :] & (k < D)[:, None], other=0.0)
                        if WIDEN:
                            w, h = w.to(tl.float32), h.to(tl.float32)
                        logits = tl.dot(w, h, logits, input_precision="ieee")
                place = out + n[None, :] * out_stride + row[:, None]
                tl.store(place, logits.to(out.dtype.element_ty), mask=inside[:, None] & mine[None, :])


def route(
    hidden_ND: Tensor, weight_VD: Tensor, ids_M: Tensor, offsets: Tensor, language_N: Tensor, out_NV: Tensor
) -> None:
    """`routed_head.route`, for rows of the matrix's own dtype: nothing here waits for the GPU."""
    (N, D), V = hidden_ND.shape, len(weight_VD)
    rows = 1 if N == 1 else min(max(_BLOCKS), max(16, triton.next_power_of_2(N)))
    block_v, block_d = _BLOCKS[rows]
    block_d = block_d * 2 // weight_VD.element_size()  # the same bytes at once in float32
    maps = len(offsets) - 1
    _route[(min(_PROGRAMS, triton.cdiv(V, block_v)), maps + 1)](
        hidden_ND,
        weight_VD,
        ids_M,
        offsets,
        language_N,
        out_NV,
        N,
        D,
        V,
        maps,
        hidden_ND.stride(0),
        weight_VD.stride(0),
        out_NV.stride(0),
        # Triton's interpreter, the only thing that brings CPU tensors here, would multiply bfloat16 as integers.
        WIDEN=weight_VD.dtype == torch.bfloat16 and not weight_VD.is_cuda,
        SCAN=_SCAN,
        BLOCK_N=rows,
        BLOCK_V=block_v,
        BLOCK_D=block_d,
        num_warps=4,
        num_stages=3,
    )
