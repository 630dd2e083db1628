"""The two rollouts equal independent implementations, packed or not."""

import pytest
import torch
from helpers.models import packed_positions, random_mimo
from helpers.reference import Head, draft_with_cache, paper_rollout
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from swift_fastmtp.families.family import Graph
from swift_fastmtp.method.config import FastMTPConfig
from swift_fastmtp.method.rollout import rollout, segment_ids, step_targets

# Document lengths of one row; deep drafts on short documents are where indices go wrong.
DOCUMENTS = st.lists(st.integers(1, 9), min_size=1, max_size=3)
HEADS = st.sampled_from([(4, 2), (4, 4), (2, 1), (6, 2)])
few = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def rope(model, dtype):
    """Rotary embedding computed in `dtype`; transformers' own is float32."""
    theta, dim = model.config.rope_parameters["rope_theta"], model.config.head_dim

    def embed(x, positions):
        freq = 1.0 / theta ** (torch.arange(0, dim, 2, dtype=dtype) / dim)
        angle = (positions[..., None].to(dtype) * freq).repeat(1, 1, 2)
        return angle.cos(), angle.sin()

    return embed


def run(model, hidden, embeds, lengths, steps, mode, **options):
    positions = packed_positions(lengths)
    rotary = rope(model, hidden.dtype)
    return rollout(model.head, hidden, embeds, positions, segment_ids(positions), rotary, steps, mode, **options)


def case(lengths, heads, seed):
    model = random_mimo(seed, heads=heads[0], kv=heads[1], dtype=torch.float64)
    total, width = sum(lengths), model.config.hidden_size
    return model, torch.randn(1, total, width, dtype=torch.float64), torch.randn(1, total, width, dtype=torch.float64)


def worst_error(model, hidden, embeds, lengths, steps, outputs, **switches):
    """Largest difference to the KV-cached draft over every base slot that still has a token to read."""
    graph = switches.pop("graph", model.head.graph)
    head, worst, start = Head(model.head, model.config), 0.0, 0
    for n in lengths:
        h, e = hidden[0, start : start + n], embeds[0, start : start + n]
        for base in range(n - 1):
            depth = min(steps, n - 1 - base)
            want = draft_with_cache(head, h, e, base, depth, graph, **switches)
            got = torch.stack([outputs[k, start + base] for k in range(depth)])
            worst = max(worst, float((got - want).detach().abs().max()))
        start += n
    return worst


@few
@given(lengths=DOCUMENTS, heads=HEADS, steps=st.integers(1, 7), seed=st.integers(0, 99))
def test_exact_equals_a_draft_with_a_kv_cache(exact_norms, shown, lengths, heads, steps, seed):
    model, hidden, embeds = case(lengths, heads, seed)
    outputs = run(model, hidden, embeds, lengths, steps, "exact")
    assert worst_error(model, hidden, embeds, lengths, steps, outputs) <= 1e-9
    shown("exact", model.config.architectures)


@pytest.mark.parametrize(
    "missing",
    [{"shift_positions": False}, {"own_chain": False}, {"graph": Graph()}],
    ids=lambda missing: next(iter(missing)),
)
def test_each_ingredient_of_exact_is_needed(exact_norms, missing):
    """Taking one ingredient away must be far outside the tolerance, or the test above proves nothing."""
    model, hidden, embeds = case([9, 7], (4, 2), 0)
    outputs = run(model, hidden, embeds, [9, 7], 4, "exact")
    assert worst_error(model, hidden, embeds, [9, 7], 4, outputs) <= 1e-9
    assert worst_error(model, hidden, embeds, [9, 7], 4, outputs, **missing) > 1e-2


@few
@given(lengths=DOCUMENTS, heads=HEADS, steps=st.integers(1, 5), seed=st.integers(0, 99))
def test_paper_equals_the_papers_equations(exact_norms, lengths, heads, steps, seed):
    model, hidden, embeds = case(lengths, heads, seed)
    outputs, start = run(model, hidden, embeds, lengths, steps, "paper"), 0
    for n in lengths:
        want = paper_rollout(
            Head(model.head, model.config), hidden[0, start : start + n], embeds[0, start : start + n], steps
        )
        for k, g in enumerate(want):
            assert (outputs[k, start : start + len(g)] - g).abs().max() <= 1e-9
        start += n


def paper_loss(model, documents, steps, beta):
    """Paper Eq. 1 and 2 on whole documents, one at a time, all tokens supervised."""
    weights = [beta ** (k - 1) / sum(beta**j for j in range(steps)) for k in range(1, steps + 1)]
    total, items = 0.0, 0
    for ids in documents:
        hidden = model.model(input_ids=ids[None]).last_hidden_state[0]
        items += len(ids) - 1
        for k, g in enumerate(
            paper_rollout(Head(model.head, model.config), hidden, model.model.embed_tokens(ids), steps), 1
        ):
            rows = g[: len(ids) - k - 1]
            if len(rows):
                nll = torch.nn.functional.cross_entropy(rows @ model.lm_head.weight.T, ids[k + 1 :], reduction="sum")
                total = total + weights[k - 1] * nll
    return total / items


@pytest.mark.parametrize("packed", [False, True])
def test_paper_loss_through_the_whole_model_in_fp32(packed):
    model = random_mimo(3)
    model.fastmtp = FastMTPConfig(rollout="paper", loss="ce", beta=0.6)
    documents = [torch.randint(0, 97, (n,)) for n in (11, 4, 2, 17)]
    want = paper_loss(model, documents, 3, 0.6)
    if packed:
        ids = torch.cat(documents)[None]
        got = model(input_ids=ids, position_ids=packed_positions(map(len, documents)), labels=_no_first(documents)).loss
    else:
        width = max(map(len, documents))
        ids = torch.stack([torch.nn.functional.pad(d, (0, width - len(d))) for d in documents])
        mask = torch.stack([torch.arange(width) < len(d) for d in documents]).long()
        got = model(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss
    assert abs(float(got.detach()) - float(want.detach())) <= 1e-5


def _no_first(documents):
    """Labels of a packed row: a document's first token is nobody's target, so it does not count as an item."""
    return torch.cat([torch.cat([torch.tensor([-100]), d[1:]]) for d in documents])[None]


@pytest.mark.parametrize("mode", ["exact", "paper"])
def test_padding_and_packing_change_nothing(mode):
    """Each document alone, padded on the right or left, and packed: the same loss and matches."""
    model = random_mimo(5)
    model.fastmtp = FastMTPConfig(rollout=mode, num_speculative_steps=4)
    documents = [torch.randint(0, 97, (n,)) for n in (13, 6, 9)]
    alone = [model(input_ids=d[None], labels=d[None]) for d in documents]
    packed = model(
        input_ids=torch.cat(documents)[None],
        position_ids=packed_positions(map(len, documents)),
        labels=_no_first(documents),
    )
    start = 0
    for document, one in zip(documents, alone, strict=True):
        part = slice(start, start + len(document))
        torch.testing.assert_close(packed.step_loss[:, 0, part], one.step_loss[:, 0], atol=2e-5, rtol=1e-4)
        assert torch.equal(packed.valid[:, 0, part], one.valid[:, 0])
        start += len(document)
        right = torch.nn.functional.pad(document, (0, 5))[None]
        mask = (torch.arange(right.shape[1]) < len(document)).long()[None]
        out = model(input_ids=right, attention_mask=mask, labels=right.masked_fill(mask == 0, -100))
        torch.testing.assert_close(out.step_loss[:, 0, : len(document)], one.step_loss[:, 0], atol=2e-5, rtol=1e-4)
        assert not out.valid[:, 0, len(document) :].any()


@given(lengths=DOCUMENTS, steps=st.integers(1, 4), data=st.data())
@settings(deadline=None)
def test_targets_stay_inside_the_document(lengths, steps, data):
    total = sum(lengths)
    ids = torch.arange(total)[None]
    supervised = data.draw(st.lists(st.booleans(), min_size=total, max_size=total))
    labels = ids.masked_fill(~torch.tensor(supervised)[None], -100)
    targets, valid = step_targets(ids, segment_ids(packed_positions(lengths)), labels, steps)
    document = [d for d, n in enumerate(lengths) for _ in range(n)]
    for k in range(1, steps + 1):
        for i in range(total):
            t = i + k + 1
            want = t < total and document[t] == document[i] and supervised[t]
            assert bool(valid[k - 1, 0, i]) == want
            if want:
                assert targets[k - 1, 0, i] == t


@pytest.mark.parametrize("mode", ["exact", "paper"])
def test_only_the_head_gets_gradients(mode):
    model = random_mimo(1).train()
    model.fastmtp = FastMTPConfig(rollout=mode)
    ids = torch.randint(0, 97, (2, 12))
    model(input_ids=ids, labels=ids).loss.backward()
    got = {n for n, p in model.named_parameters() if p.grad is not None}
    assert got == set(model.head_parameters())
    assert not model.model.layers[0].training and model.head.training


def test_without_labels_it_is_the_plain_language_model():
    from transformers import Qwen2ForCausalLM

    model = random_mimo(2)
    plain = Qwen2ForCausalLM(model.config).eval()
    plain.load_state_dict({n: p for n, p in model.state_dict().items() if "mtp_layers" not in n})
    ids = torch.randint(0, 97, (2, 10))
    assert torch.equal(model(input_ids=ids).logits, plain(input_ids=ids).logits)
    greedy = {"max_new_tokens": 5, "do_sample": False}
    assert torch.equal(model.generate(ids, **greedy), plain.generate(ids, **greedy))


@few
@given(
    lengths=DOCUMENTS, heads=HEADS, steps=st.integers(1, 5), mode=st.sampled_from(["exact", "paper"]), data=st.data()
)
def test_rows_not_asked_for_change_nothing(lengths, heads, steps, mode, data):
    """Outputs and gradients of the chosen rows are those of a rollout over all rows."""
    model, hidden, embeds = case(lengths, heads, 1)
    total = sum(lengths)
    rows = torch.tensor(sorted(data.draw(st.sets(st.integers(0, total - 1), min_size=1))))
    every = run(model, hidden, embeds, lengths, steps, mode)
    chosen = run(model, hidden, embeds, lengths, steps, mode, rows=rows)
    torch.testing.assert_close(chosen, every[:, rows], atol=1e-5, rtol=1e-5)
    upstream, parameters = torch.randn_like(chosen), list(model.head.parameters())
    got = torch.autograd.grad((chosen * upstream).sum(), parameters)
    want = torch.autograd.grad((every[:, rows] * upstream).sum(), parameters)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
