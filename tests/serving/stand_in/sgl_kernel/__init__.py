"""Pure-torch stand-in for the CPU build of ``sgl_kernel``, enough to run an unquantized model with plain, latent
or linear attention, dense or with experts, in SGLang 0.5.19 - 0.5.23 on CPU (linear attention: 0.5.23), including
EAGLE/NEXTN speculative decoding; and a dense model with plain attention in FP8 blocks, AWQ or GPTQ.

PyPI only carries the CUDA builds (sgl-kernel / sglang-kernel).  SGLang's own CPU path
(``SGLANG_USE_CPU_ENGINE=1``, ``--device cpu``, attention backend ``intel_amx``) needs a small set of
ops from the CPU build; they are written here in plain torch, following SGLang's call sites, its Triton
kernels and its CPU sources (Apache-2.0; nothing copied).  SGLang itself is not modified.
Slow but exact: no weight packing, any float dtype, any CPU. Experts and latent attention in float32 only: where their
weights are of 16 bits, SGLang calls fused operations that are not here.
"""

import ctypes

import torch

__version__ = "0.0.0+torch"


def _op(fn):
    """Expose ``fn`` as ``torch.ops.sgl_kernel.<name>`` (never seen by torch.compile)."""
    setattr(torch.ops.sgl_kernel, fn.__name__, fn)
    return fn


# ------------------------------------------------------------------ runtime
@_op
def init_cpu_threads_env(cpu_ids):
    torch.set_num_threads(1)  # the real op pins OpenMP threads; tiny models are fastest on one


@_op
def initialize(size, rank):
    if size > 1:
        raise NotImplementedError("sgl_kernel stand-in: tensor parallelism")


# ------------------------------------------------------------------- layers
@_op
def convert_weight_packed(weight):  # its presence is SGLang's test for "CPU kernels available"
    return weight.detach().clone()  # "packed" layout == plain layout


@_op
def weight_packed_linear(x, weight, bias, is_vnni):
    return torch.nn.functional.linear(x, weight, None if bias is None else bias.to(x.dtype))


@_op
def fp8_scaled_mm_cpu(x, weight, scales, block_size, bias, out_dtype, is_vnni):
    """FP8 in blocks, of which the weight is dequantized; activations are not quantized."""
    rows, columns = (torch.arange(size) // block for size, block in zip(weight.shape, block_size, strict=True))
    numbers = weight.float() * scales[rows[:, None], columns]
    return weight_packed_linear(x, numbers.to(x.dtype), bias, is_vnni).to(out_dtype)


_AWQ, _AWQ_ORDER = 0, torch.tensor([0, 4, 1, 5, 2, 6, 3, 7])
"""SGLang's `CPUQuantAlgo`; where AutoAWQ puts each of eight outputs in a word."""


def _codes(words):
    """Eight codes of four bits for each word of the last dimension, the first in its lowest bits."""
    return (words[..., None] >> torch.arange(0, 32, 4)) & 15


@_op
def convert_weight_packed_scale_zp(qweight, qzeros, scales, algorithm):
    """AWQ [in, out / 8] or GPTQ [in / 8, out], as the numbers that they stand for, [out, in] in float32; zeros and
    scales [groups, out] are in them."""
    zeros = _codes(qzeros)
    if algorithm == _AWQ:
        codes = _codes(qweight)[..., _AWQ_ORDER].flatten(-2)
        zeros = zeros[..., _AWQ_ORDER].flatten(-2)
    else:
        codes = _codes(qweight.T).flatten(-2).T
        zeros = zeros.flatten(-2) + 1  # stored as one less
    group = len(codes) // len(scales)
    numbers = (codes - zeros.repeat_interleave(group, 0)) * scales.float().repeat_interleave(group, 0)
    return numbers.T.contiguous(), qzeros, scales


@_op
def int4_scaled_mm_cpu(x, weight, zeros, scales, bias):
    """Of what `convert_weight_packed_scale_zp` gave; activations are not quantized."""
    return weight_packed_linear(x, weight.to(x.dtype), bias, True)


@_op
def rmsnorm_cpu(x, weight, eps):
    h = x.float()
    h = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + eps)
    return (h * weight.float()).to(x.dtype)


@_op
def fused_add_rmsnorm_cpu(x, residual, weight, eps):  # both in place
    total = x.float() + residual.float()
    residual.copy_(total)
    x.copy_(rmsnorm_cpu(total, weight, eps))


@_op
def silu_and_mul_cpu(x):
    gate, up = x.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


@_op
def rotary_embedding_cpu(positions, query, key, head_size, cos_sin_cache, is_neox):
    cos, sin = cos_sin_cache[positions.flatten()].float().unsqueeze(1).chunk(2, -1)
    rot = cos.shape[-1] * 2

    def rotate(t):
        heads = t.reshape(positions.numel(), -1, head_size)
        part = heads[..., :rot].float()
        if is_neox:
            a, b = part.chunk(2, -1)
            part = torch.cat((a * cos - b * sin, b * cos + a * sin), -1)
        else:
            a, b = part[..., ::2], part[..., 1::2]
            part = torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)
        return torch.cat((part.to(t.dtype), heads[..., rot:]), -1).reshape(t.shape)

    return rotate(query), rotate(key)


@_op
def store_cache_cpu(k, v, k_cache, v_cache, indices, row_dim=0):
    for new, cache in ((k, k_cache), (v, v_cache)):
        cache.index_copy_(0, indices.long(), new.reshape(-1, *cache.shape[1:]).to(cache.dtype))


# ------------------------------------------------------ mixtures of experts
@_op
def topk_softmax_cpu(hidden_states, gating_output, topk, renormalize, correction_bias=None):
    scores = gating_output.float().softmax(-1)
    ids = (scores if correction_bias is None else scores + correction_bias).topk(topk, dim=-1).indices
    weights = scores.gather(-1, ids)
    if renormalize:
        weights = weights / weights.sum(-1, keepdim=True)
    return weights, ids.int()


@_op
def biased_grouped_topk_cpu(
    hidden, gating, bias, topk, renormalize, groups, topk_groups, num_fused_shared, scaling, num_token_non_padded=None
):
    """DeepSeek-V3's routing: experts of the best groups, chosen by sigmoid score + bias, weighted by the score."""
    if num_fused_shared:
        raise NotImplementedError("sgl_kernel stand-in: fused shared experts")
    scores = gating.float().sigmoid()
    biased = (scores + bias.float()).unflatten(-1, (groups, -1))
    best = biased.topk(2, dim=-1).values.sum(-1).topk(topk_groups, dim=-1).indices
    chosen = torch.zeros(biased.shape[:-1], dtype=torch.bool).scatter_(-1, best, True)
    ids = biased.masked_fill(~chosen[..., None], float("-inf")).flatten(-2).topk(topk, dim=-1).indices
    weights = scores.gather(-1, ids)
    if renormalize:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return weights * (scaling or 1.0), ids.int()


def _missing(name):  # looked up when SGLang imports its vision modules, never called by a text model
    def fn(*args, **kwargs):
        raise NotImplementedError(f"sgl_kernel stand-in: {name}")

    fn.__name__ = name
    return fn


for _name in ("apply_rotary_pos_emb_cpu", "conv3d_embed_cpu", "flash_attn_varlen_func"):
    _op(_missing(_name))


# ---------------------------------------------------------------- attention
def _attend(q, k, v, scale, cap, mask):
    """q [n, h, d], k/v [m, hk, d], mask [n, m] -> [n, h, dv]; fp32 math."""
    group = q.shape[1] // k.shape[1]
    k, v = (t.float().repeat_interleave(group, dim=1) for t in (k, v))
    score = torch.einsum("nhd,mhd->hnm", q.float(), k) * scale
    if cap > 0:
        score = cap * torch.tanh(score / cap)
    if mask is not None:
        score = score.masked_fill(~mask, float("-inf"))
    return torch.einsum("hnm,mhd->nhd", score.softmax(-1), v)


def _split(args, at):
    """Drop the (k_scale, v_scale) pair that newer SGLang versions pass at position ``at``."""
    return args[:at] + args[at + 2 :] if not torch.is_tensor(args[at]) else args


def _plain(is_cross_attn, encoder_lens, sinks):
    if is_cross_attn or encoder_lens is not None or sinks is not None:
        raise NotImplementedError("sgl_kernel stand-in: cross attention / attention sinks")


@_op
def extend_attention_cpu(*args):
    (q, k, v, o, k_buffer, v_buffer, req_to_token, req_pool_indices, seq_lens, extend_seq_lens, extend_start_loc,
     _, scale, cap, is_cross_attn, window, encoder_lens, sinks, tree_mask, *rest) = _split(args, 6)  # fmt: skip
    _plain(is_cross_attn, encoder_lens, sinks)
    is_causal = rest[0] if rest else True
    for i in range(seq_lens.numel()):
        n, total, start = int(extend_seq_lens[i]), int(seq_lens[i]), int(extend_start_loc[i])
        prefix = total - n
        rows = req_to_token[int(req_pool_indices[i]), : total if k is None else prefix].long()
        ks, vs = k_buffer[rows], v_buffer[rows]
        if k is not None:  # the new rows need not be in the cache yet
            new = k[start : start + n], v[start : start + n]
            # With no row cached before them they may be of another kind: latent attention then passes keys and values
            # widened to all heads, where its cache holds latents.
            ks, vs = map(torch.cat, zip((ks, vs), new, strict=True)) if prefix else new
        qpos, kpos = torch.arange(prefix, total).unsqueeze(1), torch.arange(total).unsqueeze(0)
        mask = (kpos <= qpos) if is_causal else torch.ones(n, total, dtype=torch.bool)
        if tree_mask is not None:  # [bs, n, n] over the draft tokens
            mask[:, prefix:] = tree_mask.view(-1, n, n)[i]
        if window > 0:
            mask = mask & (kpos > qpos - window)
        o[start : start + n] = _attend(q[start : start + n], ks, vs, scale, cap, mask).to(o.dtype)


@_op
def decode_attention_cpu(*args):
    (q, k_buffer, v_buffer, o, k, v, loc, _, req_to_token, req_pool_indices, seq_lens, scale, cap, is_cross_attn,
     window, encoder_lens, sinks) = _split(args, 3)  # fmt: skip
    _plain(is_cross_attn, encoder_lens, sinks)
    if k is not None:  # this kernel itself writes the new row
        store_cache_cpu(k, v, k_buffer, v_buffer, loc)
    for i in range(seq_lens.numel()):
        total = int(seq_lens[i])
        rows = req_to_token[int(req_pool_indices[i]), max(0, total - window) if window > 0 else 0 : total].long()
        o[i] = _attend(q[i : i + 1], k_buffer[rows], v_buffer[rows], scale, cap, None)[0].to(o.dtype)


# ------------------------------------------------- request -> KV slot bookkeeping
def _spans(req_pool_indices, start, end):
    at = 0
    for r, s, e in zip(req_pool_indices.tolist(), start.tolist(), end.tolist(), strict=False):
        yield r, s, e, at
        at += e - s


def assign_req_to_token_pool_cpu(req_pool_indices, req_to_token, start, end, out_cache_loc, pool_len):
    for r, s, e, at in _spans(req_pool_indices, start, end):
        req_to_token[r, s:e] = out_cache_loc[at : at + e - s].to(req_to_token.dtype)


def assign_extend_cache_locs_cpu(req_pool_indices, req_to_token, start, end, out_cache_loc, pool_len):
    for r, s, e, at in _spans(req_pool_indices, start, end):
        out_cache_loc[at : at + e - s] = req_to_token[r, s:e].to(out_cache_loc.dtype)


def assign_draft_cache_locs_contiguous_cpu(
    req_pool_indices, req_to_token, seq_lens, out_cache_loc, pool_len, topk, num_steps
):
    assign_extend_cache_locs_cpu(
        req_pool_indices, req_to_token, seq_lens, seq_lens + topk * num_steps, out_cache_loc, 0
    )


def build_draft_decode_metadata_cpu(req_to_token, req_pool_indices, seq_lens, topk, num_steps, pool_len):
    """Slot table per draft branch [bs * topk, pool_len]: committed prefix, then that branch's own slots."""
    out = torch.zeros(req_pool_indices.numel() * topk, pool_len, dtype=req_to_token.dtype)
    for b, (r, s) in enumerate(zip(req_pool_indices.tolist(), seq_lens.tolist(), strict=False)):
        for t in range(topk):
            row, at = out[b * topk + t], s + t * num_steps
            row[:s] = req_to_token[r, :s]
            row[s : s + num_steps] = req_to_token[r, at : at + num_steps]
    return out


def copy_all_layer_kv_cache_cpu(data_ptrs, strides, tgt_loc, src_loc):
    """Move token rows inside every layer's K and V buffer (base addresses, row sizes in bytes)."""
    for base, row in zip(data_ptrs.tolist(), strides.tolist(), strict=False):
        rows = [ctypes.string_at(base + s * row, row) for s in src_loc.tolist()]
        for t, data in zip(tgt_loc.tolist(), rows, strict=False):
            ctypes.memmove(base + t * row, data, row)


# ------------------------------------------------------------ speculative decoding
def build_tree_kernel_efficient_cpu(
    parent_list, selected_index, verified_seq_len, tree_mask, positions, retrieve_index, retrieve_next_token,
    retrieve_next_sibling, topk, depth, draft_token_num, tree_mask_mode,
):  # fmt: skip
    """Node 0 is the bonus token, node i + 1 the i-th selected candidate; the parent of candidate c is
    candidate ``parent_list[c // topk]``, or the root if ``c // topk == 0``."""
    n, mode, at = draft_token_num, int(tree_mask_mode), 0
    if mode not in (0, 1):
        raise NotImplementedError("sgl_kernel stand-in: bit-packed tree mask")
    for b in range(verified_seq_len.numel()):
        seq, chosen = int(verified_seq_len[b]), selected_index[b].tolist()
        parent = [-1]
        for c in chosen:
            parent.append(0 if c // topk == 0 else chosen.index(int(parent_list[b, c // topk])) + 1)
        sees = torch.zeros(n, n, dtype=torch.bool)
        for i in range(n):
            j = i
            while j != -1:
                sees[i, j], j = True, parent[j]
        retrieve_index[b] = torch.arange(b * n, (b + 1) * n)
        positions[b * n : (b + 1) * n] = seq + sees.sum(1) - 1
        for i in range(n - 1, 0, -1):  # first child, then siblings, in increasing order
            if int(retrieve_next_token[b, parent[i]]) != -1:
                retrieve_next_sibling[b, i] = retrieve_next_token[b, parent[i]]
            retrieve_next_token[b, parent[i]] = i
        width = n if mode == 1 else seq + n  # QLEN_ONLY | FULL_MASK
        tree_mask.view(-1)[at : at + n * width].view(n, width)[:, width - n :] = sees
        at += n * width


def verify_tree_greedy_cpu(
    predicts, accept_index, accept_token_num, candidates, retrive_index, retrive_next_token, retrive_next_sibling,
    target_predict,
):  # fmt: skip
    """From the root, follow at each level the child that equals the target's argmax."""
    target = target_predict.reshape(-1).to(predicts.dtype)
    for b in range(candidates.shape[0]):
        node, accepted, last = 0, 0, int(retrive_index[b, 0])
        accept_index[b, 0] = last
        while accepted + 1 < accept_index.shape[1]:
            child = int(retrive_next_token[b, node])
            while child != -1 and int(candidates[b, child]) != int(target[last]):
                child = int(retrive_next_sibling[b, child])
            if child == -1:
                break
            predicts[last] = target[last]
            accepted, node, last = accepted + 1, child, int(retrive_index[b, child])
            accept_index[b, accepted] = last
        predicts[last] = target[last]
        accept_token_num[b] = accepted


def fill_bonus_tokens_cpu(accept_tokens, accept_lens, bonus_tokens, accept_stride):
    last = torch.arange(accept_lens.numel()) * accept_stride + accept_lens.long() - 1
    bonus_tokens.copy_(accept_tokens.reshape(-1)[last])


def fill_accept_out_cache_loc_cpu(accept_index, out_cache_loc, accept_out_cache_loc, size=None):
    src = accept_index.reshape(-1)
    src = src[src > -1].long()
    accept_out_cache_loc[: src.numel()] = out_cache_loc[src]


def rotate_input_ids_cpu(input_ids, extend_start_loc, extend_seq_lens, topk_index, select_index=None):
    """Shift each request's ids left by one and put the new token into the freed slot (multi-layer MTP only)."""
    for i, (s, n) in enumerate(zip(extend_start_loc.tolist(), extend_seq_lens.tolist(), strict=False)):
        if n > 0:
            input_ids[s : s + n - 1] = input_ids[s + 1 : s + n].clone()
            input_ids[s + n - 1 if select_index is None else int(select_index[i])] = topk_index.reshape(-1)[i]


from . import gated  # noqa: E402, F401 (made of the ops above; `mamba` is imported by SGLang itself)
