"""Never a worse head: a run is compared with the initial head, the one that it began with.

Before the first step the initial head is measured on the validation rows; every evaluation says what has become of
it, a checkpoint's `fastmtp.json` keeps it, and a run whose checkpoints are worse ends with the initial head. What was
measured is kept in the run's folder (`initial.json`), so a run that is resumed compares with the same.
"""

import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from swift.utils import get_logger, is_master
from transformers import TrainerCallback

from ..checkpoint.checkpoint import SETTINGS_FILE, Checkpoint
from ..errors import FastMTPError
from ..export.folders import settings
from ..export.initial import save_initial
from ..files.inputs import read_json
from ..files.known_files import read_object
from ..files.staging import write_json
from ..method.comparison import Change, compare, context_changes, shown_contexts, why_withheld
from ..method.metrics import tau_of_rows
from .compat_swift import encode_rows, link_last_checkpoint, metric_of, reset_metrics

logger = get_logger()

MEASURED = "initial.json"
INITIAL = "initial"
"""The folder of the initial head."""
VALIDATION = "validation"
OTHER = "other_val_dataset"


class AgainstInitial(TrainerCallback):
    """Compares every evaluation of one trainer with the initial head.

    Attributes:
        measured: the initial head: `began_with`, its folder, and of each set the counts of its rows (`sets`) and
            `tau_by_context`.
        compared: of the newest evaluation: `step`, `loss`, `on_worse`, a change per set (`Change.to_dict`) and
            `tau_by_context` (`comparison.context_changes`).
    """

    def __init__(self, trainer: Any, args: Any, other: Any) -> None:
        self.trainer = trainer
        self.other = other
        self.knobs = trainer.accelerator.unwrap_model(trainer.model).fastmtp
        self.model_dir = args.model_dir
        self.began_with = str(Path(args.adapters[0] if args.adapters else args.model_dir).resolve())
        self.measured: dict[str, Any] = {}
        self.compared: dict[str, Any] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step:
            self._remember(args)
            return
        started = time.perf_counter()
        measured = {VALIDATION: self._measure(self.trainer.eval_dataset)}
        if self.other is not None:
            measured[OTHER] = self._measure(self.other)
        seconds = time.perf_counter() - started
        sets = {name: one.rows for name, one in measured.items()}
        contexts = {name: one.contexts for name, one in measured.items()}
        self.measured = {"began_with": self.began_with, "sets": sets, "tau_by_context": contexts}
        if is_master():
            Path(args.output_dir).mkdir(parents=True, exist_ok=True)
            write_json(self.measured, Path(args.output_dir) / MEASURED)
        taus = [f"{_words(name)}: tau {tau_of_rows(rows):.3f} ({len(rows)} rows)" for name, rows in sets.items()]
        logger.info(f"the initial head, before the first step: {'; '.join(taus)}; measured in {seconds:.1f} s")

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        measured = {VALIDATION: self._take()}
        if not state.global_step:  # `--eval_on_start`
            return
        if self.other is not None:
            measured[OTHER] = self._measure(self.other)
        changes = self._changes({name: one.rows for name, one in measured.items()})
        self.compared = {"step": state.global_step, "loss": self.knobs.loss, "on_worse": self.knobs.on_worse}
        self.compared |= {name: change.to_dict() for name, change in changes.items()}
        if changes:
            line = "; ".join(f"{_words(name)}: {change}" for name, change in changes.items())
            logger.info(f"step {state.global_step} against the initial head: {line}")
        before = self.measured.get("tau_by_context", {})
        contexts = {name: context_changes(before.get(name), one.contexts) for name, one in measured.items()}
        self.compared["tau_by_context"] = contexts
        line = "; ".join(f"{_words(name)}: {shown_contexts(parts)}" for name, parts in contexts.items())
        logger.info(f"step {state.global_step}, tau by tokens before the draft: {line}")

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Where the best checkpoint and the last are worse, the initial head takes their place."""
        last = getattr(state, "last_model_checkpoint", None)
        if not last or not self.measured:
            return
        chosen = [self._choose(state.best_model_checkpoint or last, last) if is_master() else None]
        if dist.is_initialized():
            dist.broadcast_object_list(chosen)
        if chosen[0] is None:
            return
        state.best_model_checkpoint = chosen[0]
        if Path(chosen[0]).name == INITIAL:
            state.last_model_checkpoint = chosen[0]
            link_last_checkpoint(self.trainer)

    def mark(self, checkpoint: Path) -> None:
        """Write into a checkpoint that is being saved what its head was compared with."""
        if self.compared.get("step") != self.trainer.state.global_step:
            return
        known = read_object(checkpoint / SETTINGS_FILE)  # nothing of tuner types `lora` and `full`
        write_json({**known, "compared": self.compared}, checkpoint / SETTINGS_FILE)

    def _choose(self, best: str, last: str) -> str | None:
        """The checkpoint to hand out; None leaves what the trainer chose."""
        compared = {folder: read_object(Path(folder) / SETTINGS_FILE).get("compared") or {} for folder in (best, last)}
        why = why_withheld(compared[best])
        if why is None:
            if why_withheld(compared[last]):
                logger.warning(f"{last}: {why_withheld(compared[last])}; take {best}")
            elif _is_worse(compared[best], OTHER):
                change = compared[best][OTHER]
                logger.warning(
                    f"{best}: not worse on the validation rows, but worse than the initial head on "
                    f"fastmtp_{OTHER}: tau {change['before']} -> {change['now']}; mix rows of that kind into --dataset"
                )
            return None
        if self.knobs.on_worse == "keep":
            logger.warning(f"{best}: {why}; kept, as fastmtp_on_worse says")
            return None
        if compared[last] and why_withheld(compared[last]) is None:
            logger.warning(f"{best}: {why}; {last} is not, and takes its place")
            return last
        folder = Path(self.trainer.args.output_dir) / INITIAL
        target = Checkpoint(self.model_dir).target
        facts = settings(self.knobs, str(target), target.fingerprint) | {"compared": {"instead_of": compared[best]}}
        save_initial(self.measured["began_with"], self.model_dir, best, folder, facts)
        logger.warning(f"{best}: {why}; the initial head is in {folder}, the trained checkpoints are marked as worse")
        return str(folder)

    def _changes(self, measured: dict[str, Any]) -> dict[str, Change]:
        before = self.measured.get("sets", {})
        changes = {name: compare(before.get(name), now) for name, now in measured.items()}
        for name, change in changes.items():
            if change is None and before:
                logger.warning(f"{_words(name)}: other rows than the initial head was measured on; not compared")
        return {name: change for name, change in changes.items() if change is not None}

    def _remember(self, args: Any) -> None:
        """What the run measured before its first step. All ranks have what the main one read."""
        found: list[Any] = [None]
        if is_master():
            run = Path(args.resume_from_checkpoint or args.output_dir).resolve().parent
            for folder in (run, Path(args.output_dir)):
                if (folder / MEASURED).exists():
                    found = [read_json(folder / MEASURED)]
                    break
        if dist.is_initialized():
            dist.broadcast_object_list(found)
        if not isinstance(found[0], dict):
            logger.warning(f"the run has no {MEASURED}, of before its first step: nothing is compared")
            return
        self.measured = found[0]
        if is_master():
            write_json(self.measured, Path(args.output_dir) / MEASURED)

    def _take(self) -> "_Measured":
        metric = metric_of(self.trainer, "eval", "mtp")
        return _Measured(metric.take_rows(), metric.take_contexts())

    def _measure(self, dataset: Any) -> "_Measured":
        """One head on a set of rows, beside the trainer's own evaluations: not logged, no random number less for
        what follows."""
        trainer = self.trainer
        with random_state_kept():
            loader = trainer.get_eval_dataloader(dataset)
            trainer.evaluation_loop(loader, description="against the initial head", prediction_loss_only=True)
        trainer.callback_handler.on_predict(trainer.args, trainer.state, trainer.control, {})  # ends the progress bar
        reset_metrics(trainer, "eval")
        return self._take()


@dataclass
class _Measured:
    """One head on one set of rows."""

    rows: list[Any]
    """`metrics.row_counts` of each."""
    contexts: list[tuple[int, int, float, int]]
    """`metrics.taus_of_context`."""


def _words(name: str) -> str:
    return name if name == VALIDATION else f"fastmtp_{name}"


def _is_worse(compared: dict[str, Any], name: str) -> bool:
    return bool((compared.get(name) or {}).get("worse"))


def compare_with_initial(trainer: Any, args: Any, other: Any) -> None:
    """Have a trainer's run compared, where it evaluates; say so where it does not."""
    if args.loss_type != "fastmtp":
        return
    evaluates = trainer.eval_dataset is not None and str(trainer.args.eval_strategy.value) != "no"
    if not evaluates or getattr(trainer.args, "predict_with_generate", False):
        logger.info(
            "no validation rows are evaluated: the run is not compared with the head that it begins with "
            "(--val_dataset, or --split_dataset_ratio 0.01)"
        )
        return
    trainer.against_initial = AgainstInitial(trainer, args, other)
    trainer.add_callback(trainer.against_initial)


def load_other(swift_sft: Any, name: str, as_ids: Any) -> Any:
    """The rows of `fastmtp_other_val_dataset` as ms-swift encodes its validation rows.

    Raises `FastMTPError` for a stream, and if none is left.
    """
    from swift.dataset import load_dataset

    args = swift_sft.args
    if args.streaming:
        raise FastMTPError("fastmtp_other_val_dataset does not work with --streaming; drop one")
    options = {key: value for key, value in args.get_dataset_kwargs().items() if key != "interleave_prob"}
    _, rows = load_dataset([name], split_dataset_ratio=1.0, shuffle=False, **options)
    encoded, _ = encode_rows(swift_sft, as_ids(rows))
    if encoded is None:
        raise FastMTPError(f"fastmtp_other_val_dataset {name}: every row is longer than --max_length {args.max_length}")
    return encoded


@contextmanager
def random_state_kept() -> Iterator[None]:
    """What is drawn inside is not missing from what is drawn after it."""
    python, arrays = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        yield
    random.setstate(python)
    np.random.set_state(arrays)
