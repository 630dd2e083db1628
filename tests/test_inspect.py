"""`fastmtp inspect` describes any folder from headers alone, and agrees with what the loader would say."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from helpers.broken_models import HEAD, MODELS, broken_model, lose_mtp
from helpers.checkpoints import shard
from helpers.paths import ROOT, TINY
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from swift_fastmtp.checkpoint.checkpoint import Checkpoint
from swift_fastmtp.checkpoint.shards import pack_header
from swift_fastmtp.errors import FastMTPError
from swift_fastmtp.export.inspection import count_layers, inspect_model, odd_names, text
from swift_fastmtp.families.refused import CHAIN, LAYOUTS, MULTI_LAYER, known_layout
from swift_fastmtp.families.table import FAMILIES


def command(*words):
    return subprocess.run(
        [sys.executable, "-m", "swift_fastmtp.cli", "inspect", *map(str, words)],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_a_checkpoint_that_we_train():
    done = command(TINY, "--json")
    found = json.loads(done.stdout)
    assert done.returncode == 0 and found["trainable"] and found["reasons"] == []
    assert found["family"] == "mimo" and found["mtp_layers"] == found["mtp_layers_config"] == 1
    head = {n: e for n, e in Checkpoint(TINY).headers.entries.items() if n.startswith(HEAD)}
    assert found["mtp_tensors"] == len(head) == 16
    assert found["mtp_bytes"] == sum(e.size for e in head.values()) == 2 * found["mtp_params"]
    assert found["mtp_dtypes"] == {"bfloat16": 16} and found["own_matrices"] == [] and not found["tied_head"]
    assert found["backbone_bytes"] + found["mtp_bytes"] < (TINY / "model.safetensors").stat().st_size
    assert found["engines"]["sglang"].startswith("yes") and "transformers drops" in found["lost_on_save"]


def test_shards_change_nothing(tmp_path):
    one, many = inspect_model(TINY), inspect_model(shard(TINY, tmp_path / "model"))
    assert many.files == 3 and many.mtp_files == [
        "model-00001-of-00003.safetensors",
        "model-00002-of-00003.safetensors",
    ]
    for name in ("trainable", "mtp_params", "mtp_bytes", "backbone_bytes", "backbone_tensors", "mtp_dtypes"):
        assert getattr(one, name) == getattr(many, name), name


@pytest.mark.parametrize("case", [c for c in MODELS if c not in ("NaN", "no MTP layer", "second layer")])
def test_what_the_loader_refuses_is_not_trainable(case, tmp_path):
    """With the loader's own reason; only NaN needs the values, and is the doctor's."""
    (change, config), message = MODELS[case]
    found = inspect_model(broken_model(tmp_path, change, **config))
    message = "unknown layout" if case == "unknown family" else message
    assert not found.trainable and any(message in r for r in found.reasons), found.reasons
    assert all("\n" not in r for r in found.reasons)
    assert message.split(":")[0] in text(found)


def test_second_layer(tmp_path):
    (change, config), _ = MODELS["second layer"]
    found = inspect_model(broken_model(tmp_path, change, **config))
    assert found.mtp_layers == 2 and not found.trainable and found.engines["sglang"].startswith("no")


@pytest.mark.parametrize("architecture", ["MiMoForCausalLM", "Qwen2ForCausalLM"])
def test_a_checkpoint_that_lost_its_layer(architecture, tmp_path):
    folder = broken_model(tmp_path, lose_mtp, architectures=[architecture])
    done = command(folder)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "lost its MTP layer" in done.stdout and "fastmtp graft" in done.stdout and "0 by tensors" in done.stdout


def test_a_head_without_a_backbone(tmp_path):
    shutil.copytree(TINY, tmp_path / "draft")
    from safetensors.torch import load_file

    head = {n: t for n, t in load_file(TINY / "model.safetensors").items() if n.startswith(HEAD)}
    save_file(head, tmp_path / "draft" / "model.safetensors")
    found = inspect_model(tmp_path / "draft")
    assert not found.trainable and "without a backbone" in found.reasons[0]
    assert found.engines["sglang"].startswith("yes") and found.backbone_tensors == 0


def test_damaged_downloads(tmp_path):
    folder = shard(TINY, tmp_path / "model")
    first, second, third = sorted(folder.glob("*.safetensors"))
    first.unlink()
    second.write_bytes(second.read_bytes()[:-10])
    third.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    found = inspect_model(folder)
    assert not found.trainable
    for name, problem in ((first, "missing"), (second, "header says"), (third, "not a readable safetensors file")):
        assert any(name.name in r and problem in r for r in found.reasons), found.reasons
    assert found.mtp_tensors == sum(n.startswith(HEAD) for n in Checkpoint(folder).headers.entries) > 0


def test_nothing_to_look_at(tmp_path):
    for content, message in ((None, "not found"), ("{}", "no *.safetensors file"), ("{", "cannot be read as JSON")):
        if content:
            (tmp_path / "config.json").write_text(content)
        with pytest.raises(FastMTPError) as error:
            inspect_model(tmp_path)
        assert message in str(error.value)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": 3}')
    with pytest.raises(FastMTPError, match="cannot be read as a safetensors index"):
        inspect_model(tmp_path)


def hollow(folder, shapes, **config):
    """A folder whose tensors have headers and no data on disk."""
    folder.mkdir()
    header, offset = {}, 0
    for name, shape in shapes.items():
        end = offset + 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, end]}
        offset = end
    data = pack_header(header)
    with open(folder / "model.safetensors", "wb") as file:
        file.write(data)
        file.truncate(len(data) + offset)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda row: row.name)
def test_known_layouts_are_refused_with_the_reason(layout, tmp_path):
    prefix = layout.prefixes[0].format(N=61)
    shapes = {f"{prefix}.eh_proj.weight": (4, 8), "model.layers.0.mlp.up_proj.weight": (4, 4), "lm_head.weight": (9, 4)}
    own = layout.architectures[-1]
    found = inspect_model(hollow(tmp_path / "model", shapes, architectures=[own], num_hidden_layers=61))
    assert found.family == layout.name and not found.trainable and layout.reason in found.reasons
    assert found.mtp_tensors == 1 and found.mtp_params == 32 and found.suspicious == []
    assert found.engines["sglang"].startswith({CHAIN: "yes", None: "no"}.get(layout.sglang, "another scheme"))
    assert (layout.sglang == MULTI_LAYER) == ("multi-layer" in found.engines["sglang"])


def test_the_table_of_known_layouts():
    names = [a for row in LAYOUTS for a in row.architectures]
    assert len(names) == len(set(names)) and known_layout(["LlamaForCausalLM"]) is None
    assert not {a for family in FAMILIES for a in family.architectures} & set(names)  # trained, so not refused
    for multi in ("MiMoV2FlashForCausalLM", "Step3p5ForCausalLM", "GigaChat35ForCausalLM"):
        row = known_layout([multi])
        assert row is not None and row.sglang == MULTI_LAYER
    assert all(row.reason and row.prefixes and "\n" not in row.reason for row in LAYOUTS)


def test_unknown_layout_with_suspicious_names(tmp_path):
    shapes = {f"model.layers.{i}.mlp.up_proj.weight": (4, 4) for i in range(3)}
    shapes |= {"model.nextn.proj.weight": (4, 8), "vision.layers.7.w": (2,), "model.smtpd.weight": (2,)}
    folder = hollow(tmp_path / "model", shapes, architectures=["NewForCausalLM"], num_hidden_layers=2)
    found = inspect_model(folder)
    assert found.family is None and not found.trainable
    assert found.suspicious == ["model.layers.2.mlp.up_proj.weight", "model.nextn.proj.weight"]
    assert "unknown layout" in text(found) and "model.nextn.proj.weight" in text(found)


def test_a_terabyte_takes_no_longer(tmp_path):
    """Sixteen tensors of 64 GB, without a byte of data: anything that read them would still be at it."""
    shapes = {f"model.layers.{i}.weight": (2**17, 2**18) for i in range(16)}
    folder = hollow(tmp_path / "model", shapes, architectures=["MiMoV2FlashForCausalLM"], num_hidden_layers=16)
    found = inspect_model(folder)
    assert found.backbone_bytes == 2**40 and found.mtp_tensors == 0
    assert sum(512 * p.stat().st_blocks for p in folder.iterdir()) < 2**20


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.lists(st.integers(0, 60), min_size=1, max_size=8, unique=True))
def test_layers_beyond_the_last_are_suspicious(layers, numbers):
    names = {f"model.layers.{n}.mlp.up_proj.weight": n for n in numbers}
    want = sorted(name for name, n in names.items() if n >= layers)
    assert odd_names(names, {"num_hidden_layers": layers}) == want
    assert odd_names(names, {"text_config": {"num_hidden_layers": layers}}) == want
    assert odd_names(names, {}) == []
    assert count_layers(list(names)) == len(numbers)
