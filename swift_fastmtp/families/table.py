"""The table of MTP layouts: one row per family of checkpoints.

A row says where the head's tensors live in a checkpoint, how the head fuses hidden state and token embedding,
and which decoder block it wraps. Everything that differs between families is here; nothing else in the package
asks which family it has. README.md says how a row is added.
"""

from functools import partial
from pathlib import Path
from typing import Any

from ..errors import FastMTPError
from ..files.table import markdown_table
from .family import READ_IN, Block, Engines, Family, Fusion, Graph, Names, config_value
from .refused import LAYOUTS, known_layout
from .shapes import (
    dense,
    experts,
    experts_and_gated_expert,
    experts_and_shared_ones,
    grouped,
    latent,
    one_matrix,
    sparse_latent,
)

# Two layouts that several models share. Every row below says which it has; no row is made from another model's.

# DeepSeek-V3 began it: the MTP layer is one decoder layer more, with `enorm`, `hnorm`, `eh_proj` and `shared_head`
# beside its parts. Fed back: the output of `shared_head.norm`. Checkpoints may hold copies of the model's matrices.
NUMBERED = Names(
    prefix="model.layers.{N}",
    hidden_norm="hnorm",
    token_norm="enorm",
    proj="eh_proj",
    final_norm="shared_head.norm",
    copies=("embed_tokens.weight", "shared_head.head.weight"),
)
# Qwen3-Next began it: everything lies under `mtp`, the block in a list of one. Fed back: the output of `mtp.norm`.
UNDER_MTP = Names(
    prefix="mtp",
    hidden_norm="pre_fc_norm_hidden",
    token_norm="pre_fc_norm_embedding",
    proj="fc",
    final_norm="norm",
    block_path="layers.0",
)

# vLLM zeroes the embedding at position 0 in DeepSeek's layer and in those that were made from it; SGLang does not.
# It feeds back what the layer's final norm gives for DeepSeek only (`llm_base_proposer.py:1002`), for GLM-4.5 what
# goes into it.
VLLM_DEEPSEEK = Graph(mask_position_zero=True, source="deepseek_mtp.py:123, 144")
VLLM_DEEPSEEK_SPARSE = Graph(mask_position_zero=True, source="models/deepseek_v32/nvidia/mtp.py:117, 168")

# Rounded decay rates of linear attention would let the hidden states of long texts drift from those that a server
# drafts on.
_DECAY_RATES = ("linear_attn.A_log",)

# Qwen3-Next's attention, and Qwen3.5's.
GATED = partial(grouped, inputs_bias="attention_bias", output_bias="attention_bias", head_norms=True, gated=True)


FAMILIES: tuple[Family, ...] = (
    Family(
        name="mimo",
        architectures=("MiMoForCausalLM",),
        model_type="mimo",
        config_class="swift_fastmtp.families.mimo:MiMoConfig",
        backbone="transformers.models.qwen2.modeling_qwen2:Qwen2ForCausalLM",
        names=Names(
            prefix="model.mtp_layers.0",
            hidden_norm="hidden_layernorm",
            token_norm="token_layernorm",
            proj="input_proj",
            final_norm="final_layernorm",
        ),
        fusion=Fusion(hidden_first=True),
        block=Block(
            "transformers.models.qwen2.modeling_qwen2:Qwen2DecoderLayer",
            attention=partial(grouped, inputs_bias=True, head_dim_by_width=True),
            mlp=dense,
        ),
        engines=Engines(
            "mimo_mtp.py: MiMoMTP",
            sglang=Graph(mask_position_zero=True, source="qwen2.py:468, mimo_mtp.py:63, 83"),
            vllm=Graph(hidden_before_norm=True, mask_position_zero=True, source="mimo.py:87, mimo_mtp.py:76"),
            remote_code=True,
            stand_in="qwen2",
        ),
    ),
    # A stock full-attention layer of the backbone (output gate, QK-norm, partial rotary), whose attention goes through
    # the same function as MiMo's, and a mixture of experts behind it.
    Family(
        name="qwen3_next",
        architectures=("Qwen3NextForCausalLM",),
        model_type="qwen3_next",
        backbone="transformers.models.qwen3_next.modeling_qwen3_next:Qwen3NextForCausalLM",
        recurrent_backbone=True,
        ignored=("^mtp.*",),
        names=UNDER_MTP,
        fusion=Fusion(zero_centered_norms=True),
        block=Block(
            "transformers.models.qwen3_next.modeling_qwen3_next:Qwen3NextDecoderLayer",
            attention=GATED,
            mlp=experts_and_gated_expert,
            # SGLang's layer has experts whatever these say of layer 0 (`qwen3_next.py`).
            overrides=(("mlp_only_layers", ()), ("decoder_sparse_step", 1)),
        ),
        engines=Engines(
            "qwen3_next_mtp.py: Qwen3NextForCausalLMMTP",
            sglang=Graph(source="qwen3_next.py:998"),
            vllm=Graph(source="qwen3_next.py:739, qwen3_next_mtp.py:158"),
            num_layers_needed=False,
            needed_keys=("full_attention_interval",),  # SGLang does not read layer_types, made of it by transformers
            kept_in_float32=_DECAY_RATES,
            quantized_proj=("vLLM",),
        ),
    ),
    # As Qwen3-Next with a dense MLP; alone, or as the text model beside a vision tower, which is left on disk.
    Family(
        name="qwen3_5",
        architectures=("Qwen3_5ForCausalLM", "Qwen3_5ForConditionalGeneration"),
        model_type="qwen3_5_text",
        backbone="transformers.models.qwen3_5.modeling_qwen3_5:Qwen3_5ForCausalLM",
        recurrent_backbone=True,
        ignored=("^mtp.*", "^model.visual.*"),
        names=UNDER_MTP,
        fusion=Fusion(zero_centered_norms=True),
        block=Block(
            "transformers.models.qwen3_5.modeling_qwen3_5:Qwen3_5DecoderLayer",
            attention=GATED,
            mlp=dense,
        ),
        engines=Engines(
            "qwen3_5_mtp.py: Qwen3_5ForCausalLMMTP",
            sglang=Graph(source="qwen3_5.py:1972"),
            vllm=Graph(source="qwen3_5_mtp.py:187"),
            num_layers_key="mtp_num_hidden_layers",
            num_layers_needed=False,
            needed_keys=("full_attention_interval",),
            tied_embeddings=True,
            kept_in_float32=_DECAY_RATES,
            quantized_proj=("vLLM",),
        ),
    ),
    # The same with a mixture of experts.
    Family(
        name="qwen3_5_moe",
        architectures=("Qwen3_5MoeForCausalLM", "Qwen3_5MoeForConditionalGeneration"),
        model_type="qwen3_5_moe_text",
        backbone="transformers.models.qwen3_5_moe.modeling_qwen3_5_moe:Qwen3_5MoeForCausalLM",
        recurrent_backbone=True,
        ignored=("^mtp.*", "^model.visual.*"),
        names=UNDER_MTP,
        fusion=Fusion(zero_centered_norms=True),
        block=Block(
            "transformers.models.qwen3_5_moe.modeling_qwen3_5_moe:Qwen3_5MoeDecoderLayer",
            attention=GATED,
            mlp=experts_and_gated_expert,
        ),
        engines=Engines(
            "qwen3_5_mtp.py: Qwen3_5ForCausalLMMTP",
            sglang=Graph(source="qwen3_5.py:1972"),
            vllm=Graph(source="qwen3_5_mtp.py:187"),
            num_layers_key="mtp_num_hidden_layers",
            num_layers_needed=False,
            needed_keys=("full_attention_interval",),
            tied_embeddings=True,
            kept_in_float32=_DECAY_RATES,
            quantized_proj=("vLLM",),
        ),
    ),
    # No published checkpoint of this one has an MTP layer; `fastmtp graft` can make one.
    Family(
        name="qwen3_moe",
        architectures=("Qwen3MoeForCausalLM",),
        model_type="qwen3_moe",
        backbone="transformers.models.qwen3_moe.modeling_qwen3_moe:Qwen3MoeForCausalLM",
        names=UNDER_MTP,
        block=Block(
            "transformers.models.qwen3_moe.modeling_qwen3_moe:Qwen3MoeDecoderLayer",
            attention=partial(grouped, inputs_bias="attention_bias", output_bias="attention_bias", head_norms=True),
            mlp=experts,
            overrides=(("mlp_only_layers", ()), ("decoder_sparse_step", 1)),
        ),
        engines=Engines(
            "qwen3_moe_mtp.py: Qwen3MoeForCausalLMMTP",
            sglang=Graph(source="qwen2_moe.py:1208"),
            vllm=None,
            num_layers_needed=False,
        ),
    ),
    # Fed back: what the block puts out. No norm follows it, and none stands before the output matrix.
    Family(
        name="ernie4_5_moe",
        architectures=("Ernie4_5_MoeForCausalLM",),
        model_type="ernie4_5_moe",
        backbone="transformers.models.ernie4_5_moe.modeling_ernie4_5_moe:Ernie4_5_MoeForCausalLM",
        ignored=("mtp",),
        names=Names(
            prefix="model",
            hidden_norm="mtp_hidden_norm.0",
            token_norm="mtp_emb_norm.0",
            proj="mtp_linear_proj.0",
            final_norm=None,
            block_path="mtp_block.0",
        ),
        fusion=Fusion(proj_bias="use_bias"),
        block=Block(
            "transformers.models.ernie4_5_moe.modeling_ernie4_5_moe:Ernie4_5_MoeDecoderLayer",
            attention=partial(grouped, inputs_bias="use_bias", output_bias="use_bias", head_dim_by_width=True),
            mlp=partial(dense, bias="use_bias"),
            # Dense in the engines (`ernie4.py`, `is_mtp`), wherever the backbone's experts start.
            overrides=(("moe_layer_start_index", 1),),
        ),
        engines=Engines(
            "ernie4_eagle.py: Ernie4_5_MoeForCausalLMMTP",
            sglang=Graph(mask_position_zero=True, source="ernie4_eagle.py:79"),
            # A Llama layer, whose RoPE is not ERNIE's.
            vllm=Graph(mask_position_zero=True, rotary_halves=True, source="ernie_mtp.py:57, 69, llama.py:241"),
            tied_embeddings=True,
        ),
    ),
    # Grouped heads, and experts whatever the first layers have; below, models of the layout with latent attention.
    Family(
        name="glm4_moe",
        architectures=("Glm4MoeForCausalLM",),
        model_type="glm4_moe",
        backbone="transformers.models.glm4_moe.modeling_glm4_moe:Glm4MoeForCausalLM",
        ignored=(r"model\.layers\.92.*", r"model\.layers\.46.*"),
        names=NUMBERED,
        block=Block(
            "transformers.models.glm4_moe.modeling_glm4_moe:Glm4MoeDecoderLayer",
            attention=partial(grouped, inputs_bias="attention_bias", head_norms="use_qk_norm"),
            mlp=experts_and_shared_ones,
            overrides=(("first_k_dense_replace", 0),),
        ),
        engines=Engines(
            "glm4_moe_nextn.py: Glm4MoeForCausalLMNextN",
            sglang=Graph(source="glm4_moe_nextn.py:113"),
            vllm=Graph(feedback_before_norm=True, mask_position_zero=True, source="glm4_moe_mtp.py:116, 127"),
            unlisted_file=True,
        ),
    ),
    Family(
        name="deepseek_v3",
        architectures=("DeepseekV3ForCausalLM",),
        model_type="deepseek_v3",
        backbone="transformers.models.deepseek_v3.modeling_deepseek_v3:DeepseekV3ForCausalLM",
        ignored=(r"model\.layers\.61.*",),
        names=NUMBERED,
        block=Block(
            "transformers.models.deepseek_v3.modeling_deepseek_v3:DeepseekV3DecoderLayer",
            attention=latent,
            mlp=experts_and_shared_ones,
            overrides=(("first_k_dense_replace", 0),),
        ),
        engines=Engines(
            "deepseek_nextn.py: DeepseekV3ForCausalLMNextN",
            sglang=Graph(source="deepseek_nextn.py:236"),
            vllm=VLLM_DEEPSEEK,
        ),
    ),
    Family(
        name="glm4_moe_lite",
        architectures=("Glm4MoeLiteForCausalLM",),
        model_type="glm4_moe_lite",
        backbone="transformers.models.glm4_moe_lite.modeling_glm4_moe_lite:Glm4MoeLiteForCausalLM",
        ignored=(r"model\.layers\.47.*",),
        names=NUMBERED,
        block=Block(
            "transformers.models.glm4_moe_lite.modeling_glm4_moe_lite:Glm4MoeLiteDecoderLayer",
            attention=latent,
            mlp=experts_and_shared_ones,
            overrides=(("mlp_layer_types", ("sparse",)),),
        ),
        engines=Engines(
            "glm4_moe_lite_nextn.py: Glm4MoeLiteForCausalLMNextN",
            sglang=Graph(source="glm4_moe_lite_nextn.py:129"),
            vllm=Graph(feedback_before_norm=True, mask_position_zero=True, source="glm4_moe_lite_mtp.py:145, 156"),
            unlisted_file=True,
        ),
    ),
    # DeepSeek-V3 with sparse attention, in the MTP layer too.
    Family(
        name="deepseek_v32",
        architectures=("DeepseekV32ForCausalLM",),
        model_type="deepseek_v32",
        backbone="transformers.models.deepseek_v32.modeling_deepseek_v32:DeepseekV32ForCausalLM",
        ignored=(r"model\.layers\.61.*",),
        names=NUMBERED,
        block=Block(
            "transformers.models.deepseek_v32.modeling_deepseek_v32:DeepseekV32DecoderLayer",
            attention=sparse_latent,
            mlp=experts_and_shared_ones,
            overrides=(("mlp_layer_types", ("sparse",)),),
            indexer_rope="transformers.models.deepseek_v32.modeling_deepseek_v32:apply_rotary_pos_emb",
        ),
        engines=Engines(
            "deepseek_nextn.py: DeepseekV3ForCausalLMNextN",
            sglang=Graph(source="deepseek_nextn.py:236"),
            vllm=VLLM_DEEPSEEK_SPARSE,
        ),
    ),
    # Layers of the backbone may share an indexer; engines give the MTP layer its own.
    Family(
        name="glm_moe_dsa",
        architectures=("GlmMoeDsaForCausalLM",),
        model_type="glm_moe_dsa",
        backbone="transformers.models.glm_moe_dsa.modeling_glm_moe_dsa:GlmMoeDsaForCausalLM",
        ignored=(r"model\.layers\.78.*",),
        names=NUMBERED,
        block=Block(
            "transformers.models.glm_moe_dsa.modeling_glm_moe_dsa:GlmMoeDsaDecoderLayer",
            attention=sparse_latent,
            mlp=experts_and_shared_ones,
            overrides=(("mlp_layer_types", ("sparse",)), ("indexer_types", ("full",))),
            indexer_rope="transformers.models.glm_moe_dsa.modeling_glm_moe_dsa:apply_rotary_pos_emb_interleave",
        ),
        engines=Engines(
            "glm4_moe.py: GlmMoeDsaForCausalLMNextN",
            sglang=Graph(source="deepseek_nextn.py:236"),
            vllm=VLLM_DEEPSEEK_SPARSE,
        ),
    ),
    # Latent attention as DeepSeek's, with scaled latents, and a dense MLP, beside a backbone of another kind.
    Family(
        name="longcat_flash",
        architectures=("LongcatFlashForCausalLM",),
        model_type="longcat_flash",
        backbone="swift_fastmtp.families.longcat:LongcatFlashForCausalLM",
        ignored=(r"model\.mtp.*",),
        names=Names(
            prefix="model.mtp",
            hidden_norm="layers.0.hnorm.m",
            token_norm="layers.0.enorm.m",
            proj="layers.0.eh_proj",
            final_norm="norm",
            block_path="layers.0",
            mlp="transformer_layer.mlp",
            copies=("embed_tokens.weight",),
        ),
        block=Block(
            "swift_fastmtp.families.longcat:LongcatFlashDenseLayer",
            attention=latent,
            mlp=partial(dense, width_keys=("ffn_hidden_size", "intermediate_size")),
        ),
        engines=Engines(
            "longcat_flash_nextn.py: LongcatFlashForCausalLMNextN",
            sglang=Graph(source="longcat_flash_nextn.py:276"),
            vllm=Graph(source="longcat_flash.py:447, longcat_flash_mtp.py:70"),
            sglang_gap="the draft layer of 0.5.23 (longcat_flash_nextn.py) leaves out the projection to latents: its "
            "attention stops at an assertion, or reads what the target's last layer left",
            num_layers_needed=False,
            kept_in_float32=("mlp.router.",),
            quantized_proj=("SGLang", "vLLM"),
        ),
    ),
    # Ling 2.0 and Ring 2.0: GLM-4.5's layer under other names, all of them the checkpoints' own (`bailing.py`).
    Family(
        name="bailing_moe_v2",
        architectures=("BailingMoeV2ForCausalLM",),
        model_type="bailing_moe",
        config_class="swift_fastmtp.families.bailing:BailingMoeV2Config",
        backbone="swift_fastmtp.families.bailing:BailingMoeV2ForCausalLM",
        names=Names(
            prefix="model.layers.{N}",
            hidden_norm="hnorm",
            token_norm="enorm",
            proj="eh_proj",
            final_norm="final_layernorm",
            attention="attention",
        ),
        block=Block(
            "swift_fastmtp.families.bailing:BailingMoeV2DecoderLayer",
            attention=one_matrix,
            mlp=partial(experts_and_shared_ones, correction="expert_bias"),
            overrides=(("first_k_dense_replace", 0),),
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
        engines=Engines(
            "bailing_moe_nextn.py: BailingMoeForCausalLMNextN",
            sglang=Graph(source="bailing_moe_nextn.py:187"),
            vllm=None,
            remote_code=True,
            quantized_proj=("SGLang",),
        ),
    ),
)


def match_family(config: dict[str, Any], where: str | Path = "config.json") -> Family:
    """The row whose architectures a checkpoint's config.json names, for its number of layers.

    Raises `FastMTPError` if there is none, with the reason where engines serve the model's MTP layers otherwise.
    """
    architectures = config.get("architectures") or []
    if family := row_of(architectures):
        layers = config_value(config, "num_hidden_layers")
        if "{N}" in family.names.prefix and not isinstance(layers, int):
            raise FastMTPError(f"{where}: num_hidden_layers is {layers}; the MTP layer is numbered after it")
        return family.at(layers or 0)
    if layout := known_layout(architectures):
        raise FastMTPError(f"{where}: {architectures[0]} cannot be trained here: {layout.reason}")
    known = ", ".join(a for f in FAMILIES for a in f.architectures)
    raise FastMTPError(f"{where}: architectures {architectures} has no known MTP layout; known: {known}")


def row_of(architectures: list[str]) -> Family | None:
    """The row of config.json's architectures, with the number of its layer still open."""
    for family in FAMILIES:
        if any(a in family.architectures for a in architectures):
            return family
    return None


def layout_table() -> str:
    """The first table of docs/dev-families.md, made from the rows above."""
    rows = []
    for f in FAMILIES:
        notes = [f"`{path}.*`" for path in f.roots]
        notes.append("[hidden, embed]" if f.fusion.hidden_first else "[embed, hidden]")
        if f.fusion.zero_centered_norms:
            notes.append("norms 1 + w")
        if f.names.final_norm is None:
            notes.append("no final norm")
        if f.engines.tied_embeddings:
            notes.append("output matrix may be tied")
        architectures = ", ".join(f"`{a}`" for a in f.architectures)
        rows.append((architectures, ", ".join(notes), f"`{f.engines.served_as}`"))
    return markdown_table(("", "layout", "SGLang's class"), rows, num_text=3, raw=True)


def graph_table() -> str:
    """The table of docs/engines.md, made from the rows above."""
    rows = []
    for f in FAMILIES:
        vllm = f.engines.vllm
        agree = "yes" if vllm == f.engines.sglang else "no" if vllm else "–"
        cells = _graph_cell(f.engines.sglang), _graph_cell(vllm) if vllm else "does not draft with it"
        rows.append((f"`{f.architectures[0]}`", *cells, agree))
    return markdown_table(("", *READ_IN.values(), "the same"), rows, num_text=4, raw=True)


def _graph_cell(graph: Graph) -> str:
    notes = []
    if graph.hidden_before_norm:
        notes.append("h before the final norm")
    if graph.feedback_before_norm:
        notes.append("feeds back before the layer's norm")
    if graph.mask_position_zero:
        notes.append("embedding zeroed at position 0")
    if graph.rotary_halves:
        notes.append("RoPE on halves")
    return f"{', '.join(notes) or 'as above'} (`{graph.source}`)"


def refused_table() -> str:
    """The last table of docs/dev-families.md: what is recognized in order to be refused."""
    rows = []
    for row in LAYOUTS:
        names = ", ".join(f"`{name}`" for name in row.architectures)
        paths = ", ".join(f"`{prefix}`" for prefix in row.prefixes)
        rows.append((names, paths, row.reason))
    return markdown_table(("", "MTP tensors", "why"), rows, num_text=3, raw=True)
