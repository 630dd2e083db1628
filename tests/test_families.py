"""Families other than MiMo, on tiny random models: native keys from load to export, `exact` against a draft with a KV
cache, the real `swift` command, and one clear error for each layout that is not trained."""

import json
import re
import shutil

import pytest
import torch
from conftest import ROOT, logged, sft_args, swift
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from models import packed_positions, random_qwen3_5, random_qwen3_next, save_checkpoint
from reference import DenseQwenHead, QwenHead, draft_with_cache, paper_rollout
from safetensors.torch import load_file, save_file

from swift_fastmtp.checkpoints import Weights
from swift_fastmtp.config import FastMTPConfig
from swift_fastmtp.errors import FastMTPError
from swift_fastmtp.export.doctor import examine
from swift_fastmtp.export.folders import export_draft, export_full
from swift_fastmtp.export.serve_args import command, serve_flags
from swift_fastmtp.families import REFUSED, find_family, match_family, refused_table, support_table
from swift_fastmtp.head import join_experts, split_experts
from swift_fastmtp.modeling import head_shapes, load_model
from swift_fastmtp.rollout import rollout, segment_ids

HEAD = "mtp."
EXPERT = "mtp.layers.0.mlp.experts.1.up_proj.weight"
# Name → a tiny random model, its plain reference, and the number of MTP tensors in a checkpoint.
KINDS = {"qwen3_next": (random_qwen3_next, QwenHead, 29), "qwen3_5": (random_qwen3_5, DenseQwenHead, 15)}
kinds = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture
def exact_qwen(monkeypatch):
    """transformers computes norms and routing in float32 whatever it is given; float64 comparisons need float64."""
    from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5RMSNorm
    from transformers.models.qwen3_next import modeling_qwen3_next as module

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
    rope, positions = model.config.rope_parameters, packed_positions(lengths)
    dim = int(model.config.head_dim * rope["partial_rotary_factor"])

    def rotary(x, positions):
        freq = 1.0 / rope["rope_theta"] ** (torch.arange(0, dim, 2, dtype=hidden.dtype) / dim)
        angle = (positions[..., None].to(hidden.dtype) * freq).repeat(1, 1, 2)
        return angle.cos(), angle.sin()

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


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    kind=st.sampled_from(list(KINDS)),
    lengths=st.lists(st.integers(1, 8), min_size=1, max_size=3),
    heads=st.sampled_from([(4, 2), (2, 2), (4, 1)]),
    steps=st.integers(1, 5),
    seed=st.integers(0, 99),
)
def test_exact_equals_a_draft_with_a_kv_cache(exact_qwen, kind, lengths, heads, steps, seed):
    model, hidden, embeds = case(kind, lengths, seed, heads)
    outputs = run(model, hidden, embeds, lengths, steps, "exact")
    assert worst_error(kind, model, hidden, embeds, lengths, steps, outputs) <= 1e-9


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
def test_each_ingredient_is_needed(exact_qwen, change, monkeypatch):
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


@kinds
@pytest.mark.parametrize("seed", range(2))
def test_paper_equals_the_papers_equations(exact_qwen, kind, seed):
    model, hidden, embeds = case(kind, [9, 3], seed)
    head = KINDS[kind][1](model.head, model.config)
    outputs, start = run(model, hidden, embeds, [9, 3], 4, "paper"), 0
    for n in (9, 3):
        part = slice(start, start + n)
        for k, g in enumerate(paper_rollout(head, hidden[0, part], embeds[0, part], 4)):
            assert (outputs[k, start : start + len(g)] - g).detach().abs().max() <= 1e-9
        start += n


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
def test_padding_changes_nothing_and_packing_is_refused(kind):
    """Linear attention carries a state from row to row, so a packed row is not its documents."""
    model = KINDS[kind][0](5)
    model.fastmtp = FastMTPConfig(num_speculative_steps=4)
    ids = torch.randint(0, 97, (1, 13))
    alone = model(input_ids=ids, labels=ids)
    padded, mask = torch.nn.functional.pad(ids, (0, 5)), (torch.arange(18) < 13).long()[None]
    out = model(input_ids=padded, attention_mask=mask, labels=padded.masked_fill(mask == 0, -100))
    torch.testing.assert_close(out.step_loss[:, :, :13], alone.step_loss, atol=2e-5, rtol=1e-4)
    with pytest.raises(FastMTPError, match="train without --packing and --padding_free"):
        model(input_ids=ids, position_ids=packed_positions([6, 7]), labels=ids)


def test_without_labels_it_is_the_plain_language_model():
    from transformers import Qwen3NextForCausalLM

    model = random_qwen3_next(2)
    plain = Qwen3NextForCausalLM(model.config).eval()
    plain.load_state_dict({n: p for n, p in model.state_dict().items() if not n.startswith(HEAD)})
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
    ours = split_experts(model.head_parameters())
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
    before = {n: p.clone() for n, p in model.named_parameters() if not n.startswith(HEAD)}
    optimizer = torch.optim.AdamW(model.head_parameters().values(), lr=1e-2)
    ids = torch.randint(0, 6000, (2, 16))
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters() if n in before)
    FastMTPTuner.save_pretrained(model, str(tmp_path / "checkpoint"))
    trained, stored = load_file(tmp_path / "checkpoint/model.safetensors"), weights(each_base)
    assert trained.keys() == head_shapes(each_base).keys() and len(trained) == KINDS[each_base.name][2]
    assert all(not torch.equal(t, stored[n].float()) for n, t in trained.items())  # every tensor has learnt
    export_full(tmp_path / "checkpoint", tmp_path / "full")
    export_draft(tmp_path / "checkpoint", tmp_path / "draft")
    full, draft = weights(tmp_path / "full"), weights(tmp_path / "draft")
    assert full.keys() == stored.keys() and draft.keys() == trained.keys()
    for name, tensor in full.items():
        assert torch.equal(tensor, trained[name].bfloat16() if name in trained else stored[name]), name
    assert all(torch.equal(t, full[n]) for n, t in draft.items())
    changed = {Weights(each_base).file_of[n] for n in trained}
    for file in Weights(each_base).files:
        copy = tmp_path / "full" / file.name
        assert copy.samefile(file) == (file not in changed) and copy.stat().st_size == file.stat().st_size
    for folder in ("full", "draft"):
        assert (tmp_path / folder / "config.json").read_bytes() == (each_base / "config.json").read_bytes()
        assert examine(tmp_path / folder) == []
    flags = command(serve_flags(tmp_path / "draft"))
    assert str(each_base) in flags and "--trust-remote-code" not in flags


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


def test_swift_trains_resumes_and_exports(each_base, rows, tmp_path):
    """Started once and resumed half-way: the same weights; exported: the base with another MTP layer."""
    options = {"max_steps": 4, "save_steps": 2, "template": "qwen"}
    swift(*sft_args(each_base, rows, tmp_path / "run", **options))
    assert len(logged(tmp_path / "run")) == 4 and logged(tmp_path / "run", "mtp_acc_3")
    args = sft_args(each_base, rows, tmp_path / "again", **options)
    swift(*args, "--resume_from_checkpoint", tmp_path / "run/checkpoint-2")
    want, got = (load_file(tmp_path / r / "checkpoint-4/model.safetensors") for r in ("run", "again"))
    assert want.keys() == got.keys() == head_shapes(each_base).keys()
    assert all(torch.equal(want[n], got[n]) for n in want)
    swift("export", "--adapters", tmp_path / "again/checkpoint-4", "--output_dir", tmp_path / "full")
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


@pytest.mark.parametrize("case", ERRORS)
def test_one_clear_error(case, base, tmp_path):
    change, config, message = ERRORS[case]
    with pytest.raises(FastMTPError) as error:
        load_model(broken(base, tmp_path, change, **config), torch.float32)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("architecture", REFUSED)
def test_families_that_engines_serve_otherwise_are_refused_with_the_reason(architecture):
    why = "vision tower" if architecture.startswith("Qwen") else "SGLang serves it with its multi-layer worker"
    with pytest.raises(FastMTPError, match=f"{architecture} cannot be trained here: .*{why}"):
        find_family({"architectures": [architecture]})


def test_the_page_is_made_from_the_table():
    page = (ROOT / "docs/families.md").read_text(encoding="utf-8")
    assert support_table() in page and refused_table() in page


def test_rows_do_not_share_an_architecture_or_a_path():
    from swift_fastmtp.families import FAMILIES

    names = [a for f in FAMILIES for a in f.architectures]
    assert len(set(names)) == len(names) and not set(names) & set(REFUSED)
    for family in FAMILIES:
        assert match_family({"architectures": list(family.architectures)}) is family
        assert re.fullmatch(r"[\w.]+\.\d+", family.layer_path) and family.layer_path.startswith(family.root)
