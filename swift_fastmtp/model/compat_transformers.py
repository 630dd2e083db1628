"""What this package uses of transformers and accelerate beyond their documented interface.

One section for each thing, with the reason and the check. Tried with transformers 5.19.0 and accelerate 1.15.0; every
check raises one `FastMTPError` line that names the version to install.
"""

import inspect
from collections.abc import Iterable
from contextlib import AbstractContextManager, ExitStack
from functools import cache
from typing import Any, cast

import torch
from torch import nn
from transformers import FineGrainedFP8Config, PreTrainedConfig, PreTrainedModel

from ..checkpoint.fp8 import dequantize
from ..checkpoint.fp8_config import Blocks
from ..files.libraries import Name, changed, check_names, find

try:
    from transformers.cache_utils import DynamicIndexedLayer, DynamicLayer, LinearAttentionLayer
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter
    from transformers.dynamic_module_utils import resolve_trust_remote_code
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, register_quantization_config, register_quantizer
    from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer
except ImportError as error:
    raise changed("transformers", str(error).partition(" (")[0]) from None

# --- Reading FP8: `Fp8Dequantize._dequantize_one`, `FineGrainedFP8HfQuantizer.update_weight_conversions`.
#
# transformers' arithmetic takes the block size from the number of scales, which is wrong for matrices with a ragged
# edge. A renamed method would be silent: transformers' own would run.

FP8_METHOD = "fastmtp_fp8"
_DEQUANTIZE_ONE = Name(
    "transformers",
    "transformers.integrations.finegrained_fp8:Fp8Dequantize._dequantize_one",
    "FP8 blocks become numbers there",
    first=("self", "quantized", "scales", "output_dtype"),
)
_UPDATE_CONVERSIONS = Name(
    "transformers",
    "transformers.quantizers.quantizer_finegrained_fp8:FineGrainedFP8HfQuantizer.update_weight_conversions",
    "it chooses how FP8 tensors are read",
    first=("self", "weight_conversions"),
)


class Dequantize(Fp8Dequantize):
    """transformers' step of loading, with the arithmetic replaced."""

    def _dequantize_one(
        self, quantized: torch.Tensor, scales: torch.Tensor, output_dtype: torch.dtype | None = None
    ) -> torch.Tensor:
        rows, cols = self.hf_quantizer.quantization_config.weight_block_size
        return dequantize(quantized[...], scales[...], Blocks((rows, cols))).to(output_dtype or torch.float32)


class Quantizer(FineGrainedFP8HfQuantizer):
    """transformers' quantizer, every step of which that dequantizes is ours."""

    def update_weight_conversions(self, weight_conversions: list[Any]) -> list[Any]:
        conversions = list(super().update_weight_conversions(weight_conversions))
        replaced = 0
        for conversion in conversions:
            if not isinstance(conversion, WeightConverter):
                continue
            operations: list[Any] = []
            for operation in conversion.operations:
                ours = isinstance(operation, Fp8Dequantize)
                operations.append(Dequantize(self) if ours else operation)
                replaced += ours
            conversion.operations = operations
        if not replaced:
            raise changed("transformers", "no conversion of FP8 weights has the operation Fp8Dequantize")
        return conversions


class DequantizedFP8Config(FineGrainedFP8Config):
    """transformers' settings of FP8 blocks, under a name of our own."""


def register_fp8() -> None:
    """Make the method `FP8_METHOD` known to transformers, once. Raises `FastMTPError` if it would not be used."""
    check_fp8()
    if FP8_METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantization_config(FP8_METHOD)(DequantizedFP8Config)
        register_quantizer(FP8_METHOD)(Quantizer)


def check_fp8() -> None:
    """Raises `FastMTPError` if transformers would not call our arithmetic: tried on a matrix with a ragged edge."""
    find(_DEQUANTIZE_ONE)
    find(_UPDATE_CONVERSIONS)
    config = DequantizedFP8Config(weight_block_size=(2, 2), dequantize=True)
    operation = Dequantize(Quantizer(config, pre_quantized=True))
    weight = torch.ones(3, 3).to(torch.float8_e4m3fn)
    scales = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    wanted = dequantize(weight, scales, Blocks((2, 2)))
    try:
        result = operation.convert({"weight$": [weight], "weight_scale_inv": [scales]})["weight"]
    except Exception as error:  # noqa: BLE001 (whatever another version does with it)
        raise changed("transformers", f"Fp8Dequantize.convert fails ({type(error).__name__})") from None
    if not torch.equal(torch.as_tensor(result), wanted):
        raise changed("transformers", "Fp8Dequantize.convert does not use _dequantize_one, and gives other numbers")


# --- Saving what was FP8: `PreTrainedModel._weight_conversions`.
#
# `save_pretrained` applies the inverse of what a model was loaded with, and would quantize a dequantized model again.
# If the attribute were renamed, setting it would change nothing.


def save_as_loaded_plain(model: Any) -> None:
    """A model that was dequantized is saved by the weights that it has.

    Raises `FastMTPError` if transformers did not leave its conversions where they are replaced.
    """
    if not hasattr(model, "_weight_conversions"):
        raise changed("transformers", "a loaded model has no _weight_conversions (it would be saved in FP8 again)")
    model._weight_conversions = get_model_conversion_mapping(model)


# --- The epsilon of norms: `variance_epsilon`.
#
# transformers gives the norms of latents a constant, engines the configuration's. If it were renamed, the constant
# would stay, and trained would differ from served.


def set_epsilon(modules: Iterable[nn.Module], epsilon: float) -> None:
    """Every RMSNorm that has a constant computes with `epsilon`; the others (`eps`) were made with it.

    Raises `FastMTPError` for a norm that reads neither of the two names.
    """
    for module in modules:
        if "RMSNorm" in type(module).__name__:
            _check_norm(cast(Any, type(module)))
        if hasattr(module, "variance_epsilon"):
            setattr(module, "variance_epsilon", epsilon)  # noqa: B010 (of a type that torch does not know)


@cache
def _check_norm(kind: Any) -> None:
    """By the names in the code of the class: no number is computed, as a module may have no memory (device `meta`)."""
    names: set[str] = set()
    for holder in kind.mro()[: kind.mro().index(nn.Module)]:
        for name, function in vars(holder).items():
            if name != "__init__" and inspect.isfunction(function):
                names.update(inspect.unwrap(function).__code__.co_names)
    if not names & {"variance_epsilon", "eps"}:
        raise changed("transformers", f"{kind.__name__} computes with neither variance_epsilon nor eps")


# --- Routers with a correction bias: `e_score_correction_bias`.
#
# Routers of DeepSeek's kind compute in float32 in transformers and in engines. Under autocast their product would be
# bfloat16 all the same, and a near tie would be trained with one expert and served with another. They are told by this
# buffer; if it were renamed they would compute in bfloat16.


def route_in_float32(modules: Iterable[nn.Module]) -> None:
    """Routers with a correction bias run without autocast.

    Raises `FastMTPError` for a router with a second tensor of another name.
    """
    for module in modules:
        if hasattr(module, "e_score_correction_bias"):
            off = _AutocastOff()
            module.register_forward_pre_hook(off.begin, with_kwargs=True)
            module.register_forward_hook(off.end, always_call=True)
        elif type(module).__name__.endswith("Router"):
            _check_router(module)


def _check_router(module: nn.Module) -> None:
    known = ("weight", "bias", "e_score_correction_bias")
    for name, _ in (*module.named_parameters(), *module.named_buffers()):
        if name.rpartition(".")[2] not in known:
            raise changed(
                "transformers", f"{type(module).__name__} has {name}, where routers had e_score_correction_bias"
            )


class _AutocastOff:
    """Hooks around a module's forward."""

    def __init__(self) -> None:
        self.entered: list[AbstractContextManager[Any]] = []

    def begin(self, module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        hidden_states = (*inputs, *named.values())[0]
        context = torch.autocast(hidden_states.device.type, enabled=False)
        context.__enter__()
        self.entered.append(context)

    def end(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if self.entered:
            self.entered.pop().__exit__(None, None, None)


# --- Lists that model classes keep: what stays float32, what may be in a file and not in the model, which layers stay
# whole on a device, whether flash attention exists.
#
# Read from the class that runs the backbone. If one were renamed, it would look empty.

_CLASS_LISTS = (
    "_keep_in_fp32_modules_strict",
    "_keys_to_ignore_on_load_unexpected",
    "_no_split_modules",
    "_supports_flash_attn",
)


def _class_list(model_class: Any, name: str) -> Any:
    if not hasattr(PreTrainedModel, name):
        raise changed("transformers", f"PreTrainedModel has no {name} (which model classes say of themselves)")
    return getattr(model_class, name)


def check_class_lists() -> None:
    """Raises `FastMTPError` if transformers' model classes do not have one of the lists."""
    for name in _CLASS_LISTS:
        _class_list(PreTrainedModel, name)


def kept_in_float32(model_or_class: Any) -> list[str]:
    """Parts of names of modules that stay float32 in a model of any dtype."""
    return list(_class_list(model_or_class, "_keep_in_fp32_modules_strict") or ())


def keep_in_float32(model: Any, path: str) -> None:
    """Add to that list of one model, once it was made (`post_init` makes a set of its own)."""
    kept = _class_list(model, "_keep_in_fp32_modules_strict")
    if not isinstance(kept, set):
        raise changed("transformers", "_keep_in_fp32_modules_strict of a model is no set (what stays float32)")
    kept.add(path)


def ignored_in_files(model_class: Any) -> list[str]:
    """Patterns of tensors that files may hold and the model does not."""
    return list(_class_list(model_class, "_keys_to_ignore_on_load_unexpected") or ())


def class_attributes(in_float32: list[str], ignored: list[str]) -> dict[str, Any]:
    """The two lists, for a subclass of a model class."""
    check_class_lists()
    return {
        "_keep_in_fp32_modules_strict": in_float32,
        "_keys_to_ignore_on_load_unexpected": ignored or None,
    }


def unsplit_layers(model: Any) -> set[str]:
    """Names of the classes of decoder layers, each of which lies on one device."""
    return set(_class_list(model, "_no_split_modules") or ())


def supports_flash_attention(model_class: Any) -> bool:
    """Whether transformers has flash attention for a model class."""
    return bool(_class_list(model_class, "_supports_flash_attn"))


# --- Which attention a config names: `PreTrainedConfig._attn_implementation`.
#
# `set_attn_implementation` is a model's method; a decoder block that is made by itself has a config only.


def check_attention() -> None:
    """Raises `FastMTPError` if a config's attention is not that property."""
    stock = getattr(PreTrainedConfig, "_attn_implementation", None)
    if not isinstance(stock, property) or stock.fset is None:
        raise changed("transformers", "PreTrainedConfig has no property _attn_implementation (the block's attention)")


def attention_of(config: Any) -> Any:
    """The name of a config's attention."""
    check_attention()
    return config._attn_implementation


def use_attention(config: Any, name: str) -> None:
    """Modules that are made from this config attend by the interface of that name."""
    check_attention()
    config._attn_implementation = name


# --- The KV cache of generation: layers of `DynamicCache`, the states of linear attention, `sdpa` as functions.
#
# transformers' own cache copies everything at every token, and conversations in it begin together (`slots.py`). A layer
# whose methods were renamed would be silent: the stock ones would append to tensors that nobody reads.

__all__ = ["DynamicIndexedLayer", "DynamicLayer", "LinearAttentionLayer", "sdpa_attention_forward", "sdpa_mask"]
_CACHE = "the cache of answers in process is made of it"
_CACHE_NAMES = (
    Name(
        "transformers", "transformers.cache_utils:DynamicLayer.update", _CACHE, ("self", "key_states", "value_states")
    ),
    Name("transformers", "transformers.cache_utils:DynamicLayer.get_seq_length", _CACHE, ("self",)),
    Name(
        "transformers",
        "transformers.cache_utils:DynamicIndexedLayer.update_indexer",
        _CACHE,
        ("self", "indexer_key_states"),
    ),
    Name("transformers", "transformers.cache_utils:LinearAttentionLayer.reorder_cache", _CACHE, ("self", "beam_idx")),
    Name(
        "transformers",
        "transformers.integrations.sdpa_attention:sdpa_attention_forward",
        "prompts attend by it",
        ("module", "query", "key", "value", "attention_mask"),
    ),
)


def check_cache() -> None:
    """Raises `FastMTPError` if a name of the cache is gone, or linear attention keeps its states elsewhere."""
    check_names(_CACHE_NAMES)
    layer = LinearAttentionLayer()
    if not all(isinstance(getattr(layer, name, None), dict) for name in ("conv_states", "recurrent_states")):
        raise changed("transformers", "LinearAttentionLayer has no dictionaries conv_states and recurrent_states")


# --- Making a model as `from_pretrained` does: `PreTrainedModel.get_init_context`.
#
# With ZeRO-3 it partitions each module as it is made. Nothing documented does that without reading the files too.

_INIT_CONTEXT = Name(
    "transformers",
    "transformers:PreTrainedModel.get_init_context",
    "a model is partitioned as it is made",
    first=("dtype", "is_quantized", "_is_ds_init_called", "allow_all_kernels"),
)


def making(model_class: Any, dtype: torch.dtype) -> ExitStack:
    """Inside, `model_class(config)` gives what `from_pretrained` would, without weights."""
    find(_INIT_CONTEXT)
    stack = ExitStack()
    for context in model_class.get_init_context(dtype, False, False, None):
        stack.enter_context(context)
    return stack


# --- Which tensors are another's: `all_tied_weights_keys`, filled by `post_init`.


def tied_names(model: Any) -> set[str]:
    """Names of tensors of a model that are another one's, and in no file."""
    if not hasattr(model, "all_tied_weights_keys"):
        raise changed("transformers", "a model has no all_tied_weights_keys (which of its tensors are in no file)")
    return set(model.all_tied_weights_keys)


# --- Moving a model that lies on several devices: accelerate's `model.to`.
#
# `dispatch_model` puts a function that raises over the model's own `to`. Trainers call it, and need it to do nothing.


def is_dispatched(model: Any) -> bool:
    """Whether accelerate has put the model's layers on several devices."""
    return len(getattr(model, "hf_device_map", ())) > 1


def uncover_to(model: Any) -> None:
    """Take accelerate's `to` away, so that the class's own is called again."""
    if "to" in vars(model):
        del model.to


# --- An error text: that a folder needs Python code of its own, which is never run here.

_NEEDS_CODE = "trust_remote_code"


def needs_folder_code(error: BaseException) -> bool:
    """Whether transformers stopped because a folder needs Python code of its own."""
    return _NEEDS_CODE in str(error)


def check_needs_folder_code() -> None:
    """Raises `FastMTPError` if transformers does not stop so, or by another text."""
    try:
        resolve_trust_remote_code(False, "a folder", has_local_code=False, has_remote_code=True)
    except ValueError as error:
        if needs_folder_code(error):
            return
    raise changed("transformers", f"a model that needs Python code is not refused by a text with {_NEEDS_CODE}")


def check() -> None:
    """Everything that can be looked at before there is a model."""
    check_fp8()
    check_class_lists()
    check_attention()
    check_cache()
    find(_INIT_CONTEXT)
    check_needs_folder_code()
