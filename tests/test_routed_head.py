"""The routed head: each row has the full logits at its own map's columns and no probability anywhere else.

The oracle multiplies by the whole matrix and masks. The kernel runs under Triton's interpreter, or on a GPU where there
is one; and everywhere it is compiled for GPUs.
"""

import importlib
import os
import subprocess
import sys

import pytest
import torch
from helpers.paths import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

from swift_fastmtp.errors import FastMTPError
from swift_fastmtp.serving import routed_head
from swift_fastmtp.serving.routed_head import NOTHING, RoutedHead, fill_value

V = 97
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Both sides sum in float32, in different orders, and round once: at most one last bit of the result apart.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}
SIZES = {"one": 1, "almost": 63, "block": 64, "over": 65}


def random_maps(sizes=SIZES, vocab=V, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randperm(vocab, generator=generator)[:size] for name, size in sizes.items()}


def tensors(N, D, languages, dtype=torch.float32, vocab=V, seed=1):
    """Rows, matrix, and every language in turn; logits of about unit size."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(N, D, generator=generator).to(dtype)
    weight = (torch.randn(vocab, D, generator=generator) / D**0.5).to(dtype)
    return hidden, weight, torch.tensor(languages)[torch.arange(N) % len(languages)]


def oracle(maps, hidden, weight, language, dtype):
    full = (hidden.float() @ weight.float().T).to(dtype)
    allowed = torch.zeros(len(maps) + 2, len(weight), dtype=torch.bool)  # the last is NOTHING's
    for i, ids in enumerate(maps.values()):
        allowed[i, ids] = True
    allowed[len(maps)] = True
    return torch.where(allowed[language.long()], full, fill_value(dtype))


def check(maps, hidden, weight, language, dtype=None, head=None):
    dtype = dtype or hidden.dtype
    head = head or RoutedHead(maps, len(weight), device=DEVICE)
    got = head(hidden.to(DEVICE), weight.to(DEVICE), language.to(DEVICE), dtype=dtype)
    assert got.dtype == dtype
    want = oracle(maps, hidden, weight, language, dtype)
    # A tolerance relative to the fill value would forgive anything.
    assert torch.equal(got.cpu() == fill_value(dtype), want == fill_value(dtype))
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(got.cpu(), want, atol=tolerance, rtol=tolerance)


@pytest.fixture
def kernel(monkeypatch):
    """The kernel, with blocks and a grid small enough that each of its loops goes round."""
    pytest.importorskip("triton", reason="pip install swift_fastmtp[dev]")
    if DEVICE == "cpu":
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    module = importlib.reload(importlib.import_module("swift_fastmtp.serving.routed_head_triton"))
    monkeypatch.setattr(module, "_BLOCKS", {1: (16, 32), 16: (32, 64), 32: (16, 64)})
    monkeypatch.setattr(module, "_PROGRAMS", 2)
    monkeypatch.setattr(routed_head, "_kernel", lambda _: module.route)


@pytest.fixture(params=["plain", "kernel"])
def form(request, monkeypatch):
    """Both forms, one after the other."""
    monkeypatch.setattr(routed_head, "_kernel", lambda _: routed_head.route)
    if request.param == "kernel":
        request.getfixturevalue("kernel")


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("N", "D"), [(0, 40), (1, 40), (1, 129), (3, 129), (17, 40), (65, 129)])
def test_every_map_the_whole_vocabulary_and_nothing_in_one_batch(form, dtype, N, D):
    maps = random_maps()
    hidden, weight, language = tensors(N, D, [0, 4, 1, NOTHING, 2, 3], dtype)
    check(maps, hidden, weight, language)
    check(maps, hidden, weight, language.int(), torch.float32)


@pytest.mark.parametrize("languages", [[0], [1], [2], [3], [4], [NOTHING]], ids=str)
@pytest.mark.parametrize("N", [1, 5])
def test_batch_of_one_language(form, N, languages):
    check(random_maps(), *tensors(N, 40, languages))


def test_no_maps_is_the_plain_head(form):
    check({}, *tensors(5, 40, [0, NOTHING]))


def test_numbers_of_no_map_compute_nothing(form):
    hidden, weight, language = tensors(4, 40, [NOTHING, 2, 7, -5])
    out = RoutedHead(random_maps({"a": 3}), V, device=DEVICE)(*(x.to(DEVICE) for x in (hidden, weight, language)))
    assert (out == fill_value(torch.float32)).all()


def test_rows_are_cast_to_the_matrix(form):
    hidden, weight, language = (x.to(DEVICE) for x in tensors(5, 40, [1, 4]))
    head, weight = RoutedHead(random_maps(), V, device=DEVICE), weight.bfloat16()
    got, want = head(hidden, weight, language), head(hidden.bfloat16(), weight, language, dtype=torch.float32)
    assert torch.equal(got, want)


def test_padding_rows_cannot_spoil_others(form):
    """A captured graph's padding rows hold whatever was there."""
    maps = random_maps()
    hidden, weight, language = tensors(5, 40, [3, NOTHING])
    hidden[language == NOTHING] = float("nan")
    head = RoutedHead(maps, V, device=DEVICE)
    got = head(*(x.to(DEVICE) for x in (hidden, weight, language))).cpu()
    hidden[language == NOTHING] = 0
    torch.testing.assert_close(got, oracle(maps, hidden, weight, language, torch.float32), atol=1e-5, rtol=1e-5)


def test_buffers_of_the_caller(form):
    """A wider buffer, a matrix and rows that are slices; what was in the buffer does not matter."""
    maps = random_maps()
    hidden, weight, language = (x.to(DEVICE) for x in tensors(3, 40, [1, 4, NOTHING]))
    wide = torch.full((3, V + 7), float("nan"), device=DEVICE)
    out = wide[:, :V]
    sliced = torch.cat([weight, weight], 1)[:, :40]
    head = RoutedHead(maps, V, device=DEVICE)
    got = head(hidden.T.contiguous().T, sliced, language, out=out)
    assert got is out and wide[:, V:].isnan().all()
    torch.testing.assert_close(got, head(hidden, weight, language))
    assert torch.equal(head(hidden, weight, language.repeat_interleave(2)[::2]), got)
    assert not head(hidden, weight.clone().requires_grad_(), language).requires_grad
    assert head(hidden.bfloat16(), weight.bfloat16(), language, out=out).dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_shards_side_by_side_are_the_whole(form, dtype):
    """Two ranks of 64 rows, the second padded; one map lies in the second rank's part only."""
    maps = {**random_maps(), "high": torch.tensor([96, 70])}
    hidden, weight, language = tensors(7, 40, [0, 1, 2, 3, 4, 5, NOTHING], dtype)
    padded = torch.cat([weight, torch.zeros(128 - V, 40, dtype=dtype)]).to(DEVICE)
    parts = []
    for start, end in ((0, 64), (64, 97)):
        head = RoutedHead(maps, V, vocab_start=start, vocab_end=end, device=DEVICE)
        parts.append(head(hidden.to(DEVICE), padded[start : start + 64], language.to(DEVICE)))
    got = torch.cat(parts, 1)[:, :V].cpu()
    want, tolerance = oracle(maps, hidden, weight, language, dtype), TOLERANCE[dtype]
    assert torch.equal(got == fill_value(dtype), want == fill_value(dtype))
    torch.testing.assert_close(got, want, atol=tolerance, rtol=tolerance)
    assert (parts[0][4] == fill_value(dtype)).all()


@pytest.mark.skipif(DEVICE == "cuda", reason="looks into the interpreter")
@pytest.mark.parametrize(("N", "times"), [(1, 1), (3, 1), (32, 1), (40, 2)])
def test_the_kernel_reads_only_the_maps_in_the_batch(kernel, monkeypatch, N, times):
    """A weight row once for up to 32 rows of the batch (here), and nothing of a map that none uses: all its speed."""
    from triton.runtime.interpreter import interpreter_builder as builder

    maps = random_maps()
    head = RoutedHead(maps, V)
    hidden, weight, language = tensors(N + 70, 40, [1] if N == 1 else [NOTHING, 1])
    hidden, language = (hidden[:1], language[:1]) if N == 1 else (hidden, language)
    language[N:] = NOTHING
    of_weight, of_ids = torch.zeros_like(weight, dtype=torch.int64), torch.zeros_like(head.ids_M)
    load = builder.create_masked_load

    def watch(pointers, mask, *rest):
        for tensor, count in ((weight, of_weight), (head.ids_M, of_ids)):
            at = torch.from_numpy((pointers.data[mask.data] - tensor.data_ptr()).astype("int64")) // 4
            count.view(-1).add_(torch.bincount(at[(at >= 0) & (at < tensor.numel())], minlength=tensor.numel()))
        return load(pointers, mask, *rest)

    monkeypatch.setattr(builder, "create_masked_load", watch)
    head(hidden, weight, language)
    want = torch.zeros(V, dtype=torch.long).index_fill(0, maps["almost"], times)
    assert torch.equal(of_weight, want[:, None].expand(V, 40))
    assert of_ids.tolist() == [0] * 1 + [1] * 63 + [0] * (64 + 65)


cases = {
    "N": st.integers(1, 9),
    "D": st.integers(1, 20),
    "sizes": st.lists(st.integers(1, 30), min_size=1, max_size=4),
    "seed": st.integers(0, 2**20),
}


@settings(deadline=None, max_examples=60)
@given(**cases)
def test_a_row_is_a_distribution_over_its_map(N, D, sizes, seed):
    maps = random_maps({str(i): size for i, size in enumerate(sizes)}, 30, seed)
    hidden, weight, _ = tensors(N, D, [0], vocab=30, seed=seed)
    language = torch.randint(0, len(maps) + 1, (N,), generator=torch.Generator().manual_seed(seed))
    logits = RoutedHead(maps, 30)(hidden, weight, language)
    probs, full = logits.softmax(-1), hidden @ weight.T
    for i, ids in enumerate([*maps.values(), torch.arange(30)]):
        for n in (language == i).nonzero()[:, 0]:
            assert full[n, logits[n].argmax()] >= full[n, ids].max() - 1e-5
            assert int(logits[n].argmax()) in ids
            outside = torch.ones(30, dtype=torch.bool)
            outside[ids] = False
            assert not probs[n, outside].any()
    torch.testing.assert_close(probs.sum(-1), torch.ones(N))


@settings(deadline=None, max_examples=60)
@given(**cases)
def test_rows_of_other_languages_change_nothing(N, D, sizes, seed):
    """Bit by bit: new rows, in other languages, beside the rows of map 0."""
    head = RoutedHead(random_maps({str(i): size for i, size in enumerate(sizes)}, 30, seed), 30)
    hidden, weight, _ = tensors(N, D, [0], vocab=30, seed=seed)
    mine = torch.arange(N) % 2 == 0
    want = head(hidden[mine], weight, torch.zeros(int(mine.sum()), dtype=torch.long))
    for other in range(NOTHING, len(sizes) + 1):
        if other != 0:
            hidden[~mine] = torch.randn(int((~mine).sum()), D)
            got = head(hidden, weight, torch.where(mine, 0, other))
            assert torch.equal(got[mine], want)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([], "must be a flat list of one or more token ids"),
        ([[1, 2]], "must be a flat list of one or more token ids"),
        ([1.5], "must be a flat list of one or more token ids"),
        (["a"], "not a list of token ids"),
        ([3, 97], "holds id 97, the model has tokens 0..96; make the map with this model's tokenizer"),
        ([3, -1], "holds id -1, the model has tokens 0..96; make the map with this model's tokenizer"),
        ([5, 3, 5], "holds id 5 twice; make the ids unique"),
    ],
)
def test_a_bad_map_is_named(ids, message):
    with pytest.raises(FastMTPError) as error:
        RoutedHead({"en": [1, 2], "zh": ids}, V)
    assert str(error.value).startswith("token map 'zh': ") and message in str(error.value)
    assert "\n" not in str(error.value)


def test_maps_are_sorted_copies_in_order():
    given_ids = torch.tensor([9, 2, 5])
    head = RoutedHead({"zh": given_ids, "en": [96, 0]}, V, vocab_start=2, vocab_end=97)
    assert head.languages == ("zh", "en") and head.full == 2
    assert head.ids_M.tolist() == [0, 3, 7, 94] and head.offsets.tolist() == [0, 3, 4]
    assert head.ids_M.dtype == head.offsets.dtype == torch.int32 and given_ids.tolist() == [9, 2, 5]


def test_what_does_not_fit_is_refused():
    hidden, weight, language = tensors(3, 40, [0])
    head = RoutedHead(random_maps(), V)
    with pytest.raises(FastMTPError, match=r"has 96 rows for tokens 0\.\.96; make the token maps for this model"):
        head(hidden, weight[:96], language)
    with pytest.raises(FastMTPError, match="not quantized"):
        head(hidden, weight.to(torch.int8), language)
    for bad in (hidden[:, 1:], hidden[0]):
        with pytest.raises(ValueError, match="do not fit an output matrix"):
            head(bad, weight, language)
    for bad in (language[1:], language.float()):
        with pytest.raises(ValueError, match="3 rows need as many"):
            head(hidden, weight, bad)
    for bad in (torch.empty(3, V - 1), torch.empty(3, V).half()):
        with pytest.raises(ValueError, match=r"the logits are torch\.float32 \(3, 97\)"):
            head(hidden, weight, language, out=bad, dtype=torch.float32)
    with pytest.raises(ValueError, match="no part of a vocabulary"):
        RoutedHead({}, V, vocab_start=5, vocab_end=4)


def test_importing_it_imports_neither_triton_nor_sglang():
    code = (
        "import torch, sys; before = set(sys.modules); import swift_fastmtp.serving.routed_head; "
        "print([m for m in set(sys.modules) - before if m.split('.')[0] in ('triton', 'sglang')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from swift_fastmtp.serving import routed_head_triton as module

names = module._route.arg_names
cases = (90, "bf16", 1), (80, "fp32", 1), (90, "bf16", 16), (90, "fp16", 64), (80, "fp32", 16), (80, "bf16", 32)
for capability, dtype, rows in cases:
    signature = {name: "constexpr" if name.isupper() and len(name) > 1 else "i32" for name in names}
    signature |= {"hidden": f"*{dtype}", "weight": f"*{dtype}", "out": "*fp32"}
    signature |= {"ids": "*i32", "offsets": "*i32", "language_ptr": "*i64"}
    block_v, block_d = module._BLOCKS[rows]
    block_d = block_d // 2 if dtype == "fp32" else block_d
    constants = {"WIDEN": False, "SCAN": 128, "BLOCK_N": rows, "BLOCK_V": block_v, "BLOCK_D": block_d}
    if rows == 1:  # Triton makes a constant of every argument that is 1
        constants |= {"N": 1, "maps": 1}
        signature |= {"N": "constexpr", "maps": "constexpr"}
    target = GPUTarget("cuda", capability, 32)
    options = {"num_warps": 4, "num_stages": 3}
    kernel = triton.compile(ASTSource(module._route, signature, constants), target=target, options=options)
    assert "cubin" in kernel.asm and kernel.metadata.shared < 96 * 1024
print("compiled")
"""


@pytest.mark.matrix
def test_the_kernel_compiles_for_gpus(tmp_path):
    """The interpreter forgives what the compiler does not."""
    pytest.importorskip("triton", reason="pip install swift_fastmtp[dev]")
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE], capture_output=True, text=True, check=False, cwd=ROOT, env=env
    )
    assert done.stdout.strip() == "compiled", done.stderr[-3000:]


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_one_captured_graph_serves_every_mix_of_languages():
    maps = random_maps()
    hidden, weight, language = (x.to(DEVICE) for x in tensors(17, 129, [0], torch.bfloat16))
    head = RoutedHead(maps, V, device=DEVICE)
    head(hidden, weight, language)  # compile
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = head(hidden, weight, language)
    for languages in ([0], [1, 4], [NOTHING], [0, 1, 2, 3, 4, NOTHING]):
        language.copy_(tensors(17, 1, languages)[2])
        graph.replay()
        want = oracle(maps, hidden.cpu(), weight.cpu(), language.cpu(), torch.bfloat16)
        assert torch.equal(out.cpu() == fill_value(torch.bfloat16), want == fill_value(torch.bfloat16))
        torch.testing.assert_close(out.cpu(), want, atol=2**-7, rtol=2**-7)
