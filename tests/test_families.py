"""What families other than MiMo compute, on tiny random models: `exact` against a draft with a KV cache, each of its
ingredients, `paper`, gradients, padding."""

import copy
import sys
from dataclasses import replace

import pytest
import torch
from helpers.kinds import KINDS
from helpers.models import (
    packed_positions,
    random_glm4_moe,
    random_ling,
    random_longcat_flash,
)
from helpers.reference import (
    ErnieHead,
    GlmHead,
    GlmSparseHead,
    Head,
    LatentHead,
    QwenHead,
    SparseHead,
    draft_with_cache,
    paper_rollout,
)
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel
from transformers.models.longcat_flash import modeling_longcat_flash

from swift_fastmtp.errors import FastMTPError
from swift_fastmtp.families.family import ENGINES, Graph
from swift_fastmtp.families.table import FAMILIES
from swift_fastmtp.method import flash, indexer
from swift_fastmtp.method.config import FastMTPConfig
from swift_fastmtp.method.rollout import rollout, segment_ids
from swift_fastmtp.model.head import import_class

kinds = pytest.mark.parametrize("kind", KINDS)


class Wide:
    """torch, whose float32 is float64."""

    float32 = torch.float64

    def __getattr__(self, name):
        return getattr(torch, name)


@pytest.fixture
def in_float64(monkeypatch):
    """transformers computes norms, routing and ERNIE's RoPE in float32 whatever it is given; float64 comparisons need
    float64."""
    from transformers.models.ernie4_5_moe import modeling_ernie4_5_moe as ernie
    from transformers.models.qwen3_5 import modeling_qwen3_5 as dense
    from transformers.models.qwen3_5_moe import modeling_qwen3_5_moe as mixture
    from transformers.models.qwen3_moe import modeling_qwen3_moe as plain
    from transformers.models.qwen3_next import modeling_qwen3_next as following

    special = {ernie, dense, mixture, plain, following}
    bases = {base.__module__ for row in FAMILIES for base in import_class(row.backbone).__mro__}
    for module in {sys.modules[name] for name in bases if name.startswith("transformers.models.")} - special:
        monkeypatch.setattr(module, "torch", Wide())

    def norm(self, x):
        return self._norm(x) * (1.0 + self.weight)

    def plain_norm(self, x):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon) * self.weight

    def route(self, x):
        logits = x.reshape(-1, self.hidden_dim) @ self.weight.T
        share, chosen = logits.softmax(-1).topk(self.top_k, dim=-1)
        return logits, share / share.sum(-1, keepdim=True), chosen

    def turn(q, k, cos, sin):
        cos, sin = (x[:, None, :, : x.shape[-1] // 2].repeat_interleave(2, -1) for x in (cos, sin))
        return tuple(x * cos + ernie.rotate_half(x) * sin for x in (q, k))

    # transformers keeps on a base class what its subclasses can do, so that the experts' kernel, which has no float64,
    # would depend on which models were made before.
    monkeypatch.setattr(PreTrainedModel, "_can_set_experts_implementation", classmethod(lambda cls: False))

    for cls in (dense.Qwen3_5RMSNorm, mixture.Qwen3_5MoeRMSNorm, following.Qwen3NextRMSNorm):
        monkeypatch.setattr(cls, "forward", norm)
    for cls in (mixture.Qwen3_5MoeTopKRouter, following.Qwen3NextTopKRouter, plain.Qwen3MoeTopKRouter):
        monkeypatch.setattr(cls, "forward", route)
    for cls in (ernie.Ernie4_5_MoeRMSNorm, plain.Qwen3MoeRMSNorm):
        monkeypatch.setattr(cls, "forward", plain_norm)
    monkeypatch.setattr(ernie, "apply_rotary_pos_emb", turn)


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
    graph = switches.pop("graph", model.head.graph)
    head, worst, start = KINDS[kind][1](model.head, model.config), 0.0, 0
    for n in lengths:
        h, e = hidden[0, start : start + n], embeds[0, start : start + n]
        for base in range(n - 1):
            depth = min(steps, n - 1 - base)
            want = draft_with_cache(head, h, e, base, depth, graph, **switches)
            got = torch.stack([outputs[k, start + base] for k in range(depth)])
            worst = max(worst, float((got - want).detach().abs().max()))
        start += n
    return worst


@kinds
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lengths=st.lists(st.integers(1, 8), min_size=1, max_size=3),
    heads=st.sampled_from([(4, 2), (2, 2), (4, 1)]),
    steps=st.integers(1, 5),
    seed=st.integers(0, 99),
    engine=st.sampled_from(ENGINES),
)
def test_exact_equals_a_draft_with_a_kv_cache(in_float64, shown, kind, lengths, heads, steps, seed, engine):
    """In the graph of either engine."""
    model, hidden, embeds = case(kind, lengths, seed, heads)
    assume(engine == "sglang" or model.family.engines.vllm)
    model.fastmtp = FastMTPConfig(engine=engine)
    outputs = run(model, hidden, embeds, lengths, steps, "exact")
    assert worst_error(kind, model, hidden, embeds, lengths, steps, outputs) <= 1e-9
    shown("exact", model.config.architectures)


@kinds
def test_gradients_are_those_of_the_draft(in_float64, kind):
    model, hidden, embeds = case(kind, [7], 3)
    inputs = hidden.requires_grad_(), embeds.requires_grad_()
    head, ours, want = KINDS[kind][1](model.head, model.config), 0.0, 0.0
    outputs = run(model, hidden, embeds, [7], 3, "exact")
    share = torch.randn_like(outputs)
    for base in range(6):
        depth = min(3, 6 - base)
        chain = draft_with_cache(head, hidden[0], embeds[0], base, depth, model.head.graph)
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
            head,
            hidden[0].double(),
            embeds.double(),
            base,
            min(4, 13 - base),
            model.head.graph,
        )
        torch.testing.assert_close(outputs[: len(want), base], want, atol=1e-4, rtol=1e-4)


def error_without(kind, change, other, monkeypatch):
    """Against a plain reference that differs in one thing: a switch of the draft, or a method (its name in `other`)."""
    model, hidden, embeds = case(kind, [9, 7], 0)
    outputs = run(model, hidden, embeds, [9, 7], 4, "exact")
    if isinstance(change, str):
        monkeypatch.setattr(KINDS[kind][1], *other[change])
    switches = change if isinstance(change, dict) else {}
    return worst_error(kind, model, hidden, embeds, [9, 7], 4, outputs, **switches)


@pytest.mark.parametrize(
    "change",
    [
        {"shift_positions": False},
        {"own_chain": False},
        {"graph": Graph(mask_position_zero=True)},
        "order",
        "norms",
        "gate",
    ],
)
def test_each_ingredient_of_qwen_is_needed(in_float64, change, monkeypatch):
    """Taking one away must be far outside the tolerance, or the tests above prove nothing."""
    fuse, queries = QwenHead.fuse, QwenHead.queries_and_gate
    other = {
        "order": ("fuse", lambda self, hidden, embed: fuse(self, embed, hidden)),
        "norms": ("rms", lambda self, x, name: super(QwenHead, self).rms(x, name)),
        "gate": ("queries_and_gate", lambda self, u: (queries(self, u)[0], queries(self, u)[1] + 50)),
    }
    assert error_without("qwen3_next", change, other, monkeypatch) > 1e-2


@pytest.mark.parametrize("change", [{"graph": Graph()}, "order", "norm", "rope", "bias"])
def test_each_ingredient_of_ernie_is_needed(in_float64, change, monkeypatch):
    fuse, linear = ErnieHead.fuse, ErnieHead.linear
    other = {
        "order": ("fuse", lambda self, hidden, embed: fuse(self, embed, hidden)),
        "norm": ("final", lambda self, u: self.rms(u, "post_attention_layernorm")),
        "rope": ("rope", Head.rope),
        "bias": ("linear", lambda self, x, n: linear(self, x, n) - self.w[f"{n}.bias"] * (n == "mtp_linear_proj.0")),
    }
    assert error_without("ernie4_5_moe", change, other, monkeypatch) > 1e-2


# What vLLM's graphs set, by family; the hidden state that step 1 gets is the caller's (test_engine_graph.py).
SET_IN_VLLM = [
    (family.name, name)
    for family in FAMILIES
    for name in ("feedback_before_norm", "mask_position_zero", "rotary_halves")
    if family.name in KINDS and family.engines.vllm and getattr(family.engines.vllm, name)
]


@pytest.mark.parametrize(("kind", "name"), SET_IN_VLLM)
def test_each_field_of_vllms_graph_is_needed(in_float64, kind, name):
    model, hidden, embeds = case(kind, [9, 7], 0)
    model.fastmtp = FastMTPConfig(engine="vllm")
    outputs = run(model, hidden, embeds, [9, 7], 4, "exact")
    other = replace(model.head.graph, **{name: False})
    assert worst_error(kind, model, hidden, embeds, [9, 7], 4, outputs, graph=other) > 1e-3


@pytest.mark.parametrize("kind", ["glm4_moe", "deepseek_v3", "bailing_moe_v2"])
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
def test_each_ingredient_of_the_numbered_layer_is_needed(in_float64, kind, change, monkeypatch):
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


sparse = pytest.mark.parametrize("kind", ["deepseek_v32", "glm_moe_dsa", "glm_5_2"])


@sparse
@pytest.mark.parametrize("top", [1, 8, 20])
def test_sparse_attention_picks_what_a_draft_with_a_kv_cache_picks(in_float64, kind, top, monkeypatch):
    """Also where the chain's keys drive out all others; and where every key is picked it is dense attention, unless the
    first step's pick goes for all."""
    for module in (indexer, flash):
        monkeypatch.setattr(module, "_BLOCK", 4)
    model, lengths = KINDS[kind][0](0, top=top, dtype=torch.float64), [20, 9]
    hidden, embeds = torch.randn(2, 1, 29, 32, dtype=torch.float64)
    outputs = run(model, hidden, embeds, lengths, 4, "exact")
    assert worst_error(kind, model, hidden, embeds, lengths, 4, outputs) <= 1e-9
    dense = worst_error("deepseek_v3", model, hidden, embeds, lengths, 4, outputs)
    assert dense <= 1e-9 if top == 20 and kind != "glm_5_2" else dense > 1e-2


@sparse
@pytest.mark.parametrize(
    "change",
    [
        ("turn", lambda self, x, positions: x),
        ("index_rope", lambda self, *x: (Head if isinstance(self, GlmSparseHead) else LatentHead).rope(self, *x)),
        ("picked", lambda self, q, keys, weights, visible: visible),
        ("picked", lambda self, q, k, weights, seen, picked=SparseHead.picked: picked(self, q, k, weights.abs(), seen)),
    ],
    ids=["no rope", "other rope", "every key", "weights"],
)
def test_each_ingredient_of_the_pick_is_needed(in_float64, kind, change, monkeypatch):
    model, hidden, embeds = case(kind, [9, 7], 0)
    outputs = run(model, hidden, embeds, [9, 7], 4, "exact")
    monkeypatch.setattr(KINDS[kind][1], *change)
    assert worst_error(kind, model, hidden, embeds, [9, 7], 4, outputs) > 1e-2


@pytest.mark.parametrize(("kind", "other"), [("glm_moe_dsa", "glm_5_2"), ("glm_5_2", "glm_moe_dsa")])
def test_config_json_says_whether_a_chain_picks_once(in_float64, kind, other):
    model, hidden, embeds = case(kind, [9, 7], 0)
    outputs = run(model, hidden, embeds, [9, 7], 4, "exact")
    assert worst_error(other, model, hidden, embeds, [9, 7], 4, outputs) > 1e-2


@pytest.mark.parametrize("change", ["order", "scaled latents", "norm"])
def test_each_ingredient_of_longcat_is_needed(in_float64, change, monkeypatch):
    fuse = GlmHead.fuse
    other = {
        "order": ("fuse", lambda self, hidden, embed: fuse(self, embed, hidden)),
        "scaled latents": ("rms", Head.rms),
        "norm": ("final", lambda self, u: u),
    }
    assert error_without("longcat_flash", change, other, monkeypatch) > 1e-2


@kinds
@pytest.mark.parametrize("seed", range(2))
def test_paper_equals_the_papers_equations(in_float64, kind, seed):
    model, hidden, embeds = case(kind, [9, 3], seed)
    head = KINDS[kind][1](model.head, model.config)
    outputs, start = run(model, hidden, embeds, [9, 3], 4, "paper"), 0
    for n in (9, 3):
        part = slice(start, start + n)
        for k, g in enumerate(paper_rollout(head, hidden[0, part], embeds[0, part], 4)):
            assert (outputs[k, start : start + len(g)] - g).detach().abs().max() <= 1e-9
        start += n


@pytest.mark.parametrize("make", [random_glm4_moe, random_ling])
def test_autocast_leaves_routers_in_float32(make):
    """As engines compute them; in the backbone and in the head, and in a copy of the model."""
    model = copy.deepcopy(make(1, dtype=torch.bfloat16))
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
def test_padding_changes_nothing_and_packing_is_exact_or_refused(kind):
    """Linear attention carries a state from row to row, so a packed row is not its documents."""
    model = KINDS[kind][0](5)
    model.fastmtp = FastMTPConfig(num_speculative_steps=4)
    ids = torch.randint(0, 97, (1, 13))
    alone = model(input_ids=ids, labels=ids)
    padded, mask = torch.nn.functional.pad(ids, (0, 5)), (torch.arange(18) < 13).long()[None]
    out = model(input_ids=padded, attention_mask=mask, labels=padded.masked_fill(mask == 0, -100))
    torch.testing.assert_close(out.step_loss[:, :, :13], alone.step_loss, atol=2e-5, rtol=1e-4)
    positions = packed_positions([6, 7])
    if model.family.recurrent_backbone:
        with pytest.raises(FastMTPError, match="train without --packing and --padding_free"):
            model(input_ids=ids, position_ids=positions, labels=ids)
        return
    packed, one, two = (
        model(input_ids=x, position_ids=p, labels=x).step_loss
        for x, p in ((ids, positions), (ids[:, :6], positions[:, :6]), (ids[:, 6:], positions[:, 6:]))
    )
    torch.testing.assert_close(packed, torch.cat([one, two], 2), atol=2e-5, rtol=1e-4)


def plain_model(cls, config):
    """transformers' own, with norms of latents that read rms_norm_eps, as in SGLang (`deepseek_v2.py`)."""
    plain = cls(config).eval()
    for norm in (m for m in plain.modules() if hasattr(m, "variance_epsilon")):
        norm.variance_epsilon = config.rms_norm_eps
    return plain


def test_longcats_backbone_is_transformers_own_but_for_rows_that_nothing_reads():
    """Its class has rows for the experts that pass their input on; no checkpoint does."""
    model = random_longcat_flash(2)
    plain = plain_model(modeling_longcat_flash.LongcatFlashForCausalLM, model.config)
    state = {n: t for n, t in model.state_dict().items() if not model.family.owns(n)}
    rows = plain.state_dict()["model.layers.0.mlp.experts.gate_up_proj"].fill_(torch.nan)
    rows[:4] = state["model.layers.0.mlp.experts.gate_up_proj"]
    plain.load_state_dict({**state, "model.layers.0.mlp.experts.gate_up_proj": rows})
    ids = torch.randint(0, 97, (2, 10))
    assert len(rows) == 6 and torch.equal(model(input_ids=ids).logits, plain(input_ids=ids).logits)


@pytest.mark.parametrize(
    "kind", ["qwen3_next", "glm4_moe", "deepseek_v3", "deepseek_v32", "glm_moe_dsa", "bailing_moe_v2"]
)
def test_without_labels_it_is_the_plain_language_model(kind):
    """Also where the head's path is that of a decoder layer: the backbone does not run it."""
    model = KINDS[kind][0](2)
    plain = plain_model(import_class(model.family.backbone), model.config)
    plain.load_state_dict({n: p for n, p in model.state_dict().items() if not model.family.owns(n)})
    ids = torch.randint(0, 97, (2, 10))
    assert torch.equal(model(input_ids=ids).logits, plain(input_ids=ids).logits)
    greedy = {"max_new_tokens": 5, "do_sample": False}
    assert torch.equal(model.generate(ids, **greedy), plain.generate(ids, **greedy))
