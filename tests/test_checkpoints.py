"""Folders appear whole or not at all, and heads are tied to their backbone."""

import json
import shutil

import pytest
import torch
from conftest import TINY
from safetensors.torch import load_file, save_file

from swift_fastmtp.checkpoints import Weights, fingerprint, new_folder
from swift_fastmtp.errors import FastMTPError
from swift_fastmtp.export.folders import export_draft, export_full
from swift_fastmtp.families import FAMILIES

HEAD = "model.mtp_layers.0."


@pytest.fixture
def trained(tmp_path):
    """A head-only checkpoint, as the tuner writes it, with other values than the base's."""
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    head = {n: t.float() + 0.5 for n, t in load_file(TINY / "model.safetensors").items() if n.startswith(HEAD)}
    save_file(head, folder / "model.safetensors")
    settings = {"base_model": str(TINY), "base_fingerprint": fingerprint(TINY, FAMILIES[0])}
    (folder / "fastmtp.json").write_text(json.dumps(settings))
    return folder


def shard(model, folder):
    """The tiny model as three shards with an index; MTP tensors lie in two of them."""
    shutil.copytree(model, folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names, weight_map = sorted(tensors), {}
    for i in range(3):
        part = names[i::3] if i < 2 else [n for n in names[2::3] if not n.startswith(HEAD)]
        rest = [] if i != 1 else [n for n in names[2::3] if n.startswith(HEAD)]
        file = f"model-{i + 1:05}-of-00003.safetensors"
        save_file({n: tensors[n] for n in part + rest}, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(part + rest, file))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


@pytest.mark.parametrize("sharded", [False, True])
def test_full_export_changes_only_the_heads_bytes(sharded, trained, tmp_path):
    base = shard(TINY, tmp_path / "base") if sharded else TINY
    if sharded:
        settings = {"base_model": str(base), "base_fingerprint": fingerprint(base, FAMILIES[0])}
        (trained / "fastmtp.json").write_text(json.dumps(settings))
    out = tmp_path / "out"
    export_full(trained, out)
    before, after = Weights(base), Weights(out)
    head = load_file(trained / "model.safetensors")
    assert before.file_of.keys() == after.file_of.keys()
    for name, file in before.file_of.items():
        assert after.file_of[name].name == file.name
        want = head[name].to(torch.bfloat16) if name in head else before.read(name)
        assert torch.equal(after.read(name), want), name
    for file in base.iterdir():
        linked = file.suffix == ".safetensors" and file not in {before.file_of[n] for n in head}
        assert (out / file.name).samefile(file) == linked, file.name
    assert (out / "fastmtp.json").exists()


def test_draft_export_has_only_the_head(trained, tmp_path):
    export_draft(trained, tmp_path / "draft")
    tensors = load_file(tmp_path / "draft" / "model.safetensors")
    assert len(tensors) == 16 and {t.dtype for t in tensors.values()} == {torch.bfloat16}
    for name in ("config.json", "configuration_mimo.py", "tokenizer.json", "fastmtp.json"):
        assert (tmp_path / "draft" / name).exists()


def test_a_head_of_another_backbone_is_refused(trained, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(TINY, other)
    tensors = load_file(other / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] += 1
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(FastMTPError, match="another backbone"):
        export_full(trained, tmp_path / "out", other)
    assert not (tmp_path / "out").exists()


def test_fingerprint_ignores_the_head(trained, tmp_path):
    export_full(trained, tmp_path / "out")
    assert fingerprint(tmp_path / "out", FAMILIES[0]) == fingerprint(TINY, FAMILIES[0])


def test_a_failed_folder_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError), new_folder(tmp_path / "out") as folder:
        (folder / "file").write_text("half")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "out").mkdir()
    with pytest.raises(FastMTPError, match="already exists"), new_folder(tmp_path / "out"):
        pass


def test_a_tensor_in_two_files_is_refused(tmp_path):
    for name in ("a", "b"):
        save_file({"x": torch.zeros(1)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(FastMTPError, match=r"x is also in a\.safetensors"):
        Weights(tmp_path)


def test_truncated_file_and_broken_index(tmp_path):
    (tmp_path / "model.safetensors").write_bytes((TINY / "model.safetensors").read_bytes()[:1000])
    with pytest.raises(FastMTPError, match="not a readable safetensors file"):
        Weights(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"x": "gone.safetensors"}}')
    with pytest.raises(FastMTPError, match=r"gone\.safetensors: listed in the index, but missing"):
        Weights(tmp_path)
