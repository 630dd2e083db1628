"""Loss type `fastmtp`: hands the labels to the model, takes its loss, and logs acceptance."""

import math
from dataclasses import fields
from typing import Any

import torch
import torch.distributed as dist
from swift.loss import BaseLoss
from swift.metrics import Metric

from ..checkpoint.finite import NotFiniteError
from ..errors import FastMTPError
from ..method.metrics import AcceptanceCounts, count_acceptance, counts_by_context, row_counts, taus_of_context
from ..method.rollout import shift_left
from .compat_swift import add_metric, around_grad_norm, around_loss, metric_of


class FastMTPLoss(BaseLoss):
    """sum_k alpha_k loss_k over the supervised tokens of the global batch (paper Eq. 1)."""

    def __init__(self, args: Any, trainer: Any) -> None:
        super().__init__(args, trainer)
        # The trainer takes `labels` out of the inputs when it has a loss function. The model needs them: rows
        # without supervision are never projected to the vocabulary.
        around_loss(trainer, _compute_loss)
        around_grad_norm(trainer, _finite_grad_norm)
        for mode in ("train", "eval"):
            add_metric(trainer, mode, "mtp", FastMTPMetric(args.device, keep_rows=mode == "eval"))
        self.checked = False

    def __call__(self, outputs: Any, labels: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        model = self.trainer.accelerator.unwrap_model(self.trainer.model)
        if not self.checked:
            _check_trainable(model)
            self.checked = True
        if outputs.get("step_loss") is None:
            raise FastMTPError("--loss_type fastmtp needs --model_type fastmtp: this model returned no MTP steps")
        mode = "train" if self.trainer.model.training else "eval"
        metric_of(self.trainer, mode, "mtp").update(outputs, shift_left(labels, 1, fill=-100) != -100)
        loss: torch.Tensor = outputs.mtp_loss
        return loss


def _compute_loss(trainer: Any, original: Any, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
    if inputs.get("labels") is not None:
        inputs["mtp_labels"] = inputs["labels"]
        # Of the global batch; ms-swift gives it to the loss function only.
        inputs["num_items_in_batch"] = kwargs.get("num_items_in_batch")
    try:
        return original(model, inputs, *args, **kwargs)
    except NotFiniteError as error:
        mode = "step" if trainer.model.training else "evaluation after step"
        number = trainer.state.global_step + trainer.model.training
        raise error.of(f"{mode} {number}, batch row {error.row + 1}") from None


def _finite_grad_norm(trainer: Any, original: Any, *args: Any, **kwargs: Any) -> Any:
    """The norm of the gradients, before the optimizer sees them.

    With float16 the trainer's loss scaler finds its scale by gradients that overflow, and skips their steps itself.
    """
    norm = original(*args, **kwargs)
    if norm is not None and not math.isfinite(norm) and not trainer.args.fp16:
        raise FastMTPError(
            f"step {trainer.state.global_step + 1}: the gradient is not finite (norm {float(norm)}), the loss was; "
            "lower --learning_rate, or train in bfloat16 or float32; the checkpoints before this step are sound"
        )
    return norm


def _check_trainable(model: Any) -> None:
    """Frozen means frozen: everything that trains must lie inside the head."""
    roots = model.family.roots
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    outside = [n for n in names if not any(f"{root}." in n for root in roots)]
    if names and not outside:
        return
    what = f"{outside[0]} would be trained" if outside else "nothing would be trained"
    fix = f"or --tuner_type full --freeze_parameters_ratio 1 --trainable_parameters {' '.join(roots)}"
    if any(".lora_" in n for n in names):
        fix = f"or, for LoRA, --target_regex '^({'|'.join(roots)})' without --target_modules"
    raise FastMTPError(f"{what}; only the MTP head may be: use --tuner_type fastmtp, {fix}")


class FastMTPMetric(Metric):
    """Per depth: loss (unweighted), marginal and conditional acceptance, acceptance probability of sampled drafts; tau.

    With a token map the rates are those of a draft served with it, and in evaluation `full_*` are those without.
    """

    def __init__(self, device: torch.device, keep_rows: bool = False) -> None:
        super().__init__()
        self.device = device
        self.keep_rows = keep_rows
        self.rows: list[torch.Tensor] = []
        self.contexts: list[torch.Tensor] = []
        self.sums: dict[str, torch.Tensor] | None
        self.add_state("sums", default_factory=lambda: None)

    def update(self, outputs: Any, base_BT: torch.Tensor) -> None:
        """Add a batch: a `FastMTPOutput`, and its rows whose next token belongs to an answer."""
        sums = {"loss": outputs.step_loss.detach().flatten(1).sum(1), "trained": outputs.trained.flatten(1).sum(1)}
        if outputs.get("accept_prob") is not None:
            sums["accept_prob"] = outputs.accept_prob.flatten(1).sum(1)
        for prefix, match in (("", outputs.match), ("full_", outputs.get("full_match"))):
            if match is not None:
                counts = count_acceptance(match, outputs.valid, base_BT)
                sums.update({f"{prefix}{f.name}": getattr(counts, f.name) for f in fields(counts)})
        if self.keep_rows:
            of_rows = outputs.match, outputs.valid, base_BT
            self.rows.append(row_counts(*of_rows).cpu())
            self.contexts.append(counts_by_context(*of_rows, outputs.place).cpu())
        sums = {name: value.double() for name, value in sums.items()}
        self.sums = sums if self.sums is None else {name: self.sums[name] + value for name, value in sums.items()}

    def take_rows(self) -> list[Any]:
        """Counts of every row since the last call, of all ranks: [R][2][K], accepted and eligible."""
        batches = _of_all_ranks(self.rows)
        self.rows = []
        return [row for batch in batches for row in batch.tolist()]

    def take_contexts(self) -> list[tuple[int, int, float, int]]:
        """tau by tokens before the draft since the last call, of all ranks: `taus_of_context`."""
        batches = _of_all_ranks(self.contexts)
        self.contexts = []
        return taus_of_context(torch.stack(batches).sum(0)) if batches else []

    def compute(self) -> dict[str, float]:
        sums = self.sums
        if dist.is_initialized():
            # A rank may have seen no batch; it still takes part.
            ranks: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(ranks, None if sums is None else {n: x.cpu() for n, x in sums.items()})
            seen = [rank for rank in ranks if rank is not None]
            sums = {name: torch.stack([rank[name] for rank in seen]).sum(0) for name in seen[0]} if seen else None
        if sums is None:
            return {}
        sums = {name: value.cpu() for name, value in sums.items()}
        logs: dict[str, float] = {}
        for name in ("loss", "accept_prob"):
            if name in sums:
                means = (sums[name] / sums["trained"].clamp(min=1)).tolist()
                logs.update({f"{name}_{k}": mean for k, mean in enumerate(means, start=1)})
        for prefix in ("", "full_"):
            if f"{prefix}eligible" in sums:
                counts = AcceptanceCounts(**{f.name: sums[prefix + f.name] for f in fields(AcceptanceCounts)})
                for k, (marginal, conditional) in enumerate(zip(counts.marginal, counts.conditional, strict=True), 1):
                    logs[f"{prefix}acc_{k}"] = marginal
                    logs[f"{prefix}cond_acc_{k}"] = conditional
                logs[f"{prefix}tau"] = counts.tau
        return logs


def _of_all_ranks(batches: list[torch.Tensor]) -> list[torch.Tensor]:
    """What each rank counted, in the order of ranks."""
    if not dist.is_initialized():
        return batches
    ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, batches)
    return [batch for rank in ranks for batch in rank]
