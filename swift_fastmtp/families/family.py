"""What a row of the table says of a model family, and the few names that all families share."""

import re
from dataclasses import dataclass, replace
from typing import Any


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


EMBEDDINGS = ("embed_tokens", "word_embeddings")
"""What the embedding's module is called, in one family or another."""


def config_value(config: dict[str, Any], key: str, default: Any = None) -> Any:
    """A key of config.json, or of its text part where a model has several. Null is as if the key were not there."""
    text = config.get("text_config")
    for part in (config, text if isinstance(text, dict) else {}):
        if part.get(key) is not None:
            return part[key]
    return default


def is_embedding(name: str) -> bool:
    """Whether a tensor is an embedding matrix: the model's, or a copy in the MTP layer."""
    return name.endswith(tuple(f"{module}.weight" for module in EMBEDDINGS))
