"""Adds FastMTP to ms-swift's registries, once per process.

Should a step fail, the next call begins again: what is registered is registered anew, and what is wrapped is wrapped
once.
"""

import functools
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from swift.arguments import BaseArguments
from swift.dataset import DatasetMeta, register_dataset
from swift.loss import loss_map
from swift.model import model_meta, register_model
from swift.template import register_template
from swift.tuner_plugin import tuners_map
from transformers import PreTrainedConfig, trainer

from ..errors import FastMTPError
from .arguments import prepare_arguments
from .cache import attach_hidden_cache
from .dataset import NAME, SelfDistillLoader
from .export import export_checkpoint
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
    """Model type, loss type and tuner type `fastmtp`, dataset `fastmtp-self-distill`, `swift export`."""
    global _registered
    if _registered:
        return
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
    _one_line_errors()
    _registered = True


def _wrap(owner: Any, name: str, wrapper: Callable[[Any], Any]) -> None:
    """`owner.name` becomes `wrapper(owner.name)`, once."""
    original = getattr(owner, name)
    if getattr(original, "of_fastmtp", False):
        return
    wrapped: Any = functools.wraps(original)(wrapper(original))
    wrapped.of_fastmtp = True
    setattr(owner, name, wrapped)


def _hook_arguments() -> None:
    """Defaults and checks run where ms-swift parses `model_kwargs`: after plugins, before anything is loaded. The model
    is loaded with the knobs of these arguments."""
    watch(BaseArguments)

    def parse_model_kwargs(original: Any) -> Any:
        def _init_model_kwargs(self: Any) -> None:
            with environment_kept():
                original(self)
            prepare_arguments(self)
            choose_checkpoint(self)

        return _init_model_kwargs

    def load(original: Any) -> Any:
        def get_model_processor(self: Any, **options: Any) -> Any:
            if self.model_type != "fastmtp":
                return original(self, **options)
            with loading(knobs_of(self)):
                return original(self, **options)

        return get_model_processor

    def look_at_folder(original: Any) -> Any:
        def _get_model_info(model_dir: str, model_type: str | None, **options: Any) -> Any:
            with without_folder_code() if model_type == "fastmtp" else nullcontext():
                return original(model_dir, model_type, **options)

        return _get_model_info

    _wrap(model_meta, "_get_model_info", look_at_folder)
    _wrap(BaseArguments, "_init_model_kwargs", parse_model_kwargs)
    _wrap(BaseArguments, "get_model_processor", load)


def _hook_sft() -> None:
    """Before training: a run that is finished says so; say so when no row is left (too long ones are dropped silently),
    open the hidden-state cache. After it: ranks end together.

    ms-swift leaves the process group to the interpreter's exit, where gloo may abort a rank that is ready, and the
    launcher then ends the one that is still saving.
    """
    from swift.pipelines.train.sft import SwiftSft

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
                if self.args.model_type == "fastmtp" and _out_of_memory(error):
                    raise FastMTPError(_less_memory(self.args, error)) from error
                raise
            if self.args.model_type == "fastmtp" and dist.is_initialized():
                dist.barrier()
                dist.destroy_process_group()
            return result

        return run

    def look_at_rows(original: Any) -> Any:
        def _post_process_datasets(self: Any, datasets: list[Any]) -> list[Any]:
            train = datasets[0]
            if self.args.model_type == "fastmtp" and (train is None or (hasattr(train, "__len__") and not len(train))):
                raise FastMTPError(
                    f"--dataset: no training row is left; rows longer than --max_length {self.args.max_length} are "
                    "dropped: raise it, or choose --truncation_strategy"
                )
            if self.args.model_type == "fastmtp":
                attach_hidden_cache(self.args, self.model, datasets)
            processed: list[Any] = original(self, datasets)
            return processed

        return _post_process_datasets

    _wrap(SwiftSft, "run", end_together)
    _wrap(SwiftSft, "_post_process_datasets", look_at_rows)
    _hook_rendering(SwiftSft)


def _hook_rendering(pipeline: Any) -> None:
    """Rows are rendered by the chat template of the model's folder before ms-swift encodes them: in training, and
    where `swift export` makes a cached dataset."""

    def of_the_folder(original: Any) -> Any:
        def _prepare_template(self: Any) -> None:
            args = self.args
            if args.model_type == "fastmtp" and self.processor.chat_template and args.template != TEMPLATE:
                self.named_template = args.template  # compared with the folder's, and not used
                args.template = TEMPLATE
            original(self)

        return _prepare_template

    def rendered(original: Any) -> Any:
        def _get_dataset(self: Any) -> Any:
            if self.args.model_type != "fastmtp":
                return original(self)
            knobs = knobs_of(self.args)
            with loading(knobs):
                datasets = original(self)
            if not isinstance(self.template, FolderTemplate) or not self.template.use_chat_template:
                return datasets
            named = getattr(self, "named_template", None)
            return tuple(as_token_ids(self.args, self.template, d, knobs.on_bad_row, named) for d in datasets)

        return _get_dataset

    _wrap(pipeline, "_prepare_template", of_the_folder)
    _wrap(pipeline, "_get_dataset", rendered)


def _out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _less_memory(args: Any, error: RuntimeError) -> str:
    return (
        f"out of memory ({str(error).splitlines()[0]}); lower --per_device_train_batch_size (now "
        f"{args.per_device_train_batch_size}), --max_length (now {args.max_length}) or fastmtp_loss_chunk_size, or "
        "train inside a fastmtp_token_map"
    )


def _hook_export() -> None:
    """`swift export --adapters CKPT` with none of ms-swift's own actions writes a servable checkpoint."""
    from swift.pipelines.export.export import SwiftExport

    actions = ("to_peft_format", "quant_method", "to_ollama", "to_cached_dataset", "to_hf", "to_mcore", "push_to_hub")

    def export(original: Any) -> Any:
        def run(self: Any) -> Any:
            args = self.args
            if args.model_type != "fastmtp" or any(getattr(args, a, None) for a in actions):
                return original(self)
            return export_checkpoint(args)

        return run

    _wrap(SwiftExport, "run", export)


class _AnyConfig(PreTrainedConfig):
    max_position_embeddings: int | None = None


def _hook_resume() -> None:
    """Checkpoints are whole or not there, and a run that is resumed takes no step too many (`resume.py`).

    transformers' trainer reads a checkpoint's config.json with its bare class, to learn who wrote it. In 5.19 that
    class stops at YaRN under the keys of DeepSeek-V3's, `rope_scaling` and `rope_theta`: it lacks one attribute.
    """
    from swift.pipelines.train.sft import SwiftSft

    trainer.PreTrainedConfig = _AnyConfig
    _wrap(trainer.Trainer, "_save_checkpoint", whole_checkpoints)
    _wrap(trainer.Trainer, "_init_training_state", finish_run)
    _wrap(trainer.Trainer, "_run_epoch", no_step_too_many)
    _wrap(SwiftSft, "_handle_trainer_state", links_again)


def _one_line_errors() -> None:
    """A `FastMTPError` is the user's to mend: print its line, not a traceback. The exit status stays 1."""
    original = sys.excepthook

    def excepthook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if isinstance(error, FastMTPError):
            print(f"fastmtp: error: {error}", file=sys.stderr)
        else:
            original(kind, error, trace)

    sys.excepthook = excepthook
