"""Each silent failure, made on purpose, is found and named; a sound export has no finding."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.paths import TINY
from safetensors.torch import load_file, save_file

from swift_fastmtp.checkpoint.checkpoint import Checkpoint
from swift_fastmtp.errors import FastMTPError
from swift_fastmtp.export.doctor import examine
from swift_fastmtp.export.folders import export_draft, export_full
from swift_fastmtp.serving.flags import command
from swift_fastmtp.serving.launch import serve_flags

HEAD = "model.mtp_layers.0."


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    """Full and draft-only export of a changed head."""
    work = tmp_path_factory.mktemp("doctor")
    (work / "checkpoint").mkdir()
    head = {n: t.float() + 0.5 for n, t in load_file(TINY / "model.safetensors").items() if n.startswith(HEAD)}
    save_file(head, work / "checkpoint" / "model.safetensors")
    settings = {"base_model": str(TINY), "base_fingerprint": Checkpoint(TINY).fingerprint}
    (work / "checkpoint" / "fastmtp.json").write_text(json.dumps(settings))
    export_full(work / "checkpoint", work / "full")
    export_draft(work / "checkpoint", work / "draft")
    return work


def test_sound_exports_have_no_finding(exports, tmp_path):
    torch.save(list(range(6087)), tmp_path / "map.pt")
    assert examine(exports / "full", token_map=tmp_path / "map.pt") == []
    assert examine(exports / "draft") == []


def broken(exports, tmp_path, change=None, **config):
    folder = tmp_path / "model"
    shutil.copytree(exports / "full", folder)
    if change:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    values = {**json.loads((folder / "config.json").read_text()), **config}
    (folder / "config.json").write_text(json.dumps({k: v for k, v in values.items() if v is not None}))
    return folder


def rename(old, new):
    def change(tensors):
        tensors[new] = tensors.pop(old)

    return change


def put(name, value):
    def change(tensors):
        tensors[HEAD + name] = value(tensors[HEAD + name])

    return change


def second_layer(tensors):
    tensors["model.mtp_layers.1.input_proj.weight"] = tensors[HEAD + "input_proj.weight"].clone()


def other_backbone(tensors):
    tensors["model.layers.0.mlp.up_proj.weight"] = tensors["model.layers.0.mlp.up_proj.weight"] * 1.01


def with_nan(tensor):
    tensor[0, 0] = float("nan")
    return tensor


UP, PROJ = "mlp.up_proj.weight", "input_proj.weight"
CASES = {
    "missing": ((lambda t: t.pop(HEAD + PROJ), {}), f"{HEAD}{PROJ} is missing"),
    "other index": ((second_layer, {}), "model.mtp_layers.1.input_proj.weight is not a tensor of the one MTP layer"),
    "without model.": ((rename(HEAD + PROJ, "mtp_layers.0." + PROJ), {}), "mtp_layers.0.input_proj.weight looks like"),
    "mtp.layers": ((rename(HEAD + UP, "model.mtp.layers.0." + UP), {}), "model.mtp.layers.0.mlp.up_proj.weight looks"),
    "shape": ((put(PROJ, lambda t: t[:, 1:].contiguous()), {}), "has shape [192, 383], config.json says [192, 384]"),
    "NaN": ((put(UP, with_nan), {}), f"{HEAD}{UP} holds NaN"),
    "zeros": ((put(UP, torch.zeros_like), {}), f"{HEAD}{UP} is all zeros"),
    "dtype": ((put(UP, lambda t: t.float()), {}), "MTP tensors are bfloat16, float32, the model is bfloat16"),
    "quantized head": ((put(UP, lambda t: t.to(torch.int8)), {}), "the MTP layer is quantized (int8)"),
    "backbone": ((other_backbone, {}), "the head was trained for another backbone"),
    "layer count": ((None, {"num_nextn_predict_layers": 3}), "num_nextn_predict_layers is 3"),
    "no layer count": ((None, {"num_nextn_predict_layers": None}), "num_nextn_predict_layers is None"),
    "auto_map": ((None, {"auto_map": None}), "model_type mimo without auto_map"),
    "quantized": ((None, {"quantization_config": {"ignore": ["lm_head"]}}), "does not leave out the MTP layer"),
}


@pytest.mark.parametrize("case", CASES)
def test_silent_failures_are_found(case, exports, tmp_path):
    (change, config), message = CASES[case]
    findings = examine(broken(exports, tmp_path, change, **config))
    assert any(message in f.what for f in findings), [str(f) for f in findings]
    assert all(f.why and f.fix for f in findings)


def test_quantised_backbone_that_leaves_the_head_out_is_fine(exports, tmp_path):
    quantized = {"ignore": ["lm_head", "re:.*mtp_layers.*"]}
    assert examine(broken(exports, tmp_path, quantization_config=quantized)) == []


def test_stale_shard(exports, tmp_path):
    folder = broken(exports, tmp_path)
    stale = {HEAD + UP: load_file(TINY / "model.safetensors")[HEAD + UP]}
    save_file(stale, folder / "model-old.safetensors")
    assert any("is also in" in f.what for f in examine(folder))


def test_untrained_head(exports, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(TINY, folder)
    assert any("equals the one of" in f.what for f in examine(folder, model=TINY))


MAPS = {
    "out of range": ([0, 7000], {}, "holds id 7000"),
    "duplicate": ([1, 1, 2], {}, "holds an id twice"),
    "not a map": ({"a": 1}, {}, "not a token map"),
    "no end token": (list(range(100)), {}, "does not hold the end token 6080, 6082"),
    "other tokenizer": ([6080, 6082, 6100], {}, "holds id 6100, the tokenizer ends at 6086"),
    "tensor parallel": (list(range(6087)), {"tp_size": 2}, "tensor parallelism 2"),
}


@pytest.mark.parametrize("case", MAPS)
def test_maps(case, exports, tmp_path):
    ids, options, message = MAPS[case]
    torch.save(ids, tmp_path / "map.pt")
    findings = examine(exports / "full", token_map=tmp_path / "map.pt", **options)
    assert any(message in f.what for f in findings), [str(f) for f in findings]


def test_map_of_another_tokenizer_by_its_sidecar(exports, tmp_path):
    torch.save(list(range(6087)), tmp_path / "map.pt")
    (tmp_path / "map.meta.json").write_text('{"tokenizer_sha256": "0"}')
    findings = examine(exports / "full", token_map=tmp_path / "map.pt")
    assert ["made with another tokenizer.json" in f.what for f in findings] == [True]


def test_draft_that_disagrees_with_its_target(exports, tmp_path):
    folder = tmp_path / "draft"
    shutil.copytree(exports / "draft", folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "rope_scaling": {"rope_type": "yarn", "factor": 4.0}}))
    assert any("rope_scaling is" in f.what for f in examine(folder))


# Settings of a draft-only folder, written otherwise than its target's: with the same meaning, and with another.
SAME = {
    "the new form": {"rope_theta": None, "rope_parameters": {"rope_type": "default", "rope_theta": 10000}},
    "both forms": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
    "scaling that is none": {"rope_scaling": {"type": "default"}},
    "all dimensions turn": {"partial_rotary_factor": 1.0},
    "head_dim as it would be": {"head_dim": None, "hidden_size": 192, "num_attention_heads": 6},
    "a window that is not used": {"sliding_window": 4096, "use_sliding_window": False},
    "the usual activation": {"hidden_act": None},
    "layers' types in words": {"layer_types": ["full_attention"] * 4},
}
OTHER = {
    "rope_theta": {"rope_theta": 1000000},
    "rope_parameters": {"rope_theta": None, "rope_parameters": {"rope_type": "default", "rope_theta": 1000000}},
    "rope_scaling": {"rope_scaling": {"type": "linear", "factor": 2.0}},
    "partial_rotary_factor": {"partial_rotary_factor": 0.5},
    "sliding_window": {"sliding_window": 1024, "use_sliding_window": True},
    "hidden_act": {"hidden_act": "gelu"},
    "attention_bias": {"attention_bias": False},
    "tie_word_embeddings": {"tie_word_embeddings": True},
    "rms_norm_eps": {"rms_norm_eps": 1e-6},
    "num_experts_per_tok": {"num_experts_per_tok": 4},
}


def drafts_with(exports, tmp_path, changes):
    folder = tmp_path / "draft"
    shutil.copytree(exports / "draft", folder)
    config = {**json.loads((folder / "config.json").read_text()), **changes}
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    return folder


@pytest.mark.parametrize("case", SAME)
def test_a_draft_whose_config_means_the_same(case, exports, tmp_path):
    assert examine(drafts_with(exports, tmp_path, SAME[case])) == []


@pytest.mark.parametrize("key", OTHER)
def test_a_draft_whose_config_means_another_computation(key, exports, tmp_path):
    findings = examine(drafts_with(exports, tmp_path, OTHER[key]))
    assert any(f.level == "error" and f"config.json: {key} is" in f.what for f in findings), [str(f) for f in findings]


def test_map_with_tied_embeddings(exports, tmp_path):
    torch.save(list(range(6087)), tmp_path / "map.pt")
    folder = broken(exports, tmp_path, tie_word_embeddings=True)
    assert any("tied embeddings" in f.what for f in examine(folder, token_map=tmp_path / "map.pt"))


def test_maps_of_the_model_itself(exports, tmp_path):
    torch.save(list(range(6087)), tmp_path / "zh.pt")
    (tmp_path / "maps.json").write_text('{"zh": "zh.pt"}')
    export_full(exports / "checkpoint", tmp_path / "good", token_maps=tmp_path / "maps.json")
    assert examine(tmp_path / "good") == []
    assert command(serve_flags(tmp_path / "good")) == [
        str(tmp_path / "good") if word == str(exports / "full") else word
        for word in command(serve_flags(exports / "full"))
    ]
    torch.save([7000], tmp_path / "good/token_maps/zh.pt")
    assert any("holds id 7000" in f.what for f in examine(tmp_path / "good"))
    (tmp_path / "good/token_maps/zh.pt").unlink()
    assert any("no such file" in f.what for f in examine(tmp_path / "good"))


BAD_LISTS = {
    '{"zh": "gone.pt"}': "gone.pt: no such file",
    '{"legal": "zh.pt"}': "no text is ever told to be legal",
    '{"zh": "wide.pt"}': "holds id 7000",
    '{"zh": "other.pt"}': "made with another tokenizer.json",
}


@pytest.mark.parametrize("content", BAD_LISTS)
def test_lists_of_maps_that_are_not_exported(content, exports, tmp_path):
    for name, ids in {"zh": [1], "wide": [7000], "other": [1]}.items():
        torch.save(ids, tmp_path / f"{name}.pt")
    (tmp_path / "other.meta.json").write_text('{"tokenizer_sha256": "0"}')
    (tmp_path / "maps.json").write_text(content)
    with pytest.raises(FastMTPError, match=BAD_LISTS[content]):
        export_draft(exports / "checkpoint", tmp_path / "out", token_maps=tmp_path / "maps.json")
    assert not (tmp_path / "out").exists()


def test_exit_code_for_scripts(exports, tmp_path):
    command = [str(Path(sys.executable).parent / "fastmtp"), "doctor"]
    good = subprocess.run([*command, exports / "full"], capture_output=True, text=True, check=False)
    assert good.returncode == 0 and "0 errors, 0 warnings" in good.stdout
    folder = broken(exports, tmp_path, num_nextn_predict_layers=2)
    bad = subprocess.run([*command, folder], capture_output=True, text=True, check=False)
    assert bad.returncode == 1 and "fix:" in bad.stdout and "1 errors" in bad.stdout
