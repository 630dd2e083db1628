"""The tiny model in every form that people publish quantized models in, without its MTP layer: names, packing and
config.json as their tools write them, weights rounded to the nearest.

Each maker returns the numbers that the stored tensors stand for, by the names of the plain model.
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


def written(folder, layout, settings):
    """The tiny model with its layers' matrices in a layout: matrix → tensors by what is added to its module's name, and
    the numbers that they stand for."""
    shutil.copytree(TINY, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    stored, numbers = {}, {}
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
    """bitsandbytes: 64 numbers in a row share their largest; two codes to a byte, the first in its upper half."""
    blocks = matrix.reshape(-1, 64)
    largest = blocks.abs().amax(-1)
    codes = (blocks[..., None] / largest[:, None, None].clamp(min=1e-12) - NF4).abs().argmin(-1)
    flat = codes.flatten()
    state = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": list(matrix.shape)}
    tensors = {
        "weight": (16 * flat[::2] + flat[1::2]).to(torch.uint8)[:, None],
        "weight.absmax": largest,
        "weight.quant_map": NF4.clone(),
        "weight.quant_state.bitsandbytes__nf4": torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8),
    }
    return tensors, (NF4[codes] * largest[:, None]).reshape(matrix.shape)


# What config.json says.


def compressed(form, weights, activations=None):
    of_weights = {"symmetric": True, "dynamic": False, "observer": "minmax", **weights}
    group = {"targets": ["Linear"], "weights": of_weights, "input_activations": activations, "output_activations": None}
    settings = {"quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": group}}
    return {**settings, "ignore": ["lm_head"], "kv_cache_scheme": None, "quantization_status": "compressed"}


AWQ = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"}
INT4 = compressed("pack-quantized", {"num_bits": 4, "type": "int", "strategy": "group", "group_size": GROUP})
FP8 = compressed(
    "float-quantized",
    {"num_bits": 8, "type": "float", "strategy": "channel"},
    {"num_bits": 8, "type": "float", "strategy": "token", "symmetric": True, "dynamic": True},
)
MXFP4 = compressed("mxfp4-pack-quantized", {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32})
AUTO_ROUND = {
    "quant_method": "auto-round",
    "autoround_version": "0.8.0",
    "packing_format": "auto_round:auto_gptq",
    "data_type": "int",
    "bits": 4,
    "group_size": GROUP,
    "sym": True,
}
MODELOPT = {"producer": {"name": "modelopt", "version": "0.37.0"}, "quant_algo": "NVFP4", "kv_cache_scheme": None}
MODELOPT |= {"quant_method": "modelopt", "ignore": ["lm_head"], "group_size": 16}
BITSANDBYTES = {
    "quant_method": "bitsandbytes",
    "load_in_4bit": True,
    "load_in_8bit": False,
    "bnb_4bit_compute_dtype": "bfloat16",
    "bnb_4bit_quant_storage": "uint8",
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": False,
}


def auto_round(folder):
    numbers = gptq(TINY, folder, GROUP)
    declare(folder, AUTO_ROUND)
    return numbers


def modelopt(folder):
    numbers = written(folder, nvfp4, MODELOPT)
    declared = {"quant_algo": "NVFP4", "kv_cache_quant_algo": None, "group_size": 16, "exclude_modules": ["lm_head"]}
    file = {"producer": MODELOPT["producer"], "quantization": declared}
    (folder / "hf_quant_config.json").write_text(json.dumps(file))
    return numbers


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
    "MXFP4": lambda folder: written(folder, mxfp4, MXFP4),
    "bitsandbytes NF4": lambda folder: written(folder, nf4, BITSANDBYTES),
}
