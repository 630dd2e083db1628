"""Adds FastMTP to ms-swift's registries, once per process.

Should a step fail, the next call begins again: what is registered is registered anew, and what is wrapped is wrapped
once.
"""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch.distributed as dist
from swift.arguments import BaseArguments
from swift.dataset import DatasetMeta, register_dataset
from swift.loss import loss_map
from swift.model import register_model
from swift.template import register_template
from swift.tuner_plugin import tuners_map

from ..errors import FastMTPError
from ..model import compat_transformers
from . import compat_swift
from .arguments import prepare_arguments
from .cache import attach_hidden_cache
from .compat_swift import wrap
from .dataset import NAME, SelfDistillLoader, own_name
from .export import export_checkpoint
from .initial import compare_with_initial, load_other
from .keep import register_keep
from .knobs import environment_kept, knobs_of, loading
from .loss import FastMTPLoss
from .model import FastMTPLoader, FastMTPModelMeta, without_folder_code
from .rendering import as_token_ids
from .resume import (
    choose_checkpoint,
    finish_run,
    finished_run,
    links_again,
    no_step_too_many,
    say_finished,
    take_away_unfinished,
    whole_checkpoints,
)
from .template import META as TEMPLATE_META
from .template import TEMPLATE, FolderTemplate
from .tuner import FastMTPTuner
from .typed import watch

_registered = False


def register() -> None:
    """Model type, loss type and tuner type `fastmtp`, dataset `fastmtp-self-distill`, `swift export`; the callback
    `fastmtp_keep_mtp`."""
    global _registered
    if _registered:
        return
    _one_line_errors()  # first, for the errors of what follows
    compat_swift.check()
    compat_transformers.check()
    # The architecture is one of ours: naming the families' own would make their plain loading ambiguous.
    meta = FastMTPModelMeta("fastmtp", [], FastMTPLoader, architectures=["FastMTPForCausalLM"])
    register_model(meta, exist_ok=True)
    register_template(TEMPLATE_META, exist_ok=True)
    loss_map["fastmtp"] = FastMTPLoss
    tuners_map["fastmtp"] = FastMTPTuner
    register_dataset(DatasetMeta(dataset_name=NAME, loader=SelfDistillLoader), exist_ok=True)
    _hook_arguments()
    _hook_sft()
    _hook_export()
    _hook_resume()
    register_keep()
    _registered = True


def _hook_arguments() -> None:
    """Defaults and checks run where ms-swift parses `model_kwargs`: after plugins, before anything is loaded. The model
    is loaded with the knobs of these arguments."""
    watch(BaseArguments)

    def parse_model_kwargs(original: Any) -> Any:
        def parse_and_prepare(self: Any) -> None:
            with environment_kept():
                original(self)
            prepare_arguments(self)
            choose_checkpoint(self)

        return parse_and_prepare

    def load(original: Any) -> Any:
        def get_model_processor(self: Any, **options: Any) -> Any:
            if self.model_type != "fastmtp":
                return original(self, **options)
            with loading(knobs_of(self)):
                return original(self, **options)

        return get_model_processor

    def look_at_folder(original: Any) -> Any:
        def look_without_code(model_dir: str, model_type: str | None, **options: Any) -> Any:
            with without_folder_code() if model_type == "fastmtp" else nullcontext():
                return original(model_dir, model_type, **options)

        return look_without_code

    wrap(compat_swift.LOOK_AT_FOLDER, look_at_folder)
    wrap(compat_swift.PARSE_MODEL_KWARGS, parse_model_kwargs)
    wrap(compat_swift.LOAD_MODEL, load)


def _hook_sft() -> None:
    """Before training: a run that is finished says so; say so when no row is left (too long ones are dropped silently),
    open the hidden-state cache. After it: ranks end together.

    ms-swift leaves the process group to the interpreter's exit, where gloo may abort a rank that is ready, and the
    launcher then ends the one that is still saving.
    """

    def end_together(original: Any) -> Any:
        def run(self: Any) -> Any:
            finished = finished_run(self.args) if self.args.model_type == "fastmtp" else None
            try:
                if finished:
                    say_finished(self.args)
                elif self.args.model_type == "fastmtp":
                    take_away_unfinished(Path(self.args.output_dir))
                result = finished or original(self)
            except RuntimeError as error:
                if self.args.model_type == "fastmtp" and compat_swift.is_out_of_memory(error):
                    raise FastMTPError(_less_memory(self.args, error)) from error
                raise
            if self.args.model_type == "fastmtp" and dist.is_initialized():
                dist.barrier()
                dist.destroy_process_group()
            return result

        return run

    def look_at_rows(original: Any) -> Any:
        def look_and_process(self: Any, datasets: list[Any]) -> list[Any]:
            train = datasets[0]
            if self.args.model_type == "fastmtp" and (train is None or (hasattr(train, "__len__") and not len(train))):
                raise FastMTPError(
                    f"--dataset: no training row is left; rows longer than --max_length {self.args.max_length} are "
                    "dropped: raise it, or choose --truncation_strategy"
                )
            if self.args.model_type != "fastmtp":
                return list(original(self, datasets))
            other = _other_rows(self)
            attach_hidden_cache(self.args, self.model, [*datasets, other])
            self.other_val_dataset = None if other is None else original(self, [None, other])[1]
            return list(original(self, datasets))

        return look_and_process

    def compared(original: Any) -> Any:
        def train(self: Any, trainer: Any) -> Any:
            if self.args.model_type == "fastmtp":
                compare_with_initial(trainer, self.args, getattr(self, "other_val_dataset", None))
            return original(self, trainer)

        return train

    wrap(compat_swift.TRAIN, end_together)
    wrap(compat_swift.TRAINER, compared)
    wrap(compat_swift.AFTER_ENCODING, look_at_rows)
    _hook_rendering()


def _other_rows(sft: Any) -> Any:
    """Rows of `fastmtp_other_val_dataset`; None without it."""
    knobs = knobs_of(sft.args)
    if not knobs.other_val_dataset:
        return None

    def as_ids(rows: Any) -> Any:
        if not isinstance(sft.template, FolderTemplate) or not sft.template.use_chat_template:
            return rows
        return as_token_ids(sft.args, sft.template, rows, knobs.on_bad_row)

    with loading(knobs):
        return load_other(sft, own_name(knobs.other_val_dataset), as_ids)


def _hook_rendering() -> None:
    """Rows are rendered by the chat template of the model's folder before ms-swift encodes them: in training, and
    where `swift export` makes a cached dataset."""

    def of_the_folder(original: Any) -> Any:
        def prepare_folder_template(self: Any) -> None:
            args = self.args
            if args.model_type == "fastmtp" and self.processor.chat_template and args.template != TEMPLATE:
                self.named_template = args.template  # compared with the folder's, and not used
                args.template = TEMPLATE
            original(self)

        return prepare_folder_template

    def rendered(original: Any) -> Any:
        def rendered_rows(self: Any) -> Any:
            if self.args.model_type != "fastmtp":
                return original(self)
            knobs = knobs_of(self.args)
            with loading(knobs):
                datasets = original(self)
            if not isinstance(self.template, FolderTemplate) or not self.template.use_chat_template:
                return datasets
            named = getattr(self, "named_template", None)
            return tuple(as_token_ids(self.args, self.template, d, knobs.on_bad_row, named) for d in datasets)

        return rendered_rows

    wrap(compat_swift.CHOOSE_TEMPLATE, of_the_folder)
    wrap(compat_swift.READ_ROWS, rendered)


def _less_memory(args: Any, error: RuntimeError) -> str:
    return (
        f"out of memory ({str(error).splitlines()[0]}); lower --per_device_train_batch_size (now "
        f"{args.per_device_train_batch_size}), --max_length (now {args.max_length}) or fastmtp_loss_chunk_size, or "
        "train inside a fastmtp_token_map"
    )


def _hook_export() -> None:
    """`swift export --adapters CKPT` with none of ms-swift's own actions writes a servable checkpoint."""

    def export(original: Any) -> Any:
        def run(self: Any) -> Any:
            args = self.args
            if args.model_type != "fastmtp" or any(getattr(args, a, None) for a in compat_swift.EXPORT_ACTIONS):
                return original(self)
            return export_checkpoint(args)

        return run

    wrap(compat_swift.EXPORT, export)


def _hook_resume() -> None:
    """Checkpoints are whole or not there, and a run that is resumed takes no step too many (`resume.py`)."""
    compat_swift.read_any_config()
    wrap(compat_swift.SAVE_CHECKPOINT, whole_checkpoints)
    wrap(compat_swift.INIT_STATE, finish_run)
    wrap(compat_swift.RUN_EPOCH, no_step_too_many)
    wrap(compat_swift.LINK_CHECKPOINTS, links_again)


def _one_line_errors() -> None:
    """A `FastMTPError` is the user's to fix: one line, not a traceback."""
    compat_swift.print_errors_as_lines()
