"""What a verification step and a draft step cost, and so what acceptance is worth: speedup before anyone rents a GPU.

Decoding one request reads every weight once per step, and that is what its time is: a draft step costs the bytes of the
MTP layer and of the rows of the output matrix that its token map keeps, against the bytes of the whole model. With
K drafts per verification (SGLang runs the MTP layer K times, `eagle_worker_v2.py`) and tau tokens from it

    speedup = tau * verify / (verify + K * (draft + rows * row))

Left out: attention over the context, kernel launches, sampling, and batches so large that arithmetic counts. Two
measured times put all of that in, three where a verification takes longer than a step without drafts.
"""

from dataclasses import dataclass, replace
from pathlib import Path

from ..checkpoint.checkpoint import Checkpoint
from ..errors import FastMTPError
from ..families.family import is_embedding

# Config keys of mixtures of experts: how many there are, and how many a token reads.
_EXPERTS = ("n_routed_experts", "num_experts", "num_local_experts", "moe_num_experts")
_READ = ("num_experts_per_tok", "moe_k", "moe_topk")
_WIDTHS = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class StepCost:
    """Costs in one unit, bytes or milliseconds.

    Attributes:
        verify: one step of the model that verifies drafts.
        draft: one draft step without its output matrix.
        row: one row of the output matrix.
        vocab_size: its rows.
    """

    verify: float
    draft: float
    row: float
    vocab_size: int
    unit: str = "bytes"
    decode: float | None = None
    """One step of the model that decodes one token; None: as a verification."""

    def draft_step(self, ids: int | None = None) -> float:
        """A draft step that chooses from `ids` tokens; None is all of them."""
        return self.draft + self.row * (self.vocab_size if ids is None else ids)

    def speedup(self, tau: float, num_steps: int, ids: int | None = None) -> float:
        """Speed of decoding against no drafts, at `tau` tokens per verification of `num_steps` drafts."""
        decode = self.verify if self.decode is None else self.decode
        return tau * decode / (self.verify + num_steps * self.draft_step(ids))

    def measured(self, draft_ms: float, verify_ms: float, decode_ms: float | None = None) -> "StepCost":
        """These proportions at measured times: a draft step with the whole vocabulary, a verification step, and a step
        without drafts (default: as long as a verification).

        Raises `FastMTPError` if one is not positive.
        """
        if min(draft_ms, verify_ms, verify_ms if decode_ms is None else decode_ms) <= 0:
            raise FastMTPError(
                f"--draft_ms {draft_ms}, --verify_ms {verify_ms}, --decode_ms {decode_ms}: must be positive"
            )
        scale = draft_ms / self.draft_step()
        return replace(
            self, verify=verify_ms, draft=self.draft * scale, row=self.row * scale, unit="ms", decode=decode_ms
        )


@dataclass(frozen=True)
class Weights:
    """Bytes of weights that a step multiplies.

    Attributes:
        shared: those that every token uses.
        experts: of all experts of all layers.
        share: of the experts, how many a token is routed to; 1 for a dense model.
    """

    shared: float
    experts: float
    share: float

    @property
    def used(self) -> float:
        """By one token."""
        return self.shared + self.experts * self.share

    def read(self, tokens: int) -> float:
        """By a step over so many tokens, each of which is routed by itself, all experts alike."""
        return self.shared + self.experts * (1 - (1 - self.share) ** tokens)


@dataclass(frozen=True)
class StepParts:
    """What steps are made of, in bytes.

    Attributes:
        backbone: without embedding and output matrix.
        mtp: the MTP layer, without them.
        row: of the output matrix.
        vocab_size: its rows.
        bytes_per_weight: of the large tensors; 0 where any is quantized.
    """

    backbone: Weights
    mtp: Weights
    row: float
    vocab_size: int
    bytes_per_weight: float


def read_parts(checkpoint: Checkpoint) -> StepParts:
    """The parts of a checkpoint.

    Raises `FastMTPError` for a folder that is no checkpoint with an MTP layer, or whose vocab_size is wrong.
    """
    family = checkpoint.family
    sizes = checkpoint.sizes()
    # One row of the embedding is read, and where the two are one tensor it is the output matrix.
    embedding = next((n for n in sizes if is_embedding(n) and not family.owns(n)), None)
    head = "lm_head.weight" if "lm_head.weight" in sizes else embedding
    if head is None or not any(family.owns(n) for n in sizes):
        raise FastMTPError(f"{checkpoint}: holds no output matrix or no MTP layer; its steps cannot be compared")
    totals = {(of_mtp, of_experts): 0.0 for of_mtp in (False, True) for of_experts in (False, True)}
    for name, size in sizes.items():
        if is_embedding(name) or name == head or name.endswith("shared_head.head.weight") or ".visual." in name:
            continue
        totals[family.owns(name), ".experts." in name] += size
    # Of a mixture of experts a token reads a share.
    share = min(1.0, experts_read(checkpoint) / _first_value(checkpoint, _EXPERTS))
    backbone = Weights(totals[False, False], totals[False, True], share)
    mtp = Weights(totals[True, False], totals[True, True], share)
    V = checkpoint.vocab_size
    # Of some models routers and biases are float32 beside bfloat16: the narrowest is that of the large tensors.
    width = min(_WIDTHS.get(dtype, 0) for dtype in checkpoint.dtypes().values())
    return StepParts(backbone, mtp, sizes[head] / V, V, width)


def read_cost(model_dir: str | Path) -> StepCost:
    """The bytes of a checkpoint that its steps read for one request; of a mixture of experts, those of one token.

    Raises `FastMTPError` for a folder that is no checkpoint with an MTP layer, or whose vocab_size is wrong.
    """
    parts = read_parts(Checkpoint(model_dir))
    lm_head = parts.row * parts.vocab_size
    return StepCost(parts.backbone.used + lm_head, parts.mtp.used, parts.row, parts.vocab_size)


def experts_read(checkpoint: Checkpoint) -> int:
    """Of a mixture of experts, how many a token is routed to; 1 of a dense model."""
    return _first_value(checkpoint, _READ)


def _first_value(checkpoint: Checkpoint, keys: tuple[str, ...]) -> int:
    """The first of the keys that config.json has; 1 where it has none, as of a dense model."""
    for key in keys:
        if value := checkpoint.value(key):
            return value
    return 1
