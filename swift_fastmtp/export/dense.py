"""Dense models that no engine has an MTP layer for, as the backbone of a layout that engines serve.

SGLang and vLLM draft with MiMo's layer, and MiMo's backbone is Qwen2's. A Llama or a Mistral is a Qwen2 whose queries,
keys and values have a bias of zero; a tied output matrix is one that is the embedding again. So such a model becomes a
MiMo by a few added tensors, its own files stay as they are, and it computes the same, bit for bit: adding zero changes
nothing.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checkpoint.checkpoint import Checkpoint
from ..errors import FastMTPError
from ..families.family import Family, config_value

if TYPE_CHECKING:
    import torch  # takes seconds, and `fastmtp inspect` needs only the names

AS_QWEN2 = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM")
"""Architectures that are Qwen2's but for what is added here."""
_BACKBONE = "Qwen2ForCausalLM"
_MODEL_TYPE = "qwen2"
_OUTPUT, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
_BIASED = ("q_proj", "k_proj", "v_proj")
# Read by engines as by transformers; a missing one means what the model's own configuration class takes for it, which
# is not what Qwen2's does.
_EXPLICIT = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "max_position_embeddings",
    "rms_norm_eps",
    "vocab_size",
)
# Settings with which a layer is no Qwen2 layer, and the value that it must have.
_ONLY = {"attention_bias": False, "mlp_bias": False, "sliding_window": None, "hidden_act": "silu"}


@dataclass(frozen=True)
class Dense:
    """A dense model in Qwen2's terms; tensors by name as a `Checkpoint` gives them, with those that are added."""

    model: Checkpoint
    config: dict[str, Any]
    """config.json of the same model as a Qwen2."""
    added: dict[str, tuple[int, ...]]
    """Tensors that a Qwen2 has and the model's files have not, and their shapes."""
    notes: list[str]

    @property
    def folder(self) -> Path:
        return self.model.folder

    @property
    def names(self) -> set[str]:
        return {*self.model.file_of, *self.added}

    def shape(self, name: str) -> tuple[int, ...]:
        return self.added[name] if name in self.added else self.model.shape(name)

    def read(self, name: str) -> "torch.Tensor":
        import torch

        if name not in self.added:
            return self.model.read(name)
        return self.model.read(_EMBEDDING) if name == _OUTPUT else torch.zeros(self.added[name])


def is_qwen2s(family: Family) -> bool:
    """Whether it is a head for Qwen2's backbone, which the models here can be given."""
    return family.backbone.endswith(f":{_BACKBONE}")


def as_qwen2(model: Checkpoint) -> Dense | None:
    """The model as a Qwen2; None where it is none of `AS_QWEN2`, or is one already.

    Raises `FastMTPError` naming the key of config.json with which its layers are others than Qwen2's.
    """
    config = model.config
    architecture = (config.get("architectures") or [None])[0]
    tied = bool(config_value(config, "tie_word_embeddings", False))
    if architecture not in AS_QWEN2 or (architecture == _BACKBONE and not tied):
        return None
    known = _transformers_config(model)
    new = {**config, "tie_word_embeddings": False}
    if architecture != _BACKBONE:
        _check(model, known)
        new |= {key: getattr(known, key) for key in _EXPLICIT if getattr(known, key, None) is not None}
        new |= {"architectures": [_BACKBONE], "model_type": _MODEL_TYPE, "use_sliding_window": False}
        new.pop("auto_map", None)

    added: dict[str, tuple[int, ...]] = {}
    notes = []
    entries = model.entries
    for number in range(known.num_hidden_layers):
        for projection in _BIASED:
            name = f"model.layers.{number}.self_attn.{projection}"
            if f"{name}.bias" not in entries and f"{name}.weight" in entries:
                added[f"{name}.bias"] = entries[f"{name}.weight"].shape[:1]
    if added:
        notes.append(f"{len(added)} biases of zero: {architecture} has none, Qwen2 has")
    if tied and _OUTPUT not in entries:
        added[_OUTPUT] = entries[_EMBEDDING].shape
        notes.append(f"{_OUTPUT}: a copy of the embedding, which is the output matrix of this model")
    return Dense(model, new, added, notes)


def _transformers_config(model: Checkpoint) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(model.folder, trust_remote_code=False)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise FastMTPError(f"{model.config_file}: cannot be read by transformers ({error})") from None


def _check(model: Checkpoint, known: Any) -> None:
    for key, value in _ONLY.items():
        if (actual := getattr(known, key, value)) != value:
            architecture = model.config["architectures"][0]
            raise FastMTPError(
                f"{model.config_file}: {key} is {actual}; a {architecture} gets MiMo's MTP layer with {value} only, "
                "as its backbone must be Qwen2's"
            )
