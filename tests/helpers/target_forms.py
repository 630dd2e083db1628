"""The tiny model in every form that people publish quantized models in, without its MTP layer: names, packing and
config.json as their tools write them, weights rounded to the nearest.

Keys and lists are those of published checkpoints, or of the tool's own export; each form names its source. Each maker
returns the numbers that the stored tensors stand for, by the names of the plain model.
"""

import json
import shutil

import torch
from safetensors.torch import load_file, save_file

from helpers.models import gptq, quantized
from helpers.paths import TINY
from swift_fastmtp.checkpoint.checkpoint import Checkpoint
from swift_fastmtp.checkpoint.fp8_config import SCALE
from swift_fastmtp.checkpoint.mtp_tensors import read_plain

GROUP = 32
"""Columns that share a scale: half of them where NVFP4 says so."""
FP8_MAX = torch.finfo(torch.float8_e4m3fn).max


def without_layer(folder):
    """A copy of the tiny model that lost its MTP layer."""
    shutil.copytree(TINY, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    tensors = plain_tensors()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return tensors


def plain_tensors():
    return {n: t for n, t in load_file(TINY / "model.safetensors").items() if "mtp" not in n}


def written(folder, layout, settings, beside=None):
    """The tiny model with its layers' matrices in a layout: matrix → tensors by what is added to its module's name, and
    the numbers that they stand for. `beside`: further tensors, which stand for no matrix."""
    shutil.copytree(TINY, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    stored, numbers = dict(beside or {}), {}
    for name, tensor in plain_tensors().items():
        if tensor.ndim != 2 or ".layers." not in name:
            stored[name] = numbers[name] = tensor
            continue
        tensors, numbers[name] = layout(tensor.float())
        module = name.removesuffix("weight")
        stored |= {module + added: part.contiguous() for added, part in tensors.items()}
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    declare(folder, settings)
    return numbers


def declare(folder, settings):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": settings}))


def packed(codes, order=range(8)):
    """Eight codes of 4 bits [..., 8 n] in an int32 each [..., n]; the lowest bits hold what `order` has first."""
    eights = codes.long().unflatten(-1, (-1, 8))[..., list(order)]
    words = (eights << torch.arange(0, 32, 4)).sum(-1)
    return torch.where(words < 2**31, words, words - 2**32).int()


def symmetric(matrix):
    """Codes -8 .. 7 and scales [rows, groups], and what they stand for."""
    groups = matrix.unflatten(-1, (-1, GROUP))
    scales = (groups.abs().amax(-1) / 7).clamp(min=1e-6).bfloat16()
    codes = (groups / scales[..., None].float()).round().clamp(-8, 7)
    return codes.flatten(-2), scales, (codes * scales[..., None].float()).flatten(-2)


# Layouts.


def awq(matrix):
    """AutoAWQ's "gemm": codes 0 .. 15 and a zero point, transposed, eight outputs in a word, interleaved."""
    groups = matrix.unflatten(-1, (-1, GROUP))
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    scales = ((high - low) / 15).clamp(min=1e-6).half()
    zeros = (-low / scales.float()).round().clamp(0, 15)
    codes = (groups / scales[..., None].float() + zeros[..., None]).round().clamp(0, 15)
    numbers = ((codes - zeros[..., None]) * scales[..., None].float()).flatten(-2)
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    tensors = {"qweight": packed(codes.flatten(-2).T, order), "qzeros": packed(zeros.T, order), "scales": scales.T}
    return tensors, numbers


def pack_quantized(matrix):
    """compressed-tensors with 4-bit integers: eight neighbouring inputs in a word."""
    codes, scales, numbers = symmetric(matrix)
    shape = torch.tensor(matrix.shape)
    return {"weight_packed": packed(codes + 8), "weight_scale": scales, "weight_shape": shape}, numbers


def float_quantized(matrix):
    """compressed-tensors with FP8: a scale for each output."""
    scales = (matrix.abs().amax(-1, keepdim=True) / FP8_MAX).bfloat16()
    weight = (matrix / scales.float()).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
    return {"weight": weight, "weight_scale": scales}, weight.float() * scales.float()


E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])


def e2m1(values):
    """Codes of 4-bit floats, and their numbers: the nearest, sign in the highest bit."""
    codes = (values.abs()[..., None] - E2M1).abs().argmin(-1)
    signs = (values < 0).long()
    return codes + 8 * signs, E2M1[codes] * (1 - 2 * signs)


def bytes_of(codes):
    """Two codes of 4 bits to a byte, the first in its lower half."""
    return (codes[..., ::2] + 16 * codes[..., 1::2]).to(torch.uint8)


def nvfp4(matrix):
    """ModelOpt's: 16 columns share an FP8 scale, a matrix one in float32 above them; so do activations."""
    groups = matrix.unflatten(-1, (-1, 16))
    above = matrix.abs().max() / (6 * FP8_MAX)
    scales = (groups.abs().amax(-1) / 6 / above).clamp(max=FP8_MAX).to(torch.float8_e4m3fn)
    of_groups = (scales.float() * above)[..., None]
    codes, values = e2m1(groups / of_groups.clamp(min=1e-12))
    tensors = {"weight": bytes_of(codes.flatten(-2)), "weight_scale": scales}
    tensors |= {"weight_scale_2": above.clone(), "input_scale": torch.tensor(0.01)}
    return tensors, (values * of_groups).flatten(-2)


def mxfp4(matrix):
    """compressed-tensors' MXFP4: 32 columns share a power of two."""
    groups = matrix.unflatten(-1, (-1, 32))
    exponents = groups.abs().amax(-1).clamp(min=2.0**-100).log2().floor() - 2  # 4 is the largest power of two of E2M1
    codes, values = e2m1(groups / exponents.exp2()[..., None])
    tensors = {"weight_packed": bytes_of(codes.flatten(-2)), "weight_scale": (exponents + 127).to(torch.uint8)}
    return tensors, (values * exponents.exp2()[..., None]).flatten(-2)


_NEGATIVE = (-1.0, -0.6961928, -0.52507305, -0.3949175, -0.28444138, -0.18477343, -0.09105004, 0.0)
_POSITIVE = (0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0)
NF4 = torch.tensor((*_NEGATIVE, *_POSITIVE))


def nf4(matrix):
    """bitsandbytes with double quantization: 64 numbers in a row share their largest, and 256 of those share theirs.

    Two codes to a byte, the first in its upper half. Both maps from codes to numbers are stored, so the second one may
    be evenly spaced here.
    """
    blocks = matrix.reshape(-1, 64)
    largest, nested = in_bytes(blocks.abs().amax(-1))
    codes = (blocks[..., None] / largest[:, None, None].clamp(min=1e-12) - NF4).abs().argmin(-1)
    flat = codes.flatten()
    state = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": list(matrix.shape)}
    state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": nested.pop("offset")}
    tensors = {
        "weight": (16 * flat[::2] + flat[1::2]).to(torch.uint8)[:, None],
        "weight.quant_map": NF4.clone(),
        "weight.quant_state.bitsandbytes__nf4": torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8),
    }
    tensors |= {f"weight.{name}": tensor for name, tensor in nested.items()}
    return tensors, (NF4[codes] * largest[:, None]).reshape(matrix.shape)


def in_bytes(largest):
    """Positive numbers as a byte each around their mean: what they become, and the tensors that say so."""
    offset, even = float(largest.mean()), torch.linspace(-1, 1, 256)
    rows = torch.nn.functional.pad(largest - offset, (0, -len(largest) % 256)).view(-1, 256)
    above = rows.abs().amax(-1, keepdim=True).clamp(min=1e-12)
    codes = (rows[..., None] / above[..., None] - even).abs().argmin(-1)
    numbers = (even[codes] * above).flatten()[: len(largest)] + offset
    stored = codes.flatten()[: len(largest)].to(torch.uint8)
    tensors = {"absmax": stored, "nested_absmax": above.flatten(), "nested_quant_map": even.clone()}
    return numbers, {**tensors, "offset": offset}


# What config.json says.


ARGUMENTS = {
    "actorder": None,
    "block_structure": None,
    "dynamic": False,
    "group_size": None,
    "observer": "memoryless_minmax",
    "observer_kwargs": {},
    "scale_dtype": None,
    "symmetric": True,
    "zp_dtype": None,
}


def compressed(form, weights, activations=None, ignore=("lm_head",)):
    """What llm-compressor writes, with each key that compressed-tensors 0.14 to 0.18 has."""
    group = {
        "format": form,
        "targets": ["Linear"],
        "weights": {**ARGUMENTS, **weights},
        "input_activations": activations,
        "output_activations": None,
    }
    settings = {"quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": group}}
    settings |= {"ignore": list(ignore), "kv_cache_scheme": None, "quantization_status": "compressed"}
    return {**settings, "global_compression_ratio": None, "sparsity_config": {}, "transform_config": {}}


# Qwen/Qwen2.5-72B-Instruct-AWQ: AutoAWQ's `to_transformers_dict`.
AWQ = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"}
AWQ |= {"modules_to_not_convert": None}
# moonshotai/Kimi-K2.5, in groups of 32 too; of what it leaves out, what is not in this model.
INT4 = compressed(
    "pack-quantized",
    {"num_bits": 4, "type": "int", "strategy": "group", "group_size": GROUP},
    ignore=("lm_head", "re:.*shared_experts.*"),
)
# llm-compressor's FP8_DYNAMIC.
FP8 = compressed(
    "float-quantized",
    {"num_bits": 8, "type": "float", "strategy": "channel"},
    {**ARGUMENTS, "num_bits": 8, "type": "float", "strategy": "token", "dynamic": True, "observer": None},
)
# moonshotai/Kimi-K3; the same.
MXFP4 = compressed(
    "mxfp4-pack-quantized",
    {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"},
    ignore=("re:.*shared_experts.*", "re:.*lm_head.*", "re:.*vision_tower.*"),
)
# RedHatAI/GLM-5.3-Flash-NVFP4 and llm-compressor's NVFP4.
_FP4 = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}
_FP4 |= {"scale_dtype": "torch.float8_e4m3fn"}
NVFP4 = compressed("nvfp4-pack-quantized", _FP4, {**ARGUMENTS, **_FP4, "dynamic": "local"})
# AutoRound 0.12.3 (`export_to_autoround/export.py`); the same object is in quantization_config.json.
AUTO_ROUND = {
    "bits": 4,
    "data_type": "int",
    "group_size": GROUP,
    "sym": True,
    "iters": 0,
    "autoround_version": "0.12.3",
    "block_name_to_quantize": "model.layers",
    "quant_method": "auto-round",
    "packing_format": "auto_round:auto_gptq",
}
# nvidia/GLM-5.1-NVFP4, shortened. Older exports have nothing in config.json (nvidia/GLM-5-NVFP4).
PRODUCER = {"name": "modelopt", "version": "0.37.0"}
_OF_16 = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": 16}
MODELOPT = {
    "config_groups": {"group_0": {"input_activations": _OF_16, "weights": _OF_16, "targets": ["Linear"]}},
    "ignore": ["lm_head", "model.layers.0.self_attn.indexer*"],
    "quant_algo": "NVFP4",
    "kv_cache_scheme": {"dynamic": False, "num_bits": 8, "type": "float"},
    "producer": PRODUCER,
    "quant_method": "modelopt",
}
# transformers' BitsAndBytesConfig, as unsloth's "-bnb-4bit" have it.
BITSANDBYTES = {
    "_load_in_4bit": True,
    "_load_in_8bit": False,
    "bnb_4bit_compute_dtype": "bfloat16",
    "bnb_4bit_quant_storage": "uint8",
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
    "llm_int8_enable_fp32_cpu_offload": False,
    "llm_int8_has_fp16_weight": False,
    "llm_int8_skip_modules": None,
    "llm_int8_threshold": 6.0,
    "load_in_4bit": True,
    "load_in_8bit": False,
    "quant_method": "bitsandbytes",
}


def auto_round(folder):
    """GPTQ's packing without `g_idx` (`qlinear_torch_zp.py`)."""
    numbers = gptq(TINY, folder, GROUP, g_idx=False)
    declare(folder, AUTO_ROUND)
    (folder / "quantization_config.json").write_text(json.dumps(AUTO_ROUND))
    return numbers


def modelopt(folder, in_config=True):
    """With scales of an FP8 cache; `in_config`: config.json says it too, as in newer exports."""
    cache = {}
    for layer in range(Checkpoint(TINY).value("num_hidden_layers")):
        for name in ("k", "v"):
            cache[f"model.layers.{layer}.self_attn.{name}_proj.{name}_scale"] = torch.tensor(0.5)
    numbers = written(folder, nvfp4, MODELOPT, cache)
    declared = {"quant_algo": "NVFP4", "kv_cache_quant_algo": "FP8", "group_size": 16}
    declared["exclude_modules"] = MODELOPT["ignore"]
    (folder / "hf_quant_config.json").write_text(json.dumps({"producer": PRODUCER, "quantization": declared}))
    if not in_config:
        shutil.copyfile(TINY / "config.json", folder / "config.json")
    return numbers


def nvfp4_packed(matrix):
    """compressed-tensors' NVFP4: the scales above are what to divide by."""
    tensors, numbers = nvfp4(matrix)
    names = {"weight": "weight_packed", "weight_scale": "weight_scale"}
    packed = {names[name]: tensors[name] for name in names}
    above = {"weight_global_scale": tensors["weight_scale_2"], "input_global_scale": tensors["input_scale"]}
    return {**packed, **{name: (1 / scale).reshape(1) for name, scale in above.items()}}, numbers


def fp8_blocks(folder):
    plain = folder.with_name(folder.name + "-plain")
    without_layer(plain)
    model = Checkpoint(quantized(plain, folder, (64, 64)))
    return {name: read_plain(model, name) for name in model.names if not name.endswith(SCALE)}


# Form → what writes it.
QUANTIZED = {
    "FP8 blocks": fp8_blocks,
    "compressed-tensors FP8": lambda folder: written(folder, float_quantized, FP8),
    "compressed-tensors int4": lambda folder: written(folder, pack_quantized, INT4),
    "AWQ": lambda folder: written(folder, awq, AWQ),
    "GPTQ": lambda folder: gptq(TINY, folder, GROUP),
    "AutoRound": auto_round,
    "ModelOpt NVFP4": modelopt,
    "compressed-tensors NVFP4": lambda folder: written(folder, nvfp4_packed, NVFP4),
    "MXFP4": lambda folder: written(folder, mxfp4, MXFP4),
    "bitsandbytes NF4": lambda folder: written(folder, nf4, BITSANDBYTES),
}
