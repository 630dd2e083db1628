"""Attention kernels of torch that also return the log-sum-exp, without which two softmaxes cannot be merged.

torch's documented `scaled_dot_product_attention` returns the output only. The operators below are what it calls; they
are private, so their arguments may move. Tried with torch 2.13.0.
"""

from functools import cache
from typing import Any

import torch

from ..files.libraries import changed

CPU_FORWARD = "_scaled_dot_product_flash_attention_for_cpu"
CPU_BACKWARD = "_scaled_dot_product_flash_attention_for_cpu_backward"
CUDA_FORWARD = "_flash_attention_forward"
CUDA_BACKWARD = "_flash_attention_backward"

# Operator → the arguments that `flash.py` gives it by place, and behind the bar by name.
_ARGUMENTS = {
    # Output and log-sum-exp of causal attention.
    CPU_FORWARD: "query key value dropout_p is_causal | scale",
    # The gradients, by the output and log-sum-exp that it is given: those of a merged softmax.
    CPU_BACKWARD: "grad_out query key value out logsumexp dropout_p is_causal | scale",
    # The same two on CUDA, where documents may lie in one flat batch, with their edges.
    CUDA_FORWARD: "query key value cum_seq_q cum_seq_k max_q max_k dropout_p is_causal return_debug_mask | scale",
    CUDA_BACKWARD: (
        "grad_out query key value out logsumexp cum_seq_q cum_seq_k max_q max_k dropout_p is_causal rng_state unused "
        "| scale"
    ),
}


@cache
def operator(name: str) -> Any:
    """One of the operators of `_ARGUMENTS`.

    Raises `FastMTPError` if this torch has none of that name, or one with other arguments.
    """
    packet = getattr(torch.ops.aten, name, None)
    if packet is None:
        raise changed("torch", f"torch.ops.aten.{name} is gone (attention with its log-sum-exp)")
    by_place, by_name = (part.split() for part in _ARGUMENTS[name].split("|"))
    arguments = [argument.name for argument in packet.default._schema.arguments]
    if arguments[: len(by_place)] != by_place or not set(by_name) <= set(arguments):
        raise changed("torch", f"torch.ops.aten.{name} takes ({', '.join(arguments)}), it took {_ARGUMENTS[name]}")
    return packet
