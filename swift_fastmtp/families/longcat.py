"""LongCat-Flash, whose MTP block is none of its backbone's: those have two attentions, two MLPs and a shortcut through
experts; this one has an attention and a dense MLP (SGLang `longcat_flash_nextn.py: LongcatFlashDenseDecoderLayer`).
"""

from typing import Any

import torch
from torch import nn
from transformers.models.longcat_flash import modeling_longcat_flash as longcat


class LongcatFlashForCausalLM(longcat.LongcatFlashForCausalLM):
    """transformers', with weights for the experts that compute only. transformers 5.19 has rows for the "zero" experts,
    which pass their input on, too: nothing reads them, and a checkpoint that has none would not fit."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        for experts in self.modules():
            if isinstance(experts, longcat.LongcatFlashExperts):
                shape = experts.num_routed_experts, 2 * experts.intermediate_size, experts.hidden_size
                experts.gate_up_proj = nn.Parameter(torch.empty(shape))


class LongcatFlashDenseLayer(nn.Module):
    """The parts of the MTP block under the checkpoint's names; `head.MTPHead` runs them."""

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__()
        self.self_attn = longcat.LongcatFlashMLA(config, layer_idx)
        self.transformer_layer = nn.ModuleDict({"mlp": longcat.LongcatFlashMLP(config)})
        self.input_layernorm = longcat.LongcatFlashRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = longcat.LongcatFlashRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
