"""Folders appear whole or not at all, and heads are tied to their backbone."""

import json
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from helpers.broken_models import HEAD
from helpers.checkpoints import shard
from helpers.paths import TINY
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from swift_fastmtp.checkpoint import fingerprint as fingerprints
from swift_fastmtp.checkpoint.checkpoint import Checkpoint
from swift_fastmtp.errors import FastMTPError
from swift_fastmtp.export.doctor import examine
from swift_fastmtp.export.folders import export_draft, export_full
from swift_fastmtp.files.staging import new_folder


@pytest.mark.parametrize("sharded", [False, True])
def test_full_export_changes_only_the_heads_bytes(sharded, trained, tmp_path):
    base = shard(TINY, tmp_path / "base") if sharded else TINY
    if sharded:
        settings = {"base_model": str(base), "base_fingerprint": Checkpoint(base).fingerprint}
        (trained / "fastmtp.json").write_text(json.dumps(settings))
    out = tmp_path / "out"
    export_full(trained, out)
    before, after = Checkpoint(base), Checkpoint(out)
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
    assert Checkpoint(tmp_path / "out").fingerprint == Checkpoint(TINY).fingerprint


def backbone(folder, change=None, name="model", parts=1):
    """The tiny model's tensors, changed, in one file or in several with an index."""
    target = folder / name
    shutil.copytree(TINY, target)
    tensors = load_file(TINY / "model.safetensors")
    if change:
        change(tensors)
    (target / "model.safetensors").unlink()
    names = sorted(tensors)
    for i in range(parts):
        file = f"model-{i + 1:05}-of-{parts:05}.safetensors"
        save_file({n: tensors[n] for n in names[i::parts]}, target / file, metadata={"format": "pt"})
    return target


MATRICES = sorted(n for n, t in load_file(TINY / "model.safetensors").items() if t.ndim == 2 and not n.startswith(HEAD))


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_the_fingerprint_notices_a_change_of_any_rows(data):
    """The smallest there is, too: one value by one bit."""
    name = data.draw(st.sampled_from(MATRICES))
    count = len(load_file(TINY / "model.safetensors")[name])
    rows = data.draw(st.sets(st.integers(0, count - 1), min_size=1, max_size=5))
    smallest = data.draw(st.booleans())

    def change(tensors):
        for row in rows:
            if smallest:
                tensors[name].view(torch.int16)[row, -1] ^= 1
            else:
                tensors[name][row] *= 3

    with tempfile.TemporaryDirectory() as folder:
        assert Checkpoint(backbone(Path(folder), change)).fingerprint != Checkpoint(TINY).fingerprint


def every_other_row(tensors):
    for name in MATRICES:
        tensors[name][1:] *= 3


def merged_lora(tensors, rank=2):
    """A LoRA on one matrix of one layer, merged."""
    torch.manual_seed(0)
    weight = tensors["model.layers.1.self_attn.q_proj.weight"]
    weight += (torch.randn(len(weight), rank) @ torch.randn(rank, weight.shape[1]) * 1e-2).to(weight.dtype)


def one_embedding(tensors):
    tensors["model.embed_tokens.weight"][4711] += 1


def one_layer(tensors):
    for name in tensors:
        if name.startswith("model.layers.2."):
            tensors[name] += tensors[name] / 64


FINE_TUNES = [every_other_row, merged_lora, one_embedding, one_layer]


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("change", FINE_TUNES)
def test_the_fingerprint_notices_fine_tunes(change, whole, tmp_path, monkeypatch):
    """Also where only samples are read, as of checkpoints beyond 32 GB, which this one is made to be."""
    if not whole:
        monkeypatch.setattr(fingerprints, "WHOLE_BELOW", 0)
        monkeypatch.setattr(fingerprints, "_SMALL", 2**10)
    assert Checkpoint(backbone(tmp_path, change)).fingerprint != Checkpoint(TINY).fingerprint


def test_samples_are_spread_and_few():
    for size in (2**16 + 1, 10**7, 3 * 10**9):
        places = fingerprints._sampled("model.layers.0.mlp.experts.gate_up_proj", size)
        assert len(places) == max(2, -(-size // 2**22)) and places == sorted(places)
        assert places[0] < size / len(places) and size * (1 - 1 / len(places)) - 4096 <= places[-1] <= size - 4096
    assert fingerprints._sampled("a", 10**7) != fingerprints._sampled("b", 10**7)


@pytest.mark.parametrize("whole", [True, False])
def test_the_fingerprint_does_not_depend_on_the_shards(whole, tmp_path, monkeypatch):
    if not whole:
        monkeypatch.setattr(fingerprints, "WHOLE_BELOW", 0)
        monkeypatch.setattr(fingerprints, "_SMALL", 2**10)
    parts = [Checkpoint(backbone(tmp_path, name=f"in{n}", parts=n)).fingerprint for n in (1, 2, 5)]
    assert len({*parts, Checkpoint(shard(TINY, tmp_path / "base")).fingerprint}) == 1
    assert parts[0].startswith("v2:") and len(parts[0]) == 3 + 64


# What `fingerprint` gave for the tiny model before it began with "v2:".
OLD = "ee7d7fad496babcf4081e678ac53ee0714df5f7f187318f40cf1a730046f9ced"


def test_heads_with_the_old_fingerprint_still_belong_to_their_backbone(trained, tmp_path):
    known = {"base_model": str(TINY), "base_fingerprint": OLD}
    (trained / "fastmtp.json").write_text(json.dumps(known))
    export_full(trained, tmp_path / "out")
    assert examine(tmp_path / "out") == []
    export_draft(trained, tmp_path / "draft")
    assert examine(tmp_path / "draft") == []
    other = backbone(tmp_path, lambda t: t["model.layers.0.mlp.up_proj.weight"][0].mul_(3))
    with pytest.raises(FastMTPError, match="another backbone"):
        export_full(trained, tmp_path / "no", other)
    assert Checkpoint(TINY).has_fingerprint(OLD) and not Checkpoint(other).has_fingerprint(OLD)


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
        _ = Checkpoint(tmp_path).entries


def test_truncated_file_and_broken_index(tmp_path):
    (tmp_path / "model.safetensors").write_bytes((TINY / "model.safetensors").read_bytes()[:1000])
    with pytest.raises(FastMTPError, match="not a readable safetensors file"):
        _ = Checkpoint(tmp_path).entries
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"x": "gone.safetensors"}}')
    with pytest.raises(FastMTPError, match=r"gone\.safetensors: listed in the index, but missing"):
        _ = Checkpoint(tmp_path).entries
