"""The training step of the FastMTP paper's public code, re-implemented: what ours is measured against.

Its graph (Tencent-BAC/FastMTP, ms-swift 3.6.4 fork, commit 5875b70): ms-swift's default gradient checkpointing makes
the embedding output require gradients, so autograd recomputes and back-propagates through every frozen layer; the
next-token logits and their loss are computed and weighted 0; each of the K steps runs ordinary causal attention over
all rows and makes full fp32 logits of all rows. Its gradients for the head are those of our `paper` rollout.
"""

import torch
from torch.nn import functional as F

from swift_fastmtp.method.rollout import rollout, segment_ids


def prepare(model):
    """Switch the backbone to what the reference runs: training mode, every layer checkpointed."""
    model.train()
    torch.nn.Module.train(model.model, True)
    model.model.gradient_checkpointing_enable({"use_reentrant": True})


def reference_loss(model, input_ids, labels):
    """Loss of one step; `model` is ours, its head and its settings (K, beta) are used."""
    config = model.fastmtp
    embeds = model.model.embed_tokens(input_ids).requires_grad_()
    hidden = model.model(inputs_embeds=embeds, use_cache=False).last_hidden_state
    loss = 0.0 * cross_entropy(model.lm_head(hidden).float(), labels, 1)
    positions = torch.arange(input_ids.shape[1])[None].expand_as(input_ids)
    outputs = rollout(
        model.head,
        hidden,
        model.model.embed_tokens(input_ids),
        positions,
        segment_ids(positions),
        model.model.rotary_emb,
        config.num_speculative_steps,
        "paper",
    )
    for k, (g, weight) in enumerate(zip(outputs, config.step_weights, strict=True), start=1):
        logits = model.lm_head(g.view_as(hidden)).float()
        loss = loss + weight * cross_entropy(logits, labels, k + 1)
    return loss


def cross_entropy(logits, labels, shift):
    """Sum over supervised rows, divided by the number of supervised tokens."""
    total = F.cross_entropy(
        logits[:, :-shift].flatten(0, 1), labels[:, shift:].flatten(), ignore_index=-100, reduction="sum"
    )
    return total / (labels[:, 1:] != -100).sum()
