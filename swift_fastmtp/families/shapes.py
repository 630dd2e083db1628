"""Names and shapes of a decoder layer's tensors, from the numbers in config.json: what `fastmtp inspect` compares with.

The layer itself is transformers' class, which takes seconds to import; a row names beside it the parts that it is made
of, below. Nothing is guessed: a number that config.json does not state has a default in transformers' configuration
classes only, so `NotStatedError` sends the caller there. That both ways give the same is tested for every row.

Names are relative to the part, experts joined as transformers has them.
"""

from collections.abc import Callable
from typing import Any

Shapes = dict[str, tuple[int, ...]]


class NotStatedError(Exception):
    """config.json does not state a number as one that a layer could be made of."""


class Numbers:
    """The numbers of config.json, or of its text part where a model has several."""

    def __init__(self, config: dict[str, Any]) -> None:
        text = config.get("text_config")
        self._values = text if isinstance(text, dict) else config

    def size(self, *names: str) -> int:
        """A whole number above 0, of which config.json may have several names. Raises `NotStatedError` if it has none
        of them, another value or two."""
        stated = [self._values[name] for name in names if name in self._values]
        if not stated or any(value != stated[0] for value in stated):
            raise NotStatedError(names[0])
        value = stated[0]
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise NotStatedError(names[0])
        return value

    def flag(self, key: str) -> bool:
        """A missing one is false, as in every configuration class of the table. Raises `NotStatedError` for another
        type."""
        value = self._values.get(key, False)
        if not isinstance(value, bool):
            raise NotStatedError(key)
        return value

    def states(self, key: str) -> bool:
        return key in self._values


Part = Callable[[Numbers], Shapes]
"""The tensors of one part of the layer."""


def _linear(name: str, rows: int, columns: int, bias: bool = False) -> Shapes:
    shapes: Shapes = {f"{name}.weight": (rows, columns)}
    return {**shapes, f"{name}.bias": (rows,)} if bias else shapes


def grouped(
    numbers: Numbers,
    *,
    inputs_bias: str | bool = False,
    output_bias: str | bool = False,
    head_norms: str | bool = False,
    gated: bool = False,
    head_dim_by_width: bool = False,
) -> Shapes:
    """Attention with fewer keys and values than queries.

    Args:
        numbers: of the model.
        inputs_bias: of queries, keys and values: always, or the flag that says so.
        output_bias: the same of the output.
        head_norms: the same of the norms of each head's queries and keys.
        gated: the output has a gate, which lies beside the queries.
        head_dim_by_width: a missing `head_dim` is the width by the heads.
    """
    width, heads, kv = (numbers.size(k) for k in ("hidden_size", "num_attention_heads", "num_key_value_heads"))
    head_dim = _head_dim(numbers, width, heads, head_dim_by_width)
    bias = _flag(numbers, inputs_bias)
    shapes = _linear("q_proj", heads * head_dim * (2 if gated else 1), width, bias)
    shapes |= _linear("k_proj", kv * head_dim, width, bias) | _linear("v_proj", kv * head_dim, width, bias)
    shapes |= _linear("o_proj", width, heads * head_dim, _flag(numbers, output_bias))
    if _flag(numbers, head_norms):
        shapes |= {"q_norm.weight": (head_dim,), "k_norm.weight": (head_dim,)}
    return shapes


def one_matrix(numbers: Numbers) -> Shapes:
    """Ling's: grouped attention whose queries, keys and values come out of one matrix."""
    width, heads, kv = (numbers.size(k) for k in ("hidden_size", "num_attention_heads", "num_key_value_heads"))
    head_dim = _head_dim(numbers, width, heads, by_width=True)
    shapes = _linear("query_key_value", (heads + 2 * kv) * head_dim, width, numbers.flag("use_qkv_bias"))
    shapes |= _linear("dense", width, heads * head_dim)
    if numbers.flag("use_qk_norm"):
        shapes |= {"query_layernorm.weight": (head_dim,), "key_layernorm.weight": (head_dim,)}
    return shapes


def latent(numbers: Numbers) -> Shapes:
    """DeepSeek's: queries, keys and values come out of narrow latent vectors."""
    width, heads = numbers.size("hidden_size"), numbers.size("num_attention_heads")
    query_rank, key_rank = numbers.size("q_lora_rank"), numbers.size("kv_lora_rank")
    plain, values = numbers.size("qk_nope_head_dim"), numbers.size("v_head_dim")
    turned = _turned(numbers.size("qk_rope_head_dim"))
    for key, implied in (("head_dim", turned), ("qk_head_dim", plain + turned)):
        if numbers.states(key) and numbers.size(key) != implied:  # some classes take the one, some the other
            raise NotStatedError(key)
    bias = numbers.flag("attention_bias")
    shapes = _linear("q_a_proj", query_rank, width, bias)
    shapes |= {"q_a_layernorm.weight": (query_rank,), "kv_a_layernorm.weight": (key_rank,)}
    shapes |= _linear("q_b_proj", heads * (plain + turned), query_rank)
    shapes |= _linear("kv_a_proj_with_mqa", key_rank + turned, width, bias)
    shapes |= _linear("kv_b_proj", heads * (plain + values), key_rank)
    return shapes | _linear("o_proj", width, heads * values, bias)


def sparse_latent(numbers: Numbers) -> Shapes:
    """DeepSeek-V3.2's: the same with an indexer, which picks the keys."""
    width, rank = numbers.size("hidden_size"), numbers.size("q_lora_rank")
    heads, head_dim = numbers.size("index_n_heads"), numbers.size("index_head_dim")
    shapes = _linear("wq_b", heads * head_dim, rank) | _linear("wk", head_dim, width)
    shapes |= {"k_norm.weight": (head_dim,), "k_norm.bias": (head_dim,)} | _linear("weights_proj", heads, width)
    return latent(numbers) | {f"indexer.{name}": shape for name, shape in shapes.items()}


def dense(
    numbers: Numbers, *, width_keys: tuple[str, ...] = ("intermediate_size",), bias: str | bool = False
) -> Shapes:
    """A gated MLP.

    Args:
        numbers: of the model.
        width_keys: of config.json, for its inner width.
        bias: always, or the flag that says so.
    """
    return _mlp(numbers.size("hidden_size"), numbers.size(*width_keys), _flag(numbers, bias))


NUMBER_KEYS = ("num_experts", "num_local_experts", "n_routed_experts")
SHARED_KEYS = ("n_shared_experts", "num_shared_experts")


def experts(numbers: Numbers, *, correction: str | None = None) -> Shapes:
    """A router and its experts.

    Args:
        numbers: of the model.
        correction: the router's bias by which it chooses, where it has one.
    """
    width, inner = numbers.size("hidden_size"), numbers.size("moe_intermediate_size")
    number = numbers.size(*NUMBER_KEYS)
    shapes: Shapes = {
        "gate.weight": (number, width),
        "experts.gate_up_proj": (number, 2 * inner, width),
        "experts.down_proj": (number, width, inner),
    }
    return {**shapes, f"gate.{correction}": (number,)} if correction else shapes


def experts_and_gated_expert(numbers: Numbers) -> Shapes:
    """Qwen3-Next's: the same with an expert of all tokens, whose output has a gate."""
    width, inner = numbers.size("hidden_size"), numbers.size("shared_expert_intermediate_size")
    shared = {f"shared_expert.{name}": shape for name, shape in _mlp(width, inner, False).items()}
    return experts(numbers) | shared | _linear("shared_expert_gate", 1, width)


def experts_and_shared_ones(numbers: Numbers, *, correction: str = "e_score_correction_bias") -> Shapes:
    """DeepSeek's: the same with experts of all tokens, as one MLP.

    Args:
        numbers: of the model.
        correction: the router's bias by which it chooses.
    """
    width, inner = numbers.size("hidden_size"), numbers.size("moe_intermediate_size") * numbers.size(*SHARED_KEYS)
    shared = {f"shared_experts.{name}": shape for name, shape in _mlp(width, inner, False).items()}
    return experts(numbers, correction=correction) | shared


def _mlp(width: int, inner: int, bias: bool) -> Shapes:
    shapes = _linear("gate_proj", inner, width, bias) | _linear("up_proj", inner, width, bias)
    return shapes | _linear("down_proj", width, inner, bias)


def _head_dim(numbers: Numbers, width: int, heads: int, by_width: bool) -> int:
    if not by_width or numbers.states("head_dim"):
        return _turned(numbers.size("head_dim"))
    if width % heads:
        raise NotStatedError("head_dim")
    return _turned(width // heads)


def _turned(head_dim: int) -> int:
    """What RoPE turns, a quarter of it at least, must be pairs."""
    if head_dim % 8:
        raise NotStatedError("head_dim")
    return head_dim


def _flag(numbers: Numbers, flag: str | bool) -> bool:
    return flag if isinstance(flag, bool) else numbers.flag(flag)


def split_experts(shapes: Shapes) -> Shapes:
    """The shapes of `model/head.split_experts`: each expert by itself, as most checkpoints have them."""
    separate: Shapes = {}
    for name, shape in shapes.items():
        path, _, kind = name.rpartition(".")
        if kind not in ("gate_up_proj", "down_proj") or not path.endswith(".experts"):
            separate[name] = shape
            continue
        number, rows, columns = shape
        for e in range(number):
            if kind == "down_proj":
                separate[f"{path}.{e}.down_proj.weight"] = (rows, columns)
            else:
                half = (rows // 2, columns)
                separate[f"{path}.{e}.gate_proj.weight"] = separate[f"{path}.{e}.up_proj.weight"] = half
    return separate
