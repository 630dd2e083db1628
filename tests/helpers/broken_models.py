"""The tiny model, broken in the ways that users' models are, and what an error looks like."""

import json
import shutil

import torch
from safetensors.torch import load_file, save_file

from helpers.models import tensors_of
from helpers.paths import TINY

HEAD = "model.mtp_layers.0."


def broken_model(tmp_path, change=None, **config):
    """A copy of the tiny model with changed tensors (`change(tensors)`) or config keys."""
    folder = tmp_path / "model"
    shutil.copytree(TINY, folder)
    if change:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, **config}))
    return folder


def lose_mtp(tensors):
    for name in [n for n in tensors if n.startswith(HEAD)]:
        del tensors[name]


def misshape(tensors):
    tensors[HEAD + "input_proj.weight"] = tensors[HEAD + "input_proj.weight"][:, :-1].contiguous()


def second_layer(tensors):
    tensors["model.mtp_layers.1.input_proj.weight"] = tensors[HEAD + "input_proj.weight"].clone()


def drop(tensors):
    del tensors[HEAD + "final_layernorm.weight"]


def nan(tensors):
    tensors[HEAD + "mlp.up_proj.weight"][3, 3] = float("nan")


def quantize(tensors):
    tensors[HEAD + "mlp.up_proj.weight"] = tensors[HEAD + "mlp.up_proj.weight"].to(torch.int8)


MODELS = {
    "no MTP layer": ((lose_mtp, {}), "this checkpoint lost its MTP layer"),
    "missing tensor": ((drop, {}), HEAD + "final_layernorm.weight is missing"),
    "misshapen tensor": ((misshape, {}), HEAD + "input_proj.weight has shape [192, 383], config.json says [192, 384]"),
    "second layer": ((second_layer, {}), "unexpected MTP tensor model.mtp_layers.1.input_proj.weight"),
    "NaN": ((nan, {}), HEAD + "mlp.up_proj.weight holds NaN"),
    "quantized head": ((quantize, {}), "a quantized MTP layer cannot be trained"),
    "per-tensor FP8": ((None, {"quantization_config": {"quant_method": "fp8"}}), "only FP8 in blocks"),
    "AWQ": ((None, {"quantization_config": {"quant_method": "awq", "bits": 4}}), "quantization_config is 'awq'"),
    "tied": ((None, {"tie_word_embeddings": True}), "tie_word_embeddings is true"),
    "two layers": ((None, {"num_nextn_predict_layers": 2}), "num_nextn_predict_layers is 2"),
    "unknown family": ((None, {"architectures": ["OPTForCausalLM"]}), "has no known MTP layout"),
}


def broken(folder, tensors=None, config=None):
    """The tiny model with one number of some tensors replaced, and other values in its config.json."""
    shutil.copytree(TINY, folder)
    stored = tensors_of(TINY)
    for name, value in (tensors or {}).items():
        stored[name] = stored[name].clone()
        stored[name].view(-1)[7] = value
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, **(config or {})}))
    return folder


def assert_one_line(process, message):
    assert process.returncode == 1
    errors = [line for line in process.stderr.splitlines() if line.startswith("fastmtp: error: ")]
    assert len(errors) == 1 and message in errors[0], process.stderr[-3000:]
    assert "Traceback" not in process.stderr
