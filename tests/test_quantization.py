"""Quantized checkpoints whose MTP layer stays plain: each published way to say so is read by its method's own rule.

The forms are those of published config.json files, shortened to a few entries of each kind; `{N}` is the number of the
MTP layer, 46 for GLM-4.5-Air, 61 for DeepSeek-V3, and the tiny models' own here.
"""

import json
import re
import shutil

import pytest
import torch
from helpers.models import CHECKPOINTS, quantized
from helpers.paths import TINY
from safetensors.torch import load_file, save_file

from swift_fastmtp.checkpoint.checkpoint import Checkpoint
from swift_fastmtp.checkpoint.config_file import read_config
from swift_fastmtp.checkpoint.quantization import left_out, parts_of, read_quantization
from swift_fastmtp.checkpoint.quantization_methods import METHODS
from swift_fastmtp.export.doctor import examine
from swift_fastmtp.export.graft import graft
from swift_fastmtp.export.inspection import inspect_model, text
from swift_fastmtp.families.table import match_family
from swift_fastmtp.model.loading import head_shapes
from swift_fastmtp.serving.flags import command
from swift_fastmtp.serving.launch import serve_flags

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
QWEN_LINEARS = [
    "mtp.fc",
    *(f"mtp.layers.0.self_attn.{n}" for n in ATTENTION),
    *(f"mtp.layers.0.mlp.{n}" for n in ("gate_proj", "up_proj", "down_proj")),
]
EXPERTS = [f"model.layers.{{N}}.mlp.experts.{e}.{n}" for e in range(4) for n in ("gate_proj", "up_proj", "down_proj")]
GLM_LINEARS = [
    *(f"model.layers.{{N}}.self_attn.{n}" for n in ATTENTION),
    *EXPERTS,
    *(f"model.layers.{{N}}.mlp.shared_experts.{n}" for n in ("gate_proj", "up_proj", "down_proj")),
]
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True, "lm_head": False}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm", "zero_point": True}
QUARK = {
    "quant_method": "quark",
    "export": {"kv_cache_group": [], "pack_method": "reorder", "weight_format": "real_quantized"},
    "global_quant_config": {"weight": {"dtype": "fp4", "group_size": 32, "qscheme": "per_group"}},
}
CT = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "config_groups": {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "int"}}},
}
BNB = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
AUTO_ROUND = {"quant_method": "auto-round", "bits": 4, "group_size": 128, "sym": True, "data_type": "int",
              "packing_format": "auto_round:auto_gptq"}  # fmt: skip
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [128, 128]}
NVFP4 = {"quant_method": "modelopt", "quant_algo": "NVFP4", "config_groups": {"group_0": {"targets": ["Linear"]}}}
MIXED = {"model.language_model.layers.0.mlp.experts": {"quant_algo": "W4A16_NVFP4", "group_size": 16}}

# Name → model, quantization_config that leaves out the layer, and what it is with one entry for only one matrix.
LEFT_OUT = {
    "GPTQ dynamic, Qwen3.5 GPTQ-Int4": (
        "qwen3_5",
        GPTQ | {"dynamic": {"lm_head": {}, "-:.*attn.*": {}, "-:.*mtp.*": {}, "-:.*visual.*": {}}},
        GPTQ | {"dynamic": {"lm_head": {}, "-:.*mtp.fc.*": {}}},
    ),
    "GPTQ dynamic, numbered layer": (
        "glm4_moe",
        GPTQ | {"dynamic": {r"-:model\.layers\.{N}\..*": {}, "-:.*shared_head": {}}},
        GPTQ | {"dynamic": {r"-:model\.layers\.{N}\.self_attn\.o_proj": {}}},
    ),
    "AWQ, numbered layer, GLM-4.5-Air": (
        "glm4_moe",
        AWQ | {"modules_to_not_convert": ["lm_head", "mlp.gate", "shared_experts", "model.layers.{N}."]},
        AWQ | {"modules_to_not_convert": ["lm_head", "model.layers.{N}.self_attn.o_proj"]},
    ),
    "AWQ, DeepSeek-V3, parts of names": (
        "deepseek_v3",
        AWQ | {"modules_to_not_convert": ["layers.{N}"]},
        AWQ | {"modules_to_not_convert": ["layers.{N}.eh_proj", "layers.{N}.self_attn.kv_b_proj"]},
    ),
    "AWQ, mtp": (
        "qwen3_5",
        AWQ | {"modules_to_not_convert": ["visual", "mtp"]},
        AWQ | {"modules_to_not_convert": ["visual", "mtp.fc"]},
    ),
    "Quark, regex, DeepSeek-R1-0528-MXFP4": (
        "deepseek_v3",
        QUARK | {"exclude": ["lm_head", "re:.*mlp.gate$", "re:model.layers.{N}.*", "re:.*self_attn.*"]},
        QUARK | {"exclude": ["lm_head", "re:model.layers.{N}.self_attn.o_proj"]},
    ),
    "Quark, names of single experts, GLM-5.2-MXFP4": (
        "glm4_moe",
        QUARK | {"exclude": ["lm_head", "model.layers.{N}.eh_proj", *GLM_LINEARS]},
        QUARK | {"exclude": ["lm_head", "model.layers.{N}.eh_proj"]},
    ),
    "ModelOpt exclude_modules, DeepSeek-R1-FP4": (
        "deepseek_v3",
        {"producer": {"name": "modelopt", "version": "0.33.0"},
         "quantization": {"quant_algo": "NVFP4", "exclude_modules": ["lm_head", "model.layers.{N}*"]}},
        {"producer": {"name": "modelopt"},
         "quantization": {"quant_algo": "NVFP4", "exclude_modules": ["lm_head", "model.layers.{N}.self_attn.o_proj*"]}},
    ),
    "ModelOpt ignore in config.json, Qwen3.5 NVFP4, without mtp.fc": (
        "qwen3_5",
        NVFP4 | {"ignore": ["lm_head", "model.visual*", "model.language_model.layers.*.linear_attn*",
                            "mtp.layers.0*"]},
        NVFP4 | {"ignore": ["lm_head", "mtp.fc"]},
    ),
    "ModelOpt ignore, Qwen3.5-122B-A10B-NVFP4, with an FP8 cache": (
        "qwen3_5",
        NVFP4 | {"ignore": ["lm_head", "model.language_model.layers.0.linear_attn*", "model.visual*", "mtp.layers.0*",
                            "mtp*"], "kv_cache_scheme": {"dynamic": False, "num_bits": 8, "type": "float"}},
        NVFP4 | {"ignore": ["lm_head", "mtp.fc*"]},
    ),
    "ModelOpt mixed precision, Qwen3.6 NVFP4": (
        "qwen3_5",
        {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION", "ignore": [], "quantized_layers": MIXED},
        {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION", "ignore": ["mtp.fc"],
         "quantized_layers": MIXED | {"mtp.layers.0.mlp.gate_proj": {"quant_algo": "NVFP4"}}},
    ),
    "AutoRound blocks": (
        "qwen3_5",
        AUTO_ROUND | {"block_name_to_quantize": "model.language_model.layers"},
        AUTO_ROUND | {"extra_config": {"mtp.fc": {"bits": 16, "data_type": "fp"}}},
    ),
    "AutoRound extra_config, numbered layer": (
        "glm4_moe",
        AUTO_ROUND | {"block_name_to_quantize": ["model.layers"],
                      "extra_config": {r".*layers\.{N}\..*": {"bits": 16, "data_type": "float"}}},
        AUTO_ROUND | {"block_name_to_quantize": "model.layers",
                      "extra_config": {"model.layers.{N}.self_attn.o_proj": {"bits": 16}}},
    ),
    "bitsandbytes, unsloth's dynamic 4 bits": (
        "qwen3_5",
        BNB | {"llm_int8_skip_modules": ["model.visual", "lm_head", "mtp"]},
        BNB | {"llm_int8_skip_modules": ["lm_head", "mtp.fc", "model.layers.0.linear_attn"]},
    ),
    "bitsandbytes, numbered layer": (
        "glm4_moe",
        BNB | {"llm_int8_skip_modules": ["lm_head", "model.layers.{N}"]},
        BNB | {"llm_int8_skip_modules": ["lm_head", "model.layers.{N}.eh_proj"]},
    ),
    "compressed-tensors, regex, RedHatAI": (
        "qwen3_5",
        CT | {"ignore": ["lm_head", "re:.*visual.*", "re:.*mtp.*"]},
        CT | {"ignore": ["lm_head", "mtp.fc", "mtp.layers.0.self_attn.o_proj"]},
    ),
    "compressed-tensors, as llm-compressor adds it for Qwen3.5": (  # `save_mtp_tensors_to_checkpoint`
        "qwen3_5",
        CT | {"ignore": ["lm_head", "model.visual.blocks.0.attn.qkv", "model.language_model.layers.0.linear_attn.norm",
                         "re:^mtp.*"]},
        CT | {"ignore": ["lm_head", "re:^mtp.fc"]},
    ),
    "compressed-tensors, every name": (
        "qwen3_5", CT | {"ignore": ["lm_head", *QWEN_LINEARS]}, CT | {"ignore": QWEN_LINEARS[:1]}
    ),
    "compressed-tensors, numbered layer": (
        "glm4_moe",
        CT | {"ignore": ["lm_head", r"re:.*layers\.{N}\..*"]},
        CT | {"ignore": ["lm_head", "model.layers.{N}", "model.layers.{N}.eh_proj"]},  # a parent is no match
    ),
    "FP8, every name, Qwen3.5-FP8 with a plain layer": (
        "qwen3_5",
        FP8 | {"modules_to_not_convert": ["lm_head", "model.layers.0.linear_attn.conv1d", *QWEN_LINEARS]},
        FP8 | {"modules_to_not_convert": ["lm_head", "mtp.fc", "mtp.norm"]},
    ),
    "FP8 ignored_layers, experts by one name": (
        "glm4_moe",
        FP8 | {"ignored_layers": [n for n in GLM_LINEARS if ".experts." not in n] + EXPERTS[:1]},
        FP8 | {"ignored_layers": ["model.layers.{N}.self_attn.o_proj"]},
    ),
}  # fmt: skip


@pytest.fixture(scope="session")
def plain_models(tmp_path_factory):
    work = tmp_path_factory.mktemp("plain")
    return {name: CHECKPOINTS[name](work / name) for name in ("qwen3_5", "glm4_moe", "deepseek_v3", "qwen3_5_moe")}


def declared(folder, target, settings):
    """A copy that declares a quantization, in the file in which the method has it; its MTP layer is plain."""
    shutil.copytree(folder, target)
    config = read_config(target)
    number = str(config.get("num_hidden_layers"))
    settings = json.loads(json.dumps(settings).replace("{N}", number))
    if "producer" in settings:
        (target / "hf_quant_config.json").write_text(json.dumps(settings))
    else:
        (target / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
    return target


def about(folder):
    return [f for f in examine(folder) if "quantization" in f.what or "leave" in f.what]


@pytest.mark.parametrize("form", LEFT_OUT)
def test_a_layer_that_is_left_out_has_no_finding(form, plain_models, tmp_path):
    model, settings, _ = LEFT_OUT[form]
    assert examine(declared(plain_models[model], tmp_path / "model", settings)) == []


@pytest.mark.parametrize("form", LEFT_OUT)
def test_a_layer_of_which_only_one_matrix_is_left_out_is_an_error(form, plain_models, tmp_path):
    """The message names the others, and not that one; how to fix it names the key of the method."""
    model, _, settings = LEFT_OUT[form]
    folder = declared(plain_models[model], tmp_path / "model", settings)
    [error] = [f for f in about(folder) if f.level == "error"]
    quantization = read_quantization(read_config(folder), folder)
    assert f"({quantization.method})" in error.what and f'"{quantization.key}"' in error.fix
    assert "gate_proj" in error.what or "and " in error.what
    assert "mtp.fc" not in error.what and "eh_proj" not in error.what
    if model == "qwen3_5":
        assert "mtp.layers.0.mlp.up_proj" in error.what


NOTHING = {
    "gptq": GPTQ,
    "awq": AWQ | {"modules_to_not_convert": None},
    "quark": QUARK | {"exclude": ["lm_head"]},
    "modelopt": NVFP4 | {"ignore": ["lm_head"]},
    "auto-round": AUTO_ROUND,
    "bitsandbytes": BNB | {"llm_int8_skip_modules": ["lm_head"]},
    "compressed-tensors": CT | {"ignore": ["lm_head"]},
    "fp8": FP8 | {"modules_to_not_convert": ["lm_head"]},
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("model", ["qwen3_5", "glm4_moe"])
def test_a_layer_that_is_not_left_out_is_an_error(method, model, plain_models, tmp_path):
    """And what the message says to add is enough."""
    folder = declared(plain_models[model], tmp_path / "model", NOTHING[method])
    [finding] = about(folder)
    assert finding.level == "error" and "does not leave out the MTP layer" in finding.what
    settings, family = dict(NOTHING[method]), match_family(read_config(folder))
    key = read_quantization(read_config(folder)).key
    assert f'to "{key}" of config.json' in finding.fix
    entries = re.search("add (.*) to ", finding.fix)[1]
    if method in ("gptq", "auto-round"):
        settings[key] = json.loads("{" + entries + "}")
    elif method == "fp8":  # every name; the message gives the first
        names = [m for part in parts_of(family, head_shapes(Checkpoint(folder))) for m in part.modules]
        shown = json.loads("[" + entries.split(" and ")[0] + "]")
        assert shown == sorted(n for n in names if "eh_proj" not in n)[:3]
        settings[key] = names
    else:
        settings[key] = json.loads("[" + entries + "]")
    assert examine(declared(plain_models[model], tmp_path / "fixed", settings)) == []


# What one engine reads otherwise than the other, or than the tool that wrote it: (settings, who does not).
ONE_ENGINE = {
    "FP8, a module above: vLLM compares whole names": (FP8 | {"modules_to_not_convert": ["mtp"]}, ["vLLM"]),
    "GPTQ, names of what is quantized: SGLang has no such key": (
        GPTQ | {"modules_in_block_to_quantize": [["model.layers.0.mlp.up_proj"], ["model.layers.0.mlp.down_proj"]]},
        ["SGLang"],
    ),
    "Quark, globs: both engines know whole names and re:": (QUARK | {"exclude": ["*mtp*"]}, ["SGLang", "vLLM"]),
    "GPTQ, all but the projection, which SGLang has plain": (
        GPTQ | {"dynamic": {r"-:mtp\.layers.*": {}}},
        ["vLLM"],
    ),
    "AWQ, parts of a fused matrix: SGLang looks at the fused name": (
        AWQ | {"modules_to_not_convert": QWEN_LINEARS}, ["SGLang"]
    ),
}  # fmt: skip


@pytest.mark.parametrize("form", ONE_ENGINE)
def test_what_one_engine_reads_otherwise_is_a_warning_that_names_it(form, plain_models, tmp_path):
    settings, engines = ONE_ENGINE[form]
    findings = examine(declared(plain_models["qwen3_5"], tmp_path / "model", settings))
    assert [f.level for f in findings] == ["warning"] * len(engines)
    for finding, engine in zip(findings, engines, strict=True):
        assert f"{engine} does not read it as leaving out mtp." in finding.what


def test_a_method_that_is_not_known_is_said_to_be_unchecked(plain_models, tmp_path):
    for name, settings in {"hqq": {"quant_method": "hqq"}, "none": {"bits": 4}}.items():
        [finding] = examine(declared(plain_models["qwen3_5"], tmp_path / name, settings))
        assert finding.level == "warning" and "was not checked" in finding.what


BAD = {
    "not an object": ("q4", "must be an object"),
    "not a list": (AWQ | {"modules_to_not_convert": {"mtp": 1}}, "must be a list of module names"),
    "no regular expression": (GPTQ | {"dynamic": {"-:(mtp": {}}}, "no regular expression"),
    "dynamic as a list": (GPTQ | {"dynamic": ["-:mtp"]}, "dynamic is .* must be an object"),
}


@pytest.mark.parametrize("case", BAD)
def test_settings_that_no_engine_can_read(case, plain_models, tmp_path):
    settings, message = BAD[case]
    findings = examine(declared(plain_models["qwen3_5"], tmp_path / "model", settings))
    assert [f.level for f in findings] == ["error"] and re.search(message, findings[0].what)


def changed(folder, change):
    """The MTP layer's tensors, changed, in one file."""
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
        path.unlink()
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def packed(tensors):
    """Every linear of the layer as GPTQ stores it."""
    for module in QWEN_LINEARS:
        rows, columns = tensors.pop(f"{module}.weight").shape
        tensors[f"{module}.qweight"] = torch.ones(columns // 8, rows, dtype=torch.int32)
        tensors[f"{module}.qzeros"] = torch.ones(1, rows // 8, dtype=torch.int32)
        tensors[f"{module}.scales"] = torch.ones(1, rows, dtype=torch.float16)
        tensors[f"{module}.g_idx"] = torch.zeros(columns, dtype=torch.int32)


def test_a_quantised_layer_that_is_declared_so_is_a_warning(plain_models, tmp_path):
    folder = declared(plain_models["qwen3_5"], tmp_path / "model", GPTQ)
    changed(folder, packed)
    [finding] = examine(folder)
    assert finding.level == "warning" and "the MTP layer is quantized" in finding.what


def packed_by_autoround(tensors):
    """AutoRound's own: what transformers did not load is quantized too, without `g_idx`, all but `mtp.fc`."""
    fc = tensors["mtp.fc.weight"]
    packed(tensors)
    for name in [n for n in tensors if n.endswith(".g_idx") or n.startswith("mtp.fc.")]:
        del tensors[name]
    tensors["mtp.fc.weight"] = fc


def test_a_layer_that_autoround_quantized_with_the_model(plain_models, tmp_path):
    """One line says so and what to do, which then works; nothing of it is taken for a missing tensor."""
    blocks = {"block_name_to_quantize": ["model.language_model.layers", "mtp.layers.0"]}
    settings = AUTO_ROUND | blocks | {"extra_config": {"mtp.fc": {"bits": 16, "data_type": "fp"}}}
    target = declared(plain_models["qwen3_5"], tmp_path / "model", settings)
    changed(target, packed_by_autoround)
    _, reason = inspect_model(target).reasons  # the first is of the whole model
    assert "7 matrices are stored packed, as mtp.layers.0.mlp.down_proj" in reason
    assert "`fastmtp graft --donor BASE --draft_only`" in reason
    report = graft(target, tmp_path / "draft", plain_models["qwen3_5"], draft_only=True)
    assert any("has MTP tensors of its own" in line for line in report.notes)
    assert examine(tmp_path / "draft") == []
    words = command(serve_flags(tmp_path / "draft", "vllm"))
    overrides = json.loads(words[words.index("--hf-overrides") + 1])
    plain = read_quantization(overrides)
    for part in parts_of(match_family(read_config(target)), head_shapes(Checkpoint(tmp_path / "draft"))):
        assert all(left_out(plain, part).values()), part.name


def test_a_file_of_modelopt_that_names_no_producer(tmp_path):
    """nvidia/NVIDIA-Nemotron-3-Super-120B-A12B-FP8's hf_quant_config.json."""
    settings = {"quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8"}}
    (tmp_path / "hf_quant_config.json").write_text(json.dumps(settings))
    quantization = read_quantization({}, tmp_path)
    assert quantization.method == "modelopt" and quantization.settings["quant_algo"] == "FP8"


def test_a_quantised_layer_that_is_left_out_is_an_error(plain_models, tmp_path):
    folder = declared(plain_models["qwen3_5"], tmp_path / "model", GPTQ | {"dynamic": {"-:.*mtp.*": {}}})
    changed(folder, packed)
    errors = [f for f in examine(folder) if f.level == "error"]
    assert errors and all("leaves it out of the quantization" in f.what for f in errors)
    assert any("mtp.layers.0.self_attn.q_proj" in f.what for f in errors)


def test_a_fused_matrix_of_which_one_part_is_plain_is_an_error(plain_models, tmp_path):
    plain = ("norm", "embed", "conv", "mtp.fc", "mtp.layers.0.self_attn.q_proj")
    [finding] = examine(quantized(plain_models["qwen3_5"], tmp_path / "model", (16, 32), plain))
    assert finding.level == "error" and finding.what.startswith("mtp.layers.0.self_attn.q_proj: plain, beside")


def test_published_fp8_with_a_quantised_layer_but_a_plain_projection(plain_models, tmp_path):
    """As Qwen's own FP8 checkpoints: the layer in FP8, `mtp.fc` and the router plain and left out."""
    plain = ("norm", "embed", "lm_head", "conv", "mtp.fc", "mlp.gate.", "expert_gate")
    folder = quantized(plain_models["qwen3_5_moe"], tmp_path / "model", (24, 20), plain)
    assert examine(folder) == []
    config = read_config(folder)
    config["quantization_config"]["modules_to_not_convert"].append("mtp.layers.0.self_attn.o_proj")
    (folder / "config.json").write_text(json.dumps(config))
    [finding] = examine(folder)
    assert finding.level == "error" and finding.what.startswith("mtp.layers.0.self_attn.o_proj: quantized")


def test_experts_are_one_part_however_they_are_stored(plain_models):
    for model in ("glm4_moe", "qwen3_5_moe"):
        folder = plain_models[model]
        parts = {p.name: p for p in parts_of(match_family(read_config(folder)), head_shapes(Checkpoint(folder)))}
        [experts] = [p for p in parts.values() if p.experts]
        assert len(experts.modules) > 1 and not any(name.endswith(("mlp.gate", "shared_expert_gate")) for name in parts)
    assert any(name.endswith("self_attn.qkv_proj") and len(p.modules) == 3 for name, p in parts.items())


def test_every_method_is_read_by_an_engine():
    settings = {"quant_method": "gptq", "dynamic": {"-:.*mtp.*": {}}}
    family = match_family({"architectures": ["Qwen3_5ForCausalLM"], "num_hidden_layers": 2})
    part = next(p for p in parts_of(family, {"mtp.layers.0.mlp.down_proj.weight": (4, 4)}))
    assert left_out(read_quantization({"quantization_config": settings}), part) == {
        "SGLang": True, "vLLM": True, "GPTQModel": True
    }  # fmt: skip
    assert left_out(read_quantization({"quantization_config": {"quant_method": "hqq"}}), part) is None


def test_sglang_is_told_to_draft_with_a_plain_layer(plain_models, tmp_path):
    """It builds some layers under other names than the checkpoint's, so what is left out there may not be."""
    flag = "--speculative-draft-model-quantization"
    form = LEFT_OUT["AWQ, numbered layer, GLM-4.5-Air"][1]
    folder = declared(plain_models["glm4_moe"], tmp_path / "model", form)
    words = command(serve_flags(folder))
    assert words[words.index(flag) + 1] == "unquant"
    assert flag not in command(serve_flags(plain_models["glm4_moe"]))
    plain = ("norm", "embed", "head.", "eh_proj", "mlp.gate.")
    assert flag not in command(serve_flags(quantized(plain_models["glm4_moe"], tmp_path / "fp8", (16, 24), plain)))


def test_inspect_says_the_method_and_whether_the_layer_is_left_out(plain_models, tmp_path):
    form = LEFT_OUT["AWQ, numbered layer, GLM-4.5-Air"]
    out = declared(plain_models["glm4_moe"], tmp_path / "out", form[1])
    shown = text(inspect_model(out))
    assert re.search("quantized +awq, the MTP layer left out\n", shown)
    assert inspect_model(declared(out, tmp_path / "part", form[2])).mtp_left_out == "partly left out"
    assert inspect_model(declared(out, tmp_path / "none", AWQ)).mtp_left_out == "not left out"
    assert inspect_model(declared(out, tmp_path / "other", {"quant_method": "hqq"})).mtp_left_out is None
    assert inspect_model(TINY).mtp_left_out is None


def test_headers_name_types_as_torch_does(tmp_path):
    tensors = {str(t).removeprefix("torch."): torch.zeros(2, dtype=t) for t in (torch.bfloat16, torch.float8_e4m3fn,
               torch.int8, torch.uint8, torch.float16, torch.float32, torch.int32)}  # fmt: skip
    save_file(tensors, tmp_path / "model.safetensors")
    assert Checkpoint(tmp_path).dtypes() == {name: name for name in tensors}
