"""What training a head takes: arithmetic and memory, from a model's numbers alone.

Arithmetic, of a token that is trained on, in operations (2 for each parameter that it is multiplied with):

    backbone   2 P, forward only; of a mixture of experts the P that a token is routed to; its output matrix is not used
    MTP layer  6 P a draft step, forward and backward; in `exact` only step 1 of it runs at every token, and the rest at
               those that are answers, in `paper` everything runs everywhere
    lm_head    4 V D a step and supervised token (logits, and their gradient to the hidden state; the matrix is frozen),
               and 2 V D more for a soft loss, which needs the frozen model's own logits once
    attention  by the average context, half a row

Memory, of a GPU: the frozen backbone in bfloat16 as `swift_plugin` loads it (FP8 too), and of the MTP layer weights,
gradients and AdamW's moments, as each way to train keeps them (`state_bytes`).

Left out of the arithmetic: norms, softmax, RoPE, the state of linear attention, the optimizer's step. Measured
beside it: `tests/test_training_cost.py`.
"""

from dataclasses import dataclass
from typing import Literal

from ..errors import FastMTPError
from .gpus import GPU

WIDTH = 2
"""Bytes of bfloat16, the backbone's dtype."""
BUCKET = 200_000_000
"""Elements of a gradient bucket (`recipes/deepspeed_zero2.json`); there are two where communication overlaps."""
MAX_LIVE = 1_000_000_000
"""Parameters that ZeRO-3 keeps whole at once (`stage3_max_live_parameters` in ms-swift's zero3.json)."""
LOGITS = 3 * 2**28
"""Bytes of the buffer of logits in float32, 512 MiB (`frozen_head.chunk_size`), and of the product in bfloat16."""
KEPT = 1.4
"""What autograd keeps of a draft step, by inputs and outputs of its matrices; by docs/results/training_step.md, whose
growth with T and with K a test compares."""
KEPT_WIDTH = 3
"""Bytes of a kept number: bfloat16, but float32 in norms and softmax."""
ROOM = 0.92
"""Share of a GPU's memory that may be planned for: an allocator leaves holes."""
NODE = 8
"""GPUs that share a fast link."""
BETWEEN_NODES = 50e9
"""Bytes per second of a GPU to another node, 400 Gb/s."""
DISK = 3e9
"""Bytes per second from a disk (NVMe)."""

Stage = Literal["one process", "DDP", "ZeRO-0", "ZeRO-2", "ZeRO-3"]


@dataclass(frozen=True)
class ModelNumbers:
    """Parameters, if nothing else stands there. "Used" are those that one token is multiplied with.

    Attributes:
        layers: of the backbone, all but embedding and output matrix.
        layers_used: of them, by one token.
        embedding: of the embedding matrix.
        lm_head: of the output matrix, V D.
        tied: the two are one.
        mtp: of the MTP layer.
        mtp_entry: used, of its projection and attention.
        mtp_rest: used, of its feed-forward part.
        mtp_width: inputs and outputs of all its matrices, of one token.
        attentions: of the backbone, those over all tokens before.
        attention_width: of one, sizes of a query and of a value, of all attention heads.
        largest: of the module that is largest without its children.
        hidden_size: D.
        stored: bytes of the checkpoint's files, or what they would be by config.json.
    """

    layers: int
    layers_used: float
    embedding: int
    lm_head: int
    tied: bool
    mtp: int
    mtp_entry: float
    mtp_rest: float
    mtp_width: float
    attentions: int
    attention_width: int
    largest: int
    hidden_size: int
    stored: float

    @property
    def matrices(self) -> int:
        """Embedding and output matrix, which stay with the head."""
        return self.embedding + (0 if self.tied else self.lm_head)

    @property
    def frozen(self) -> int:
        return self.layers + self.matrices


@dataclass(frozen=True)
class Workload:
    """What is trained on, and how; each is an option of `fastmtp inspect --gpus`.

    Args:
        rows: of training data (the paper: 389.4K)
        tokens_per_row: on average, prompt and answer; the paper does not say, only that answers end at 4096
        max_length: tokens of the longest row, which memory must be enough for
        answer_share: of the tokens, how many are answers
        epochs: how often every row is trained on (the paper: 3)
        rows_per_step: rows that a GPU computes at once, per_device_train_batch_size
        num_speculative_steps: draft depth K
        loss: of each step
        rollout: graph of the recursion
        draft_ids: token ids of the token map that is trained in; 0 is the whole vocabulary
        peak_share: of a GPU's arithmetic peak, how much is reached; hours are in inverse proportion to it
    """

    rows: int = 389_400
    tokens_per_row: int = 1024
    max_length: int = 4096
    answer_share: float = 0.75
    epochs: int = 3
    rows_per_step: int = 1
    num_speculative_steps: int = 3
    loss: Literal["kl", "lk", "ce"] = "kl"
    rollout: Literal["exact", "paper"] = "exact"
    draft_ids: int = 0
    peak_share: float = 0.35

    def __post_init__(self) -> None:
        for name in ("rows", "tokens_per_row", "max_length", "epochs", "rows_per_step", "num_speculative_steps"):
            if getattr(self, name) < 1:
                raise FastMTPError(f"--{name} {getattr(self, name)}: must be at least 1")
        for name in ("answer_share", "peak_share"):
            if not 0 < getattr(self, name) <= 1:
                raise FastMTPError(f"--{name} {getattr(self, name)}: must be above 0 and at most 1")
        if self.draft_ids < 0:
            raise FastMTPError(f"--draft_ids {self.draft_ids}: must be 0 or more")

    @property
    def tokens(self) -> int:
        """Of one epoch."""
        return self.rows * self.tokens_per_row

    @property
    def step_tokens(self) -> int:
        """Of a GPU, at once, on average."""
        return self.rows_per_step * self.tokens_per_row


@dataclass(frozen=True)
class Operations:
    """Of a token that is trained on, on average."""

    backbone: float
    mtp: float
    lm_head: float

    @property
    def head(self) -> float:
        """All but the backbone."""
        return self.mtp + self.lm_head


def operations(model: ModelNumbers, work: Workload) -> Operations:
    """Of a token that is trained on; the formulas are above."""
    K, share = work.num_speculative_steps, work.answer_share
    # Scores and weighted values over half a row of keys, 2 operations for each element.
    attention = 2 * (work.tokens_per_row / 2) * model.attention_width
    backbone = 2 * model.layers_used + model.attentions * attention
    entry, rest = 6 * model.mtp_entry + 3 * attention, 6 * model.mtp_rest
    everywhere, at_answers = entry, (K - 1) * entry + K * rest
    if work.rollout == "paper":
        everywhere, at_answers = K * (entry + rest), 0.0
    mtp = everywhere + share * at_answers
    V = model.lm_head / model.hidden_size
    matrix = (min(work.draft_ids, V) if work.draft_ids else V) * model.hidden_size
    soft = 0 if work.loss == "ce" else 2
    return Operations(backbone, mtp, share * (4 * K + soft) * matrix)


def state_bytes(trained: int, frozen: int, stage: Stage, processes: int) -> dict[str, float]:
    """Bytes of a process for weights and what training keeps of them, by name.

    In one process and under DDP the head is float32, and autocast keeps a copy in bfloat16 while it computes; DDP has a
    bucket for every gradient. DeepSpeed keeps the head in bfloat16, with a copy, moments and, during a step, gradients
    in float32, which ZeRO-2 and ZeRO-3 divide among the processes; ZeRO-3 divides weights and gradients too, and the
    backbone.

    Args:
        trained: parameters of the head
        frozen: parameters of all else
        stage: how the processes share
        processes: number of them
    """
    if stage in ("one process", "DDP"):
        buckets = 4 if stage == "DDP" else 0
        head = {"head, fp32 and bf16": 6 * trained, "gradients": (4 + buckets) * trained, "AdamW": 8 * trained}
        return {"frozen": WIDTH * frozen, **{name: float(size) for name, size in head.items()}}
    divided = 1 if stage == "ZeRO-0" else processes
    weights = processes if stage == "ZeRO-3" else 1
    return {
        "frozen": WIDTH * frozen / weights,
        "head, fp32 and bf16": WIDTH * trained / weights + 4 * trained / divided,
        "gradients": WIDTH * trained / weights + 4 * trained / divided,
        "AdamW": 8 * trained / divided,
    }


def working_bytes(model: ModelNumbers, work: Workload, stage: Stage) -> dict[str, float]:
    """Bytes of a process for a step besides `state_bytes`, by name."""
    kept = (work.num_speculative_steps + 1) * work.rows_per_step * work.max_length * model.mtp_width * KEPT * KEPT_WIDTH
    working = {"activations": kept, "logits": float(LOGITS)}
    if stage == "ZeRO-2":
        working["buckets"] = 2.0 * WIDTH * min(BUCKET, model.mtp)
    if stage == "ZeRO-3":
        working["gathered"] = float(WIDTH * (max(MAX_LIVE, model.largest) + model.lm_head))
    return working


def memory(model: ModelNumbers, work: Workload, stage: Stage, processes: int) -> dict[str, float]:
    """Bytes of a process at its peak, by name."""
    return {**state_bytes(model.mtp, model.frozen, stage, processes), **working_bytes(model, work, stage)}


def backbone_seconds(model: ModelNumbers, work: Workload, gpu: GPU) -> float:
    """Of a GPU for a step's tokens: the arithmetic, or reading every weight once, whichever is longer."""
    computed = operations(model, work).backbone * work.step_tokens / (gpu.operations * work.peak_share)
    return max(computed, WIDTH * model.layers / gpu.bandwidth)


def head_seconds(model: ModelNumbers, work: Workload, gpu: GPU) -> float:
    """Of a GPU for all of a step but the backbone."""
    return operations(model, work).head * work.step_tokens / (gpu.operations * work.peak_share)


def gather_seconds(model: ModelNumbers, gpu: GPU, processes: int) -> float:
    """That ZeRO-3 takes to bring every rank the others' parts of the weights, for each step; that computing and
    gathering overlap in part is left out."""
    link = gpu.link if processes <= NODE else min(gpu.link, BETWEEN_NODES)
    return WIDTH * (model.frozen + model.mtp) * (processes - 1) / processes / link
