"""Checkpoints of families other than MiMo: native keys from load to export, the real `swift` command, one clear error
for each layout that is not trained, and the page that says all that."""

import json
import re
import shutil
from types import SimpleNamespace

import pytest
import support_matrix
import torch
from conftest import ROOT, logged, sft_args, swift
from models import (
    CARRIED,
    CHECKPOINTS,
    random_ernie,
    random_glm4_moe,
    random_qwen3_5,
    random_qwen3_next,
    save_checkpoint,
    tensors_of,
)
from safetensors.torch import load_file, save_file
from test_families import KINDS
from transformers import AutoModelForImageTextToText

from swift_fastmtp.checkpoints import Weights, fingerprint
from swift_fastmtp.config import FastMTPConfig
from swift_fastmtp.errors import FastMTPError
from swift_fastmtp.evaluation.cost import read_cost
from swift_fastmtp.export.doctor import examine
from swift_fastmtp.export.folders import export_draft, export_full
from swift_fastmtp.export.graft import graft
from swift_fastmtp.export.inspection import inspect_model
from swift_fastmtp.export.serve_args import command, serve_flags
from swift_fastmtp.families import FAMILIES, find_family, layout_table, match_family, read_config, refused_table
from swift_fastmtp.head import as_stored, import_class, join_experts, split_experts
from swift_fastmtp.known_layouts import LAYOUTS
from swift_fastmtp.modeling import build_class, head_shapes, load_config, load_model
from swift_fastmtp.rollout import segment_ids
from swift_fastmtp.swift_plugin.arguments import _check_packing
from swift_fastmtp.vocab.must_keep import read_vocabulary

HEAD = "mtp."
EXPERT = "mtp.layers.0.mlp.experts.1.up_proj.weight"
LAYER = "model.layers.2."
BIAS = LAYER + "mlp.gate.e_score_correction_bias"
# MTP tensors in a checkpoint; of the two forms of four experts, one has three tensors for each, one has two in all.
TENSORS = {
    "qwen3_next": 29,
    "qwen3_5": 15,
    "qwen3_5_vision": 15,
    "qwen3_5_moe": 29,
    "qwen3_5_moe_vision": 19,
    "qwen3_moe": 25,
    "ernie4_5_moe": 12,
    "glm4_moe": 38,
    "deepseek_v3": 36,
    "glm4_moe_lite": 36,
    "deepseek_v32": 41,
    "glm_moe_dsa": 41,
    "longcat_flash": 16,
    "bailing_moe_v2": 34,
}
STOPS = ("longcat_flash",)  # Not drafted with by stock SGLang.


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_checkpoint(random_qwen3_next, tmp_path_factory.mktemp("qwen3_next") / "base")


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Every checkpoint by name, made when asked for."""
    made, folder = {}, tmp_path_factory.mktemp("bases")
    return lambda name: made.get(name) or made.setdefault(name, CHECKPOINTS[name](folder / name))


@pytest.fixture(params=list(CHECKPOINTS))
def each_base(request, bases):
    return bases(request.param)


def test_experts_split_as_transformers_splits_them(base):
    """Ours is in the checkpoint's names without a model, and must give what transformers' converters give."""
    model = load_model(base, torch.bfloat16)
    ours = split_experts(model.head_parameters())
    stored = {n: t for n, t in tensors_of(base).items() if n.startswith(HEAD)}
    assert ours.keys() == stored.keys() and len(stored) == 29
    assert all(torch.equal(ours[n], stored[n]) for n in stored)
    assert head_shapes(base) == {n: tuple(t.shape) for n, t in stored.items()}
    joined = join_experts(stored)
    assert all(torch.equal(joined[n], p) for n, p in model.head_parameters().items())


def test_trainers_that_read_checkpoints_themselves_find_every_tensor(each_base):
    """transformers' Trainer resumes with a lenient `load_state_dict` of the file's names."""
    model, stored = load_model(each_base, torch.float32), tensors_of(each_base)
    for parameter in model.head_parameters().values():
        parameter.data.zero_()
    owns, copies = model.family.owns, model.family.is_copy
    found = model.load_state_dict({n: t for n, t in stored.items() if owns(n) and not copies(n)}, strict=False)
    assert not found.unexpected_keys and not [n for n in found.missing_keys if owns(n)]
    parameters = model.head_parameters()
    back = as_stored(parameters, head_shapes(each_base))
    assert parameters and all(torch.equal(p, stored[n].float()) for n, p in back.items())


@pytest.mark.parametrize("name", [n for n in CHECKPOINTS if "vision" in n])
def test_the_text_model_runs_as_it_does_beside_the_vision_tower(name, bases):
    """The tower is not built; hidden states of text, and its positions, are those of the whole model."""
    ours = load_model(bases(name), torch.float32)
    whole = AutoModelForImageTextToText.from_pretrained(bases(name), dtype=torch.float32).eval()
    assert not [n for n, _ in ours.named_modules() if "visual" in n]
    ids, mask = torch.randint(100, 6000, (2, 12)), torch.ones(2, 12).long()
    mask[1, 9:] = 0
    positions, _ = whole.model.get_rope_index(ids, torch.zeros_like(ids), attention_mask=mask)
    assert torch.equal(ours.get_rope_index(ids, mask)[0][:, mask.bool()], positions[:, mask.bool()])
    with torch.no_grad():
        want = whole.model(input_ids=ids, attention_mask=mask).last_hidden_state
        segments = segment_ids(positions[0], mask)
        got = ours.backbone_states(ids, mask, positions[0], segments)
        assert torch.equal(ours.lm_head.weight, whole.lm_head.weight)
    torch.testing.assert_close(got[mask.bool()], want[mask.bool()], atol=1e-5, rtol=1e-5)
    labels = ids.masked_fill(mask == 0, -100)
    plain = ours(input_ids=ids, attention_mask=mask, labels=labels)
    threefold = ours(input_ids=ids, attention_mask=mask, labels=labels, position_ids=positions)
    assert torch.equal(plain.step_loss, threefold.step_loss)
    greedy = {"max_new_tokens": 3, "do_sample": False}
    added = {"mm_token_type_ids": torch.zeros_like(ids[:1]), "position_ids": positions[:, :1]}  # by their templates
    assert torch.equal(ours.generate(ids[:1], **greedy), ours.generate(ids[:1], **greedy, **added))


def test_decay_rates_and_routers_stay_in_float32_as_in_the_engine(bases):
    model, stored = load_model(bases("qwen3_5_moe_vision"), torch.bfloat16), Weights(bases("qwen3_5_moe_vision"))
    (wide,) = (n for n, p in model.named_parameters() if p.dtype == torch.float32)
    rates = stored.read("model.language_model.layers.0.linear_attn.A_log")
    assert wide == "model.layers.0.linear_attn.A_log" and torch.equal(model.get_parameter(wide), rates)
    assert not torch.equal(rates, rates.bfloat16().float())
    ids = torch.randint(0, 6000, (1, 12))
    assert model(input_ids=ids, labels=ids).loss.isfinite()
    longcat = load_model(bases("longcat_flash"), torch.bfloat16)
    wide = {n.rsplit("router.")[-1] for n, t in longcat.state_dict().items() if t.dtype == torch.float32}
    assert wide == {"classifier.weight", "e_score_correction_bias"}
    assert longcat(input_ids=ids, labels=ids).loss.isfinite()


@pytest.mark.parametrize("name", ["qwen3_5_vision", "longcat_flash"])
def test_rope_in_three_parts_is_plain_rope_for_text_and_so_is_yarn_by_one(name, bases):
    """Every position of text has one number, whichever axis a frequency belongs to."""
    rotary = load_model(bases(name), torch.float32).model.rotary_emb
    assert rotary.mrope_section == [2, 1, 1] if name == "qwen3_5_vision" else rotary.rope_type == "yarn"
    positions = torch.arange(30)[None]
    cos, sin = rotary(torch.zeros(1), positions)
    angle = (positions[..., None] * 10000.0 ** -(torch.arange(4) / 4)).repeat(1, 1, 2)
    torch.testing.assert_close((cos, sin), (angle.cos(), angle.sin()))


def test_native_keys_from_load_to_export(each_base, tmp_path, shown):
    """Load, train a step, save the head, export: every tensor accounted for, every other byte as it was."""
    from swift_fastmtp.swift_plugin.tuner import FastMTPTuner

    model = load_model(each_base, torch.float32)
    model.fastmtp, model.model_dir = FastMTPConfig(), each_base
    model.freeze_backbone()
    model.train()
    before = {n: t.clone() for n, t in model.state_dict().items() if not model.family.owns(n)}
    optimizer = torch.optim.AdamW(model.head_parameters().values(), lr=1e-2)
    ids = torch.randint(0, 6000, (2, 16))
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items() if n in before)
    FastMTPTuner.save_pretrained(model, str(tmp_path / "checkpoint"))
    trained, stored = load_file(tmp_path / "checkpoint/model.safetensors"), tensors_of(each_base)
    assert trained.keys() == head_shapes(each_base).keys() and len(trained) == TENSORS[each_base.name]
    changed = {n for n, t in trained.items() if not torch.equal(t, stored[n].float())}
    assert changed == {n for n in trained if not CARRIED.search(n)}  # every weight has learnt
    export_full(tmp_path / "checkpoint", tmp_path / "full")
    export_draft(tmp_path / "checkpoint", tmp_path / "draft")
    full, draft = tensors_of(tmp_path / "full"), tensors_of(tmp_path / "draft")
    assert full.keys() == stored.keys() and draft.keys() == trained.keys()
    for name, tensor in full.items():
        want = trained[name].to(stored[name].dtype) if name in trained else stored[name]
        assert tensor.dtype == want.dtype and torch.equal(tensor, want), name
    assert all(torch.equal(t, full[n]) for n, t in draft.items())
    rewritten = {Weights(each_base).file_of[n] for n in trained}
    for file in Weights(each_base).files:
        copy = tmp_path / "full" / file.name
        assert copy.samefile(file) == (file not in rewritten) and copy.stat().st_size == file.stat().st_size
    for folder in ("full", "draft"):
        assert (tmp_path / folder / "config.json").read_bytes() == (each_base / "config.json").read_bytes()
        assert [f.why for f in examine(tmp_path / folder)] == [model.family.sglang_gap] * (each_base.name in STOPS)
    flags = serve_flags(tmp_path / "draft")
    assert str(each_base) in command(flags)
    assert ("--trust-remote-code" in command(flags)) == ("auto_map" in read_config(each_base))
    assert (model.family.sglang_gap in [flag.why for flag in flags]) == (each_base.name in STOPS)
    if not model.family.plain_model_type:
        with pytest.raises(FastMTPError, match="has no configuration without remote code; keep it"):
            export_draft(tmp_path / "checkpoint", tmp_path / "plain", remote_code=False)
    shown("keys", read_config(each_base)["architectures"])


def test_whatever_reads_a_checkpoint_finds_the_text_part(each_base):
    """`inspect`, the cost model and the vocabulary, where config.json has parts and where it has none."""
    found = inspect_model(each_base)
    assert found.trainable and found.mtp_layers == 1
    assert found.mtp_tensors == TENSORS[each_base.name] + len(found.own_matrices)
    assert found.engines["sglang"].startswith("no: the draft layer" if each_base.name in STOPS else "yes")
    family = match_family(read_config(each_base))
    assert found.engines["vllm"].startswith("yes" if family.vllm else "no: it has no method")
    if not family.vllm:
        with pytest.raises(FastMTPError, match=f"vLLM has no MTP for {family.architectures[0]}; serve with SGLang"):
            serve_flags(each_base, "vllm")
    assert "drops" in found.lost_on_save
    assert found.tied_head == ("lm_head.weight" not in Weights(each_base).file_of)
    cost = read_cost(each_base)
    assert cost.vocab_size == read_vocabulary(each_base).exists_V.shape[0] == 6144 and 0 < cost.draft < cost.verify


def test_copies_of_the_matrices_are_allowed_and_left_out_of_what_is_trained(tmp_path):
    """As GLM-4.5 and DeepSeek-V3 hold them; SGLang's loaders skip them."""
    folder = save_checkpoint(random_glm4_moe, tmp_path / "model")
    copies = {LAYER + "embed_tokens.weight", LAYER + "shared_head.head.weight"}
    found = inspect_model(folder)
    assert found.trainable and set(found.own_matrices) == copies and found.mtp_layers == 1
    assert copies <= set(tensors_of(folder)) and not copies & set(head_shapes(folder))
    assert examine(folder) == []
    identity = fingerprint(folder, find_family(read_config(folder)))
    tensors = {n: t for n, t in tensors_of(folder).items() if n not in copies}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").unlink()
    for file in folder.glob("model-*"):
        file.unlink()
    assert inspect_model(folder).trainable and not inspect_model(folder).own_matrices
    assert fingerprint(folder, find_family(read_config(folder))) == identity


@pytest.mark.parametrize("name", ["deepseek_v32", "glm_moe_dsa"])
def test_an_indexer_is_carried_along_in_float32(name, bases):
    """It is not trained, so a bfloat16 run must not round what it stores again."""
    model, stored = load_model(bases(name), torch.bfloat16), tensors_of(bases(name))
    found = {n: t for n, t in model.head_tensors().items() if ".indexer." in n}
    assert len(found) == 5 and not found.keys() & model.head_parameters().keys()
    assert all(t.dtype == torch.float32 and torch.equal(t, stored[n].float()) for n, t in found.items())
    assert {stored[n].dtype for n in found} == {torch.float32, torch.bfloat16}
    assert model.model.layers[0].self_attn.indexer.wk.weight.dtype == torch.bfloat16
    ids = torch.randint(0, 6000, (2, 16))
    with torch.autocast("cpu", torch.bfloat16):
        assert model(input_ids=ids, labels=ids).loss.isfinite()


@pytest.mark.parametrize("kind", ["glm4_moe", "deepseek_v3", "deepseek_v32"])
def test_a_numbered_layer_is_made_after_the_last_one(kind, tmp_path):
    base = save_checkpoint(KINDS[kind][0], tmp_path / "base")
    tuned = import_class(load_model(base, torch.bfloat16).family.backbone).from_pretrained(base, dtype=torch.bfloat16)
    tuned.save_pretrained(tmp_path / "tuned")
    assert graft(tmp_path / "tuned", tmp_path / "fresh", init_from_last_layer=True).family == kind
    assert load_model(tmp_path / "fresh", torch.float32).family.prefix == "model.layers.2"
    config = tmp_path / "tuned" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "num_hidden_layers": 1}))
    with pytest.raises(
        FastMTPError, match=r"num_hidden_layers is 1, in .* it is 2; the MTP layer is numbered after it"
    ):
        graft(tmp_path / "tuned", tmp_path / "other", base)


def test_a_chat_model_without_the_layer_gets_that_of_the_base_model(bases, tmp_path, shown):
    """As Ling 2.0 is published."""
    base = bases("bailing_moe_v2")
    chat = broken(base, tmp_path, lose_mtp, num_nextn_predict_layers=0)
    shutil.copyfile(base / "configuration_bailing_moe_v2.py", chat / "configuration_bailing_moe_v2.py")
    with pytest.raises(FastMTPError, match="exactly 1: `fastmtp graft` puts one in"):
        load_model(chat, torch.float32)
    graft(chat, tmp_path / "whole", base)
    model, (want, whole) = load_model(tmp_path / "whole", torch.bfloat16), map(tensors_of, (base, tmp_path / "whole"))
    assert model.family.name == "bailing_moe_v2" and examine(tmp_path / "whole") == []
    assert want.keys() == whole.keys() and all(torch.equal(whole[n], want[n]) for n in want)
    shown("graft", model.config.architectures)


def test_ling_without_groups_and_without_a_width_of_heads(bases, tmp_path):
    """`n_group` 0 is what inclusionAI's converter writes for a router without groups."""
    config = load_config(broken(bases("bailing_moe_v2"), tmp_path, n_group=0, topk_group=0, head_dim=None))
    assert (config.n_group, config.topk_group, config.head_dim) == (1, 1, 8)


@pytest.mark.parametrize("key", [key for row in FAMILIES for key, _ in row.only])
def test_settings_that_the_classes_do_not_know_are_refused(key, bases):
    config = read_config(bases("bailing_moe_v2"))
    with pytest.raises(FastMTPError, match=f'^config.json: {key} is "other"; BailingMoeV2ForCausalLM can be trained'):
        find_family({**config, key: "other"})


def test_a_static_map_is_refused_where_the_output_matrix_is_tied(tmp_path):
    folder = save_checkpoint(random_qwen3_5, tmp_path / "model")
    assert "lm_head.weight" not in Weights(folder).file_of
    words = command(serve_flags(folder))
    assert words[words.index("--model-path") + 1] == str(folder) and "--speculative-draft-model-path" not in words
    with pytest.raises(FastMTPError, match="no static token map for tied embeddings"):
        serve_flags(folder, token_map="map.pt")


def test_zero_centred_norms_may_be_zero(base, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(base, folder)
    for name, file in Weights(folder).file_of.items():
        if name in ("mtp.norm.weight", "mtp.fc.weight"):
            tensors = load_file(file)
            save_file({**tensors, name: torch.zeros_like(tensors[name])}, file, metadata={"format": "pt"})
    assert [f.what for f in examine(folder)] == ["mtp.fc.weight is all zeros"]


def run_args(base, rows, output_dir, **changes):
    """A vision checkpoint's chat template is found by how it renders, since the folder's name says nothing."""
    template = None if "vision" in base.name else "qwen"
    return sft_args(base, rows, output_dir, **{"max_steps": 4, "save_steps": 2, "template": template, **changes})


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_swift_trains_resumes_and_exports(name, bases, rows, tmp_path, shown):
    """Started once and resumed half-way: the same weights; exported: the base with another MTP layer."""
    base, run, again, full = bases(name), tmp_path / "run", tmp_path / "again", tmp_path / "full"
    done = swift(*run_args(base, rows, run))
    found = "template 'qwen3_5' renders like the tokenizer's chat template"
    assert (found in done.stdout + done.stderr) == ("vision" in name)
    assert len(logged(run)) == 4 and logged(run, "mtp_acc_3")
    swift(*run_args(base, rows, again), "--resume_from_checkpoint", run / "checkpoint-2")
    swift("export", "--adapters", again / "checkpoint-4", "--output_dir", full)
    want, got = (load_file(folder / "checkpoint-4/model.safetensors") for folder in (run, again))
    assert want.keys() == got.keys() == head_shapes(base).keys()
    assert all(torch.equal(want[n], got[n]) for n in want)
    before, after = tensors_of(base), tensors_of(full)
    assert before.keys() == after.keys()
    changed = {n for n in before if not torch.equal(before[n], after[n])}
    assert changed <= {n for n in want if not CARRIED.search(n)}
    assert {n for n in want if "_proj" in n and not n.endswith(".bias") and not CARRIED.search(n)} <= changed
    assert (full / "config.json").read_bytes() == (base / "config.json").read_bytes()
    shown("swift", read_config(base)["architectures"])


@pytest.mark.parametrize("name", ["qwen3_next", "qwen3_5_vision", "ernie4_5_moe"])
def test_the_backbone_in_memory_stays_bit_identical_in_training(name, bases, rows, tmp_path):
    """Tuner type `full` saves the whole model, so its checkpoint shows what training did to every tensor."""
    base, whole = bases(name), tmp_path / "run/checkpoint-4"
    swift(*run_args(base, rows, tmp_path / "run", tuner_type="full"))
    swift("export", "--model", whole, "--output_dir", tmp_path / "full")
    family = match_family(read_config(base))
    before, after = tensors_of(base), tensors_of(whole)
    rest = {n for n in before if ".visual." not in n}
    assert rest == after.keys() and len(before) - len(rest) == (21 if "vision" in name else 0)
    assert all(torch.equal(before[n].float(), after[n].float()) for n in rest if not family.owns(n))
    assert any(not torch.equal(before[n].float(), after[n]) for n in rest if family.owns(n))
    assert examine(tmp_path / "full") == []
    full = tensors_of(tmp_path / "full")
    assert full.keys() == before.keys() and all(torch.equal(full[n], before[n]) for n in before if ".visual." in n)


def test_lora_is_for_dense_models(bases, rows, tmp_path):
    """With experts anywhere, peft turns the head's target regex into bare names that also match the backbone."""
    lora = {"tuner_type": "lora", "lora_rank": 4}
    for name in ("qwen3_next", "ernie4_5_moe"):
        failed = swift(*run_args(bases(name), rows, tmp_path / name, **lora), check=False)
        line = failed.stderr.splitlines()[-1]
        assert failed.returncode and "lora does not work with a mixture of experts" in line
        assert "use --tuner_type fastmtp" in line
    base = bases("qwen3_5_vision")
    swift(*run_args(base, rows, tmp_path / "run", **lora))
    swift("export", "--adapters", tmp_path / "run/checkpoint-4", "--output_dir", tmp_path / "full")
    before, after = tensors_of(base), tensors_of(tmp_path / "full")
    assert before.keys() == after.keys()
    changed = {n for n in before if not torch.equal(before[n], after[n])}
    assert changed and all(re.fullmatch(r"mtp\.(fc|.*_proj)\.weight", n) for n in changed)


def broken(base, tmp_path, change=None, **config):
    """The checkpoint in one file, changed."""
    folder = tmp_path / "model"
    folder.mkdir()
    tensors = tensors_of(base)
    if change:
        change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({**json.loads((base / "config.json").read_text()), **config}))
    return folder


def second_layer(tensors):
    tensors["mtp.layers.1.input_layernorm.weight"] = torch.ones(32)


def narrow(tensors):
    tensors["mtp.fc.weight"] = tensors["mtp.fc.weight"][:16, :32].contiguous()


def lose_mtp(tensors):
    for name in [n for n in tensors if n.startswith((HEAD, LAYER))]:
        del tensors[name]


ERRORS = {
    "unknown family": (None, {"architectures": ["LlamaForCausalLM"]}, "no known MTP layout; known: MiMoForCausalLM, "),
    "no architectures": (None, {"architectures": None}, "architectures [] has no known MTP layout"),
    "two layers, by the config": (None, {"num_nextn_predict_layers": 2}, "num_nextn_predict_layers is 2; FastMTP"),
    "two layers, by the tensors": (second_layer, {}, "mtp.layers.1.input_layernorm.weight; it is of a second MTP"),
    "hidden size": (narrow, {}, "the MTP layer has hidden size 16, the model 32; it belongs to another model"),
    "lost": (lose_mtp, {}, "no tensor under 'mtp.'; this checkpoint lost its MTP layer"),
    "expert missing": (lambda t: t.pop(EXPERT), {}, f"MTP tensor {EXPERT} is missing"),
    "backbone": (lambda t: t.pop("model.norm.weight"), {}, "model.norm.weight is in no file (1 such tensors)"),
    "tied": (None, {"tie_word_embeddings": True}, "tie_word_embeddings is true, but Qwen3NextForCausalLM has its own"),
}  # fmt: skip


NUMBERED_ERRORS = {
    "two layers, by the config": (None, {"num_nextn_predict_layers": 2}, "num_nextn_predict_layers is 2; FastMTP"),
    "two layers, by the tensors": (
        lambda t: t.update({"model.layers.3.enorm.weight": torch.ones(32)}),
        {},
        "unexpected MTP tensor model.layers.3.enorm.weight; it is of a second MTP layer",
    ),
    "hidden size": (
        lambda t: t.update({LAYER + "eh_proj.weight": torch.ones(16, 32)}),
        {},
        "the MTP layer has hidden size 16, the model 32; it belongs to another model",
    ),
    "lost": (lose_mtp, {}, "no tensor under 'model.layers.2.'; this checkpoint lost its MTP layer"),
    "no bias": (lambda t: t.pop(BIAS), {}, f"MTP tensor {BIAS} is missing"),
    "another depth": (None, {"num_hidden_layers": 3}, "no tensor under 'model.layers.3.'"),
    "no depth": (None, {"num_hidden_layers": None}, "num_hidden_layers is None; the MTP layer is numbered after it"),
}


LONGCAT_ERRORS = {
    "two layers, by the config": (None, {"num_nextn_predict_layers": 2}, "num_nextn_predict_layers is 2; FastMTP"),
    "two layers, by the tensors": (
        lambda t: t.update({"model.mtp.layers.1.enorm.m.weight": torch.ones(32)}),
        {},
        "unexpected MTP tensor model.mtp.layers.1.enorm.m.weight; it is of a second MTP layer",
    ),
    "no model type": (None, {"model_type": None}, 'has no model_type; add "model_type": "longcat_flash"'),
}


def one_clear_error(case, base, tmp_path):
    change, config, message = case
    with pytest.raises(FastMTPError) as error:
        load_model(broken(base, tmp_path, change, **config), torch.float32)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("case", ERRORS)
def test_one_clear_error(case, base, tmp_path):
    one_clear_error(ERRORS[case], base, tmp_path)


@pytest.mark.parametrize("case", NUMBERED_ERRORS)
def test_one_clear_error_of_a_numbered_layer(case, bases, tmp_path):
    one_clear_error(NUMBERED_ERRORS[case], bases("deepseek_v3"), tmp_path)


@pytest.mark.parametrize("case", LONGCAT_ERRORS)
def test_one_clear_error_of_longcat(case, bases, tmp_path):
    one_clear_error(LONGCAT_ERRORS[case], bases("longcat_flash"), tmp_path)


def test_a_numbered_head_is_named_by_the_folder_alone(bases):
    """`--tuner_type full` and `lora` choose parameters by a pattern, and must not reach a backbone's layer."""
    from swift_fastmtp.swift_plugin.arguments import _families, _roots

    own, others = (_roots(_families(model)) for model in (str(bases("glm4_moe")), "org/name"))
    assert re.fullmatch(own, "model.layers.2") and not re.match(own, "model.layers.1.self_attn")
    assert not re.match(others, "model.layers.2.self_attn")


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda row: row.name)
def test_known_layouts_are_refused_with_their_reason(layout):
    for name in layout.architectures:
        with pytest.raises(FastMTPError) as error:
            find_family({"architectures": [name]})
        assert f"{name} cannot be trained here: {layout.reason}" in str(error.value)


@pytest.mark.parametrize("name", ["packing", "padding_free"])
def test_packing_is_refused_where_no_attention_keeps_documents_apart(name, bases):
    args = SimpleNamespace(model=str(bases("deepseek_v32")), attn_impl="flash_attention_2")
    with pytest.raises(FastMTPError, match=f"has none for DeepseekV32ForCausalLM; drop --{name}"):
        _check_packing(name, args)


def test_keys_of_the_text_part_count():
    config = {"architectures": ["Qwen3_5ForConditionalGeneration"], "model_type": "qwen3_5"}
    with pytest.raises(FastMTPError, match="mtp_num_hidden_layers is 2"):
        find_family({**config, "text_config": {"mtp_num_hidden_layers": 2}})
    with pytest.raises(FastMTPError, match="tie_word_embeddings is True, and in text_config False"):
        find_family({**config, "tie_word_embeddings": True, "text_config": {"tie_word_embeddings": False}})
    assert find_family({**config, "text_config": {"tie_word_embeddings": True}}).name == "qwen3_5"


def test_the_block_is_the_engines_whatever_the_backbones_first_layer_is():
    sparse = random_qwen3_next().config
    sparse.mlp_only_layers, sparse.decoder_sparse_step = [0, 1], 2
    dense = random_ernie().config
    assert sparse.layer_types[0] == "linear_attention" and dense.moe_layer_start_index == 0
    with torch.device("meta"):
        heads = [build_class(match_family({"architectures": c.architectures}))(c).head for c in (sparse, dense)]
    mlps = heads[0].get_submodule("layers.0.mlp"), heads[1].get_submodule("mtp_block.0.mlp")
    assert [hasattr(mlp, "experts") for mlp in mlps] == [True, False]


def test_the_page_is_made_from_the_tables():
    page = (ROOT / "docs/families.md").read_text(encoding="utf-8")
    assert layout_table() in page and support_matrix.table() in page and refused_table() in page


def test_every_architecture_is_shown(bases):
    """Every architecture of every row is a checkpoint here; MiMo has tests of its own everywhere."""
    ran = {read_config(bases(name))["architectures"][0] for name in CHECKPOINTS} | {"MiMoForCausalLM"}
    claims = support_matrix.read()["shown"]
    assert [*claims] == support_matrix.architectures() and claims.keys() == ran
    assert all(
        {"keys", "swift", "graft"} <= shown.keys() and shown.keys() & {"draft class", "server"}
        for shown in claims.values()
    )


def test_rows_do_not_share_an_architecture_or_a_path():
    names = [a for row in (*FAMILIES, *LAYOUTS) for a in row.architectures]
    assert len(set(names)) == len(names)
    for family in FAMILIES:
        family = family.at(7)
        assert match_family({"architectures": list(family.architectures), "num_hidden_layers": 7}) == family
        for path in family.layer_paths:
            assert re.fullmatch(r"[\w.]+\.[07]", path) and family.owns(f"{path}.weight")
            assert not family.is_other_layer(f"{path}.weight")
            assert family.is_other_layer(f"{path[:-1]}8.weight") and family.owns(f"{path[:-1]}8.weight")
        assert (
            not family.owns("model.layers.6.mlp.up_proj.weight")
            and not family.owns("model.layers.0.mlp.up_proj.weight")
            and not family.owns("model.norm.weight")
        )
