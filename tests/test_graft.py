"""A backbone that lost its MTP layer gets it back: nothing else changes, and misfits are one line."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from helpers.benchmarks import load
from helpers.broken_models import HEAD, broken_model, lose_mtp
from helpers.checkpoints import shard
from helpers.models import CHECKPOINTS, row_of
from helpers.paths import ROOT, TINY
from helpers.tiers import some_now
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from swift_fastmtp.checkpoint.checkpoint import Checkpoint
from swift_fastmtp.checkpoint.config_file import read_config
from swift_fastmtp.checkpoint.refusals import find_family
from swift_fastmtp.checkpoint.shards import copy_without, tensor_hashes, write_tensors
from swift_fastmtp.errors import FastMTPError
from swift_fastmtp.export.doctor import examine
from swift_fastmtp.export.graft import HEAD_FILE, graft
from swift_fastmtp.export.inspection import inspect_model
from swift_fastmtp.model.head import import_class
from swift_fastmtp.model.loading import load_model
from swift_fastmtp.serving.launch import serve_flags


@pytest.fixture(scope="module")
def lost(tmp_path_factory):
    """The tiny model after a save through transformers, which knows its backbone only as Qwen2."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    work = tmp_path_factory.mktemp("lost")
    plain = {k: v for k, v in json.loads((TINY / "config.json").read_text()).items() if k != "auto_map"}
    config = Qwen2Config(**{**plain, "model_type": "qwen2"})
    Qwen2ForCausalLM.from_pretrained(TINY, config=config, dtype=torch.bfloat16).save_pretrained(work / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(TINY / name, work / "model" / name)
    return work / "model"


def copy(folder, to, change=None, **config):
    shutil.copytree(folder, to)
    if change:
        tensors = load_file(to / "model.safetensors")
        change(tensors)
        save_file(tensors, to / "model.safetensors", metadata={"format": "pt"})
    values = {**json.loads((to / "config.json").read_text()), **config}
    (to / "config.json").write_text(json.dumps({k: v for k, v in values.items() if v is not None}))
    return to


def assert_grafted(out, tuned, donor=TINY, dtype=torch.bfloat16):
    """Every tensor of both, nothing else; and everything that reads a checkpoint takes it."""
    after, before, head = Checkpoint(out), Checkpoint(tuned), Checkpoint(donor)
    rest = {n for n in before.file_of if not n.startswith("model.mtp_layers.")}
    names = {n for n in head.file_of if n.startswith(HEAD)}
    assert set(after.file_of) == rest | names and len(names) == 16
    for name in rest:
        assert torch.equal(after.read(name), before.read(name)), name
    for name in names:
        assert after.read(name).dtype == dtype and torch.equal(after.read(name), head.read(name).to(dtype)), name
    assert inspect_model(out).trainable and examine(out) == [] and serve_flags(out)
    assert not (out / "model.safetensors").exists()  # transformers would load it and never look at the index
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {n: f.name for n, f in after.file_of.items()}
    assert index["metadata"]["total_size"] == sum(after.sizes().values())
    model = load_model(out, dtype)
    want = {**{n: before.read(n) for n in rest}, **{n: head.read(n).to(dtype) for n in names}}
    assert all(torch.equal(p, want[n]) for n, p in model.named_parameters())


def test_a_save_through_transformers_is_undone(lost, tmp_path, shown):
    assert not inspect_model(lost).trainable
    done = graft(lost, tmp_path / "out", TINY)
    assert_grafted(tmp_path / "out", lost)
    assert (tmp_path / "out" / "model-00001-of-00002.safetensors").samefile(lost / "model.safetensors")
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (lost / "tokenizer.json").read_bytes()
    before, after = (json.loads((f / "config.json").read_text()) for f in (lost, tmp_path / "out"))
    tiny = json.loads((TINY / "config.json").read_text())
    assert {k: v for k, v in after.items() if before.get(k) != v} == {
        k: tiny[k] for k in ("architectures", "model_type", "auto_map") if before.get(k) != tiny[k]
    }
    assert (tmp_path / "out" / "configuration_mimo.py").exists()
    assert done.tensors == 16 and any("architectures" in n for n in done.notes)
    assert not any("warning" in n for n in done.notes)
    shown("graft", ["MiMoForCausalLM"])


def test_shards_are_linked(tmp_path):
    tuned = shard(broken_model(tmp_path, lose_mtp), tmp_path / "tuned")
    (tuned / "trainer_state.json").write_text("{}")
    graft(tuned, tmp_path / "out", TINY)
    assert_grafted(tmp_path / "out", tuned)
    for file in tuned.glob("*.safetensors"):
        assert (tmp_path / "out" / file.name).samefile(file)
    assert not (tmp_path / "out" / "trainer_state.json").exists()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_head_takes_the_models_dtype(dtype, lost, tmp_path):
    def change(tensors):
        tensors.update({n: t.to(dtype) for n, t in tensors.items()})

    tuned = copy(lost, tmp_path / "tuned", change, dtype=str(dtype).removeprefix("torch."))
    done = graft(tuned, tmp_path / "out", TINY)
    assert_grafted(tmp_path / "out", tuned, dtype=dtype)
    assert str(dtype).removeprefix("torch.") in done.notes[0]


@pytest.mark.parametrize("sharded", [False, True])
def test_overwrite_leaves_no_stale_tensor(sharded, tmp_path):
    def change(tensors):
        for name in [n for n in tensors if n.startswith(HEAD)]:
            tensors[name] = tensors[name] + 1
        tensors["model.mtp_layers.1.input_proj.weight"] = tensors[HEAD + "input_proj.weight"].clone()

    tuned = broken_model(tmp_path, change)
    tuned = shard(tuned, tmp_path / "tuned") if sharded else tuned
    with pytest.raises(FastMTPError, match="holds 17 MTP tensors already"):
        graft(tuned, tmp_path / "out", TINY)
    graft(tuned, tmp_path / "out", TINY, overwrite=True)
    assert_grafted(tmp_path / "out", tuned)
    graft(tmp_path / "out", tmp_path / "again", TINY, overwrite=True)  # the head's own file is emptied and made anew
    assert_grafted(tmp_path / "again", tuned)


def test_other_vocabulary_rope_and_tokenizer_are_said(lost, tmp_path):
    def pad(tensors):
        for name in ("lm_head.weight", "model.embed_tokens.weight"):
            tensors[name] = torch.cat([tensors[name], tensors[name][:64]])

    tuned = copy(lost, tmp_path / "tuned", pad, vocab_size=6208, rope_parameters={"rope_theta": 5e5})
    tokenizer = json.loads((tuned / "tokenizer.json").read_text())
    (tuned / "tokenizer.json").write_text(json.dumps(tokenizer))  # other bytes, same tokenizer
    notes = "\n".join(graft(tuned, tmp_path / "out", TINY).notes)
    assert "vocab_size is 6208, the donor's is 6144" in notes and "warning: RoPE" in notes and "tokenizer" not in notes
    assert_grafted(tmp_path / "out", tuned)
    tokenizer["added_tokens"].append({**tokenizer["added_tokens"][-1], "id": 6100, "content": "<new>"})
    (tuned / "tokenizer.json").write_text(json.dumps(tokenizer))
    notes = "\n".join(graft(tuned, tmp_path / "out2", TINY).notes)
    assert "0 of its 6087 tokens are gone or renumbered, 1 are new" in notes


def infinite(tensors):
    tensors[HEAD + "mlp.up_proj.weight"][0, 0] = 1e9


def half(tensors):
    tensors.update({n: t.half() for n, t in tensors.items()})


FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
MISFITS = {
    "other width": ({"hidden_size": 96}, {}, "hidden_size is 96"),
    "other heads": ({"num_attention_heads": 3}, {}, "num_attention_heads is 3"),
    "other MLP": ({"intermediate_size": 256}, {}, "intermediate_size is 256"),
    "other architecture": ({"architectures": ["MixtralForCausalLM"]}, {}, "a mimo head fits Qwen2ForCausalLM"),
    "rows": ({"vocab_size": 7000}, {}, "has shape [6144, 192], config.json says [7000, 192]"),
    "quantized": ({"quantization_config": {"quant_method": "fp8"}}, {}, "is quantized (fp8); --draft_only"),
    "FP8": ({"quantization_config": FP8}, {}, "is quantized (fp8); --draft_only writes the layer beside it"),
    "no dense Qwen2": ({"architectures": ["LlamaForCausalLM"]}, {}, "attention_bias is True"),
    "donor lost it too": ({}, {"change": lose_mtp}, "this checkpoint lost its MTP layer"),
    "donor with two": ({}, {"num_nextn_predict_layers": 2}, "num_nextn_predict_layers is 2"),
    "donor unknown": ({}, {"architectures": ["LlamaForCausalLM"]}, "has no known MTP layout"),
    "too large for fp16": ({"change": half, "dtype": "float16"}, {"change": infinite}, "does not fit into float16"),
}


@pytest.mark.parametrize("case", MISFITS)
def test_misfits_are_one_line_and_leave_nothing(case, lost, tmp_path):
    ours, theirs, message = MISFITS[case]
    tuned, donor = copy(lost, tmp_path / "tuned", **ours), copy(TINY, tmp_path / "donor", **theirs)
    with pytest.raises(FastMTPError) as error:
        graft(tuned, tmp_path / "out", donor)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["donor", "tuned"]


def test_misfit_folders(lost, tmp_path):
    with pytest.raises(FastMTPError, match="either --donor BASE or --init_from_last_layer"):
        graft(lost, tmp_path / "out")
    adapter = copy(lost, tmp_path / "adapter")
    (adapter / "adapter_config.json").write_text("{}")
    with pytest.raises(FastMTPError, match="merge it first"):
        graft(adapter, tmp_path / "out", TINY)
    stray = shard(lost, tmp_path / "stray")
    shutil.copyfile(lost / "model.safetensors", stray / "model.safetensors")
    with pytest.raises(FastMTPError, match="transformers loads it instead"):
        graft(stray, tmp_path / "out", TINY)
    short = copy(lost, tmp_path / "short")
    (short / "model.safetensors").write_bytes((lost / "model.safetensors").read_bytes()[:-4])
    with pytest.raises(FastMTPError, match="its header says"):
        graft(short, tmp_path / "out", TINY)
    code = copy(lost, tmp_path / "code", model_type="mimo", auto_map={"AutoConfig": "gone.Config"})
    with pytest.raises(FastMTPError, match=r"auto_map names gone\.py"):
        graft(copy(code, tmp_path / "own", architectures=["MiMoForCausalLM"]), tmp_path / "out", TINY)
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))


def test_a_head_from_the_last_layer(lost, tmp_path):
    """Its block is the last layer, and the block's input is the average of the normed hidden state and embedding."""
    graft(lost, tmp_path / "out", init_from_last_layer=True)
    weights = Checkpoint(tmp_path / "out")
    for name in weights.under("model.layers.3"):
        assert torch.equal(weights.read(name), weights.read(name.replace("model.layers.3.", HEAD)))
    assert torch.equal(weights.read(HEAD + "final_layernorm.weight"), weights.read("model.norm.weight"))
    model = load_model(tmp_path / "out", torch.float32)
    hidden, embeds = torch.randn(2, 1, 5, 192)
    norm = torch.nn.functional.rms_norm
    want = (norm(hidden, (192,), eps=1e-5) + norm(embeds, (192,), eps=1e-5)) / 2
    torch.testing.assert_close(model.head.fuse(hidden, embeds), want)
    assert inspect_model(tmp_path / "out").trainable and examine(tmp_path / "out") == []


def test_no_last_layer_to_start_from(lost, tmp_path):
    def rename(tensors):
        tensors["model.layers.3.mlp.experts.weight"] = tensors.pop("model.layers.3.mlp.up_proj.weight")

    with pytest.raises(FastMTPError, match=r"model\.layers\.3\.mlp\.up_proj\.weight is missing"):
        graft(copy(lost, tmp_path / "model", rename), tmp_path / "out", init_from_last_layer=True)
    with pytest.raises(FastMTPError, match="has no known MTP layout"):
        other = copy(lost, tmp_path / "other", architectures=["GPT2LMHeadModel"])
        graft(other, tmp_path / "out", init_from_last_layer=True)


def test_the_command(lost, tmp_path):
    words = [sys.executable, "-m", "swift_fastmtp.cli", "graft", "--model", lost, "--output_dir", tmp_path / "out"]
    done = subprocess.run([*words, "--donor", TINY], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "16 MTP tensors" in done.stdout and "swift sft" in done.stdout, done.stderr
    again = subprocess.run([*words, "--donor", TINY], cwd=ROOT, capture_output=True, text=True, check=False)
    assert again.returncode == 1 and again.stderr.count("fastmtp: error: ") == 1 and "already exists" in again.stderr


MEMORY = """
import sys
from swift_fastmtp.export.folders import export_draft
from swift_fastmtp.export.graft import graft
def peak():
    return int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1]) * 1024
before = None
for work in sys.argv[1:]:
    graft(f"{work}/tuned", f"{work}/out", f"{work}/base")
    export_draft(f"{work}/trained", f"{work}/draft")
    before, after = before or peak(), peak()
print(after - before)
"""


@pytest.mark.matrix
def test_memory_is_a_tensor_whatever_the_size(tmp_path):
    """A hollow 20 GB model: all of its shards are linked; graft and export take memory for a tensor, not a head."""
    huge = load("export/huge.py")
    huge.make(tmp_path / "small", huge.SIZES["small"], 2**20)
    sizes = {"hidden_size": 2048, "intermediate_size": 16384, "num_hidden_layers": 80, "num_attention_heads": 64}
    facts = huge.make(tmp_path / "large", {**huge.SIZES["small"], **sizes}, 10**9)
    assert facts["checkpoint_bytes"] > 15e9 and facts["disk_bytes"] < 20e6
    words = [sys.executable, "-c", MEMORY, tmp_path / "small", tmp_path / "large"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 3 * facts["largest_tensor_bytes"] < facts["head_bytes"]
    written = [p for p in (tmp_path / "large" / "out").glob("*.safetensors") if p.stat().st_nlink == 1]
    assert [p.name for p in written] == [HEAD_FILE]


def test_the_measured_page_is_the_results():
    results = ROOT / "docs" / "results" / "huge_checkpoint.json"
    page = load("export/huge.py").page(json.loads(results.read_text()))
    assert page == results.with_suffix(".md").read_text(encoding="utf-8")


# Those of transformers.
@pytest.mark.parametrize("name", some_now([n for n in CHECKPOINTS if not row_of(n).config_class]))
def test_other_families_saved_through_transformers(name, tmp_path, shown):
    """A vision tower stays, experts have the form of the donor, and scattered parts come back to their places."""
    base = CHECKPOINTS[name](tmp_path / "base")
    family = find_family(read_config(base))
    cls = AutoModelForImageTextToText if "vision" in name else import_class(family.backbone)
    cls.from_pretrained(base, dtype=torch.bfloat16).save_pretrained(tmp_path / "tuned")
    assert any("lost its MTP layer" in r for r in inspect_model(tmp_path / "tuned").reasons)
    graft(tmp_path / "tuned", tmp_path / "out", base)
    donor, after, before = Checkpoint(base), Checkpoint(tmp_path / "out"), Checkpoint(tmp_path / "tuned")
    head = {n for n in donor.file_of if family.owns(n) and not family.is_copy(n)}
    assert set(after.file_of) == set(before.file_of) | head and not set(before.file_of) & head
    for name in after.file_of:  # routers' biases stay float32
        tensor, want = after.read(name), (donor if name in head else before).read(name)
        assert tensor.dtype == want.dtype and torch.equal(tensor, want)
    assert inspect_model(tmp_path / "out").trainable and load_model(tmp_path / "out", torch.float32)
    assert "error" not in {finding.level for finding in examine(tmp_path / "out")}
    shown("graft", read_config(base)["architectures"])


@pytest.mark.parametrize("name", ["qwen3_5_moe_vision", "qwen3_moe"])
def test_a_layer_is_made_for_a_mixture_of_experts(name, tmp_path):
    base = CHECKPOINTS[name](tmp_path / "base")
    auto = AutoModelForImageTextToText if "vision" in name else AutoModelForCausalLM
    auto.from_pretrained(base, dtype=torch.bfloat16).save_pretrained(tmp_path / "tuned")
    graft(tmp_path / "tuned", tmp_path / "out", init_from_last_layer=True)
    model = load_model(tmp_path / "out", torch.float32)
    assert torch.equal(model.head.layers[0].mlp.experts.down_proj, model.model.layers[-1].mlp.experts.down_proj)
    assert torch.equal(model.head.norm.weight, model.model.norm.weight)


def test_no_layer_is_made_where_the_last_one_is_of_another_kind(tmp_path):
    base = CHECKPOINTS["ernie4_5_moe"](tmp_path / "base")
    with pytest.raises(FastMTPError, match="the last decoder layer is no ernie4_5_moe block"):
        graft(base, tmp_path / "out", init_from_last_layer=True, overwrite=True)


NAMES = st.text("abc.", min_size=1, max_size=6)
SHAPES = st.lists(st.integers(0, 4), max_size=3).map(tuple)


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(NAMES, SHAPES, max_size=6), st.sampled_from([torch.bfloat16, torch.float32]), st.data())
def test_files_are_what_safetensors_reads(tmp_path_factory, shapes, dtype, data):
    folder = tmp_path_factory.mktemp("files")
    tensors = {n: torch.randn(s).to(dtype) for n, s in shapes.items()}
    hashes = write_tensors(folder / "a.safetensors", {n: (dtype, s) for n, s in shapes.items()}, tensors.__getitem__)
    found = load_file(folder / "a.safetensors")
    assert found.keys() == tensors.keys() and tensor_hashes(folder / "a.safetensors") == hashes
    assert all(torch.equal(found[n], t) for n, t in tensors.items())
    gone = set(data.draw(st.lists(st.sampled_from(sorted(shapes)), unique=True))) if shapes else set()
    copy_without(folder / "a.safetensors", folder / "b.safetensors", gone)
    rest = load_file(folder / "b.safetensors")
    assert rest.keys() == tensors.keys() - gone and all(torch.equal(t, tensors[n]) for n, t in rest.items())
    assert tensor_hashes(folder / "b.safetensors") == {n: h for n, h in hashes.items() if n not in gone}
