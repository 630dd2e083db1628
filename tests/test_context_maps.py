"""What the benchmark of token maps per request computes in one pass is what a server would do, token by token."""

import json
import sys

import numpy as np
import pytest
import torch
from helpers.benchmarks import load
from helpers.paths import ROOT, TINY
from helpers.reference import speculative_greedy
from transformers import AutoTokenizer

from swift_fastmtp.data.generate import end_token_ids
from swift_fastmtp.files.rows import read_rows
from swift_fastmtp.method.config import FastMTPConfig
from swift_fastmtp.method.metrics import verify_rounds
from swift_fastmtp.model.loading import load_model
from swift_fastmtp.simulate.acceptance import greedy_acceptance, make_texts

PROMPTS = ROOT / "examples" / "prompts" / "eval.jsonl"
K = 3


@pytest.fixture(scope="module")
def drafted():
    """The tiny model, its answers to prompts of three languages, and a ranking of its ids."""
    model, tokenizer = load_model(TINY, torch.float32), AutoTokenizer.from_pretrained(TINY)
    model.fastmtp = FastMTPConfig(num_speculative_steps=K)
    rows = [row for category in ("en", "zh", "code") for row in of_category(category)[:1]]
    texts = make_texts(model, tokenizer, rows, 24, "generate", 4)
    sets = load("vocab/context_sets.py")
    counts = np.bincount([i for text in texts for i in text.ids], minlength=model.config.vocab_size)
    return model, tokenizer, texts, sets, sets.ranking([counts[::-1]])  # frequent ids are no text's own


def of_category(category):
    return [row for row in read_rows(PROMPTS) if row["category"] == category]


def test_the_ids_of_requests_draft_what_a_server_would(drafted):
    model, tokenizer, texts, _, (order, rank) = drafted
    module = load("vocab/context_tau.py")
    V = len(order)
    forms = [(module.CONTEXT, 0), (module.CONTEXT, 1500), (module.STATIC, 3000), (module.STATIC, V)]
    found = module.acceptance(model, texts, tokenizer.pad_token_id, 4, (order, rank), forms)
    by_id = torch.from_numpy(order)
    static = greedy_acceptance(model, texts, tokenizer.pad_token_id, 4, (by_id[:3000], None), "")
    for mine, theirs in zip(found[2:], static, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
    ends = end_token_ids(model, tokenizer)
    for (_, base), of in zip(forms[:2], found[:2], strict=True):

        def allowed(ids, base=base):
            return torch.cat([by_id[:base], torch.tensor(ids)]).unique()

        for text, accepted in zip(texts, of, strict=True):
            with torch.no_grad():
                tokens, want = speculative_greedy(model, text.ids[: text.start], K, 24, ends, allowed)
            assert tokens == text.ids[text.start : text.end]
            assert verify_rounds(accepted, K) == want
    accepted = [sum(int(each.sum()) for each in of) for of in found]
    assert 0 < accepted[0] < accepted[1] < accepted[3]


def test_how_many_ids_a_request_has(drafted):
    *_, texts, sets, (_, rank) = drafted
    held = sets.mean_sizes(texts, rank)
    for base in (0, 7, 1000, len(rank)):
        sizes = []
        for text in texts:
            for last in range(text.start, text.end - 1):
                own = {int(rank[i]) for i in text.ids[: last + 1]} - set(range(base))
                sizes.append(base + len(own))
        assert held[base] == pytest.approx(np.mean(sizes))
    assert (np.diff(held) >= -1e-9).all()
    base = sets.base_of(1000, held)
    assert held[base] <= 1000 < held[base + 1] and sets.base_of(0, held) is None


def test_coverage_by_hand():
    coverage = load("vocab/context_coverage.py")
    samples = [coverage.Sample([0, 1, 2, 3, 2, 0, 9], 2, 7)]
    found = coverage.of_texts(samples, np.arange(10), [4, 5, 10])
    # Drafted are 3, 2, 0 and 9, the middle two of which the request has; it knows 3, 4, 4 and 4 ids.
    assert found["static"] == {4: 0.75, 5: 0.75, 10: 1.0}
    assert found["context alone"] == {"ids": 4, "coverage": 0.5}
    assert found["context"] == {4: 0.75, 5: 0.75, 10: 1.0} and found["static for 99 %"] == 10


def test_messages_of_a_translation(tmp_path):
    coverage = load("vocab/context_coverage.py")
    header, empty = '# a\nmsgid ""\nmsgstr "Header: x\\n"', 'msgid "No"\nmsgstr ""'
    entries = [header, 'msgid "One"\nmsgstr ""\n"Uno \\"y\\"\\n"\n"dos"', empty]
    (tmp_path / "a.po").write_text("\n\n".join(entries) + "\n")
    ((language, kind, prompt, text, _),) = coverage._translations("es", tmp_path)
    assert (language, kind, prompt, text) == ("es", "documents", None, 'Uno "y"\ndos')


def test_cost_in_small(monkeypatch, tmp_path, capsys):
    """All forms take the same tokens, which the benchmark itself asserts."""
    context = load("vocab/context.py")
    cost = sys.modules["context_cost"]
    monkeypatch.setitem(cost.SHAPES, "MiMo-7B", {"vocabulary": 600, "hidden": 16, "keys": 8, "wide": 32})
    output = tmp_path / "context.json"
    sizes = ["--shapes", "MiMo-7B", "--requests", "2", "--ids", "64", "--own_ids", "16", "--rounds", "1"]
    monkeypatch.setattr(sys, "argv", ["context.py", "cost", *sizes, "--output", str(output)])
    threads = torch.get_num_threads()
    try:
        context.main()
    finally:
        torch.set_num_threads(threads)
    (case,) = json.loads(output.read_text())["cost"]["cases"]
    assert (
        case["forms"]["static"]["step"] == [1.0, 1.0, 1.0] and case["forms"]["context, rows kept"]["microseconds"] > 0
    )
    assert "matrix / static" in capsys.readouterr().out
