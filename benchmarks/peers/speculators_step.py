"""One training step of the head, ours beside speculators': the same weights, hidden states, loop and optimizer.

    pip install --no-deps speculators==0.9.0 hs-connectors==0.9.0 loguru    # beside this package; not in its own .venv
    python benchmarks/peers/speculators_step.py                      # writes docs/results/speculators.*

A random checkpoint at MiMo-7B's proportions (vocabulary = 37 x hidden, MLP = 2.69 x hidden) in a layout that both
train, Qwen3.5's. Both load the head from it with their own code. Hidden states are given, so that no backbone runs: a
step is the head's forward and backward, clipping and AdamW, on one thread. First the same objective must give the same
loss and gradients. Then the variants take turns, each turn in another order, and a ratio is the median over the turns
of `speculators / this` in CPU seconds; its range is beside it. Peak memory is the process's, above weights, gradients
and the optimizer's moments, each variant in a process of its own.

Not named `speculators.py`: Python would import it in place of the package.
"""

import argparse
import ctypes
import gc
import itertools
import multiprocessing
import statistics
import sys
import tempfile
import time
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file
from torch.nn.utils import clip_grad_norm_
from transformers.models.qwen3_5.configuration_qwen3_5 import Qwen3_5TextConfig

from swift_fastmtp.families.table import FAMILIES
from swift_fastmtp.files.provenance import provenance
from swift_fastmtp.method.config import FastMTPConfig
from swift_fastmtp.model.loading import load_model
from swift_fastmtp.model.modeling import build_class

sys.path.insert(0, str(Path(__file__).parents[1]))
from common import write_result

K = 3
BETA = 0.6
SUPERVISED = 0.75
IN_MAP = 0.98  # of the tokens
PEER = "speculators"
INSTALL = "pip install --no-deps speculators==0.9.0 hs-connectors==0.9.0 loguru"
OURS = {
    "paper, ce (the same objective)": {"rollout": "paper", "loss": "ce"},
    "exact, ce": {"loss": "ce"},
    "exact, kl (default)": {"loss": "kl"},
    "exact, kl, in the map": {"loss": "kl", "token_map": True},
}
# Variant → the products that it cannot do without: (teachers of the kl, in the map).
FLOORS = {
    "products of exact, ce": (False, False),
    "products of exact, kl": (True, False),
    "products of exact, kl, in the map": (True, True),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--map", type=int, default=8192, help="ids in the token map")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", default="docs/results/speculators")
    args = parser.parse_args()
    if find_spec(PEER) is None:
        sys.exit(f"speculators is not installed: {INSTALL}")
    torch.set_num_threads(1)
    started = time.time()
    made_by = {**provenance(), PEER: version(PEER)}
    with tempfile.TemporaryDirectory() as folder:
        work = Work(Path(folder), args.hidden, args.length, args.map)
        memory = {name: in_a_fork(peak, work, name) for name in (PEER, *OURS)}
        equal = same_objective(work)
        seconds = in_turns(work, args.rounds)
    record = {
        "schema": "swift_fastmtp.speculators/1",
        "provenance": {**made_by, "seconds": round(time.time() - started, 1)},
        "shape": work.sizes,
        "steps": K,
        "supervised": SUPERVISED,
        "same_objective": equal,
        "cpu_seconds": seconds,
        "extra_bytes": memory,
        "gigaflop": {name: gigaflop(products(work, *of)) for name, of in FLOORS.items()},
    }
    text = table(record)
    print(text)
    write_result(record, text, args.output)


class Work:
    """What both train on: a checkpoint on disk, one sequence, its hidden states, a token map."""

    def __init__(self, folder, hidden, length, map_size):
        self.folder, self.map_file = folder, folder / "map.pt"
        heads = max(1, hidden // 128)
        vocab = 37 * hidden
        self.sizes = {"hidden": hidden, "intermediate": 2752 * hidden // 1024, "heads": heads, "kv": max(1, heads // 4)}
        self.sizes |= {"vocab": vocab, "length": length, "map": map_size}
        save_checkpoint(folder, self.sizes)
        torch.save(list(range(map_size)), self.map_file)
        generator = torch.Generator().manual_seed(0)
        inside = torch.randint(0, map_size, (1, length), generator=generator)
        anywhere = torch.randint(0, vocab, (1, length), generator=generator)
        self.ids = torch.where(torch.rand(1, length, generator=generator) < IN_MAP, inside, anywhere)
        self.labels = self.ids.masked_fill(torch.arange(length) < (1 - SUPERVISED) * length, -100)
        self.hidden = torch.randn(1, length, hidden, generator=generator)


def save_checkpoint(folder, sizes):
    """A random Qwen3.5 of two layers with an MTP layer."""
    torch.manual_seed(0)
    config = Qwen3_5TextConfig(
        vocab_size=sizes["vocab"],
        hidden_size=sizes["hidden"],
        intermediate_size=sizes["intermediate"],
        num_hidden_layers=2,
        layer_types=["linear_attention", "full_attention"],
        num_attention_heads=sizes["heads"],
        num_key_value_heads=sizes["kv"],
        head_dim=128,
        partial_rotary_factor=0.25,
        tie_word_embeddings=False,
        mtp_num_hidden_layers=1,
        architectures=["Qwen3_5ForCausalLM"],
    )
    model = build_class(next(f for f in FAMILIES if f.name == "qwen3_5"))(config)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, -0.2, 0.2)  # no two alike: `same_objective` tells them by their values
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(folder)


class Ours:
    """Our model class's own `forward`, with the given hidden states in the place of the backbone's."""

    def __init__(self, work):
        self.work = work
        self.model = load_model(work.folder, torch.float32)
        self.model.freeze_backbone()
        self.model.train()
        self.model.backbone_states = lambda *_: work.hidden
        self.parameters = list(self.model.head_parameters().values())

    def use(self, settings):
        """Settings of one variant; the map's rows of the output matrix are copied here, as once in a run."""
        settings = {**settings, "token_map": str(self.work.map_file) if settings.get("token_map") else ""}
        self.model.fastmtp = FastMTPConfig(num_speculative_steps=K, beta=BETA, **settings)
        self.model._mapped = None
        _ = self.model.draft_vocabulary.weight

    def loss(self, labels):
        return self.model(input_ids=self.work.ids, labels=labels).loss


class Theirs:
    """Their model as released, by their own constructor and with their own step weights."""

    def __init__(self, work):
        from speculators.models.mtp.core import MTPDraftModel, compute_step_weights
        from speculators.models.utils import get_verifier_config

        self.work = work
        config = get_verifier_config(str(work.folder))
        self.model = MTPDraftModel.from_training_args(
            config, num_speculative_steps=K, verifier_name_or_path=str(work.folder)
        )
        self.model.float().train()
        self.weights = compute_step_weights(BETA, K)
        for parameter in self.model.parameters():
            parameter.requires_grad_(False)
        self.parameters = list(self.model.mtp_layers.parameters())
        for parameter in self.parameters:
            parameter.requires_grad_(True)

    def loss(self, labels):
        mask = (labels != -100).long()
        _, loss, _ = self.model(self.work.ids, self.work.hidden, loss_mask=mask, step_weights=self.weights)
        return loss


def same_objective(work):
    """Both losses, and the largest difference of a gradient, relative to its largest entry.

    Without labels on the last K - 1 tokens, which theirs never has as targets of step 1. There theirs divides each
    step by its own rows, ours by all supervised tokens; of rows in the middle of a text both are the same.
    """
    labels = work.labels.clone()
    labels[:, -(K - 1) :] = -100
    ours, theirs = Ours(work), Theirs(work)
    ours.use(next(iter(OURS.values())))
    losses = []
    for one in (ours, theirs):
        loss = one.loss(labels)
        loss.backward()
        losses.append(float(loss.detach()))
    # Names differ; the shape and the order within a shape do not settle it, so gradients are matched by the weights.
    worst = 0.0
    for parameter in ours.parameters:
        (twin,) = [p for p in theirs.parameters if p.shape == parameter.shape and torch.equal(p, parameter)]
        worst = max(worst, float((twin.grad - parameter.grad).abs().max() / parameter.grad.abs().max()))
    assert abs(losses[0] - losses[1]) < 1e-5 * losses[0] and worst < 1e-4, (losses, worst)
    return {"loss": losses[0], "loss_of_speculators": losses[1], "gradient_difference": worst}


def step_of(trainer, labels):
    """One training step: the same for both."""
    optimizer = torch.optim.AdamW(trainer.parameters, lr=1e-5)

    def step():
        trainer.loss(labels).backward()
        clip_grad_norm_(trainer.parameters, 1.0)
        optimizer.step()

    step.optimizer = optimizer
    return step


def in_turns(work, rounds):
    """CPU seconds (user and system) of every variant, one figure a round; each round begins with another variant."""
    ours, theirs = Ours(work), Theirs(work)
    our_step, their_step = step_of(ours, work.labels), step_of(theirs, work.labels)
    variants = {PEER: (lambda: None, their_step)}
    for name, settings in OURS.items():
        variants[name] = (lambda s=settings: ours.use(s), our_step)
    for name, of in FLOORS.items():
        tensors = floor_tensors(products(work, *of))
        variants[name] = (lambda: None, lambda t=tensors: multiply(t))
    seconds = {name: [] for name in variants}
    for turn in range(rounds + 1):
        names = list(variants)
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            prepare, step = variants[name]
            prepare()
            for one in (our_step, their_step):
                one.optimizer.zero_grad()
            gc.collect()
            began = time.process_time()
            step()
            if turn:  # the first turn warms up
                seconds[name].append(time.process_time() - began)
    return seconds


class Product(NamedTuple):
    """`rows` rows through a matrix [out, into], forward and back."""

    rows: int
    out: int
    into: int
    to_input: bool = True
    to_weight: bool = True


def products(work, teacher, in_map):
    """The matrix products that a step of `exact` cannot do without."""
    sizes, heads = work.sizes, work.sizes["heads"]
    width, attended, kv = sizes["hidden"], 128 * heads, 128 * sizes["kv"]
    rows, all_rows = int((work.labels != -100).sum()), sizes["length"]
    found = []
    for k in range(K):
        # Keys and values of step 1 are needed of every position; what its inputs' gradient would be, of none.
        here = rows if k else all_rows
        found.append(Product(here, width, 2 * width, to_input=k > 0))
        found += [Product(here, kv, width)] * 2
        found += [Product(rows, 2 * attended, width), Product(rows, width, attended)]  # queries and their gates; out
        found += [Product(rows, sizes["intermediate"], width)] * 2 + [Product(rows, width, sizes["intermediate"])]
        found.append(Product(rows, sizes["map" if in_map else "vocab"], width, to_weight=False))
    if teacher:
        found.append(found[-1]._replace(to_input=False))
    return found


def gigaflop(found):
    return sum(2e-9 * p.rows * p.out * p.into * (1 + p.to_input + p.to_weight) for p in found)


def floor_tensors(found):
    """Each product with its operands: rows, matrix, and gradient."""
    operand = {
        shape: torch.randn(shape) for p in found for shape in [(p.rows, p.into), (p.out, p.into), (p.rows, p.out)]
    }
    return [(p, operand[p.rows, p.into], operand[p.out, p.into], operand[p.rows, p.out]) for p in found]


def multiply(tensors):
    for product, rows, matrix, grad in tensors:
        torch.mm(rows, matrix.T, out=grad)
        if product.to_input:
            torch.mm(grad, matrix)
        if product.to_weight:
            torch.mm(grad.T, rows)


def in_a_fork(function, *args):
    """What a function returns, run in a process of its own."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=lambda: sender.send(function(*args)))
    process.start()
    sender.close()  # so that `recv` raises if the process dies
    result = receiver.recv()
    process.join()
    return result


def peak(work, name):
    """Peak bytes of one step above weights, gradients and the optimizer's moments."""
    trainer = Theirs(work) if name == PEER else Ours(work)
    if name != PEER:
        trainer.use(OURS[name])
    for tensor in itertools.chain(trainer.model.parameters(), trainer.model.buffers()):
        tensor.data = tensor.data.clone()  # a file's mapping is not in memory before it is read
    for parameter in trainer.parameters:
        parameter.grad = torch.zeros_like(parameter)
    step = step_of(trainer, work.labels)
    step.optimizer.step()  # makes the moments
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what loading has freed must not serve the step unseen
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak that VmHWM reports
    before = status("VmRSS")
    step()
    return status("VmHWM") - before


def status(key):
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(key))
    return int(line.split()[1]) * 1024


def table(record):
    """The result page."""
    shape, equal, made = record["shape"], record["same_objective"], record["provenance"]
    seconds, memory = record["cpu_seconds"], record["extra_bytes"]
    lines = [
        "# One training step of the head, beside speculators",
        "",
        f"A random Qwen3.5 layer at MiMo's proportions: hidden {shape['hidden']}, MLP {shape['intermediate']}, "
        f"vocabulary {shape['vocab']}, map {shape['map']} ids; {shape['length']} tokens, "
        f"{record['supervised']:.0%} supervised, K = {record['steps']}, float32, {made['num_threads']} thread, "
        f"hidden states given. speculators {made[PEER]}, torch {made['torch']}. Made by "
        "`benchmarks/peers/speculators_step.py`; definitions there.",
        "",
        f"The same objective: loss {equal['loss']:.6f} here and {equal['loss_of_speculators']:.6f} there; no gradient "
        f"differs by more than {equal['gradient_difference']:.0e} of its largest entry.",
        "",
        f"CPU seconds, median of {len(seconds[PEER])} rounds in which the variants took turns; in brackets the range "
        "of the ratio. Peak memory is above weights, gradients and moments.",
        "",
        "| step | CPU s | speculators / this | peak MB | speculators / this |",
        "|---|---:|---:|---:|---:|",
    ]
    for name in (PEER, *OURS):
        lines.append(
            f"| {name} | {statistics.median(seconds[name]):.2f} | {ratio(seconds[PEER], seconds[name])} "
            f"| {memory[name] / 1e6:.0f} | {memory[PEER] / memory[name]:.1f}x |"
        )
    lines += ["", "What binds: the matrix products alone, in the same rounds.", ""]
    lines += ["| | GFLOP | CPU s | GFLOP/s | speculators / this |", "|---|---:|---:|---:|---:|"]
    for name, work in record["gigaflop"].items():
        median = statistics.median(seconds[name])
        lines.append(
            f"| {name} | {work:.0f} | {median:.2f} | {work / median:.0f} | {ratio(seconds[PEER], seconds[name])} |"
        )
    return "\n".join(lines) + "\n"


def ratio(theirs, ours):
    """Median and range of the rounds' ratios."""
    ratios = [a / b for a, b in zip(theirs, ours, strict=True)]
    return f"{statistics.median(ratios):.2f}x ({min(ratios):.2f}–{max(ratios):.2f})"


if __name__ == "__main__":
    main()
