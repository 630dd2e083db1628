"""Names in a folder's files stay inside the folder: what an index, a list or a link says about others is refused."""

import json
import os
import shutil

import pytest
import torch
from helpers.broken_models import HEAD
from helpers.checkpoints import shard
from helpers.paths import TINY
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from swift_fastmtp.checkpoint.checkpoint import Checkpoint
from swift_fastmtp.checkpoint.weight_files import INDEX_FILE, resolve
from swift_fastmtp.errors import FastMTPError
from swift_fastmtp.export.doctor import examine
from swift_fastmtp.export.folders import export_draft, export_full
from swift_fastmtp.export.graft import graft
from swift_fastmtp.export.inspection import inspect_model
from swift_fastmtp.files.paths import files_of, inside
from swift_fastmtp.method.map_files import copy_maps, read_map_list

OUTSIDE = ["/etc/passwd", "../x.pt", "a/../../x.pt", "..", "a/../../../etc/x", "", "a\0b", "..\\x.pt"]


@pytest.mark.parametrize("name", OUTSIDE)
def test_paths_that_lead_out(name, tmp_path):
    with pytest.raises(FastMTPError, match=r"list\.json: names .*, which is no file below"):
        inside(tmp_path, name, "list.json")


@given(st.text(max_size=60))
def test_what_is_accepted_lies_below_the_folder(name):
    folder = TINY
    try:
        path = inside(folder, name, "list.json")
    except FastMTPError as error:
        assert "\n" not in str(error)
    else:
        assert path.resolve().is_relative_to(folder.resolve())


def secret(tmp_path):
    path = tmp_path / "elsewhere" / "id_rsa"
    path.parent.mkdir()
    path.write_text("SECRET")
    return path


@pytest.mark.parametrize("write", [export_full, export_draft])
@pytest.mark.parametrize("name", ["notes.txt", "tokenizer_config.json", "evil.py"])
def test_exports_copy_nothing_through_a_link(write, name, trained, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(TINY, base)
    (base / name).unlink(missing_ok=True)
    (base / name).symlink_to(secret(tmp_path))
    with pytest.raises(FastMTPError, match=rf"{name}: is a link to .*id_rsa, outside of the folder"):
        write(trained, tmp_path / "out", base)
    assert not (tmp_path / "out").exists()


def test_nor_do_grafts(tmp_path):
    model = tmp_path / "model"
    shutil.copytree(TINY, model)
    (model / "notes.txt").symlink_to(secret(tmp_path))
    with pytest.raises(FastMTPError, match=r"notes\.txt: is a link to"):
        graft(model, tmp_path / "out", TINY, overwrite=True)
    assert not (tmp_path / "out").exists()


def test_weights_that_are_links(tmp_path):
    """To a file beside it, or in a hub's cache: followed. To somebody else's: refused, by everybody."""
    model = tmp_path / "model"
    shutil.copytree(TINY, model)
    (model / "model.safetensors").rename(model / "weights.bin")
    (model / "model.safetensors").symlink_to("weights.bin")
    assert inspect_model(model).trainable
    blobs = tmp_path / "models--OWNER--NAME" / "blobs"
    blobs.mkdir(parents=True)
    (model / "weights.bin").rename(blobs / "0123")
    (model / "model.safetensors").unlink()
    (model / "model.safetensors").symlink_to(blobs / "0123")
    assert inspect_model(model).trainable and examine(model) == []
    (blobs / "0123").rename(tmp_path / "theirs.safetensors")
    (model / "model.safetensors").unlink()
    (model / "model.safetensors").symlink_to(tmp_path / "theirs.safetensors")
    for read in (resolve, inspect_model, lambda f: Checkpoint(f).entries):
        with pytest.raises(FastMTPError, match=r"model\.safetensors: is a link to .*theirs\.safetensors, outside"):
            read(model)


def test_links_in_a_circle(tmp_path):
    (tmp_path / "a.safetensors").symlink_to("b.safetensors")
    (tmp_path / "b.safetensors").symlink_to("a.safetensors")
    with pytest.raises(FastMTPError, match="holds no"):
        resolve(tmp_path)
    assert files_of(tmp_path) == []


@pytest.mark.parametrize("listed", ["absolute", "up", "folder"])
def test_an_index_that_leads_elsewhere_is_never_exported(listed, trained, tmp_path):
    """An export once verified the file that such an index names, and wrote the untrained head into its own."""
    base = shard(TINY, tmp_path / "base")
    index = json.loads((base / INDEX_FILE).read_text())
    there = {"absolute": f"{base}/", "up": "../base/", "folder": "./"}[listed]
    index["weight_map"] = {name: there + file for name, file in index["weight_map"].items()}
    (base / INDEX_FILE).write_text(json.dumps(index))
    for write in (export_full, export_draft):
        with pytest.raises(FastMTPError, match=rf"{INDEX_FILE}: lists '.*', which is no \*\.safetensors file of the f"):
            write(trained, tmp_path / "out", base)
        assert not (tmp_path / "out").exists()


def test_what_an_export_wrote_is_what_an_engine_reads(trained, tmp_path):
    base = shard(TINY, tmp_path / "base")
    export_full(trained, tmp_path / "out", base)
    want = {n: t.to(torch.bfloat16) for n, t in load_file(trained / "model.safetensors").items()}
    out = Checkpoint(tmp_path / "out")
    for name, tensor in want.items():
        assert torch.equal(out.read(name), tensor), name
        assert out.file_of[name].resolve().parent == (tmp_path / "out").resolve()
    assert len(want) == len([n for n in out.file_of if n.startswith(HEAD)])


@pytest.mark.parametrize("name", OUTSIDE[:5])
def test_map_lists(name, tmp_path):
    (tmp_path / "maps.json").write_text(json.dumps({"en": name}))
    with pytest.raises(FastMTPError, match=r"maps\.json: en: names"):
        read_map_list(tmp_path / "maps.json")


def test_maps_that_are_links(tmp_path):
    folder = tmp_path / "maps"
    folder.mkdir()
    (folder / "en.pt").symlink_to(secret(tmp_path))
    (folder / "maps.json").write_text('{"en": "en.pt"}')
    with pytest.raises(FastMTPError, match=r"en\.pt: is a link to .*id_rsa"):
        read_map_list(folder / "maps.json")


@pytest.mark.parametrize("name", ["../evil", "/tmp/evil", "a/b", "x" * 300, "en"])
def test_copies_of_maps_stay_below_the_folder(name, tmp_path):
    torch.save([1, 2], tmp_path / "map.pt")
    out = tmp_path / "out"
    out.mkdir()
    copied = copy_maps({name: tmp_path / "map.pt"}, out)
    (file,) = copied.values()
    assert (out / file).is_file() and os.path.dirname(os.path.normpath(file)) == "token_maps"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["map.pt", "out"]
