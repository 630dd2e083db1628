"""Hunyuan 3 (Hy3): transformers' classes, whose mixture of experts has the checkpoints' names here.

transformers calls router, its bias and the shared expert otherwise, and renames tensors while it loads a model. A head
is also loaded, saved and exported by itself, so here modules have the checkpoints' names, and only experts are joined.

Sources: SGLang's `hunyuan_v3.py` (`HYV3MoEFused`) and `hunyuan_v3_nextn.py`; transformers' `modeling_hy_v3.py`.
"""

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.models.hy_v3 import modeling_hy_v3 as hy


class HunyuanV3Router(hy.HYV3TopKRouter):
    """In float32, under autocast too, as in engines: a near tie must be trained with the expert that is served."""

    def forward(
        self, hidden_states: torch.Tensor, e_score_correction_bias: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """As `HYV3TopKRouter.forward`: hidden states [N, D] → logits [N, E], weights and numbers of the best experts.

        The bias takes part in the choice of experts, not in their weights.
        """
        with torch.autocast(hidden_states.device.type, enabled=False):
            logits = F.linear(hidden_states.to(torch.float32), self.weight.to(torch.float32))
        scores = logits.sigmoid()
        best = (scores + e_score_correction_bias).topk(self.top_k, dim=-1).indices
        weights = scores.gather(1, best)
        weights = weights / weights.sum(dim=-1, keepdim=True) * self.router_scaling_factor
        return logits, weights, best


class HunyuanV3MoE(nn.Module):
    """`HYV3MoE` under the checkpoints' names."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.router = nn.ModuleDict({"gate": HunyuanV3Router(config)})
        self.expert_bias = nn.Buffer(torch.zeros(config.num_experts))
        self.experts = hy.HYV3Experts(config)
        self.shared_mlp = hy.HYV3MLP(config, config.moe_intermediate_size * config.num_shared_experts)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        flat = hidden_states.reshape(-1, hidden_states.shape[-1])
        _, weights, best = self.router["gate"](flat, self.expert_bias)
        out: torch.Tensor = self.experts(flat, best, weights) + self.shared_mlp(flat)
        return out.view_as(hidden_states)


class HunyuanV3DecoderLayer(hy.HYV3DecoderLayer):
    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        if config.mlp_layer_types[layer_idx] == "sparse":
            self.mlp = HunyuanV3MoE(config)


class HunyuanV3Model(hy.HYV3Model):
    def __init__(self, config: Any) -> None:
        super().__init__(config)
        for layer in self.layers:
            if isinstance(layer.mlp, hy.HYV3MoE):
                layer.mlp = HunyuanV3MoE(config)


class HYV3ForCausalLM(hy.HYV3ForCausalLM):
    _keep_in_fp32_modules_strict = ("expert_bias",)
    _keys_to_ignore_on_load_unexpected = None

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model = HunyuanV3Model(config)


# By the class's name, so that transformers' own classes keep their renaming.
register_checkpoint_conversion_mapping(
    HunyuanV3Model.__name__, get_checkpoint_conversion_mapping("qwen2_moe"), overwrite=True
)
