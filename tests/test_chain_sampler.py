"""SGLang's own kernel for sampled drafts, against a verifier of a few lines, chain by chain and in distribution.

On a CPU SGLang verifies greedily at any temperature, so its sampled regimes cannot be served there; their kernel
(`chain_speculative_sampling_triton`) runs in Triton's interpreter, on a GPU compiled. The file is the installed
SGLang's, or the one that SGLANG_CHAIN_SAMPLER names, for a machine without SGLang.
"""

import importlib.util
import os
import sys
from pathlib import Path

import pytest
import torch
from helpers.chains import drafted, language, verify

from swift_fastmtp.serving.routed_head import RoutedHead, fill_value

pytest.importorskip("triton", reason="pip install swift_fastmtp[dev]")
pytestmark = pytest.mark.matrix

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CHAINS = 200_000 if DEVICE == "cuda" else 2_000  # the interpreter takes 8 ms for each
VOCAB, STEPS, WIDTH, TEMPERATURE = 4, 2, 8, 0.6
KERNEL = "sglang/kernels/ops/speculative/reject_sampling.py"
CRITICAL = 103.4  # 0.999 quantile of chi-square with VOCAB ** 3 - 1 = 63 degrees of freedom
MAPS = {"none": None, "a map of three": [0, 2, 3]}


def kernel_file():
    if named := os.environ.get("SGLANG_CHAIN_SAMPLER"):
        return Path(named)
    for folder in map(Path, sys.path):
        if (folder / KERNEL).exists():
            return folder / KERNEL
    if DEVICE == "cuda":
        pytest.skip("SGLang is not installed, and SGLANG_CHAIN_SAMPLER does not name its reject_sampling.py")
    from helpers.engine import engine_folder  # makes SGLang's environment, if it is not there

    return next(Path(engine_folder()).glob(f"lib/python3*/site-packages/{KERNEL}"))


@pytest.fixture(scope="module")
def sampler():
    with pytest.MonkeyPatch.context() as patch:
        if DEVICE == "cpu":
            patch.setenv("TRITON_INTERPRET", "1")
        spec = importlib.util.spec_from_file_location("sglang_reject_sampling", kernel_file())
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module.chain_speculative_sampling_triton


def run(sampler, drafts, q, p, coins, last, block):
    """What SGLang makes of a round, called as `eagle_sample` does: (accepted drafts [N], the token after them [N])."""
    N, slots = len(drafts), STEPS + 1
    start = torch.zeros(N, 1, dtype=torch.long)  # the token that was verified last
    out = {
        "predicts": torch.zeros(N * slots, dtype=torch.int32),
        "accept_index": torch.full((N, slots), -1, dtype=torch.int32),
        "accept_token_num": torch.empty(N, dtype=torch.int32),
    }
    out = {name: tensor.to(DEVICE) for name, tensor in out.items()}
    given = {
        "candidates": torch.cat([start, drafts], 1),
        "retrive_index": torch.arange(N * slots).view(N, slots),
        "uniform_samples": torch.cat([coins, coins[:, :1]], 1),
        "uniform_samples_for_final_sampling": last,
        "target_probs": p,
        "draft_probs": q,
    }
    given = {name: tensor.to(DEVICE).contiguous() for name, tensor in given.items()}
    unused = dict.fromkeys(("retrive_next_token", "retrive_next_sibling"))
    thresholds = {"threshold_single": 1.0, "threshold_acc": 1.0, "deterministic": True}
    sampler(**out, **given, **unused, **thresholds, block_verification=block)
    accepted = out["accept_token_num"].cpu().long()
    predicts = out["predicts"].cpu().long().view(N, slots)
    for k in range(STEPS):  # what it commits are the drafts that it accepted, and one more token
        assert torch.equal(predicts[accepted > k, k], drafts[accepted > k, k])
    return accepted, predicts.gather(1, accepted[:, None])[:, 0]


def draft_table(ids):
    """The draft's distribution behind each token [V, V], by the routed head, as the plugin hands it to SGLang."""
    generator = torch.Generator().manual_seed(1)
    hidden, matrix = (torch.randn(VOCAB, WIDTH, generator=generator) / WIDTH**0.25 for _ in range(2))
    head = RoutedHead({"en": ids} if ids else {}, VOCAB)
    logits = head(hidden, matrix, torch.zeros(VOCAB, dtype=torch.int32))
    q = (logits / TEMPERATURE).softmax(-1)  # `sampling_softmax`, `renorm_draft_probs`
    outside = sorted(set(range(VOCAB)) - set(ids or range(VOCAB)))
    assert q.shape == (VOCAB, VOCAB) and not q[:, outside].any()
    assert (logits[:, outside] == fill_value(logits.dtype)).all()
    return q


@pytest.mark.parametrize("ids", MAPS.values(), ids=MAPS)
@pytest.mark.parametrize("block", [False, True], ids=["rejection", "block"])
def test_the_engines_kernel_is_the_papers_and_writes_what_the_target_would(sampler, block, ids):
    target, draft = language(VOCAB, 0, 0.5), draft_table(ids)
    generator = torch.Generator().manual_seed(2)
    start = torch.zeros(CHAINS, dtype=torch.long)
    drafts, q, p = drafted(target, draft, start, generator, STEPS)
    coins, last = torch.rand(CHAINS, STEPS, generator=generator), torch.rand(CHAINS, generator=generator)
    accepted, after = run(sampler, drafts, q, p, coins, last, block)
    # The same random numbers, the same drafts and tokens: all but those whose number falls on a rounded edge.
    want, want_after = verify(drafts, q, p, coins, last, block)
    assert ((accepted == want) & (after == want_after)).float().mean() > 0.9995
    assert torch.bincount(accepted, minlength=STEPS + 1).min() > 0.02 * CHAINS
    # And they are distributed as three tokens of the target.
    out, before = torch.zeros(CHAINS, STEPS + 1, dtype=torch.long), start
    for t in range(STEPS + 1):
        plain = torch.multinomial(target[before], 1, generator=generator)[:, 0]
        out[:, t] = torch.where(accepted > t, drafts[:, min(t, STEPS - 1)], torch.where(accepted == t, after, plain))
        before = out[:, t]
    seen = torch.bincount((out * torch.tensor([VOCAB**2, VOCAB, 1])).sum(1), minlength=VOCAB**3).double()
    expected = (target[0][:, None, None] * target[:, :, None] * target[None]).double().flatten() * CHAINS
    assert float(((seen - expected) ** 2 / expected).sum()) < CRITICAL


def test_a_verification_that_takes_sampled_drafts_for_greedy_ones_is_noticed(sampler):
    """The kernel told that q is 1 at each draft: it still writes the target's distribution, and accepts fewer."""
    target, draft = language(VOCAB, 0, 0.5), draft_table(None)
    generator = torch.Generator().manual_seed(2)
    drafts, q, p = drafted(target, draft, torch.zeros(500, dtype=torch.long), generator, STEPS)
    coins, last = torch.rand(500, STEPS, generator=generator), torch.rand(500, generator=generator)
    certain = torch.nn.functional.one_hot(drafts, VOCAB).float()
    right, _ = run(sampler, drafts, q, p, coins, last, False)
    wrong, _ = run(sampler, drafts, certain, p, coins, last, False)
    assert wrong.float().mean() < 0.8 * right.float().mean()
