"""The table of MTP layouts: one row per family of checkpoints.

A row says where the head's tensors live in a checkpoint, how the head fuses hidden state and token embedding,
and which decoder block it wraps. Everything that differs between families is here; nothing else in the package
asks which family it has.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import FastMTPError
from .family import Family, config_value
from .refused import LAYOUTS, known_layout

# A stock full-attention layer of the backbone (output gate, QK-norm, partial rotary), whose attention goes through
# the same function as MiMo's, and a mixture of experts behind it. Fed back: the output of `mtp.norm`.
_QWEN3_NEXT = Family(
    name="qwen3_next",
    architectures=("Qwen3NextForCausalLM",),
    backbone="transformers.models.qwen3_next.modeling_qwen3_next:Qwen3NextForCausalLM",
    block="transformers.models.qwen3_next.modeling_qwen3_next:Qwen3NextDecoderLayer",
    prefix="mtp",
    block_path="layers.0",
    hidden_norm="pre_fc_norm_hidden",
    token_norm="pre_fc_norm_embedding",
    proj="fc",
    final_norm="norm",
    hidden_first=False,
    zero_centred_norms=True,
    mask_position_zero=False,
    config_model_type="qwen3_next",
    num_layers_key="num_nextn_predict_layers",
    num_layers_needed=False,
    plain_model_type="qwen3_next",
    tied_embeddings=False,
    recurrent_backbone=True,
    served_as="qwen3_next_mtp.py: Qwen3NextForCausalLMMTP",
    # SGLang's layer has experts whatever these say of layer 0 (`qwen3_next.py`).
    block_config=(("mlp_only_layers", ()), ("decoder_sparse_step", 1)),
    # SGLang does not read layer_types, which transformers makes of it.
    needed_keys=("full_attention_interval",),
    quantized_proj=("vLLM",),
    # Rounded decay rates would let the hidden states of long texts drift from those that a server drafts on.
    kept_in_float32=("linear_attn.A_log",),
)


# As Qwen3-Next with a dense MLP; alone, or as the text model beside a vision tower, which is left on disk.
_QWEN3_5 = replace(
    _QWEN3_NEXT,
    name="qwen3_5",
    architectures=("Qwen3_5ForCausalLM", "Qwen3_5ForConditionalGeneration"),
    backbone="transformers.models.qwen3_5.modeling_qwen3_5:Qwen3_5ForCausalLM",
    block="transformers.models.qwen3_5.modeling_qwen3_5:Qwen3_5DecoderLayer",
    config_model_type="qwen3_5_text",
    num_layers_key="mtp_num_hidden_layers",
    plain_model_type="qwen3_5_text",
    tied_embeddings=True,
    served_as="qwen3_5_mtp.py: Qwen3_5ForCausalLMMTP",
    block_config=(),
)


# The layout that DeepSeek-V3 began: the MTP layer is one decoder layer more, with `enorm`, `hnorm`, `eh_proj` and
# `shared_head` beside its parts. It has experts whatever the first layers have. Fed back: the output of
# `shared_head.norm`. Here grouped heads; the other models of the layout have latent attention (MLA).
_GLM4_MOE = Family(
    name="glm4_moe",
    architectures=("Glm4MoeForCausalLM",),
    backbone="transformers.models.glm4_moe.modeling_glm4_moe:Glm4MoeForCausalLM",
    block="transformers.models.glm4_moe.modeling_glm4_moe:Glm4MoeDecoderLayer",
    prefix="model.layers.{N}",
    block_path="",
    hidden_norm="hnorm",
    token_norm="enorm",
    proj="eh_proj",
    final_norm="shared_head.norm",
    hidden_first=False,
    zero_centred_norms=False,
    mask_position_zero=False,
    config_model_type="glm4_moe",
    num_layers_key="num_nextn_predict_layers",
    num_layers_needed=True,
    plain_model_type="glm4_moe",
    tied_embeddings=False,
    recurrent_backbone=False,
    served_as="glm4_moe_nextn.py: Glm4MoeForCausalLMNextN",
    block_config=(("first_k_dense_replace", 0),),
    copies=("embed_tokens.weight", "shared_head.head.weight"),
)


# DeepSeek-V3 with sparse attention, in the MTP layer too.
_DEEPSEEK_V32 = replace(
    _GLM4_MOE,
    name="deepseek_v32",
    architectures=("DeepseekV32ForCausalLM",),
    backbone="transformers.models.deepseek_v32.modeling_deepseek_v32:DeepseekV32ForCausalLM",
    block="transformers.models.deepseek_v32.modeling_deepseek_v32:DeepseekV32DecoderLayer",
    config_model_type="deepseek_v32",
    plain_model_type="deepseek_v32",
    served_as="deepseek_nextn.py: DeepseekV3ForCausalLMNextN",
    block_config=(("mlp_layer_types", ("sparse",)),),
    indexer_rope="transformers.models.deepseek_v32.modeling_deepseek_v32:apply_rotary_pos_emb",
)


FAMILIES: tuple[Family, ...] = (
    Family(
        name="mimo",
        architectures=("MiMoForCausalLM",),
        backbone="transformers.models.qwen2.modeling_qwen2:Qwen2ForCausalLM",
        block="transformers.models.qwen2.modeling_qwen2:Qwen2DecoderLayer",
        prefix="model.mtp_layers.0",
        block_path="",
        hidden_norm="hidden_layernorm",
        token_norm="token_layernorm",
        proj="input_proj",
        final_norm="final_layernorm",
        hidden_first=True,
        zero_centred_norms=False,
        mask_position_zero=True,
        config_model_type="mimo",
        num_layers_key="num_nextn_predict_layers",
        num_layers_needed=True,
        plain_model_type="qwen2",
        tied_embeddings=False,
        recurrent_backbone=False,
        served_as="mimo_mtp.py: MiMoMTP",
    ),
    _QWEN3_NEXT,
    _QWEN3_5,
    replace(
        _QWEN3_5,
        name="qwen3_5_moe",
        architectures=("Qwen3_5MoeForCausalLM", "Qwen3_5MoeForConditionalGeneration"),
        backbone="transformers.models.qwen3_5_moe.modeling_qwen3_5_moe:Qwen3_5MoeForCausalLM",
        block="transformers.models.qwen3_5_moe.modeling_qwen3_5_moe:Qwen3_5MoeDecoderLayer",
        config_model_type="qwen3_5_moe_text",
        plain_model_type="qwen3_5_moe_text",
    ),
    # No published checkpoint of this one has an MTP layer; `fastmtp graft` can make one.
    replace(
        _QWEN3_NEXT,
        name="qwen3_moe",
        architectures=("Qwen3MoeForCausalLM",),
        backbone="transformers.models.qwen3_moe.modeling_qwen3_moe:Qwen3MoeForCausalLM",
        block="transformers.models.qwen3_moe.modeling_qwen3_moe:Qwen3MoeDecoderLayer",
        zero_centred_norms=False,
        config_model_type="qwen3_moe",
        plain_model_type="qwen3_moe",
        recurrent_backbone=False,
        needed_keys=(),
        served_as="qwen3_moe_mtp.py: Qwen3MoeForCausalLMMTP",
        vllm=False,
    ),
    # Fed back: what the block puts out. No norm follows it, and none stands before the output matrix.
    Family(
        name="ernie4_5_moe",
        architectures=("Ernie4_5_MoeForCausalLM",),
        backbone="transformers.models.ernie4_5_moe.modeling_ernie4_5_moe:Ernie4_5_MoeForCausalLM",
        block="transformers.models.ernie4_5_moe.modeling_ernie4_5_moe:Ernie4_5_MoeDecoderLayer",
        prefix="model",
        block_path="mtp_block.0",
        hidden_norm="mtp_hidden_norm.0",
        token_norm="mtp_emb_norm.0",
        proj="mtp_linear_proj.0",
        final_norm=None,
        hidden_first=False,
        zero_centred_norms=False,
        mask_position_zero=True,
        config_model_type="ernie4_5_moe",
        num_layers_key="num_nextn_predict_layers",
        num_layers_needed=True,
        plain_model_type="ernie4_5_moe",
        tied_embeddings=True,
        recurrent_backbone=False,
        served_as="ernie4_eagle.py: Ernie4_5_MoeForCausalLMMTP",
        proj_bias="use_bias",
        # Dense in the engines (`ernie4.py`, `is_mtp`), wherever the backbone's experts start.
        block_config=(("moe_layer_start_index", 1),),
    ),
    _GLM4_MOE,
    replace(
        _GLM4_MOE,
        name="deepseek_v3",
        architectures=("DeepseekV3ForCausalLM",),
        backbone="transformers.models.deepseek_v3.modeling_deepseek_v3:DeepseekV3ForCausalLM",
        block="transformers.models.deepseek_v3.modeling_deepseek_v3:DeepseekV3DecoderLayer",
        config_model_type="deepseek_v3",
        plain_model_type="deepseek_v3",
        served_as="deepseek_nextn.py: DeepseekV3ForCausalLMNextN",
    ),
    replace(
        _GLM4_MOE,
        name="glm4_moe_lite",
        architectures=("Glm4MoeLiteForCausalLM",),
        backbone="transformers.models.glm4_moe_lite.modeling_glm4_moe_lite:Glm4MoeLiteForCausalLM",
        block="transformers.models.glm4_moe_lite.modeling_glm4_moe_lite:Glm4MoeLiteDecoderLayer",
        config_model_type="glm4_moe_lite",
        plain_model_type="glm4_moe_lite",
        served_as="glm4_moe_lite_nextn.py: Glm4MoeLiteForCausalLMNextN",
        block_config=(("mlp_layer_types", ("sparse",)),),
    ),
    _DEEPSEEK_V32,
    # Layers of the backbone may share an indexer; engines give the MTP layer its own.
    replace(
        _DEEPSEEK_V32,
        name="glm_moe_dsa",
        architectures=("GlmMoeDsaForCausalLM",),
        backbone="transformers.models.glm_moe_dsa.modeling_glm_moe_dsa:GlmMoeDsaForCausalLM",
        block="transformers.models.glm_moe_dsa.modeling_glm_moe_dsa:GlmMoeDsaDecoderLayer",
        config_model_type="glm_moe_dsa",
        plain_model_type="glm_moe_dsa",
        served_as="glm4_moe.py: GlmMoeDsaForCausalLMNextN",
        block_config=(("mlp_layer_types", ("sparse",)), ("indexer_types", ("full",))),
        indexer_rope="transformers.models.glm_moe_dsa.modeling_glm_moe_dsa:apply_rotary_pos_emb_interleave",
    ),
    # Latent attention as DeepSeek's, with scaled latents, and a dense MLP, beside a backbone of another kind.
    Family(
        name="longcat_flash",
        architectures=("LongcatFlashForCausalLM",),
        backbone="swift_fastmtp.families.longcat:LongcatFlashForCausalLM",
        block="swift_fastmtp.families.longcat:LongcatFlashDenseLayer",
        prefix="model.mtp",
        block_path="layers.0",
        hidden_norm="layers.0.hnorm.m",
        token_norm="layers.0.enorm.m",
        proj="layers.0.eh_proj",
        final_norm="norm",
        hidden_first=False,
        zero_centred_norms=False,
        mask_position_zero=False,
        config_model_type="longcat_flash",
        num_layers_key="num_nextn_predict_layers",
        num_layers_needed=False,
        plain_model_type="longcat_flash",
        tied_embeddings=False,
        recurrent_backbone=False,
        served_as="longcat_flash_nextn.py: LongcatFlashForCausalLMNextN",
        kept_in_float32=("mlp.router.",),
        quantized_proj=("SGLang", "vLLM"),
        sglang_gap="the draft layer of 0.5.23 (longcat_flash_nextn.py) leaves out the projection to latents: its "
        "attention stops at an assertion, or reads what the target's last layer left",
        mlp="transformer_layer.mlp",
        copies=("embed_tokens.weight",),
    ),
    # Ling 2.0 and Ring 2.0: GLM-4.5's layer under other names, all of them the checkpoints' own (`bailing.py`).
    replace(
        _GLM4_MOE,
        name="bailing_moe_v2",
        architectures=("BailingMoeV2ForCausalLM",),
        backbone="swift_fastmtp.families.bailing:BailingMoeV2ForCausalLM",
        block="swift_fastmtp.families.bailing:BailingMoeV2DecoderLayer",
        final_norm="final_layernorm",
        config_model_type="bailing_moe",
        plain_model_type=None,
        served_as="bailing_moe_nextn.py: BailingMoeForCausalLMNextN",
        vllm=False,
        quantized_proj=("SGLang",),
        copies=(),
        attention="attention",
        only=(
            ("model_type", "bailing_moe"),
            ("score_function", "sigmoid"),
            ("moe_router_enable_expert_bias", True),
            ("router_type", "topN"),
            ("multi_gate", False),
            ("hidden_act", "silu"),
            ("use_bias", False),
            ("norm_head", False),
            ("norm_softmax", False),
        ),
    ),
)


def match_family(config: dict[str, Any], where: str | Path = "config.json") -> Family:
    """The row whose architectures a checkpoint's config.json names, for its number of layers.

    Raises `FastMTPError` if there is none, with the reason where engines serve the model's MTP layers otherwise.
    """
    architectures = config.get("architectures") or []
    if family := _row(architectures):
        layers = config_value(config, "num_hidden_layers")
        if "{N}" in family.prefix and not isinstance(layers, int):
            raise FastMTPError(f"{where}: num_hidden_layers is {layers}; the MTP layer is numbered after it")
        return family.at(layers or 0)
    if layout := known_layout(architectures):
        raise FastMTPError(f"{where}: {architectures[0]} cannot be trained here: {layout.reason}")
    known = ", ".join(a for f in FAMILIES for a in f.architectures)
    raise FastMTPError(f"{where}: architectures {architectures} has no known MTP layout; known: {known}")


def _row(architectures: list[str]) -> Family | None:
    for family in FAMILIES:
        if any(a in family.architectures for a in architectures):
            return family
    return None


def layout_table() -> str:
    """The first table of docs/families.md, made from the rows above."""
    lines = ["| | layout | SGLang's class |", "|---|---|---|"]
    for f in FAMILIES:
        order = "[hidden, embed]" if f.hidden_first else "[embed, hidden]"
        notes = [*(f"`{path}.*`" for path in (f.layer_paths if f.scattered else (f.prefix,))), order]
        notes += ["norms 1 + w"] * f.zero_centred_norms + ["no final norm"] * (f.final_norm is None)
        notes += ["embedding zeroed at position 0"] * f.mask_position_zero
        notes += ["output matrix may be tied"] * f.tied_embeddings
        lines.append(f"| {', '.join(f'`{a}`' for a in f.architectures)} | {', '.join(notes)} | `{f.served_as}` |")
    return "\n".join(lines)


def refused_table() -> str:
    """The last table of docs/families.md: what is recognised in order to be refused."""
    lines = ["| | MTP tensors | why |", "|---|---|---|"]
    for row in LAYOUTS:
        names, paths = (", ".join(f"`{x}`" for x in y) for y in (row.architectures, row.prefixes))
        lines.append(f"| {names} | {paths} | {row.reason} |")
    return "\n".join(lines)
