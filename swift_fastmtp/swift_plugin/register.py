"""Adds FastMTP to ms-swift's registries, once per process."""

import sys
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from swift.arguments import BaseArguments
from swift.dataset import DatasetMeta, register_dataset
from swift.loss import loss_map
from swift.model import register_model
from swift.template import register_template
from swift.tuner_plugin import tuners_map
from transformers import PreTrainedConfig, trainer

from ..config import FastMTPConfig
from ..errors import FastMTPError
from .arguments import prepare_arguments
from .cache import attach_hidden_cache
from .dataset import NAME, SelfDistillLoader
from .export import export_checkpoint
from .loss import FastMTPLoss
from .model import FastMTPLoader, FastMTPModelMeta
from .rendering import as_token_ids
from .template import META as TEMPLATE_META
from .template import TEMPLATE, FolderTemplate
from .tuner import FastMTPTuner

_registered = False


def register() -> None:
    """Model type, loss type and tuner type `fastmtp`, dataset `fastmtp-self-distill`, `swift export`."""
    global _registered
    if _registered:
        return
    _registered = True
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


def _hook_arguments() -> None:
    """Defaults and checks run where ms-swift parses `model_kwargs`: after plugins, before anything is loaded."""
    original = BaseArguments._init_model_kwargs

    def _init_model_kwargs(self: Any) -> None:
        original(self)
        prepare_arguments(self)

    BaseArguments._init_model_kwargs = _init_model_kwargs


def _hook_sft() -> None:
    """Before training: say so when no row is left (too long ones are dropped silently), open the hidden-state cache.
    After it: ranks end together.

    ms-swift leaves the process group to the interpreter's exit, where gloo may abort a rank that is ready, and the
    launcher then ends the one that is still saving.
    """
    from swift.pipelines.train.sft import SwiftSft

    original, run_original = SwiftSft._post_process_datasets, SwiftSft.run

    def run(self: Any) -> Any:
        try:
            result = run_original(self)
        except RuntimeError as error:
            if self.args.model_type == "fastmtp" and _out_of_memory(error):
                raise FastMTPError(_less_memory(self.args, error)) from error
            raise
        if self.args.model_type == "fastmtp" and dist.is_initialized():
            dist.barrier()
            dist.destroy_process_group()
        return result

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

    SwiftSft._post_process_datasets, SwiftSft.run = _post_process_datasets, run
    _hook_rendering(SwiftSft)


def _hook_rendering(pipeline: Any) -> None:
    """Rows are rendered by the chat template of the model's folder before ms-swift encodes them: in training, and
    where `swift export` makes a cached dataset."""
    prepare, load = pipeline._prepare_template, pipeline._get_dataset

    def _prepare_template(self: Any) -> None:
        args = self.args
        if args.model_type == "fastmtp" and self.processor.chat_template and args.template != TEMPLATE:
            self.named_template = args.template  # compared with the folder's, and not used
            args.template = TEMPLATE
        prepare(self)

    def _get_dataset(self: Any) -> Any:
        datasets = load(self)
        if self.args.model_type != "fastmtp" or not isinstance(self.template, FolderTemplate):
            return datasets
        if not self.template.use_chat_template:
            return datasets
        named = getattr(self, "named_template", None)
        policy = FastMTPConfig.from_env().on_bad_row
        return tuple(as_token_ids(self.args, self.template, dataset, policy, named) for dataset in datasets)

    pipeline._prepare_template, pipeline._get_dataset = _prepare_template, _get_dataset


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

    original = SwiftExport.run
    actions = ("to_peft_format", "quant_method", "to_ollama", "to_cached_dataset", "to_hf", "to_mcore", "push_to_hub")

    def run(self: Any) -> Any:
        args = self.args
        if args.model_type != "fastmtp" or any(getattr(args, a, None) for a in actions):
            return original(self)
        return export_checkpoint(args)

    SwiftExport.run = run


class _AnyConfig(PreTrainedConfig):
    max_position_embeddings: int | None = None


def _hook_resume() -> None:
    """transformers' trainer reads a checkpoint's config.json with its bare class, to learn who wrote it. In 5.19 that
    class stops at YaRN under the keys of DeepSeek-V3's, `rope_scaling` and `rope_theta`: it lacks one attribute."""
    trainer.PreTrainedConfig = _AnyConfig


def _one_line_errors() -> None:
    """A `FastMTPError` is the user's to mend: print its line, not a traceback. The exit status stays 1."""
    original = sys.excepthook

    def excepthook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if isinstance(error, FastMTPError):
            print(f"fastmtp: error: {error}", file=sys.stderr)
        else:
            original(kind, error, trace)

    sys.excepthook = excepthook
