"""Loss type `fastmtp`: hands the labels to the model, weights its steps, and logs acceptance."""

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from swift.loss import BaseLoss
from swift.metrics import Metric

from ..errors import FastMTPError
from ..evaluation.metrics import AcceptanceCounts, count_acceptance
from ..losses import weighted_loss
from ..rollout import shift_left


class FastMTPLoss(BaseLoss):
    """sum_k alpha_k CE_k over the supervised tokens of the global batch (paper Eq. 1)."""

    def __init__(self, args: Any, trainer: Any) -> None:
        super().__init__(args, trainer)
        # The trainer takes `labels` out of the inputs when it has a loss function. The model needs them: rows
        # without supervision are never projected to the vocabulary.
        trainer.compute_loss = partial(_compute_loss, trainer.compute_loss)
        for mode in ("train", "eval"):
            trainer.custom_metrics[mode]["mtp"] = FastMTPMetric(args.device)
        self.checked = False

    def __call__(
        self, outputs: Any, labels: torch.Tensor, *, num_items_in_batch: Any = None, **kwargs: Any
    ) -> torch.Tensor:
        model = self.trainer.accelerator.unwrap_model(self.trainer.model)
        if not self.checked:
            _check_trainable(model)
            self.checked = True
        if outputs.get("nll") is None:
            raise FastMTPError("--loss_type fastmtp needs --model_type fastmtp: this model returned no MTP steps")
        if num_items_in_batch is None:
            num_items_in_batch = (labels[:, 1:] != -100).sum()
        counts = count_acceptance(outputs.match, outputs.valid, shift_left(labels, 1, fill=-100) != -100)
        mode = "train" if self.trainer.model.training else "eval"
        self.trainer.custom_metrics[mode]["mtp"].update(counts, outputs.nll.detach(), outputs.valid)
        return weighted_loss(outputs.nll, model.fastmtp.step_weights, num_items_in_batch)


def _compute_loss(original: Any, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
    if inputs.get("labels") is not None:
        inputs["mtp_labels"] = inputs["labels"]
    return original(model, inputs, *args, **kwargs)


def _check_trainable(model: Any) -> None:
    """Frozen means frozen: everything that trains must lie inside the head."""
    prefix = f"{model.family.prefix}."
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    outside = [n for n in names if prefix not in n]
    if outside or not names:
        what = f"{outside[0]} would be trained" if outside else "nothing would be trained"
        raise FastMTPError(
            f"{what}; only the MTP head may be: use --tuner_type fastmtp, or with --tuner_type full "
            f"--freeze_parameters_ratio 1 --trainable_parameters {model.family.prefix}, or with --tuner_type lora "
            f"--target_regex '^{model.family.prefix}'"
        )


class FastMTPMetric(Metric):
    """Per-depth loss (unweighted, nats), marginal and conditional acceptance, and tau, over rows of all ranks."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device
        self.sums: torch.Tensor | None
        self.add_state("sums", default_factory=lambda: None)

    def update(self, counts: AcceptanceCounts, nll_KBT: torch.Tensor, valid_KBT: torch.Tensor) -> None:
        rows = (counts.eligible, counts.reached, counts.accepted, nll_KBT.sum(dim=(1, 2)), valid_KBT.sum(dim=(1, 2)))
        sums = torch.stack([r.double() for r in rows])
        self.sums = sums if self.sums is None else self.sums + sums

    def compute(self) -> dict[str, float]:
        sums = self.sums
        if dist.is_initialized():
            # A rank may have seen no batch; it still takes part.
            shapes: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(shapes, None if sums is None else tuple(sums.shape))
            shape = next((s for s in shapes if s is not None), None)
            if shape is None:
                return {}
            sums = torch.zeros(shape, dtype=torch.float64) if sums is None else sums
            sums = sums.to(self.device)
            dist.all_reduce(sums)
        if sums is None:
            return {}
        eligible, reached, accepted, nll, valid = sums.cpu()
        counts = AcceptanceCounts(eligible, reached, accepted)
        logs = {}
        for k, (marginal, conditional) in enumerate(zip(counts.marginal, counts.conditional, strict=True), start=1):
            logs[f"loss_{k}"] = float(nll[k - 1] / valid[k - 1].clamp(min=1))
            logs[f"acc_{k}"] = marginal
            logs[f"cond_acc_{k}"] = conditional
        logs["tau"] = counts.tau
        return logs
