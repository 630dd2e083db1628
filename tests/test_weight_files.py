"""Checkpoint folders as people have them: what is loaded, and that everything that reads a folder agrees on it."""

import json
import os
import re
import shutil

import pytest
import torch
from helpers.broken_models import HEAD, assert_one_line, broken_model, lose_mtp
from helpers.checkpoints import shard
from helpers.models import CHECKPOINTS, tensors_of
from helpers.paths import ROOT, TINY
from helpers.swift_runs import sft_args, swift
from safetensors.torch import load_file, save_file

from swift_fastmtp.checkpoint.checkpoint import Checkpoint
from swift_fastmtp.checkpoint.config_file import read_config
from swift_fastmtp.checkpoint.mtp_tensors import check_head
from swift_fastmtp.checkpoint.weight_files import INDEX_FILE, resolve
from swift_fastmtp.errors import FastMTPError
from swift_fastmtp.export.doctor import examine
from swift_fastmtp.export.folders import export_full
from swift_fastmtp.export.graft import graft
from swift_fastmtp.export.inspection import inspect_model, text
from swift_fastmtp.families.table import match_family
from swift_fastmtp.model.loading import head_shapes, load_model
from swift_fastmtp.serving.launch import serve_flags
from swift_fastmtp.simulate.cost import read_cost


def write_index(folder, weight_map, **more):
    (folder / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": weight_map, **more}))


def read_index(folder):
    return json.loads((folder / INDEX_FILE).read_text())["weight_map"]


def lay_out(source, folder, parts, listed, rename=None):
    """A checkpoint in other files: name of a file → which tensors are in it; `listed` files are in the index."""
    shutil.copytree(source, folder)
    tensors = tensors_of(source)
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    weight_map = {}
    for name, chosen in parts.items():
        part = {(rename or (lambda n: n))(n): t.clone() for n, t in tensors.items() if chosen(n)}
        assert part, name
        save_file(part, folder / name, metadata={"format": "pt"})
        if name in listed:
            weight_map.update(dict.fromkeys(part, name))
    if listed:
        write_index(folder, weight_map)
    return folder


def is_head(name):
    return name.startswith(HEAD)


def sidecar(folder, listed, name="mtp.safetensors", main="model.safetensors"):
    """The tiny model with its layer in a file of its own."""
    parts = {main: lambda n: not is_head(n), name: is_head}
    return lay_out(TINY, folder, parts, listed)


def assert_same_model(folder, like=TINY):
    """What training loads is, tensor by tensor, what the files hold."""
    model, want = load_model(folder, torch.bfloat16), tensors_of(like)
    assert model.config.name_or_path == model.name_or_path == str(folder)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, want[name]), name


GOOD = {
    "sidecar, listed": ("model.safetensors", "mtp.safetensors", True),
    "sidecar, no index": ("model.safetensors", "mtp.safetensors", False),
    "any names, no index": ("weights-a.safetensors", "weights-b.safetensors", False),
    "shards": ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", True),
}


@pytest.mark.parametrize("case", GOOD)
def test_layouts_that_engines_load_are_loaded(case, tmp_path):
    """transformers alone would read `model.safetensors` and no index, or no file at all."""
    main, side, listed = GOOD[case]
    folder = sidecar(tmp_path / "model", (main, side) if listed else (), side, main)
    found = inspect_model(folder)
    assert found.trainable and found.notes == [] and found.mtp_files == [side]
    assert found.engines["sglang"].startswith("yes") and found.engines["vllm"].startswith("yes")
    assert examine(folder) == []
    assert_same_model(folder)
    assert Checkpoint(folder).fingerprint == Checkpoint(TINY).fingerprint and read_cost(folder) == read_cost(TINY)


def test_an_index_without_metadata_is_one(tmp_path):
    """Engines read the map only; transformers stops at the missing key."""
    folder = sidecar(tmp_path / "model", ("a.safetensors", "b.safetensors"), "b.safetensors", "a.safetensors")
    (folder / INDEX_FILE).write_text(json.dumps({"weight_map": read_index(folder)}))
    assert inspect_model(folder).trainable and examine(folder) == []
    assert_same_model(folder)


@pytest.mark.engine
def test_training_reads_a_sidecar(rows, tmp_path):
    """Through the real command, whose checkpoint is then exported with the base's own files."""
    folder = sidecar(tmp_path / "model", ("model.safetensors", "mtp.safetensors"))
    swift(*sft_args(folder, rows, tmp_path / "run", max_steps=2))
    (checkpoint,) = (tmp_path / "run").rglob("checkpoint-2")
    export_full(checkpoint, tmp_path / "out")
    assert examine(tmp_path / "out") == [] and read_index(tmp_path / "out") == read_index(folder)


def run_lines(number, folder, *replace):
    """A python block of docs/inspect.md, for this folder."""
    page = (ROOT / "docs" / "inspect.md").read_text()
    code = re.findall(r"^```python\n(.*?)^```", page, re.S | re.M)[number]
    for old, new in (("my-model", str(folder)), *replace):
        assert old in code
        code = code.replace(old, new)
    exec(compile(code, "docs/inspect.md", "exec"), {})


def assert_told_where(folder, *parts):
    """Every reader says the same: where the layer is, and how to fix it; none says that it is lost."""
    family = match_family(read_config(folder))
    where = Checkpoint(folder).elsewhere(family).text
    assert all(part in where for part in parts) and "graft" not in where, where
    found = inspect_model(folder)
    assert not found.trainable and where in found.reasons and not any("lost" in r for r in found.reasons)
    assert all(verdict.startswith("no") for verdict in found.engines.values())
    assert sum(where in f.what for f in examine(folder)) == 1
    for read in (
        lambda: load_model(folder, torch.float32),
        lambda: check_head(Checkpoint(folder), family, head_shapes(Checkpoint(folder))),
        lambda: serve_flags(folder),
        lambda: graft(folder, folder.with_name("out"), folder),
    ):
        with pytest.raises(FastMTPError) as error:
            read()
        assert where in str(error.value)
    assert not folder.with_name("out").exists()


UNLISTED = {
    "mtp.safetensors": ("model.safetensors",),
    "model-mtp.safetensors": ("model-00001-of-00001.safetensors",),
    "model-00002-of-00002.safetensors": ("model-00001-of-00002.safetensors",),
}


@pytest.mark.parametrize("name", UNLISTED)
def test_a_layer_in_a_file_that_the_index_leaves_out(name, tmp_path):
    (main,) = UNLISTED[name]
    folder = sidecar(tmp_path / "model", (main,), name, main)
    assert_told_where(folder, name, "does not list", "list the file's tensors in the index")
    run_lines(0, folder)
    assert inspect_model(folder).trainable and examine(folder) == []
    assert_same_model(folder)


def test_a_part_of_the_layer_in_an_unlisted_file(tmp_path):
    one = HEAD + "input_proj.weight"
    parts = {"model.safetensors": lambda n: n != one, "mtp.safetensors": lambda n: n == one}
    folder = lay_out(TINY, tmp_path / "model", parts, ("model.safetensors",))
    assert_told_where(folder, "1 tensors of the MTP layer are in mtp.safetensors")


@pytest.mark.parametrize("name", ["glm4_moe", "glm4_moe_lite"])
def test_sglang_adds_an_unlisted_sidecar_of_glm(name, tmp_path):
    """So training takes it too; vLLM does not, and an export lists it for both."""
    source = CHECKPOINTS[name](tmp_path / "source")
    parts = {"model.safetensors": lambda n: "layers.2." not in n, "mtp.safetensors": lambda n: "layers.2." in n}
    folder = lay_out(source, tmp_path / "model", parts, ("model.safetensors",))
    found = inspect_model(folder)
    assert found.trainable and found.engines["sglang"].startswith("yes")
    assert found.engines["vllm"].startswith("no") and "mtp.safetensors" in found.engines["vllm"]
    assert [f.level for f in examine(folder)] == ["warning"]
    load_model(folder, torch.bfloat16)
    with pytest.raises(FastMTPError, match="does not list mtp"):
        serve_flags(folder, "vllm")
    assert serve_flags(folder)
    head = {n: t.float() + 0.5 for n, t in load_file(folder / "mtp.safetensors").items()}
    (tmp_path / "checkpoint").mkdir()
    save_file(head, tmp_path / "checkpoint" / "model.safetensors")
    export_full(tmp_path / "checkpoint", tmp_path / "out", folder)
    assert read_index(tmp_path / "out") == {n: f.name for n, f in Checkpoint(tmp_path / "out").file_of.items()}
    assert resolve(tmp_path / "out").refusals == {} and examine(tmp_path / "out") == []


MISNAMED = {
    "qwen3_5": ("mtp.", "model.language_model.mtp."),
    "qwen3_5_vision": ("mtp.", "language_model.mtp."),
    "qwen3_next": ("mtp.", "model.mtp."),
    "deepseek_v3": ("model.layers.2.", "model.language_model.layers.2."),
    "ernie4_5_moe": ("model.mtp_", "language_model.model.mtp_"),
    "mimo": (HEAD, "mtp_layers.0."),
}


@pytest.mark.parametrize("name", MISNAMED)
def test_a_layer_under_another_path(name, tmp_path):
    new, old = MISNAMED[name]
    source = TINY if name == "mimo" else CHECKPOINTS[name](tmp_path / "source")

    def rename(tensor):
        return old + tensor.removeprefix(new) if tensor.startswith(new) else tensor

    parts = {"model.safetensors": lambda n: not n.startswith(new), "mtp.safetensors": lambda n: n.startswith(new)}
    folder = lay_out(source, tmp_path / "model", parts, tuple(parts), rename)
    assert_told_where(folder, "where engines look for", "rename them")
    run_lines(1, folder, ('"model.language_model.mtp."', f'"{old}"'), ('"mtp."', f'"{new}"'))
    run_lines(0, folder)
    assert inspect_model(folder).trainable and [f for f in examine(folder) if f.level == "error"] == []
    load_model(folder, torch.bfloat16)


def test_graft_replaces_a_layer_that_no_engine_finds(tmp_path):
    parts = {"model.safetensors": lambda n: not is_head(n), "mtp.safetensors": is_head}
    folder = lay_out(
        TINY, tmp_path / "model", parts, ("model.safetensors",), lambda n: n.replace(HEAD, "mtp_layers.0.")
    )
    graft(folder, tmp_path / "out", TINY, overwrite=True)
    assert examine(tmp_path / "out") == [] and not (tmp_path / "out" / "mtp.safetensors").exists()
    assert set(Checkpoint(tmp_path / "out").file_of) == set(Checkpoint(TINY).file_of)


def with_index(tmp_path, **entries):
    """The tiny model with an index that lists more than there is."""
    folder = tmp_path / "model"
    shutil.copytree(TINY, folder)
    names = dict.fromkeys(Checkpoint(TINY).file_of, "model.safetensors")
    write_index(folder, {**names, **{k.replace("__", "."): v for k, v in entries.items()}})
    return folder


def test_a_listed_tensor_that_nobody_holds_or_needs(trained, tmp_path):
    folder = with_index(tmp_path, old__weight="model.safetensors")
    found = inspect_model(folder)
    assert found.trainable and found.engines["sglang"].startswith("yes") and "old.weight" in found.notes[0]
    assert "old.weight" in text(found)
    assert [(f.level, "old.weight" in f.what) for f in examine(folder)] == [("warning", True)]
    assert_same_model(folder)
    export_full(trained, tmp_path / "out", folder)
    assert examine(tmp_path / "out") == []


def test_a_listed_file_that_is_not_there_and_nobody_needs(trained, tmp_path):
    """Training does without; engines stop when they start, so an export's index is set right."""
    folder = with_index(tmp_path, old__weight="model-00002-of-00002.safetensors")
    found = inspect_model(folder)
    assert all("model-00002-of-00002.safetensors, which is missing" in v for v in found.engines.values())
    assert any("missing" in f.what and f.level == "error" for f in examine(folder))
    with pytest.raises(FastMTPError, match="which is missing"):
        serve_flags(folder)
    export_full(trained, tmp_path / "out", folder)
    assert examine(tmp_path / "out") == [] and inspect_model(tmp_path / "out").engines["sglang"].startswith("yes")


NEEDED = "model.layers.0.mlp.up_proj.weight"


@pytest.mark.parametrize("file", ["model.safetensors", "model-00002-of-00002.safetensors"])
def test_a_listed_tensor_of_the_backbone_that_no_file_holds(file, trained, tmp_path):
    folder = with_index(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    del tensors[NEEDED]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    write_index(folder, {**dict.fromkeys(tensors, "model.safetensors"), NEEDED: file})
    found = inspect_model(folder)
    assert not found.trainable and found.engines["sglang"].startswith("no"), found
    assert any(NEEDED in f.what and f.level == "error" for f in examine(folder))
    for read in (lambda: load_model(folder, torch.float32), lambda: export_full(trained, tmp_path / "out", folder)):
        with pytest.raises(FastMTPError, match=r"in no file"):
            read()
    tuned = tmp_path / "tuned"
    shutil.copytree(folder, tuned)
    lose_mtp(tensors)
    save_file(tensors, tuned / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(FastMTPError, match=r"is in no file"):
        graft(tuned, tmp_path / "out", TINY)
    assert not (tmp_path / "out").exists()


def test_a_lost_vision_tower_is_the_engines_loss_only(tmp_path):
    source = CHECKPOINTS["qwen3_5_vision"](tmp_path / "source")
    parts = {"model.safetensors": lambda n: ".visual." not in n}
    folder = lay_out(source, tmp_path / "model", parts, tuple(parts))
    lost = [n for n in tensors_of(source) if ".visual." in n]
    write_index(folder, {**read_index(folder), **dict.fromkeys(lost, "model.safetensors")})
    assert inspect_model(folder).trainable
    load_model(folder, torch.bfloat16)
    assert any(".visual." in f.what and f.level == "error" for f in examine(folder))


def test_a_missing_shard_is_named(tmp_path):
    folder = shard(TINY, tmp_path / "model")
    gone = "model-00003-of-00003.safetensors"
    (folder / gone).unlink()
    for read in (
        lambda: "; ".join(inspect_model(folder).reasons),
        lambda: "; ".join(f.what for f in examine(folder)),
        lambda: load_model(folder, torch.float32),
    ):
        try:
            message = read()
        except FastMTPError as error:
            message = str(error)
        assert gone in message and "missing" in message, message
    assert serve_flags_refused(folder)


def serve_flags_refused(folder):
    with pytest.raises(FastMTPError, match="is missing"):
        serve_flags(folder)
    return True


@pytest.mark.parametrize(
    "name",
    ["/etc/passwd", "../other.safetensors", "sub/model.safetensors", "", ".", "pytorch_model.bin", "a\0.safetensors"],
)
def test_an_index_that_leads_elsewhere_is_refused(name, tmp_path):
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    folder = with_index(tmp_path, old__weight=name)
    for read in (resolve, inspect_model, lambda f: Checkpoint(f).entries, lambda f: load_model(f, torch.float32)):
        with pytest.raises(FastMTPError, match=r"no \*\.safetensors file of the folder itself") as error:
            read(folder)
        assert "\n" not in str(error.value)
    assert any("of the folder itself" in f.what for f in examine(folder))


@pytest.mark.parametrize("value", [3, None, ["model.safetensors"], {"a": "b"}])
def test_an_index_that_names_no_file(value, tmp_path):
    folder = with_index(tmp_path, old__weight=value)
    with pytest.raises(FastMTPError, match="cannot be read as a safetensors index"):
        inspect_model(folder)


def test_a_name_of_the_index_that_is_a_folder(tmp_path):
    folder = with_index(tmp_path, old__weight="part.safetensors")
    (folder / "part.safetensors").mkdir()
    assert resolve(folder).missing == {"part.safetensors": "a folder, no file"}
    assert any("a folder, no file" in f.what for f in examine(folder))
    (folder / INDEX_FILE).unlink()
    assert [p.name for p in resolve(folder).files] == ["model.safetensors"]


def test_the_hub_cache_is_a_folder_of_links(trained, tmp_path):
    """`snapshots/REVISION/NAME` → `../../blobs/HASH`; exports link the blob, not the link."""
    source = shard(TINY, tmp_path / "source")
    blobs, folder = tmp_path / "blobs", tmp_path / "snapshots" / "main"
    blobs.mkdir()
    folder.mkdir(parents=True)
    for number, file in enumerate(sorted(source.iterdir())):
        file.rename(blobs / str(number))
        (folder / file.name).symlink_to(os.path.relpath(blobs / str(number), folder))
    assert inspect_model(folder).trainable and examine(folder) == []
    assert_same_model(folder)
    export_full(trained, tmp_path / "out", folder)
    assert not any(p.is_symlink() for p in (tmp_path / "out").iterdir())
    (blobs / "0").unlink()  # its link leads nowhere now
    first = sorted(p.name for p in folder.iterdir())[0]
    assert not (folder / first).exists()


def test_mac_resource_forks_and_hidden_files_are_no_weights(tmp_path):
    shutil.copytree(TINY, tmp_path / "model")
    (tmp_path / "model" / "._model.safetensors").write_bytes(b"\0\5\26\7")
    assert inspect_model(tmp_path / "model").trainable and examine(tmp_path / "model") == []


def test_mistrals_consolidated_file_is_left_out(tmp_path):
    shutil.copytree(TINY, tmp_path / "model")
    shutil.copyfile(TINY / "model.safetensors", tmp_path / "model" / "consolidated.safetensors")
    found = inspect_model(tmp_path / "model")
    assert found.trainable and found.engines["sglang"].startswith("yes")
    assert "consolidated.safetensors instead" in found.engines["vllm"]
    assert_same_model(tmp_path / "model")


def test_a_config_cannot_name_other_weights(tmp_path):
    """transformers would load what `transformers_weights` of config.json names; engines do not know that key."""
    folder = tmp_path / "model"
    shutil.copytree(TINY, folder)
    other = {n: t + 1 for n, t in load_file(folder / "model.safetensors").items()}
    save_file(other, folder / "other.safetensors", metadata={"format": "pt"})
    write_index(folder, dict.fromkeys(other, "model.safetensors"))
    config = {**read_config(folder), "transformers_weights": "other.safetensors"}
    (folder / "config.json").write_text(json.dumps(config))
    assert_same_model(folder)


# Key, value → what every reader answers: None is that it goes.
CONFIGS = {
    "no quantization": ({"quantization_config": None}, None),
    "empty quantization": ({"quantization_config": {}}, None),
    "no text part": ({"text_config": None}, None),
    "no head size": ({"head_dim": None}, None),
    "no end token": ({"eos_token_id": None}, None),
    "no scaling": ({"rope_scaling": None}, None),
    "tied: null": ({"tie_word_embeddings": None}, "tie_word_embeddings"),
    "tied: text": ({"tie_word_embeddings": "false"}, "tie_word_embeddings is 'false', it must be true or false"),
    "layers: null": ({"num_hidden_layers": None}, "num_hidden_layers"),
    "layers: text": ({"num_hidden_layers": "2"}, "it must be a whole number"),
    "architectures: null": ({"architectures": None}, "architecture"),
    "architectures: text": ({"architectures": "MiMoForCausalLM"}, "it must be a list of names"),
    "quantization: list": ({"quantization_config": []}, "it must be an object"),
    "text part: list": ({"text_config": [1]}, "it must be an object"),
    "auto_map: null": ({"auto_map": None}, "auto_map"),
    "vocabulary: null": ({"vocab_size": None}, "vocab_size"),
    "vocabulary: true": ({"vocab_size": True}, "it must be a whole number"),
    "MTP layers: text": ({"num_nextn_predict_layers": "1"}, "it must be a whole number"),
    "base of RoPE: null": ({"rope_theta": None}, "rope_theta is None"),
    "norm: null": ({"rms_norm_eps": None}, "rms_norm_eps"),
    "model type: null": ({"model_type": None}, "has no model_type"),
    "model type: unknown": ({"model_type": "nobodys"}, "this package runs none"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_null_and_wrong_types_in_config(case, tmp_path, monkeypatch):
    """One line each, from all; never a traceback, nor a question whether to run the folder's code."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked at the terminal"))
    config, message = CONFIGS[case]
    folder = broken_model(tmp_path, **config)
    lines = []
    for read in (
        lambda: inspect_model(folder).reasons,
        lambda: [f.what for f in examine(folder) if f.level == "error"],
        lambda: load_model(folder, torch.float32) and [],
    ):
        try:
            lines.append(read())
        except FastMTPError as error:
            lines.append([str(error)])
    if message is None:
        assert lines == [[], [], []]
        return
    assert all(any(message in line for line in printed) for printed in lines), lines
    assert not any("\n" in line for printed in lines for line in printed)


@pytest.mark.parametrize("content", ["[]", '"text"', "3", "null"])
def test_a_config_that_is_no_object(content, tmp_path):
    folder = broken_model(tmp_path)
    (folder / "config.json").write_text(content)
    for read in (inspect_model, examine, lambda f: load_model(f, torch.float32)):
        with pytest.raises(FastMTPError, match="must hold a JSON object"):
            read(folder)


@pytest.mark.engine
def test_null_through_swift(rows, tmp_path):
    model = broken_model(tmp_path, tie_word_embeddings="no")
    assert_one_line(swift(*sft_args(model, rows, tmp_path / "run"), check=False), "it must be true or false")


VERDICTS = {
    "quantized otherwise": (None, {"quantization_config": {"quant_method": "awq", "bits": 4}}, "yes"),
    "two layers": (None, {"num_nextn_predict_layers": 2}, "no"),
    "tied": (None, {"tie_word_embeddings": True}, "no"),
    "a second layer": (lambda t: t.update({"model.mtp_layers.1.input_proj.weight": torch.zeros(2, 2)}), {}, "no"),
    "a missing tensor": (lambda t: t.pop(HEAD + "input_proj.weight"), {}, "no"),
    "sound": (None, {}, "yes"),
}
NAMES = ["zoo", "modelzoo", "model.mtp_layers.0", "num_nextn_predict_layers", "mtp", "x"]


@pytest.mark.parametrize("case", VERDICTS)
def test_the_folders_name_tells_nothing(case, tmp_path):
    change, config, want = VERDICTS[case]
    folder = broken_model(tmp_path, change, **config)
    verdicts = set()
    for name in NAMES:
        folder = folder.rename(tmp_path / name)
        found = inspect_model(folder)
        verdict = found.engines["sglang"].replace(str(folder), "FOLDER")
        verdicts.add((found.trainable, verdict))
    ((trainable, verdict),) = verdicts
    assert verdict.startswith(want) and trainable == (case == "sound")


def test_the_name_of_the_folder_is_no_reason_for_the_engine(tmp_path):
    """`modelzoo/` once gave no, `zoo/` yes: any error that began with `model` was taken for one about a tensor."""
    source = CHECKPOINTS["bailing_moe_v2"](tmp_path / "zoo")
    config = read_config(source)
    (source / "config.json").write_text(json.dumps({**config, "norm_head": True}))
    verdicts = []
    for name in ("zoo", "modelzoo"):
        os.chdir(tmp_path)
        source = source.rename(tmp_path / name)
        found = inspect_model(name)
        assert not found.trainable and any("norm_head" in r for r in found.reasons)
        verdicts.append(found.engines["sglang"])
    assert verdicts[0] == verdicts[1] and verdicts[0].startswith("yes")


def contents(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("verb", ["export", "graft"])
def test_editing_an_output_leaves_the_base_alone(verb, trained, tmp_path):
    base = shard(TINY, tmp_path / "base")
    (base / "README.md").write_text("of the base")
    (base / "merges.bin").write_bytes(b"1")
    before = contents(base)
    if verb == "export":
        settings = {"base_model": str(base), "base_fingerprint": Checkpoint(base).fingerprint}
        (trained / "fastmtp.json").write_text(json.dumps(settings))
        export_full(trained, tmp_path / "out")
    else:
        graft(base, tmp_path / "out", TINY, overwrite=True)
    edited = [p for p in (tmp_path / "out").iterdir() if p.suffix != ".safetensors"]
    assert {"config.json", "README.md", "merges.bin", "tokenizer.json"} <= {p.name for p in edited}
    for path in edited:
        with open(path, "r+b") as file:  # in place, as an editor may
            file.write(b"edited")
    assert contents(base) == before
    linked = [p.name for p in (tmp_path / "out").iterdir() if p.stat().st_nlink > 1]
    assert linked and all(name.endswith(".safetensors") for name in linked)


def test_readers_agree_on_the_files(tmp_path):
    """Weights and headers are one selection, for every layout of this page."""
    for number, (main, side, listed) in enumerate(GOOD.values()):
        folder = sidecar(tmp_path / str(number), (main, side) if listed else (), side, main)
        assert Checkpoint(folder).files == Checkpoint(folder).headers.files == list(resolve(folder).files)
        assert Checkpoint(folder).file_of == {n: e.file for n, e in Checkpoint(folder).headers.entries.items()}
