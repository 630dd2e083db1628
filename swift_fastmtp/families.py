"""The table of MTP layouts: one row per family of checkpoints.

A row says where the head's tensors live in a checkpoint, how the head fuses hidden state and token embedding,
and which decoder block it wraps. Everything that differs between families is here; nothing else in the package
asks which family it has.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from . import inputs
from .errors import FastMTPError
from .inputs import FLAG, NAME, NAMES, NUMBER, OBJECT, TOKEN_IDS, Kind, is_int, not_finite, shown, wrong_types
from .known_layouts import LAYOUTS, known_layout


@dataclass(frozen=True)
class Family:
    """One MTP layout. Module names are relative to the head."""

    name: str
    architectures: tuple[str, ...]
    """`architectures` of the checkpoints' config.json."""
    backbone: str
    """transformers class that runs the backbone, as 'module:Class'."""
    block: str
    """Decoder block of the head, as 'module:Class'."""
    prefix: str
    """Path of the head in the checkpoint, without the trailing dot; `{N}` is the number of decoder layers (`at`)."""
    block_path: str
    """Where the block's tensors lie; "" is beside the norms and the projection."""
    hidden_norm: str
    token_norm: str
    proj: str
    """Where this ends in the layer's number, the parts have no path of their own: each is a list under `prefix`."""
    final_norm: str | None
    """None: the block's output is fed back, and projected to logits, as it is."""
    hidden_first: bool
    """Order of the fused input: [hidden, embed] if true, else [embed, hidden]."""
    zero_centred_norms: bool
    """Norms multiply by 1 + weight (Gemma's), so weights of all zeros are a sound norm."""
    mask_position_zero: bool
    """Engines zero the token embedding where the position is 0 (SGLang and vLLM `mimo_mtp.py`)."""
    config_model_type: str
    """`model_type` of config.json."""
    num_layers_key: str
    """config.json key that holds the number of MTP layers."""
    num_layers_needed: bool
    """Engines read that key. Where they do not (SGLang sets it to 1 itself, `model_config.py`) it may be missing."""
    plain_model_type: str | None
    """A `model_type` of transformers itself under which engines load config.json without remote code."""
    tied_embeddings: bool
    """Engines serve checkpoints whose output matrix is the embedding (`tie_word_embeddings`)."""
    recurrent_backbone: bool
    """Backbone layers carry a state from row to row (linear attention): documents packed into one row would leak."""
    served_as: str
    """SGLang's draft class, as 'file: class'."""
    proj_bias: str | None = None
    """config.json key that gives the projection a bias."""
    block_config: tuple[tuple[str, Any], ...] = ()
    """Settings of config.json that engines take otherwise for the MTP layer's block."""
    needed_keys: tuple[str, ...] = ()
    """Further config.json keys without which engines do not start; a save through transformers may lose them."""
    kept_in_float32: tuple[str, ...] = ()
    """Parts of the backbone that engines keep in float32 beside bfloat16, where transformers rounds them."""
    indexer_rope: str | None = None
    """Rotary embedding of the indexer that picks the keys which the block attends to (`indexer.py`), as
    'module:function'; None: it attends to all."""
    quantized_proj: tuple[str, ...] = ()
    """Engines that build the projection as quantization_config says; in others it is plain, whatever that says."""
    sglang_gap: str | None = None
    """What keeps stock SGLang, in the version that the tests run, from drafting with it."""
    vllm: bool = True
    """vLLM drafts with it (`config/speculative.py` `MTPModelTypes`; read, not run)."""
    attention: str = "self_attn"
    """The block's attention, by its path in the block."""
    mlp: str = "mlp"
    """Its feed-forward part."""
    copies: tuple[str, ...] = ()
    """Tensors of the head's path that checkpoints may hold and SGLang skips: copies of the backbone's matrices."""
    only: tuple[tuple[str, Any], ...] = ()
    """Settings of config.json of which the classes above know this one value; a missing one is taken for it."""

    def at(self, num_hidden_layers: int) -> "Family":
        """The row for a model of that many decoder layers, after which some families number their MTP layer."""
        return replace(self, prefix=self.prefix.replace("{N}", str(num_hidden_layers)))

    @property
    def scattered(self) -> bool:
        """Whether the parts lie beside the backbone's modules, not under a path of their own."""
        return self.proj[-1].isdigit()

    @property
    def layer_paths(self) -> tuple[str, ...]:
        """Paths of the one MTP layer that end in its number."""
        if self.scattered:
            return tuple(f"{self.prefix}.{p}" for p in (self.block_path, self.token_norm, self.hidden_norm, self.proj))
        return (f"{self.prefix}.{self.block_path}" if self.block_path else self.prefix,)

    @property
    def roots(self) -> tuple[str, ...]:
        """Paths below which every tensor belongs to the one MTP layer."""
        return self.layer_paths if self.scattered else (self.prefix,)

    @property
    def root(self) -> str:
        """The first of `roots`, for messages."""
        return self.roots[0]

    def owns(self, name: str) -> bool:
        """Whether a tensor or module belongs to an MTP layer, this one or one after it."""
        return name.startswith(tuple(f"{root}." for root in self.roots)) or self.is_other_layer(name)

    def is_other_layer(self, name: str) -> bool:
        """Whether a tensor belongs to an MTP layer after the first."""
        for path in self.layer_paths:
            layers, _, number = path.rpartition(".")
            match = re.match(rf"{re.escape(layers)}\.(\d{{1,18}})\.", name)
            if match and int(match[1]) > int(number):
                return True
        return False

    def is_copy(self, name: str) -> bool:
        """Whether a tensor is one of `copies`."""
        return name.removeprefix(f"{self.prefix}.") in self.copies


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
        backbone="swift_fastmtp.longcat:LongcatFlashForCausalLM",
        block="swift_fastmtp.longcat:LongcatFlashDenseLayer",
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
        backbone="swift_fastmtp.bailing:BailingMoeV2ForCausalLM",
        block="swift_fastmtp.bailing:BailingMoeV2DecoderLayer",
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
EMBEDDINGS = ("embed_tokens", "word_embeddings")
"""What the embedding's module is called, in one family or another."""


class WrongTypeError(FastMTPError):
    """A key of config.json holds something of another type than this package and the engines read."""


def read_config(model_dir: str | Path) -> dict[str, Any]:
    """config.json of a checkpoint folder.

    Raises `FastMTPError` if it is missing or not a JSON object; `WrongTypeError` naming the first key of `_TYPES` that
    is of another type, or the first that holds NaN or an infinite number.
    """
    path = Path(model_dir) / "config.json"
    try:
        config = inputs.read_json(path)
    except FileNotFoundError:
        raise FastMTPError(f"{path}: not found; pass the folder of a Hugging Face checkpoint") from None
    if not isinstance(config, dict):
        raise FastMTPError(
            f"{path}: must hold a JSON object, not {type(config).__name__}; restore it from the base model"
        )
    _check_types(config, path)
    return config


_COUNT = Kind("a whole number that is not negative, and at most 2**24", lambda v: is_int(v) and 0 <= v <= 2**24)
_LAYERS = Kind("a whole number that is not negative, and at most 1000", lambda v: is_int(v) and 0 <= v <= 1000)
_EXPERTS = Kind("a whole number that is not negative, and at most 10000", lambda v: is_int(v) and 0 <= v <= 10_000)
_TYPES: dict[str, Kind] = {
    "architectures": NAMES,
    "model_type": NAME,
    **dict.fromkeys(("text_config", "quantization_config", "auto_map", "rope_scaling", "rope_parameters"), OBJECT),
    "tie_word_embeddings": FLAG,
    "dtype": NAME,
    "torch_dtype": NAME,
    "eos_token_id": TOKEN_IDS,
    "rms_norm_eps": NUMBER,
    "rope_theta": NUMBER,
}
"""Keys of config.json that are read here, and what they hold; null is a key that is not there."""
_SHAPES: dict[str, Kind] = {
    **dict.fromkeys(
        ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim"),
        _COUNT,
    ),
    # transformers makes lists of so many entries, and layers.
    **dict.fromkeys(
        ("num_hidden_layers", "num_layers", "num_nextn_predict_layers", "mtp_num_hidden_layers"),
        _LAYERS,
    ),
    **dict.fromkeys(
        ("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts", "num_experts_per_tok"),
        _EXPERTS,
    ),
}
"""Keys that modules are made from. Models of no layout here may hold a list, a number for each of their parts."""
_MAY_BE_INFINITE = ("time_step_limit",)
"""Of state-space layers, in published files."""


def _check_types(config: dict[str, Any], path: Path) -> None:
    text = config.get("text_config")
    parts = (("", config), ("text_config.", text if isinstance(text, dict) else {}))
    _check_parts(parts, _TYPES, path)
    if _row(config.get("architectures") or []):
        _check_parts(parts, _SHAPES, path)
    for key, value in not_finite(config):
        if key.rpartition(".")[2] not in _MAY_BE_INFINITE:
            raise WrongTypeError(
                f"{path}: {key} is {value}, it must be a finite number; take it from the base model's config.json"
            )


def _check_parts(parts: tuple[tuple[str, dict[str, Any]], ...], kinds: dict[str, Kind], path: Path) -> None:
    for where, part in parts:
        for key, what in wrong_types(part, kinds):
            raise WrongTypeError(
                f"{path}: {where}{key} is {shown(part[key])}, it must be {what}; take it from the base model's "
                "config.json"
            )


def config_value(config: dict[str, Any], key: str, default: Any = None) -> Any:
    """A key of config.json, or of its text part where a model has several. Null is as if the key were not there."""
    text = config.get("text_config")
    for part in (config, text if isinstance(text, dict) else {}):
        if part.get(key) is not None:
            return part[key]
    return default


def vocabulary_size(config: dict[str, Any], where: str | Path) -> int:
    """V, the rows of the output matrix. Raises `FastMTPError` if config.json does not say."""
    rows = config_value(config, "vocab_size")
    if not is_int(rows) or rows < 1:
        raise FastMTPError(f"{where}: vocab_size is {rows!r}; it must be the rows of the output matrix")
    return int(rows)


def is_embedding(name: str) -> bool:
    """Whether a tensor is an embedding matrix: the model's, or a copy in the MTP layer."""
    return name.endswith(tuple(f"{module}.weight" for module in EMBEDDINGS))


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


@dataclass(frozen=True)
class Refusal:
    """One reason against training a checkpoint, in one line."""

    about: str
    """`draft`: engines would draft wrongly with it, or not start; `training`: only training stands against it."""
    key: str
    """Of config.json."""
    text: str


def find_family(config: dict[str, Any], where: str | Path = "config.json") -> Family:
    """The row for a checkpoint that we can train.

    Raises `FastMTPError` if no row matches, or with the first of `refusals`.
    """
    family = match_family(config, where)
    for refusal in refusals(config, family, where):
        raise FastMTPError(refusal.text)
    return family


def refusals(config: dict[str, Any], family: Family, where: str | Path = "config.json") -> Iterator[Refusal]:
    """What config.json says against training a checkpoint of this family.

    It has no `model_type`; it has another number of MTP layers than the one that FastMTP shares between all steps; it
    has a setting that the family's classes here do not know; it is quantised otherwise than in FP8 blocks
    (`fp8.read_blocks`); it ties its output matrix to the embedding where the engines do not, or says two things of
    that.
    """
    if not config_value(config, "model_type"):  # LongCat-Flash-Thinking-2601's once had none
        text = f'{where}: has no model_type; add "model_type": "{family.config_model_type}"'
        yield Refusal("draft", "model_type", text)
    layers = config_value(config, family.num_layers_key, 1)
    if layers != 1:
        text = (
            f"{where}: {family.num_layers_key} is {layers}; FastMTP shares one MTP layer between all steps, "
            f"so the checkpoint must have exactly 1{'' if layers else ': `fastmtp graft` puts one in'}"
        )
        yield Refusal("draft", family.num_layers_key, text)
    for key, value in family.only:
        if (found := config_value(config, key, value)) != value:
            text = (
                f"{where}: {key} is {json.dumps(found)}; {family.architectures[0]} can be trained with "
                f"{json.dumps(value)} only"
            )
            yield Refusal("training", key, text)
    from .fp8 import read_blocks  # this module alone needs no torch

    try:
        read_blocks(config, where)
    except FastMTPError as error:
        yield Refusal("training", "quantization_config", str(error))
    parts = (config, config.get("text_config") or {})
    tied = [part["tie_word_embeddings"] for part in parts if part.get("tie_word_embeddings") is not None]
    if len(set(tied)) > 1:
        text = (
            f"{where}: tie_word_embeddings is {tied[0]}, and in text_config {tied[1]}; the target goes by the first, "
            "SGLang's draft by the second: set both alike"
        )
        yield Refusal("draft", "tie_word_embeddings", text)
    elif any(tied) and not family.tied_embeddings:
        text = (
            f"{where}: tie_word_embeddings is true, but {family.architectures[0]} has its own lm_head in every "
            "engine; set it to false and store lm_head.weight"
        )
        yield Refusal("draft", "tie_word_embeddings", text)


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
