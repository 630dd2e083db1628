"""Lets vLLM 0.32.0 sample with drafts on a CPU: a plugin of vLLM, for the tests only.

Its CPU version of the rejection sampler's expand kernel (`vllm/utils/cpu_triton_utils.py:397`) writes into a copy of
every tensor that is not int64, so temperature, top_k and top_p of drafted rows stay uninitialised memory
(docs/dev/upstream/vllm-expand-kernel.md). This one writes where it should. Nothing else of verification is touched.

With this folder on PYTHONPATH each of vLLM's processes finds the entry point and calls `register`.
"""

import torch

KERNEL = "vllm.v1.sample.rejection_sampler.expand_kernel"


def expand(output, input_val, cu_num_tokens, replace_from, replace_to, MAX_NUM_TOKENS=None):
    """As the Triton kernel does: request i's value for each of its tokens, `replace_from` replaced."""
    counts = cu_num_tokens.diff(prepend=cu_num_tokens.new_zeros(1))
    values = torch.where(input_val == replace_from, replace_to, input_val)
    output.copy_(values.repeat_interleave(counts))


def register():
    from vllm.triton_utils import dispatcher
    from vllm.utils import cpu_triton_utils

    # What the platform registers from here on, and what it has registered already.
    assert cpu_triton_utils._expand_kernel_impl
    cpu_triton_utils._expand_kernel_impl = expand
    if KERNEL in dispatcher._registry:
        dispatcher.register_kernels({KERNEL: expand})
