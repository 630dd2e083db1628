"""Families other than MiMo, on tiny random models: native keys from load to export, `exact` against a draft with a KV
cache, the real `swift` command, and one clear error for each layout that is not trained."""

import copy
import json
import re
import shutil

import pytest
import torch
from conftest import ROOT, logged, sft_args, swift
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from models import (
    packed_positions,
    random_deepseek_v3,
    random_glm4_moe,
    random_glm4_moe_lite,
    random_qwen3_5,
    random_qwen3_next,
    save_checkpoint,
)
from reference import DenseQwenHead, GlmHead, LatentHead, QwenHead, draft_with_cache, paper_rollout
from safetensors.torch import load_file, save_file

from swift_fastmtp.checkpoints import Weights, fingerprint
from swift_fastmtp.config import FastMTPConfig
from swift_fastmtp.errors import FastMTPError
from swift_fastmtp.export.doctor import examine
from swift_fastmtp.export.folders import export_draft, export_full
from swift_fastmtp.export.graft import graft
from swift_fastmtp.export.inspection import inspect_model
from swift_fastmtp.export.serve_args import command, serve_flags
from swift_fastmtp.families import (
    FAMILIES,
    REFUSED,
    find_family,
    match_family,
    read_config,
    refused_table,
    support_table,
)
from swift_fastmtp.head import import_class, join_experts, split_experts
from swift_fastmtp.known_layouts import LAYOUTS
from swift_fastmtp.modeling import head_shapes, load_model
from swift_fastmtp.rollout import rollout, segment_ids

HEAD = "mtp."
EXPERT = "mtp.layers.0.mlp.experts.1.up_proj.weight"
LAYER = "model.layers.2."
BIAS = LAYER + "mlp.gate.e_score_correction_bias"
# Name → a tiny random model, its plain reference, the number of MTP tensors in a checkpoint, and their path.
KINDS = {
    "qwen3_next": (random_qwen3_next, QwenHead, 29, HEAD),
    "qwen3_5": (random_qwen3_5, DenseQwenHead, 15, HEAD),
    "glm4_moe": (random_glm4_moe, GlmHead, 38, LAYER),
    "deepseek_v3": (random_deepseek_v3, LatentHead, 36, LAYER),
    "glm4_moe_lite": (random_glm4_moe_lite, LatentHead, 36, LAYER),
}
kinds = pytest.mark.parametrize("kind", KINDS)


class Wide:
    """torch, whose float32 is float64."""

    float32 = torch.float64

    def __getattr__(self, name):
        return getattr(torch, name)


@pytest.fixture
def exact(monkeypatch):
    """transformers computes norms and routing in float32 whatever it is given; float64 comparisons need float64."""
    from transformers.models.deepseek_v3 import modeling_deepseek_v3
    from transformers.models.glm4_moe import modeling_glm4_moe
    from transformers.models.glm4_moe_lite import modeling_glm4_moe_lite
    from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5RMSNorm
    from transformers.models.qwen3_next import modeling_qwen3_next as module

    for other in (modeling_glm4_moe, modeling_deepseek_v3, modeling_glm4_moe_lite):
        monkeypatch.setattr(other, "torch", Wide())

    def norm(self, x):
        return self._norm(x) * (1.0 + self.weight)

    def route(self, x):
        logits = x.reshape(-1, self.hidden_dim) @ self.weight.T
        share, chosen = logits.softmax(-1).topk(self.top_k, dim=-1)
        return logits, share / share.sum(-1, keepdim=True), chosen

    monkeypatch.setattr(Qwen3_5RMSNorm, "forward", norm)
    monkeypatch.setattr(module.Qwen3NextRMSNorm, "forward", norm)
    monkeypatch.setattr(module.Qwen3NextTopKRouter, "forward", route)


def run(model, hidden, embeds, lengths, steps, mode):
    """The package's rollout, with rotary angles in the model's own precision."""
    head, positions = KINDS[model.family.name][1](model.head, model.config), packed_positions(lengths)

    def rotary(x, positions):
        angle = (positions[..., None] * head.frequencies).repeat(1, 1, 2)
        return angle.cos() * head.amplitude, angle.sin() * head.amplitude

    return rollout(model.head, hidden, embeds, positions, segment_ids(positions), rotary, steps, mode)


def case(kind, lengths, seed, heads=(4, 2)):
    model = KINDS[kind][0](seed, heads=heads[0], kv=heads[1], dtype=torch.float64)
    states = torch.randn(2, 1, sum(lengths), model.config.hidden_size, dtype=torch.float64)
    return model, states[0], states[1]


def worst_error(kind, model, hidden, embeds, lengths, steps, outputs, **switches):
    head, worst, start = KINDS[kind][1](model.head, model.config), 0.0, 0
    for n in lengths:
        h, e = hidden[0, start : start + n], embeds[0, start : start + n]
        for base in range(n - 1):
            depth = min(steps, n - 1 - base)
            want = draft_with_cache(head, h, e, base, depth, **{"mask_position_zero": False, **switches})
            got = torch.stack([outputs[k, start + base] for k in range(depth)])
            worst = max(worst, float((got - want).detach().abs().max()))
        start += n
    return worst


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    kind=st.sampled_from(list(KINDS)),
    lengths=st.lists(st.integers(1, 8), min_size=1, max_size=3),
    heads=st.sampled_from([(4, 2), (2, 2), (4, 1)]),
    steps=st.integers(1, 5),
    seed=st.integers(0, 99),
)
def test_exact_equals_a_draft_with_a_kv_cache(exact, kind, lengths, heads, steps, seed):
    model, hidden, embeds = case(kind, lengths, seed, heads)
    outputs = run(model, hidden, embeds, lengths, steps, "exact")
    assert worst_error(kind, model, hidden, embeds, lengths, steps, outputs) <= 1e-9


@kinds
def test_gradients_are_those_of_the_draft(exact, kind):
    model, hidden, embeds = case(kind, [7], 3)
    inputs = hidden.requires_grad_(), embeds.requires_grad_()
    head, ours, want = KINDS[kind][1](model.head, model.config), 0.0, 0.0
    outputs = run(model, hidden, embeds, [7], 3, "exact")
    share = torch.randn_like(outputs)
    for base in range(6):
        depth = min(3, 6 - base)
        chain = draft_with_cache(head, hidden[0], embeds[0], base, depth, mask_position_zero=False)
        ours = ours + (outputs[:depth, base] * share[:depth, base]).sum()
        want = want + (chain * share[:depth, base]).sum()
    pairs = zip(torch.autograd.grad(ours, inputs), torch.autograd.grad(want, inputs), strict=True)
    assert all((a - b).abs().max() <= 1e-9 for a, b in pairs)


@kinds
def test_exact_in_fp32_with_transformers_own_norms_and_routing(kind):
    """Nothing is replaced here, so the tolerance is float32's."""
    model = KINDS[kind][0](1)
    ids = torch.randint(0, 97, (1, 14))
    model.fastmtp = FastMTPConfig(num_speculative_steps=4)
    positions = torch.arange(14)[None]
    hidden = model.backbone_states(ids, None, positions, segment_ids(positions))
    outputs = model.draft_states(hidden, ids, positions, segment_ids(positions)).double()
    head, embeds = KINDS[kind][1](model.head, model.config), model.model.embed_tokens(ids)[0]
    head.w = {n: w.double() for n, w in head.w.items()}
    for base in range(13):
        want = draft_with_cache(
            head, hidden[0].double(), embeds.double(), base, min(4, 13 - base), mask_position_zero=False
        )
        torch.testing.assert_close(outputs[: len(want), base], want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "change", [{"shift_positions": False}, {"own_chain": False}, {"mask_position_zero": True}, "order", "norms", "gate"]
)
def test_each_ingredient_is_needed(exact, change, monkeypatch):
    """Taking one away must be far outside the tolerance, or the tests above prove nothing."""
    model, hidden, embeds = case("qwen3_next", [9, 7], 0)
    outputs = run(model, hidden, embeds, [9, 7], 4, "exact")
    fuse, queries = QwenHead.fuse, QwenHead.queries_and_gate
    other = {
        "order": ("fuse", lambda self, hidden, embed: fuse(self, embed, hidden)),
        "norms": ("rms", lambda self, x, name: super(QwenHead, self).rms(x, name)),
        "gate": ("queries_and_gate", lambda self, u: (queries(self, u)[0], queries(self, u)[1] + 50)),
    }
    if isinstance(change, str):
        monkeypatch.setattr(QwenHead, *other[change])
    switches = change if isinstance(change, dict) else {}
    assert worst_error("qwen3_next", model, hidden, embeds, [9, 7], 4, outputs, **switches) > 1e-2


@pytest.mark.parametrize("kind", ["glm4_moe", "deepseek_v3"])
@pytest.mark.parametrize(
    "change",
    [
        ("fuse", lambda self, hidden, embed, fuse=GlmHead.fuse: fuse(self, embed, hidden)),
        ("bias", 0),
        ("open_groups", 2),
        ("routed_scale", 1.0),
        ("rope", lambda self, x, positions: x),
        ("scale", 0.1),
    ],
    ids=lambda change: change[0],
)
def test_each_ingredient_of_the_numbered_layer_is_needed(exact, kind, change, monkeypatch):
    model, hidden, embeds = case(kind, [9, 7], 0)
    outputs = run(model, hidden, embeds, [9, 7], 4, "exact")
    head, (name, value) = KINDS[kind][1], change
    original = head.__init__
    if callable(value):
        monkeypatch.setattr(head, name, value)
    else:
        value = torch.zeros(6).double() if name == "bias" else value
        monkeypatch.setattr(head, "__init__", lambda self, *a: (original(self, *a), setattr(self, name, value))[0])
    assert worst_error(kind, model, hidden, embeds, [9, 7], 4, outputs) > 1e-2


@kinds
@pytest.mark.parametrize("seed", range(2))
def test_paper_equals_the_papers_equations(exact, kind, seed):
    model, hidden, embeds = case(kind, [9, 3], seed)
    head = KINDS[kind][1](model.head, model.config)
    outputs, start = run(model, hidden, embeds, [9, 3], 4, "paper"), 0
    for n in (9, 3):
        part = slice(start, start + n)
        for k, g in enumerate(paper_rollout(head, hidden[0, part], embeds[0, part], 4)):
            assert (outputs[k, start : start + len(g)] - g).detach().abs().max() <= 1e-9
        start += n


def test_autocast_leaves_routers_in_float32():
    """As engines compute them; in the backbone and in the head, and in a copy of the model."""
    model = copy.deepcopy(random_glm4_moe(1, dtype=torch.bfloat16))
    routers = [m for m in model.modules() if hasattr(m, "e_score_correction_bias")]
    hidden = torch.randn(1, 50, 32).bfloat16()
    want = [router(hidden) for router in routers]
    with torch.autocast("cpu", torch.bfloat16):
        got = [router(hidden) for router in routers]
    assert len(routers) == 2 and all(logits.dtype == torch.float32 for logits, _, _ in got)
    assert all(torch.equal(a, b) for x, y in zip(want, got, strict=True) for a, b in zip(x, y, strict=True))
    assert all(router.forward.__self__ is router for router in routers)


@kinds
@pytest.mark.parametrize("mode", ["exact", "paper"])
def test_only_the_head_gets_gradients(kind, mode):
    model = KINDS[kind][0](1).train()
    model.fastmtp = FastMTPConfig(rollout=mode)
    ids = torch.randint(0, 97, (2, 12))
    model(input_ids=ids, labels=ids).loss.backward()
    assert {n for n, p in model.named_parameters() if p.grad is not None} == set(model.head_parameters())
    assert not model.model.layers[0].training and model.head.training


@kinds
def test_padding_changes_nothing_and_packing_is_refused_where_states_cross(kind):
    """Linear attention carries a state from row to row, so a packed row is not its documents."""
    model = KINDS[kind][0](5)
    model.fastmtp = FastMTPConfig(num_speculative_steps=4)
    ids = torch.randint(0, 97, (1, 13))
    alone = model(input_ids=ids, labels=ids)
    padded, mask = torch.nn.functional.pad(ids, (0, 5)), (torch.arange(18) < 13).long()[None]
    out = model(input_ids=padded, attention_mask=mask, labels=padded.masked_fill(mask == 0, -100))
    torch.testing.assert_close(out.step_loss[:, :, :13], alone.step_loss, atol=2e-5, rtol=1e-4)
    if model.family.recurrent_backbone:
        with pytest.raises(FastMTPError, match="train without --packing and --padding_free"):
            model(input_ids=ids, position_ids=packed_positions([6, 7]), labels=ids)
    else:
        packed = model(input_ids=ids, position_ids=packed_positions([6, 7]), labels=ids)
        first = model(input_ids=ids[:, :6], labels=ids[:, :6])
        torch.testing.assert_close(packed.step_loss[:, :, :6], first.step_loss, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["qwen3_next", "glm4_moe", "deepseek_v3"])
def test_without_labels_it_is_the_plain_language_model(kind):
    """Also where the head's path is that of a decoder layer: the backbone does not run it."""
    model = KINDS[kind][0](2)
    plain = import_class(model.family.backbone)(model.config).eval()
    plain.load_state_dict({n: p for n, p in model.state_dict().items() if not n.startswith(KINDS[kind][3])})
    ids = torch.randint(0, 97, (2, 10))
    assert torch.equal(model(input_ids=ids).logits, plain(input_ids=ids).logits)
    greedy = {"max_new_tokens": 5, "do_sample": False}
    assert torch.equal(model.generate(ids, **greedy), plain.generate(ids, **greedy))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_checkpoint(random_qwen3_next, tmp_path_factory.mktemp("qwen3_next") / "base")


@pytest.fixture(scope="module", params=list(KINDS))
def each_base(request, tmp_path_factory):
    return save_checkpoint(KINDS[request.param][0], tmp_path_factory.mktemp("each") / request.param)


def weights(folder):
    found = Weights(folder)
    return {name: found.read(name) for name in found.file_of}


def test_experts_split_as_transformers_splits_them(base):
    """Ours is in the checkpoint's names without a model, and must give what transformers' converters give."""
    model = load_model(base, torch.bfloat16)
    ours = split_experts(model.head_tensors())
    stored = {n: t for n, t in weights(base).items() if n.startswith(HEAD)}
    assert ours.keys() == stored.keys() and len(stored) == 29
    assert all(torch.equal(ours[n], stored[n]) for n in stored)
    assert head_shapes(base) == {n: tuple(t.shape) for n, t in stored.items()}
    joined = join_experts(stored)
    assert all(torch.equal(joined[n], p) for n, p in model.head_parameters().items())


def test_trainers_that_read_checkpoints_themselves_find_the_experts(base):
    """transformers' Trainer resumes with a lenient `load_state_dict` of the file's names."""
    model, stored = load_model(base, torch.float32), weights(base)
    for parameter in model.head_parameters().values():
        parameter.data.zero_()
    found = model.load_state_dict({n: t for n, t in stored.items() if n.startswith(HEAD)}, strict=False)
    assert not found.unexpected_keys and not [n for n in found.missing_keys if n.startswith(HEAD)]
    assert all(torch.equal(p, stored[n].float()) for n, p in split_experts(model.head_parameters()).items())


def test_native_keys_from_load_to_export(each_base, tmp_path):
    """Load, train a step, save the head, export: every tensor accounted for, every other byte as it was."""
    from swift_fastmtp.swift_plugin.tuner import FastMTPTuner

    model = load_model(each_base, torch.float32)
    model.fastmtp, model.model_dir = FastMTPConfig(), each_base
    model.freeze_backbone()
    model.train()
    _, _, number, head = KINDS[each_base.name]
    before = {n: t.clone() for n, t in model.state_dict().items() if not n.startswith(head)}
    optimizer = torch.optim.AdamW(model.head_parameters().values(), lr=1e-2)
    ids = torch.randint(0, 6000, (2, 16))
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items() if n in before)
    FastMTPTuner.save_pretrained(model, str(tmp_path / "checkpoint"))
    trained, stored = load_file(tmp_path / "checkpoint/model.safetensors"), weights(each_base)
    assert trained.keys() == head_shapes(each_base).keys() and len(trained) == number
    changed = {n for n, t in trained.items() if not torch.equal(t, stored[n].float())}
    assert changed == {n for n in trained if not n.endswith("e_score_correction_bias")}  # every weight has learnt
    export_full(tmp_path / "checkpoint", tmp_path / "full")
    export_draft(tmp_path / "checkpoint", tmp_path / "draft")
    full, draft = weights(tmp_path / "full"), weights(tmp_path / "draft")
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
        assert examine(tmp_path / folder) == []
    flags = command(serve_flags(tmp_path / "draft"))
    assert str(each_base) in flags and "--trust-remote-code" not in flags


def test_copies_of_the_matrices_are_allowed_and_left_out_of_what_is_trained(tmp_path):
    """As GLM-4.5 and DeepSeek-V3 hold them; SGLang's loaders skip them."""
    folder = save_checkpoint(random_glm4_moe, tmp_path / "model")
    copies = {LAYER + "embed_tokens.weight", LAYER + "shared_head.head.weight"}
    found = inspect_model(folder)
    assert found.trainable and set(found.own_matrices) == copies and found.mtp_layers == 1
    assert copies <= set(weights(folder)) and not copies & set(head_shapes(folder))
    assert examine(folder) == []
    identity = fingerprint(folder, find_family(read_config(folder)))
    tensors = {n: t for n, t in weights(folder).items() if n not in copies}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").unlink()
    for file in folder.glob("model-*"):
        file.unlink()
    assert inspect_model(folder).trainable and not inspect_model(folder).own_matrices
    assert fingerprint(folder, find_family(read_config(folder))) == identity


@pytest.mark.parametrize("kind", ["glm4_moe", "deepseek_v3"])
def test_a_lost_numbered_layer_is_grafted_with_its_routers_float32(kind, tmp_path):
    base = save_checkpoint(KINDS[kind][0], tmp_path / "base")
    tuned = import_class(load_model(base, torch.bfloat16).family.backbone).from_pretrained(base, dtype=torch.bfloat16)
    tuned.save_pretrained(tmp_path / "tuned")
    assert not inspect_model(tmp_path / "tuned").trainable
    assert graft(tmp_path / "tuned", tmp_path / "whole", base).family == kind
    whole, stored = weights(tmp_path / "whole"), weights(base)
    assert all(torch.equal(whole[n], stored[n]) and whole[n].dtype == stored[n].dtype for n in head_shapes(base))
    assert whole[LAYER + "mlp.gate.e_score_correction_bias"].dtype == torch.float32
    assert inspect_model(tmp_path / "whole").trainable
    assert graft(tmp_path / "tuned", tmp_path / "fresh", init_from_last_layer=True).family == kind
    assert load_model(tmp_path / "fresh", torch.float32).family.prefix == "model.layers.2"
    config = tmp_path / "tuned" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "num_hidden_layers": 1}))
    with pytest.raises(
        FastMTPError, match=r"num_hidden_layers is 1, in .* it is 2; the MTP layer is numbered after it"
    ):
        graft(tmp_path / "tuned", tmp_path / "other", base)


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


@pytest.mark.parametrize("each_base", [k for k in KINDS if k != "glm4_moe_lite"], indirect=True)
def test_swift_trains_resumes_and_exports(each_base, rows, tmp_path):
    """Started once and resumed half-way: the same weights; exported: the base with another MTP layer."""
    options = {"max_steps": 4, "save_steps": 2, "template": "qwen"}
    swift(*sft_args(each_base, rows, tmp_path / "run", **options))
    assert len(logged(tmp_path / "run")) == 4 and logged(tmp_path / "run", "mtp_acc_3")
    want, last = load_file(tmp_path / "run/checkpoint-4/model.safetensors"), tmp_path / "run/checkpoint-4"
    assert want.keys() == head_shapes(each_base).keys()
    if each_base.name != "deepseek_v3":  # which resumes as glm4_moe does
        args, last = sft_args(each_base, rows, tmp_path / "again", **options), tmp_path / "again/checkpoint-4"
        swift(*args, "--resume_from_checkpoint", tmp_path / "run/checkpoint-2")
        got = load_file(last / "model.safetensors")
        assert want.keys() == got.keys() and all(torch.equal(want[n], got[n]) for n in want)
    swift("export", "--adapters", last, "--output_dir", tmp_path / "full")
    before, after = weights(each_base), weights(tmp_path / "full")
    assert before.keys() == after.keys()
    changed = {n for n in before if not torch.equal(before[n], after[n])}
    assert changed <= want.keys() and {n for n in want if "_proj" in n} <= changed
    assert (tmp_path / "full/config.json").read_bytes() == (each_base / "config.json").read_bytes()


def test_the_backbone_in_memory_stays_bit_identical_in_training(base, rows, tmp_path):
    """Tuner type `full` saves the whole model, so its checkpoint shows what training did to every tensor."""
    swift(*sft_args(base, rows, tmp_path / "run", max_steps=2, tuner_type="full", template="qwen"))
    before, after = weights(base), weights(tmp_path / "run/checkpoint-2")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[n].float(), after[n]) for n in before if not n.startswith(HEAD))
    assert not torch.equal(before[EXPERT].float(), after[EXPERT])
    swift("export", "--model", tmp_path / "run/checkpoint-2", "--output_dir", tmp_path / "full")
    assert examine(tmp_path / "full") == []


def test_lora_on_a_mixture_of_experts_is_refused(base, rows, tmp_path):
    """peft turns the head's target regex into bare names that also match the backbone."""
    args = sft_args(base, rows, tmp_path / "run", max_steps=2, tuner_type="lora", lora_rank=4, template="qwen")
    done = swift(*args, check=False)
    assert done.returncode == 1 and "would be trained; only the MTP head may be" in done.stderr


def broken(base, tmp_path, change=None, **config):
    """The checkpoint in one file, changed."""
    folder = tmp_path / "model"
    folder.mkdir()
    tensors = weights(base)
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
    for name in [n for n in tensors if n.startswith(HEAD)]:
        del tensors[name]


ERRORS = {
    "unknown family": (None, {"architectures": ["LlamaForCausalLM"]}, "no known MTP layout; known: MiMoForCausalLM, "),
    "no architectures": (None, {"architectures": None}, "architectures [] has no known MTP layout"),
    "two layers, by the config": (None, {"num_nextn_predict_layers": 2}, "num_nextn_predict_layers is 2; FastMTP"),
    "two layers, by the tensors": (second_layer, {}, "mtp.layers.1.input_layernorm.weight; it is of a second MTP"),
    "hidden size": (narrow, {}, "the MTP layer has hidden size 16, the model 32; it belongs to another model"),
    "lost": (lose_mtp, {}, "no tensor under 'mtp.'; this checkpoint lost its MTP layer"),
    "expert missing": (lambda t: t.pop(EXPERT), {}, f"MTP tensor {EXPERT} is missing"),
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
    "lost": (
        lambda t: [t.pop(n) for n in list(t) if n.startswith(LAYER)],
        {},
        "no tensor under 'model.layers.2.'; this checkpoint lost its MTP layer",
    ),
    "no bias": (lambda t: t.pop(BIAS), {}, f"MTP tensor {BIAS} is missing"),
    "another depth": (None, {"num_hidden_layers": 3}, "no tensor under 'model.layers.3.'"),
    "no depth": (None, {"num_hidden_layers": None}, "num_hidden_layers is None; the MTP layer is numbered after it"),
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
def test_one_clear_error_of_a_numbered_layer(case, tmp_path):
    base = save_checkpoint(random_deepseek_v3, tmp_path / "base")
    one_clear_error(NUMBERED_ERRORS[case], base, tmp_path)


@pytest.mark.parametrize("architecture", REFUSED)
def test_families_that_engines_serve_otherwise_are_refused_with_the_reason(architecture):
    why = "vision tower" if architecture.startswith("Qwen") else "SGLang serves it with its multi-layer worker"
    with pytest.raises(FastMTPError, match=f"{architecture} cannot be trained here: .*{why}"):
        find_family({"architectures": [architecture]})


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_layouts_that_inspect_knows_are_refused_with_its_reason(layout):
    names = {a for f in FAMILIES for a in f.architectures} | set(REFUSED)
    for architecture in set(layout.architectures) - names:
        with pytest.raises(FastMTPError, match=re.escape(f"{layout.name} cannot be trained here: {layout.reason}")):
            find_family({"architectures": [architecture]})


def test_a_numbered_head_is_named_by_the_folder_alone(tmp_path):
    """`--tuner_type full` and `lora` choose parameters by a pattern, and must not reach a backbone's layer."""
    from swift_fastmtp.swift_plugin.arguments import _prefixes

    folder = save_checkpoint(random_glm4_moe, tmp_path / "model")
    assert re.fullmatch(_prefixes(str(folder)), "model.layers.2")
    assert not re.match(_prefixes(str(folder)), "model.layers.1.self_attn")
    assert not re.match(_prefixes("org/name"), "model.layers.2.self_attn")


def test_the_page_is_made_from_the_table():
    page = (ROOT / "docs/families.md").read_text(encoding="utf-8")
    assert support_table() in page and refused_table() in page


def test_rows_do_not_share_an_architecture_or_a_path():
    names = [a for f in FAMILIES for a in f.architectures]
    assert len(set(names)) == len(names) and not set(names) & set(REFUSED)
    for family in FAMILIES:
        found = match_family({"architectures": list(family.architectures), "num_hidden_layers": 7})
        assert found == family.at(7) and re.fullmatch(r"[\w.]+\.\d+", found.layer_path)
        assert found.holds(f"{found.layer_path}.x") and not found.holds("model.layers.6.x")
