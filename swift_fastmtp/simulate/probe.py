"""`fastmtp doctor --probe`: is the MTP layer that is there any good?

Names, shapes and finite numbers do not tell. So the model answers a few prompts greedily, and the layer's drafts are
compared with these answers, as `fastmtp simulate` does: as the layer is, with each known fault taken back
(`repairs.py`), and beside layers that learned nothing. `verdict.py` reads the numbers.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.mtp_tensors import head_reader
from ..data.chat_template import load_tokenizer
from ..data.generate import padding_id
from ..errors import FastMTPError, detail
from ..families.family import ENGINE_NAMES
from ..files.rows import read_rows
from ..files.table import NOTHING, terminal_table
from ..method.config import FastMTPConfig
from ..method.metrics import micro_tau, text_counts, verify_rounds
from ..model.loading import head_shapes, load_head, load_model
from .acceptance import Text, greedy_acceptance, make_texts
from .repairs import known_repairs, norm_names, repaired
from .states import States
from .verdict import Measured, Verdict, judge

PROMPTS = (
    "Explain in a few sentences why the sky is blue.",
    "Write a short story about a lost dog.",
    "How do I boil an egg? Give the steps.",
    "Write a Python function that checks whether a number is prime.",
    "What is the capital of France, and what is it known for?",
    "List five fruits and say what each tastes like.",
    "Write a short letter to a friend who has moved to another city.",
    "Explain what a bank does.",
    "A train covers 120 km in two hours. What is its average speed?",
    "Summarize what happens in a year on a farm.",
    "Was ist der Unterschied zwischen Wetter und Klima?",
    "Translate into French: Good morning, how are you?",
)
NUM_STEPS = 3
MAX_NEW_TOKENS = 40
"""Of an answer: short, because small models soon repeat themselves, and repeated text is drafted too well."""
BATCH_SIZE = 16
RANDOM_HEADS = 3
SHARE = 0.8
"""Of the free memory that a model may take; the rest is for its cache, states and logits."""
# So that a base model, which has no chat template, continues the prompt.
_PLAIN_TEMPLATE = "{{ bos_token or '' }}{% for message in messages %}{{ message['content'] }}{% endfor %}"

Start = Callable[[Any, Any, Any, dict[str, tuple[int, ...]]], Callable[[str], torch.Tensor]]
"""Backbone, configuration, family, shapes → what reads the tensors of an untrained layer (`export/init_head.py`)."""


@dataclass
class Probe:
    """What was measured, for people."""

    text: str
    """The table, or one line that says why nothing was measured."""
    verdicts: list[Verdict] = field(default_factory=list)
    measured: list[Measured] = field(default_factory=list)
    """In the order of the table: the layer as it is first. Empty if nothing was measured."""


def probe(
    folder: str | Path,
    model: str | Path | None = None,
    prompts: str | Path | None = None,
    engine: str = "sglang",
    start: Start | None = None,
) -> Probe:
    """Measure the MTP layer of a full checkpoint, a draft-only folder or a training checkpoint.

    Args:
        folder: that is probed.
        model: its base model, where `folder` holds the layer alone; default: the one that it was trained for.
        prompts: file of rows to answer instead of `PROMPTS`.
        engine: whose graph is computed.
        start: makes an untrained layer to compare with.

    A checkpoint that cannot be loaded is no error: the result says why. Raises `FastMTPError` for bad prompts.
    """
    rows = read_rows(prompts) if prompts else [{"messages": [{"role": "user", "content": text}]} for text in PROMPTS]
    checkpoint = Checkpoint(folder)
    try:
        base = _base(checkpoint, model)
        has_own = base is checkpoint or any(checkpoint.family.owns(name) for name in base.file_of)
        loaded = _load(base, None if has_own else checkpoint, checkpoint.settings.get("backbone_lora"))
        return _probe(loaded, checkpoint, base, has_own, rows, engine, start)
    except FastMTPError as error:
        return Probe(f"probe: nothing was measured: {error}")
    except torch.OutOfMemoryError:
        return Probe(f"probe: nothing was measured: {checkpoint} and its model do not fit into the memory here")


def _base(checkpoint: Checkpoint, model: str | Path | None) -> Checkpoint:
    """The folder whose backbone is run."""
    if checkpoint.has_backbone():
        return checkpoint
    base = model or checkpoint.settings.get("base_model")
    if not base:
        raise FastMTPError(f"{checkpoint} holds an MTP layer alone; name its model with --model")
    return Checkpoint(base)


def _place(base: Checkpoint) -> tuple[torch.dtype, str]:
    """A GPU where there is one, float32 where it fits. Raises `FastMTPError` if nothing does."""
    from accelerate.utils import get_max_memory

    elements = sum(torch.Size(entry.shape).numel() for entry in base.entries.values())
    free = get_max_memory()
    devices = {"cuda": free.get(0, 0), "cpu": free.get("cpu", 0)}
    for device, room in devices.items():
        for dtype in (torch.float32, torch.bfloat16):
            if elements * dtype.itemsize <= SHARE * room:
                return dtype, device
    most = max(devices.values())
    raise FastMTPError(f"{base} takes {elements * 2 / 1e9:.1f} GB in bfloat16, and {most / 1e9:.1f} GB are free here")


def _load(base: Checkpoint, layer: Checkpoint | None, backbone_lora: str | None) -> Any:
    """The model; with the MTP layer of another folder if it has none, with the adapter that the layer is for.

    Raises `FastMTPError` where that cannot be done here.
    """
    if layer:
        architecture = (base.config.get("architectures") or [None])[0]
        runs = layer.family.backbone.split(":")[1]
        if architecture not in (*layer.family.architectures, runs):
            raise FastMTPError(
                f"{base} has no MTP layer and is a {architecture}, which is not run as a {runs} here; `fastmtp graft` "
                "puts the layer into it, and that can be probed"
            )
    dtype, device = _place(base)
    try:
        return load_model(base.folder, dtype, device, layer, backbone_lora)
    except FastMTPError:
        raise
    except Exception as error:  # noqa: BLE001 (transformers and its quantizers raise what they like)
        raise FastMTPError(f"{base}: transformers cannot load it here ({detail(error)})") from None


def _probe(
    model: Any,
    checkpoint: Checkpoint,
    base: Checkpoint,
    has_own: bool,
    rows: list[dict[str, Any]],
    engine: str,
    start: Start | None,
) -> Probe:
    """Of the model that was loaded from `base`, with the layer of `checkpoint`; `has_own` if the base has one too."""
    model.fastmtp = replace(FastMTPConfig(), num_speculative_steps=NUM_STEPS, engine=engine)
    expected = head_shapes(base if has_own else checkpoint)
    tokenizer = load_tokenizer(str(base))
    tokenizer.chat_template = tokenizer.chat_template or _PLAIN_TEMPLATE
    texts = make_texts(model, tokenizer, rows, MAX_NEW_TOKENS, "generate", BATCH_SIZE)
    # The backbone runs once over each text; what differs between the passes is the layer.
    with torch.no_grad(), States(passes=2) as states:
        measurement = _Measurement(model, texts, padding_id(model, tokenizer), states)
        own = None
        if has_own and base is not checkpoint:
            own = measurement.of("the base's own")
            load_head(model, head_reader(checkpoint, model.family, expected), expected)
        as_it_is = measurement.of("as it is")
        # Each known fault taken back.
        tried = []
        for repair in known_repairs(model, engine):
            with repaired(model, repair):
                try:
                    tried.append((repair, measurement.of(repair.name)))
                except FastMTPError:  # numbers that are not finite: not that one
                    continue
        # Layers that learned nothing; the model's own is not needed any more.
        untrained = None
        if start:
            try:
                load_head(model, start(base, model.config, model.family, expected), expected)
                untrained = measurement.of("last decoder layer, untrained")
            except FastMTPError:  # that layer is of another kind than the MTP layer's block
                untrained = None
        random = []
        for seed in range(RANDOM_HEADS):
            _randomize(model, seed)
            random.append(measurement.of("random weights"))
        chance = max(random, key=lambda each: each.rate)
    verdicts, helped = judge(as_it_is, tried, chance, untrained, own, str(base))
    shown = [each for each in (as_it_is, helped, own, untrained, chance) if each]
    tokens = sum(text.end - text.start for text in texts)
    dtype = str(model.dtype).removeprefix("torch.")
    setting = f"{dtype} on {model.device}, {ENGINE_NAMES[engine]}'s graph"
    answers = f"{len(texts)} greedy answers, {tokens} tokens, {int(measurement.distinct.sum())} of them no repetition"
    first = f"probe: {answers}; {setting}"
    return Probe(f"{first}\n{table(shown)}", verdicts, shown)


class _Measurement:
    """What is the same for every layer that is measured."""

    def __init__(self, model: Any, texts: list[Text], pad: int, states: States) -> None:
        self.model, self.texts, self.pad, self.states = model, texts, pad, states
        self.distinct = distinct_positions(texts)

    def of(self, name: str) -> Measured:
        """The layer that is in the model now."""
        self.states.keep_of(self.model)
        (accepted,) = greedy_acceptance(self.model, self.texts, self.pad, BATCH_SIZE, label="")
        counts = text_counts(accepted)
        tau = micro_tau([verify_rounds(accepted_KA, NUM_STEPS) for accepted_KA in accepted])
        lengths = torch.cat([accepted_KA.sum(0) for accepted_KA in accepted])
        return Measured(name, counts, tau, lengths[self.distinct])


def distinct_positions(texts: list[Text]) -> torch.Tensor:
    """Which positions of the answers, all in a row, are the first with their tokens: bool.

    A model that repeats itself gives the same draft again and again, which is one observation and not many. Positions
    are alike where the two tokens before a draft and the two that it should be are.
    """
    seen: set[tuple[int, ...]] = set()
    distinct = []
    for text in texts:
        for last in range(text.start, text.end):
            tokens = tuple(text.ids[last - 1 : last + 3])
            distinct.append(tokens not in seen)
            seen.add(tokens)
    return torch.tensor(distinct)


def _randomize(model: Any, seed: int) -> None:
    """Weights as an untrained model has them; the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    std = getattr(model.config, "initializer_range", None) or 0.02
    tensors = model.head.state_dict()
    norms = set(norm_names(list(tensors)))
    for name, tensor in tensors.items():
        if name in norms:
            tensor.fill_(0.0 if model.family.fusion.zero_centered_norms else 1.0)
        elif tensor.ndim > 1:
            tensor.copy_(std * torch.randn(tensor.shape, generator=generator))
        elif name.endswith("bias"):
            tensor.zero_()


def table(measured: list[Measured]) -> str:
    """Marginal and conditional rate per depth with the counts behind them, and tau, as `fastmtp simulate` has them."""
    header = ["head", "rate", *(f"depth {k}" for k in range(1, NUM_STEPS + 1)), f"tau K={NUM_STEPS}"]
    lines = []
    for each in measured:
        counts = each.counts
        marginal = _cells(counts.marginal, counts.accepted, counts.eligible)
        conditional = _cells(counts.conditional, counts.accepted, counts.reached)
        lines.append([each.name, "marginal", *marginal, f"{each.tau:.2f}"])
        lines.append(["", "conditional", *conditional])
    return terminal_table(header, lines, num_text=2)


def _cells(rates: list[float], parts: torch.Tensor, wholes: torch.Tensor) -> list[str]:
    cells = []
    for rate, part, whole in zip(rates, parts.tolist(), wholes.tolist(), strict=True):
        cells.append(f"{rate:.1%} ({part:.0f}/{whole:.0f})" if whole else NOTHING)
    return cells
