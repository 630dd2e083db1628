"""Whether config.json holds what transformers' configuration classes are sure to take, without importing them.

They take more than this, and say best what is wrong: so where a key is not as it is everywhere, they are asked. What
passes here must pass there, which is tested with every key of every family's class.
"""

from collections.abc import Callable, Mapping
from typing import Any

from ..families.family import Family
from ..files.kinds import FLAG, NUMBER, OBJECT, TOKEN_IDS, Kind, is_int, is_number, whole

_COUNT = whole(1, 2**24)
_COUNT_OR_ZERO = whole(0, 2**24)
# A 1 without a point is refused by transformers where it wants a fraction.
_FRACTION = Kind("a positive number with a point", lambda v: isinstance(v, float) and is_number(v) and v > 0)
_POSITIVE = Kind("a positive number", lambda v: is_number(v) and v > 0)
_TURNED = Kind("the share of a head that RoPE turns", lambda v: is_number(v) and v in (0.25, 0.5, 1.0))
_LAYER_INDEX = Kind("a whole number, -1 for the last", lambda v: is_int(v) and -1 <= v <= 1000)
_INDEXES = Kind("a list of whole numbers", lambda v: isinstance(v, list) and all(is_int(i) for i in v))


def _one_of(*values: str) -> Kind:
    return Kind(f"one of {', '.join(values)}", lambda v: isinstance(v, str) and v in values)


_ROPE = _one_of("default", "linear", "dynamic", "yarn", "llama3")


def _is_rope(value: Any) -> bool:
    """Numbers, flags, lists of numbers and a known kind."""
    if not isinstance(value, dict):
        return False
    kinds: dict[str, Callable[[Any], bool]] = {
        "rope_theta": _POSITIVE.fits,
        "partial_rotary_factor": _TURNED.fits,
        **dict.fromkeys(("type", "rope_type"), _ROPE.fits),
    }
    plain: Callable[[Any], bool] = lambda v: isinstance(v, bool) or is_number(v) or _INDEXES.fits(v)  # noqa: E731
    return all(kinds.get(key, plain)(inner) for key, inner in value.items())


_KINDS: dict[str, Kind] = {
    **dict.fromkeys(
        (
            *("hidden_size", "vocab_size", "num_hidden_layers", "num_layers", "max_position_embeddings"),
            *("intermediate_size", "ffn_hidden_size", "moe_intermediate_size", "shared_expert_intermediate_size"),
            *("expert_ffn_hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "qk_head_dim"),
            *("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"),
            *("index_n_heads", "index_head_dim", "index_topk", "num_experts", "num_local_experts", "moe_num_experts"),
            *("n_routed_experts", "num_experts_per_tok", "moe_k", "moe_topk", "n_shared_experts"),
            *("num_shared_experts", "moe_num_shared_experts", "decoder_sparse_step", "full_attention_interval"),
            *("linear_conv_kernel_dim", "linear_num_key_heads", "linear_num_value_heads", "linear_key_head_dim"),
            *("linear_value_head_dim", "pretraining_tp", "moe_layer_interval", "sliding_window"),
        ),
        _COUNT,
    ),
    **dict.fromkeys(
        (
            *("n_group", "topk_group", "first_k_dense_replace", "max_window_layers", "zero_expert_num"),
            *("num_nextn_predict_layers", "num_mtp_layers", "mtp_num_hidden_layers", "chunk_size_feed_forward"),
        ),
        _COUNT_OR_ZERO,
    ),
    **dict.fromkeys(("moe_layer_start_index", "moe_layer_end_index"), _LAYER_INDEX),
    **dict.fromkeys(
        (
            *("attention_bias", "mlp_bias", "use_bias", "use_qk_norm", "use_qkv_bias", "tie_word_embeddings"),
            *("use_cache", "use_sliding_window", "norm_topk_prob", "output_router_logits", "rope_interleave"),
            *("is_encoder_decoder", "output_hidden_states", "output_attentions", "return_dict"),
        ),
        FLAG,
    ),
    **dict.fromkeys(
        ("initializer_range", "rms_norm_eps", "routed_scaling_factor", "router_aux_loss_coef", "moe_norm_min"),
        _FRACTION,
    ),
    "rope_theta": _POSITIVE,
    "partial_rotary_factor": _TURNED,
    "attention_dropout": NUMBER,
    **dict.fromkeys(("bos_token_id", "pad_token_id"), whole(0, 2**31 - 1)),
    "eos_token_id": TOKEN_IDS,
    "hidden_act": _one_of("silu"),
    **dict.fromkeys(("dtype", "torch_dtype"), _one_of("bfloat16", "float16", "float32")),
    "mlp_only_layers": _INDEXES,
    **dict.fromkeys(("rope_scaling", "rope_parameters"), Kind("RoPE", _is_rope)),
    "auto_map": OBJECT,
}
_LAYERS = {
    "layer_types": ("full_attention", "linear_attention", "indexed_attention"),
    "mlp_layer_types": ("dense", "sparse"),
    "indexer_types": ("full", "shared"),
}
"""A name for each layer of the backbone."""
_MAY_BE_NULL = ("rope_scaling", "sliding_window", "bos_token_id", "eos_token_id", "pad_token_id")
_RARE = ("problem_type", "id2label", "label2id", "num_labels")
"""Keys of classifiers, with rules of their own."""


def is_usual(config: Mapping[str, Any], family: Family) -> bool:
    """Whether transformers is sure to make a configuration of it."""
    text = config.get("text_config")
    parts = [config, text] if isinstance(text, dict) else [config]
    if parts[-1].get("model_type") != family.model_type:
        return False
    return all(_fits(key, part[key], part) for part in parts for key in part)


def _fits(key: str, value: Any, part: Mapping[str, Any]) -> bool:
    if key in _RARE:
        return False
    if key in _LAYERS:
        is_list = isinstance(value, list) and len(value) == part.get("num_hidden_layers")
        return is_list and all(name in _LAYERS[key] for name in value)
    if value is None and key in _KINDS:
        return key in _MAY_BE_NULL
    return key not in _KINDS or _KINDS[key].fits(value)
