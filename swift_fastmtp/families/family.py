"""What a row of the table says of a model family, and the few names that all families share.

A row has a few fields of its own and four groups: `Names` (where the tensors lie), `Fusion` (how hidden state and
token embedding become one input), `Block` (the decoder layer) and `Engines` (what SGLang and vLLM ask for, and the
`Graph` that each computes with the layer). README.md says where each is looked up.
"""

import re
from dataclasses import dataclass, field, fields, replace
from typing import Any

from ..errors import FastMTPError
from .shapes import Part


@dataclass(frozen=True)
class Names:
    """Where the tensors of the MTP layer lie in a checkpoint. All but `prefix` is relative to it."""

    prefix: str
    """Path of the MTP layer, without the trailing dot; `{N}` is the number of decoder layers (`Family.at`)."""
    hidden_norm: str
    token_norm: str
    proj: str
    """Where this ends in the layer's number, the parts have no path of their own: each is a list under `prefix`."""
    final_norm: str | None
    """None: the block's output is fed back, and projected to logits, as it is."""
    block_path: str = ""
    """Where the block's tensors lie; "" is beside the norms and the projection."""
    attention: str = "self_attn"
    """The block's attention, by its path in the block."""
    mlp: str = "mlp"
    """Its feed-forward part."""
    copies: tuple[str, ...] = ()
    """Tensors below `prefix` that checkpoints may hold and SGLang skips: copies of the backbone's matrices."""


@dataclass(frozen=True)
class Fusion:
    """How hidden state and token embedding become the block's input: proj(cat of the two, each after its norm)."""

    hidden_first: bool = False
    """Order of the fused input: [hidden, embed] if true, else [embed, hidden]."""
    zero_centered_norms: bool = False
    """Norms multiply by 1 + weight (Gemma's), so weights of all zeros are a sound norm."""
    proj_bias: str | None = None
    """config.json key that gives the projection a bias."""


@dataclass(frozen=True)
class Block:
    """The decoder layer of the MTP layer."""

    layer_class: str
    """As 'module:Class'; made with the backbone's configuration and `layer_idx=0`."""
    attention: Part
    """The tensors of its attention, without making it (`shapes.py`)."""
    mlp: Part
    """The same of its feed-forward part."""
    overrides: tuple[tuple[str, Any], ...] = ()
    """Settings of config.json that engines take otherwise for the MTP layer's block."""
    indexer_rope: str | None = None
    """Rotary embedding of the indexer that picks the keys which the block attends to (`method/indexer.py`), as
    'module:function'; None: it attends to all."""
    only: tuple[tuple[str, Any], ...] = ()
    """Settings of config.json of which this class and the backbone's know one value; a missing one is taken for it."""


ENGINES = ("sglang", "vllm")
"""The servers that a row knows, as users write them."""
ENGINE_NAMES = {"sglang": "SGLang", "vllm": "vLLM", "both": "SGLang and vLLM"}


@dataclass(frozen=True)
class Graph:
    """What one engine computes with the MTP layer, where engines differ although the weights are the same.

    Two graphs are equal where they compute the same, wherever that was read.
    """

    hidden_before_norm: bool = False
    """Step 1 gets the backbone's hidden state before its final norm; else the one after it."""
    feedback_before_norm: bool = False
    """Steps 2..K get the block's output before the layer's final norm; else the one after it."""
    mask_position_zero: bool = False
    """The token embedding is zeroed where the position is 0."""
    rotary_halves: bool = False
    """RoPE turns element i of the MTP layer's queries and keys with i + half, where the weights were trained with
    neighbors (2i, 2i + 1)."""
    source: str = field(default="", compare=False)
    """Where that was read: the engine's files and lines, in the version of `READ_IN`."""


_DIFFERENCES = {
    "hidden_before_norm": "vLLM drafts from the hidden state before the backbone's final norm, SGLang after it",
    "feedback_before_norm": "vLLM feeds back the state before the MTP layer's final norm, SGLang after it",
    "mask_position_zero": "vLLM zeroes the token embedding at position 0, SGLang does not",
    "rotary_halves": "vLLM rotates halves in the MTP layer's attention, SGLang neighbors",
}
"""What differs where vLLM's graph has such a field set and SGLang's has not: the only direction there is."""

READ_IN = {"sglang": "SGLang 0.5.23", "vllm": "vLLM 0.32.0"}
"""The version of each engine that the lines in `Graph.source` are of."""


@dataclass(frozen=True)
class Engines:
    """What engines do with such a checkpoint, and what they ask of it."""

    served_as: str
    """SGLang's draft class, as 'file: class'."""
    sglang: Graph
    """What SGLang computes."""
    vllm: Graph | None
    """What vLLM computes; None: it does not draft with it (`config/speculative.py`, `MTPModelTypes`)."""
    sglang_gap: str | None = None
    """What keeps stock SGLang, in the version that the tests run, from drafting with it."""
    num_layers_key: str = "num_nextn_predict_layers"
    """config.json key that holds the number of MTP layers."""
    num_layers_needed: bool = True
    """Engines read that key. Where they do not (SGLang sets it to 1 itself, `model_config.py`) it may be missing."""
    needed_keys: tuple[str, ...] = ()
    """Further config.json keys without which engines do not start; a save through transformers may lose them."""
    remote_code: bool = False
    """transformers has no class for `Family.model_type`, so engines read config.json with the folder's own code."""
    stand_in: str | None = None
    """A `model_type` of transformers under which they read it without that code, where `remote_code` is true."""
    tied_embeddings: bool = False
    """Engines serve checkpoints whose output matrix is the embedding (`tie_word_embeddings`)."""
    kept_in_float32: tuple[str, ...] = ()
    """Parts of the backbone that engines keep in float32 beside bfloat16, where transformers rounds them."""
    quantized_proj: tuple[str, ...] = ()
    """Engines that build the projection as quantization_config says; in others it is plain, whatever that says."""
    unlisted_file: bool = False
    """SGLang loads a file `mtp.safetensors` that the index does not list; published FP4 checkpoints forgot to."""

    @property
    def draft_class(self) -> str:
        """The name of SGLang's draft class."""
        return self.served_as.split(": ")[1]


@dataclass(frozen=True)
class Family:
    """One MTP layout."""

    name: str
    architectures: tuple[str, ...]
    """`architectures` of the checkpoints' config.json; with a second one, that of a model with a vision tower."""
    model_type: str
    """`model_type` of config.json, or of its text part."""
    backbone: str
    """transformers class that runs the backbone, as 'module:Class'."""
    names: Names
    block: Block
    engines: Engines
    fusion: Fusion = field(default_factory=Fusion)
    config_class: str | None = None
    """Configuration class for a `model_type` of which transformers has none, as 'module:Class'."""
    ignored: tuple[str, ...] = ()
    """Patterns of names that transformers drops while it loads the backbone, without a word."""
    recurrent_backbone: bool = False
    """Backbone layers carry a state from row to row (linear attention): documents packed into one row would leak."""

    @property
    def plain_model_type(self) -> str | None:
        """A `model_type` of transformers itself under which engines load config.json without remote code."""
        return self.engines.stand_in if self.engines.remote_code else self.model_type

    def graph(self, engine: str) -> Graph:
        """What an engine of `ENGINES` computes with the MTP layer; `both`: what both compute.

        Raises `FastMTPError` where vLLM does not draft with such a checkpoint, and for `both` where they differ.
        """
        sglang, vllm = self.engines.sglang, self.engines.vllm
        if engine == "sglang":
            return sglang
        if vllm is None:
            raise FastMTPError(f"vLLM has no MTP for {self.architectures[0]}; fastmtp_engine must be sglang")
        if engine == "both" and vllm != sglang:
            raise FastMTPError(
                f"fastmtp_engine both: engines do not compute the same with the MTP layer of {self.architectures[0]}: "
                f"{'; '.join(self.differences)}; set fastmtp_engine to sglang or vllm, which will serve it"
            )
        return vllm

    def mismatch(self, trained_for: str, served_by: str, target: dict[str, Any] | None = None) -> str | None:
        """What is lost when a head that was trained for one engine's graph is served by another, as one sentence; None
        where nothing is, or where an engine does not draft with such a checkpoint at all.

        Args:
            trained_for: one of `ENGINES`.
            served_by: likewise.
            target: config.json of the model that a draft-only folder is served beside.
        """
        if self.engines.vllm is None or self.graph(trained_for) == self.graph_beside(target, served_by):
            return None
        if self.graph(trained_for) == self.graph(served_by):
            what = "beside a model of another class vLLM drafts from the hidden state after its final norm"
        else:
            what = "; ".join(self.differences)
        return (
            f"trained for {ENGINE_NAMES[trained_for]}'s graph, and {what}: text stays the same, fewer drafts are "
            "accepted than were in training"
        )

    def graph_beside(self, target: dict[str, Any] | None, engine: str) -> Graph:
        """`graph`, where the layer drafts for a target with that config.json, which may be of another class.

        The state before the final norm comes from the target's class (vLLM `mimo.py`); all others give the one after.
        """
        graph = self.graph(engine)
        architectures = (target or {}).get("architectures") or self.architectures
        if set(architectures) & set(self.architectures):
            return graph
        return replace(graph, hidden_before_norm=False)

    @property
    def differences(self) -> list[str]:
        """What vLLM computes otherwise than SGLang, a line each."""
        sglang, vllm = self.engines.sglang, self.engines.vllm
        if vllm is None:
            return []
        names = [f.name for f in fields(Graph) if f.compare]
        return [_DIFFERENCES[n] for n in names if getattr(vllm, n) != getattr(sglang, n)]

    def at(self, num_hidden_layers: int) -> "Family":
        """The row for a model of that many decoder layers, after which some families number their MTP layer."""
        prefix = self.names.prefix.replace("{N}", str(num_hidden_layers))
        return replace(self, names=replace(self.names, prefix=prefix))

    @property
    def scattered(self) -> bool:
        """Whether the parts lie beside the backbone's modules, not under a path of their own."""
        return self.names.proj[-1].isdigit()

    @property
    def layer_paths(self) -> tuple[str, ...]:
        """Paths of the one MTP layer that end in its number."""
        names = self.names
        if self.scattered:
            parts = names.block_path, names.token_norm, names.hidden_norm, names.proj
            return tuple(f"{names.prefix}.{part}" for part in parts)
        return (f"{names.prefix}.{names.block_path}" if names.block_path else names.prefix,)

    @property
    def roots(self) -> tuple[str, ...]:
        """Paths below which every tensor belongs to the one MTP layer."""
        return self.layer_paths if self.scattered else (self.names.prefix,)

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
        """Whether a tensor is one of `Names.copies`."""
        return name.removeprefix(f"{self.names.prefix}.") in self.names.copies


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
