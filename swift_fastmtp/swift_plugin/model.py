"""Model type `fastmtp`: any checkpoint whose MTP layout is in `families/table.py`."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from swift.model import MODEL_MAPPING, ModelLoader, ModelMeta, model_meta
from swift.model.model_meta import get_matched_model_meta, get_matched_model_types
from transformers import AutoConfig
from transformers.integrations import is_deepspeed_zero3_enabled

from ..checkpoint.checkpoint import Checkpoint
from ..data.chat_template import load_tokenizer
from ..errors import FastMTPError
from ..method.token_map import read_token_map
from ..model.backbone_lora import check_lora, lora_hash, merge_lora
from ..model.config import load_config
from ..model.hidden_cache import EngineStates, engine_states
from ..model.loading import check_checkpoint, model_class
from ..model.without_backbone import load_without_backbone
from .knobs import run_knobs
from .template import TEMPLATE


class FastMTPLoader(ModelLoader):
    """Loads backbone and head as one model, after checking that the checkpoint has everything the head needs."""

    default_trust_remote_code = False
    """ms-swift runs Python code of any model folder; here every class is transformers' or ours."""

    def get_config(self, model_dir: str) -> Any:
        checkpoint = Checkpoint(model_dir)
        _ = checkpoint.trainable_family  # raises where it cannot be trained
        return load_config(checkpoint)

    def get_processor(self, model_dir: str, config: Any) -> Any:
        return load_tokenizer(model_dir)  # no processor: rows are text, whatever else the model sees

    def get_model(self, model_dir: str, config: Any, processor: Any, model_kwargs: dict[str, Any]) -> Any:
        checkpoint = Checkpoint(model_dir)
        settings = run_knobs()
        if settings.token_map:
            read_token_map(settings.token_map, config.vocab_size)
        if settings.backbone_lora:
            check_lora(settings.backbone_lora)
        states = engine_states(settings.hidden_cache) if settings.hidden_cache else None
        if states:
            # An engine has computed the states: the layers of the backbone are not needed, and may be none of ours.
            _check_adapter(settings.hidden_cache, states, settings.backbone_lora)
            model = load_without_backbone(checkpoint, checkpoint.target, self.model_info.torch_dtype)
            model.fastmtp = settings
            return model
        check_checkpoint(checkpoint)
        self.auto_model_cls = model_class(checkpoint)
        model_kwargs["dtype"] = self.model_info.torch_dtype  # of FP8 checkpoints ms-swift would take the stored one
        if is_deepspeed_zero3_enabled():
            # On CPU the trainer sets up the process group only later; `zero.Init` would see a world of one.
            import deepspeed

            deepspeed.init_distributed(dist_backend=None if _has_gpu() else "gloo")
        model = super().get_model(model_dir, config, processor, model_kwargs)
        if settings.backbone_lora:
            merge_lora(model, settings.backbone_lora)
        model.fastmtp = settings
        return model


def _check_adapter(cache: str, states: EngineStates, backbone_lora: str) -> None:
    """Raises `FastMTPError` if an engine's states are not of the adapter that the run names, or of none."""
    wanted = lora_hash(backbone_lora) if backbone_lora else None
    if states.backbone_lora == wanted:
        return
    held = "an adapter" if states.backbone_lora else "the base alone"
    if states.backbone_lora and wanted:
        held = "another adapter"
    raise FastMTPError(
        f"fastmtp_backbone_lora: {cache} holds an engine's states of {held}; name the adapter that "
        "`fastmtp hidden --backbone_lora` was given, or use another folder"
    )


@contextmanager
def without_folder_code() -> Iterator[None]:
    """Inside, ms-swift's first look at a model folder runs no Python code of it (`_get_model_info`, which always
    would), nor does it say so."""
    original = model_meta.AutoConfig

    def is_true(record: logging.LogRecord) -> bool:
        return "trust_remote_code=True" not in record.getMessage()

    model_meta.AutoConfig = _AutoConfig
    model_meta.logger.addFilter(is_true)
    try:
        yield
    finally:
        model_meta.AutoConfig = original
        model_meta.logger.removeFilter(is_true)


class _AutoConfig(AutoConfig):
    @classmethod
    def from_pretrained(cls, model_dir: str, **_: Any) -> Any:
        return AutoConfig.from_pretrained(model_dir, trust_remote_code=False)


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


class FastMTPModelMeta(ModelMeta):
    """The folder's own chat template; the rest from the model type that ms-swift has for the same checkpoint, its
    templates too where the folder has none (base models)."""

    def check_requires(self, model_info: Any = None) -> None:
        # The last call before ms-swift picks the chat template, and the first that knows the folder.
        super().check_requires(model_info)
        if model_info is None:
            return
        model_dir = model_info.model_dir
        self.additional_saved_files = sorted(f for f in os.listdir(model_dir) if f.endswith(".py"))
        self.template = TEMPLATE if load_tokenizer(model_dir).chat_template else None
        base = get_matched_model_meta(model_dir)
        # By every name of the family: a text model has the chat template of the one with a vision tower.
        names = () if base else Checkpoint(model_dir).family.architectures
        bases = [base] if base else [MODEL_MAPPING[t] for name in names for t in get_matched_model_types([name])]
        if not bases:
            return
        self.model_arch = next((b.model_arch for b in bases if not b.is_multimodal), None)
        self.candidate_templates = list(dict.fromkeys(t for b in bases for t in b.candidate_templates))
