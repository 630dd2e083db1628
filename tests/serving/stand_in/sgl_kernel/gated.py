"""Layers of Qwen3-Next and Qwen3.5: norms that multiply by 1 + weight, gates, packed inputs of the delta rule."""

import torch

from . import _op, convert_weight_packed, rmsnorm_cpu, rotary_embedding_cpu

torch.ops.sgl_kernel.causal_conv1d_weight_pack = convert_weight_packed
torch.ops.sgl_kernel.conv3d_embed_weight_pack = convert_weight_packed  # of the vision tower, which text does not enter


@_op
def gemma_rmsnorm_cpu(x, weight, eps):
    return rmsnorm_cpu(x, 1 + weight.float(), eps)


@_op
def gemma_fused_add_rmsnorm_cpu(x, residual, weight, eps):  # both in place
    residual += x
    x.copy_(gemma_rmsnorm_cpu(residual, weight, eps))


@_op
def fused_qk_gemma_rmsnorm_cpu(q, k, q_weight, k_weight, eps, head_dim):
    heads = (x.reshape(-1, head_dim) for x in (q, k))
    return tuple(gemma_rmsnorm_cpu(x, w, eps) for x, w in zip(heads, (q_weight, k_weight), strict=True))


@_op
def fused_qk_gemma_rmsnorm_with_gate_cpu(q_gate, k, q_weight, k_weight, eps, head_dim, num_heads):
    q, gate = q_gate.view(-1, num_heads, 2 * head_dim).chunk(2, -1)
    return *fused_qk_gemma_rmsnorm_cpu(q, k, q_weight, k_weight, eps, head_dim), gate.flatten(1)


@_op
def multimodal_rotary_embedding_cpu(
    positions, query, key, head_size, cos_sin_cache, mrope_section, mrope_interleaved, is_neox
):  # both in place
    """Of text, where the positions in time, height and width are one."""
    rows = positions.view(-1, positions.shape[-1])
    if (rows != rows[0]).any():
        raise NotImplementedError("sgl_kernel stand-in: positions in images")
    turned = rotary_embedding_cpu(rows[0], query, key, head_size, cos_sin_cache, is_neox)
    for x, new in zip((query, key), turned, strict=True):
        x.copy_(new)


@_op
def fused_sigmoid_mul_cpu(x, gate):  # in place
    x *= gate.reshape(x.shape).sigmoid()


def fused_gate_sigmoid_mul_add(hidden_states, gate_weight, shared_output, final_hidden_states):  # the last in place
    """A shared expert beside the routed ones."""
    final_hidden_states += (hidden_states @ gate_weight).sigmoid()[:, None] * shared_output


@_op
def fused_rmsnorm_gated_cpu(x, weight, z, eps):
    return rmsnorm_cpu(x, weight, eps) * torch.nn.functional.silu(z)


@_op
def fused_qkvzba_split_reshape_cat_contiguous_cpu(qkvz, ba, key_heads, value_heads, key_dim, value_dim):
    """[q | k | v | z] and [b | a] of all heads (Qwen3.5) -> [q | k | v], z, b, a."""
    qkv, z = qkvz.split([2 * key_heads * key_dim + value_heads * value_dim, value_heads * value_dim], -1)
    b, a = ba.chunk(2, -1)
    return qkv.contiguous(), z.reshape(-1, value_heads, value_dim), b.contiguous(), a.contiguous()


@_op
def fused_qkvzba_split_reshape_cat_cpu(qkvz, ba, key_heads, value_heads, key_dim, value_dim):
    """The same from [q k v z] and [b a] of each key head (Qwen3-Next)."""
    values = value_heads // key_heads
    parts = qkvz.view(len(qkvz), key_heads, -1).split([key_dim, key_dim, values * value_dim, values * value_dim], -1)
    q, k, v, z = (part.flatten(1) for part in parts)
    b, a = (part.flatten(1) for part in ba.view(len(ba), key_heads, -1).chunk(2, -1))
    return torch.cat((q, k, v), -1), z.view(-1, value_heads, value_dim), b, a
