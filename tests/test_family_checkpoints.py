"""Checkpoints of families other than MiMo: native keys from load to export, and what reads them on the way."""

import json
import shutil

import pytest
import torch
from helpers.models import (
    CARRIED,
    CHECKPOINTS,
    HEAD,
    LAYER,
    RANDOM,
    broken,
    for_each_row,
    lose_mtp,
    random_glm4_moe,
    random_qwen3_5,
    save_checkpoint,
    tensors_of,
)
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from swift_fastmtp.checkpoint.checkpoint import Checkpoint
from swift_fastmtp.checkpoint.config_file import read_config
from swift_fastmtp.errors import FastMTPError
from swift_fastmtp.export.doctor import examine
from swift_fastmtp.export.folders import export_draft, export_full
from swift_fastmtp.export.graft import graft
from swift_fastmtp.export.inspection import inspect_model
from swift_fastmtp.families.table import match_family
from swift_fastmtp.method.config import FastMTPConfig
from swift_fastmtp.method.rollout import segment_ids
from swift_fastmtp.model.config import load_config
from swift_fastmtp.model.head import as_stored, import_class, join_experts, split_experts
from swift_fastmtp.model.loading import head_shapes, load_model
from swift_fastmtp.serving.flags import command
from swift_fastmtp.serving.launch import serve_flags
from swift_fastmtp.simulate.cost import read_cost
from swift_fastmtp.vocab.must_keep import read_vocabulary

BIAS = LAYER + "mlp.gate.e_score_correction_bias"
# MTP tensors in a checkpoint; of the two forms of four experts, one has three tensors for each, one has two in all.
TENSORS = for_each_row(
    "TENSORS of tests/test_family_checkpoints.py",
    {
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
    },
    but=["mimo"],
)


@pytest.fixture
def base(bases):
    return bases("qwen3_next")


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
    assert head_shapes(Checkpoint(base)) == {n: tuple(t.shape) for n, t in stored.items()}
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
    back = as_stored(parameters, head_shapes(Checkpoint(each_base)))
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
    model, stored = load_model(bases("qwen3_5_moe_vision"), torch.bfloat16), Checkpoint(bases("qwen3_5_moe_vision"))
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
    assert trained.keys() == head_shapes(Checkpoint(each_base)).keys() and len(trained) == TENSORS[each_base.name]
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
    rewritten = {Checkpoint(each_base).file_of[n] for n in trained}
    for file in Checkpoint(each_base).files:
        copy = tmp_path / "full" / file.name
        assert copy.samefile(file) == (file not in rewritten) and copy.stat().st_size == file.stat().st_size
    gap = model.family.engines.sglang_gap
    for folder in ("full", "draft"):
        assert (tmp_path / folder / "config.json").read_bytes() == (each_base / "config.json").read_bytes()
        assert [f.why for f in examine(tmp_path / folder)] == ([gap] if gap else [])
    flags = serve_flags(tmp_path / "draft")
    assert str(each_base) in command(flags)
    assert ("--trust-remote-code" in command(flags)) == ("auto_map" in read_config(each_base))
    assert (gap in [flag.why for flag in flags]) == (gap is not None)
    if not model.family.plain_model_type:
        with pytest.raises(FastMTPError, match="has no configuration without remote code; keep it"):
            export_draft(tmp_path / "checkpoint", tmp_path / "plain", remote_code=False)
    shown("keys", read_config(each_base)["architectures"])


def test_whatever_reads_a_checkpoint_finds_the_text_part(each_base):
    """`inspect`, the cost model and the vocabulary, where config.json has parts and where it has none."""
    found = inspect_model(each_base)
    assert found.trainable and found.mtp_layers == 1
    assert found.mtp_tensors == TENSORS[each_base.name] + len(found.own_matrices)
    family = match_family(read_config(each_base))
    gap = family.engines.sglang_gap
    assert found.engines["sglang"].startswith(f"no: {gap[:15]}" if gap else "yes")
    assert found.engines["vllm"].startswith("yes" if family.engines.vllm else "no: it has no method")
    if not family.engines.vllm:
        with pytest.raises(FastMTPError, match=f"vLLM has no MTP for {family.architectures[0]}; serve with SGLang"):
            serve_flags(each_base, "vllm")
    assert "drops" in found.lost_on_save
    assert found.tied_head == ("lm_head.weight" not in Checkpoint(each_base).file_of)
    cost = read_cost(each_base)
    assert cost.vocab_size == read_vocabulary(each_base).exists_V.shape[0] == 6144 and 0 < cost.draft < cost.verify


def test_copies_of_the_matrices_are_allowed_and_left_out_of_what_is_trained(tmp_path):
    """As GLM-4.5 and DeepSeek-V3 hold them; SGLang's loaders skip them."""
    folder = save_checkpoint(random_glm4_moe, tmp_path / "model")
    copies = {LAYER + "embed_tokens.weight", LAYER + "shared_head.head.weight"}
    found = inspect_model(folder)
    assert found.trainable and set(found.own_matrices) == copies and found.mtp_layers == 1
    assert copies <= set(tensors_of(folder)) and not copies & set(head_shapes(Checkpoint(folder)))
    assert examine(folder) == []
    identity = Checkpoint(folder).fingerprint
    tensors = {n: t for n, t in tensors_of(folder).items() if n not in copies}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").unlink()
    for file in folder.glob("model-*"):
        file.unlink()
    assert inspect_model(folder).trainable and not inspect_model(folder).own_matrices
    assert Checkpoint(folder).fingerprint == identity


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
    base = save_checkpoint(RANDOM[kind], tmp_path / "base")
    tuned = import_class(load_model(base, torch.bfloat16).family.backbone).from_pretrained(base, dtype=torch.bfloat16)
    tuned.save_pretrained(tmp_path / "tuned")
    assert graft(tmp_path / "tuned", tmp_path / "fresh", init_from_last_layer=True).family == kind
    assert load_model(tmp_path / "fresh", torch.float32).family.names.prefix == "model.layers.2"
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
    config = load_config(Checkpoint(broken(bases("bailing_moe_v2"), tmp_path, n_group=0, topk_group=0, head_dim=None)))
    assert (config.n_group, config.topk_group, config.head_dim) == (1, 1, 8)


def test_a_static_map_is_refused_where_the_output_matrix_is_tied(tmp_path):
    folder = save_checkpoint(random_qwen3_5, tmp_path / "model")
    assert "lm_head.weight" not in Checkpoint(folder).file_of
    words = command(serve_flags(folder))
    assert words[words.index("--model-path") + 1] == str(folder) and "--speculative-draft-model-path" not in words
    with pytest.raises(FastMTPError, match="no static token map for tied embeddings"):
        serve_flags(folder, token_map="map.pt")


def test_zero_centered_norms_may_be_zero(base, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(base, folder)
    for name, file in Checkpoint(folder).file_of.items():
        if name in ("mtp.norm.weight", "mtp.fc.weight"):
            tensors = load_file(file)
            save_file({**tensors, name: torch.zeros_like(tensors[name])}, file, metadata={"format": "pt"})
    assert [f.what for f in examine(folder)] == ["mtp.fc.weight is all zeros"]
