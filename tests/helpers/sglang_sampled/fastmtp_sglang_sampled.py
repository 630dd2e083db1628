"""Lets SGLang verify sampled drafts on a CPU as it does on a GPU: a plugin of SGLang, for the tests only.

SGLang takes its branch for sampled drafts on GPUs only (0.5.23 `eagle_utils.py`, `_verify_uses_greedy`). With this
plugin it takes it on a CPU as well; the kernel in it is SGLang's own, in Triton's interpreter. FlashInfer's cuts of the
target's distribution, which need a GPU, are plain torch here. SGLANG_BLOCK_VERIFICATION=1 stands for the flag
`--speculative-use-block-verification`, which is refused without a GPU before it gets here.

With this folder on PYTHONPATH each of SGLang's processes finds the entry point and calls `register`.
"""

import os
from functools import partial


def verifies_greedily(*, is_all_greedy, use_rejection_sampling, **_):
    from sglang.srt.speculative import eagle_utils

    eagle_utils.top_k_renorm_prob, eagle_utils.top_p_renorm_prob = top_k_renorm_prob, top_p_renorm_prob
    kernel = eagle_utils.chain_speculative_sampling_triton
    if os.environ.get("SGLANG_BLOCK_VERIFICATION") == "1" and not isinstance(kernel, partial):
        eagle_utils.chain_speculative_sampling_triton = partial(kernel, block_verification=True)
    return is_all_greedy or not use_rejection_sampling


def top_k_renorm_prob(probs, top_ks):
    """[N, V] with all but the `top_ks` [N] largest of a row left out, and the rest divided by their sum."""
    ordered, _ = probs.sort(-1, descending=True)
    smallest = ordered.gather(1, top_ks.long().clamp(1, probs.shape[1])[:, None] - 1)
    kept = probs.where(probs >= smallest, 0)
    return kept / kept.sum(-1, keepdim=True)


def top_p_renorm_prob(probs, top_ps):
    """As `top_k_renorm_prob`, with the fewest tokens whose sum reaches `top_ps`."""
    ordered, places = probs.sort(-1, descending=True)
    before = ordered.cumsum(-1) - ordered
    kept = probs.new_zeros(probs.shape).scatter(1, places, ordered.where(before < top_ps[:, None], 0))
    return kept / kept.sum(-1, keepdim=True)


def register():
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    target = "sglang.srt.speculative.eagle_utils._verify_uses_greedy"
    HookRegistry.register(target, verifies_greedily, HookType.REPLACE)
