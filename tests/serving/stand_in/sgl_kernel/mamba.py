"""The gated delta rule of Qwen3-Next and Qwen3.5, and the convolution before it, as SGLang's backend for linear
attention calls them (``linear/gdn_backend.py``).

A request has a slot in two pools: the last inputs of the convolution, and a matrix per head that decays and
learns.  Verification leaves both alone and keeps what they would be after every draft; then those after the
last accepted draft are committed.
"""

from itertools import pairwise

import torch
from torch.nn.functional import conv1d, silu, softplus

from . import _op


def _convolve(x, window, weight, bias):
    """x [dim, n] after `window` [dim, width - 1] -> output [dim, n], inputs with the window's [dim, width - 1 + n]."""
    inputs = torch.cat((window, x), -1)
    return silu(conv1d(inputs[None], weight[:, None], bias, groups=len(weight))[0]), inputs


def causal_conv1d_fn_cpu(
    x, weight, bias, *, activation, conv_states, has_initial_state, cache_indices, query_start_loc, seq_lens_cpu
):
    """x [dim, tokens of all sequences] -> the same shape."""
    out = torch.empty_like(x)
    for i, (start, end) in enumerate(pairwise(query_start_loc.tolist())):
        window = conv_states[cache_indices[i]]
        out[:, start:end], inputs = _convolve(x[:, start:end], window * has_initial_state[i], weight, bias)
        window.copy_(inputs[:, -window.shape[-1] :])
    return out


def causal_conv1d_update_cpu(
    x, conv_states, weight, bias, activation, conv_state_indices, intermediate_conv_window=None,
    intermediate_state_indices=None, retrieve_next_token=None, retrieve_next_sibling=None, retrieve_parent_token=None,
):  # fmt: skip
    """x [batch, dim] or [batch, dim, n] -> the same shape; kept windows [rows, n, dim, width - 1]."""
    if retrieve_parent_token is not None:
        raise NotImplementedError("sgl_kernel stand-in: linear attention over a tree of drafts")
    out = torch.empty_like(x)
    for i, tokens in enumerate(x.reshape(*x.shape[:2], -1)):
        window = conv_states[conv_state_indices[i]]
        result, inputs = _convolve(tokens, window, weight, bias)
        out[i] = result.view(x.shape[1:])
        after = inputs.unfold(-1, window.shape[-1], 1)[:, 1:].transpose(0, 1)
        if intermediate_conv_window is None:
            window.copy_(after[-1])
        else:
            intermediate_conv_window[intermediate_state_indices[i]] = after
    return out


@_op
def fused_gdn_gating_cpu(A_log, a, b, dt_bias):
    """a, b [n, heads] -> log decay and learning rate, both [1, n, heads]."""
    return (-A_log.float().exp() * softplus(a.float() + dt_bias.float()))[None], b.float().sigmoid()[None]


def _delta_rule(q, k, v, g, beta, state):
    """q, k [n, heads, K], v [n, value heads, V], state [value heads, V, K] -> outputs like v, states after each token.

    The gated delta rule (Yang et al. 2024, Gated Delta Networks) with keys and queries of length one.
    """
    q, k = (x.float() * (x.float().square().sum(-1, keepdim=True) + 1e-6).rsqrt() for x in (q, k))
    q, k = (x.repeat_interleave(v.shape[1] // x.shape[1], 1) for x in (q * q.shape[-1] ** -0.5, k))
    states, state = [], state.float()
    for key, value, log_decay, rate in zip(k, v.float(), g, beta, strict=True):
        state = state * log_decay.exp()[:, None, None]
        error = value - torch.einsum("hvk,hk->hv", state, key)
        state = state + torch.einsum("h,hv,hk->hvk", rate, error, key)
        states.append(state)
    states = torch.stack(states)
    return torch.einsum("nhvk,nhk->nhv", states, q).to(v.dtype), states


def chunk_gated_delta_rule_cpu(
    q, k, v, g, beta, initial_state, initial_state_indices, cu_seqlens, head_first, use_qk_l2norm_in_kernel
):
    """Prefill of sequences behind each other, [1, n, ...]; the pool has each one's last state then."""
    out = torch.empty_like(v)
    for i, (start, end) in enumerate(pairwise(cu_seqlens.tolist())):
        rows, slot = (0, slice(start, end)), initial_state_indices[i]
        out[rows], states = _delta_rule(*(x[rows] for x in (q, k, v, g, beta)), initial_state[slot])
        initial_state[slot] = states[-1]
    return out, None, None


@_op
def fused_sigmoid_gating_delta_rule_update_cpu(
    A_log, dt_bias, q, k, v, a, b, initial_state_source, initial_state_indices, cu_seqlens, use_qk_l2norm_in_kernel,
    softplus_beta, softplus_threshold, is_kda=False, disable_state_update=False, intermediate_states_buffer=None,
    intermediate_state_indices=None, cache_steps=None, retrieve_parent_token=None,
):  # fmt: skip
    """Decoding, and verification with `disable_state_update`: kept states [rows, drafts, value heads, V, K]."""
    g, beta = fused_gdn_gating_cpu(A_log, a, b, dt_bias)
    out = torch.empty_like(v)
    for i, (start, end) in enumerate(pairwise(cu_seqlens.tolist())):
        rows, slot = (0, slice(start, end)), initial_state_indices[i]
        out[rows], states = _delta_rule(*(x[rows] for x in (q, k, v, g, beta)), initial_state_source[slot])
        if disable_state_update:
            intermediate_states_buffer[intermediate_state_indices[i], : end - start] = states
        else:
            initial_state_source[slot] = states[-1]
    return out


def fused_mamba_state_scatter_with_mask(pool, kept, slots, last_steps, rows=None):
    """pool [layers, slots, ...], kept [layers, rows, drafts, ...]; a request with a negative step keeps its state."""
    rows = range(len(slots)) if rows is None else rows.tolist()
    for slot, step, row in zip(slots.tolist(), last_steps.tolist(), rows, strict=True):
        if step >= 0:
            pool[:, slot] = kept[:, row, step]


fused_conv_window_scatter_with_mask = fused_mamba_state_scatter_with_mask
