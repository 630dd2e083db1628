"""Ling 2.0 and Ring 2.0, for which transformers has no classes: GLM-4.5's, under the checkpoints' own names.

What inclusionAI publishes beside its checkpoints is remote code, which nothing here runs. The model is GLM-4.5's
(`Glm4Moe`: grouped heads, QK-norm, RoPE on a part of each head, experts in groups chosen by a score with a bias, one
dense layer first) but for the names and for queries, keys and values, which come out of one matrix. So modules lie
where the checkpoints have them and tensors need no conversion, apart from the experts, as in every other family.

Source: `modeling_bailing_moe_v2.py` of github.com/inclusionAI/Ling-V2, and SGLang's `bailing_moe.py`.
"""

from typing import Any, ClassVar

import torch
from torch import nn
from transformers import Glm4MoeConfig
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.glm4_moe import modeling_glm4_moe as glm

# transformers' names → the checkpoints'.
_NAMES = {
    "embed_tokens": "word_embeddings",
    "self_attn": "attention",
    "o_proj": "dense",
    "q_norm": "query_layernorm",
    "k_norm": "key_layernorm",
    "e_score_correction_bias": "expert_bias",
}


class BailingMoeV2Config(Glm4MoeConfig):
    """config.json of the checkpoints; what cannot be said here is refused by the family's row (`Block.only`)."""

    model_type = "bailing_moe"
    attribute_map: ClassVar[dict[str, str]] = {
        **Glm4MoeConfig.attribute_map,
        "n_routed_experts": "num_experts",
        "num_local_experts": "num_experts",
        "n_shared_experts": "num_shared_experts",
    }
    head_dim: int | None = None
    n_group: int = 1
    topk_group: int = 1
    use_qkv_bias: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        self.head_dim = self.head_dim or self.hidden_size // self.num_attention_heads
        self.n_group, self.topk_group = self.n_group or 1, self.topk_group or 1  # 0: no groups


class _Renamed(nn.Module):
    """Holds its parts under the checkpoints' names, and transformers' code finds them under its own."""

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(_NAMES.get(name, name), value)

    def __getattr__(self, name: str) -> Any:
        return super().__getattr__(_NAMES.get(name, name))


class BailingMoeV2Attention(_Renamed, glm.Glm4MoeAttention):
    """`query_key_value` is all query heads, then all key heads, then all value heads."""

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        del self.q_proj, self.k_proj, self.v_proj
        kv = config.num_key_value_heads
        self.heads = [config.num_attention_heads, kv, kv]
        width = sum(self.heads) * self.head_dim
        self.query_key_value = nn.Linear(config.hidden_size, width, bias=config.use_qkv_bias)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As `Glm4MoeAttention.forward`: hidden states [B, T, D] → the same shape, and attention weights or None."""
        heads_BTHd = self.query_key_value(hidden_states).unflatten(-1, (-1, self.head_dim))
        query, key, value = heads_BTHd.split(self.heads, dim=-2)
        if self.use_qk_norm:
            query, key = self.q_norm(query), self.k_norm(key)
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        query, key = glm.apply_rotary_pos_emb(query, key, *position_embeddings)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, glm.eager_attention_forward)  # noqa: SLF001 (as transformers' own classes of attention do)
        out, weights = attend(self, query, key, value, attention_mask, scaling=self.scaling, **kwargs)
        return self.o_proj(out.flatten(-2)), weights


class BailingMoeV2Router(_Renamed, glm.Glm4MoeTopkRouter):
    """Its bias is `expert_bias`."""


# The three below make their parts themselves: GLM's `__init__` would make its own first, experts and all.


class BailingMoeV2DecoderLayer(_Renamed, glm.Glm4MoeDecoderLayer):
    def __init__(self, config: Any, layer_idx: int) -> None:
        GradientCheckpointingLayer.__init__(self)
        self.self_attn = BailingMoeV2Attention(config, layer_idx)
        self.mlp = (glm.Glm4MoeMoE if layer_idx >= config.first_k_dense_replace else glm.Glm4MoeMLP)(config)
        if hasattr(self.mlp, "experts"):
            self.mlp.gate = BailingMoeV2Router(config)
        self.input_layernorm = glm.Glm4MoeRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = glm.Glm4MoeRMSNorm(config.hidden_size, eps=config.rms_norm_eps)


class BailingMoeV2Model(_Renamed, glm.Glm4MoeModel):
    def __init__(self, config: Any) -> None:
        glm.Glm4MoePreTrainedModel.__init__(self, config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(BailingMoeV2DecoderLayer(config, n) for n in range(config.num_hidden_layers))
        self.norm = glm.Glm4MoeRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = glm.Glm4MoeRotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()


class BailingMoeV2ForCausalLM(glm.Glm4MoeForCausalLM):
    config_class = BailingMoeV2Config
    _no_split_modules = ("BailingMoeV2DecoderLayer",)
    _keep_in_fp32_modules_strict = ("expert_bias",)
    _keys_to_ignore_on_load_unexpected = None
    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "model.word_embeddings.weight"}

    def __init__(self, config: Any) -> None:
        glm.Glm4MoePreTrainedModel.__init__(self, config)
        self.model = BailingMoeV2Model(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


register_checkpoint_conversion_mapping(
    BailingMoeV2Config.model_type, get_checkpoint_conversion_mapping("glm4_moe"), overwrite=True
)
