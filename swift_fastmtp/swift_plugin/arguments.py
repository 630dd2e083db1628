"""What `--model_type fastmtp` implies, and what it rules out, before any weight is loaded."""

import os
import re
from pathlib import Path
from typing import Any

from swift.utils import get_device_count, get_logger
from transformers.utils import is_torch_mps_available

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.headers import read_headers
from ..data.chat_template import load_tokenizer
from ..errors import FastMTPError
from ..families.family import ENGINE_NAMES, Family
from ..families.table import FAMILIES
from ..files.inputs import check_folder
from ..method.config import likely_typos
from ..model.compat_transformers import supports_flash_attention
from ..model.head import import_class
from .dataset import own_name
from .knobs import knobs_of
from .template import BASE_STRATEGIES, TEMPLATE
from .typed import is_typed

logger = get_logger()


_RENDERED = "rows are rendered by the chat template of the model's folder, as engines render them"
# (argument, value that is fine, why anything else is not)
_UNSUPPORTED = (
    ("sequence_parallel_size", 1, "draft steps read tokens of the neighboring rank"),
    ("enable_dft_loss", False, "it re-weights next-token logits, which FastMTP never computes"),
    ("enable_channel_loss", False, "it needs next-token logits, which FastMTP never computes"),
    ("use_liger_kernel", False, "it replaces the model's forward, and with it the MTP steps"),
    ("predict_with_generate", False, "evaluation is acceptance; use `swift infer` for text"),
    ("quant_method", None, "the head is trained against the unquantized backbone"),
    ("quant_bits", None, "the head is trained against the unquantized backbone"),
)
_OF_OTHER_TEMPLATES = (
    ("agent_template", None, _RENDERED),
    ("response_prefix", None, _RENDERED),
    ("preserve_thinking", None, _RENDERED),
    ("add_non_thinking_prefix", True, _RENDERED),
)
_FLASH = ("flash_attn", "flash_attention_2", "flash_attention_3", "flash_attention_4")


def prepare_arguments(args: Any) -> None:
    """Fill in what follows from the model type and refuse what cannot work.

    Called by ms-swift's argument classes for every command. Raises `FastMTPError`, naming the argument.
    """
    if getattr(args, "model_type", None) != "fastmtp":
        return
    knobs = knobs_of(args)
    for typo, meant in likely_typos(os.environ).items():
        logger.warning(f"environment: {typo} is ignored; did you mean {meant}?")
    if hasattr(args, "loss_type") or getattr(args, "to_cached_dataset", False):
        _prepare_data(args)
    if not hasattr(args, "loss_type"):
        return  # infer, export, deploy
    args.loss_type = args.loss_type or "fastmtp"
    from_checkpoint = args.load_args and args.ckpt_dir  # its args.json goes before what was typed
    if args.tuner_type == "lora" and not is_typed(args, "tuner_type") and not from_checkpoint:
        args.tuner_type = "fastmtp"  # `lora` is ms-swift's default, not the user's word
    if not is_typed(args, "template") and args.template != TEMPLATE and _has_template(args.model):
        args.template = TEMPLATE  # ms-swift took the one that the folder was tuned with, of its args.json
    if args.tuner_type == "lora" and args.target_modules == ["all-linear"] and not args.target_regex:
        # Not experts: peft takes a name like the shared one's `gate_proj` for the experts of every layer of the model.
        families = _families(args.model)
        projections = "|".join(re.escape(f"{family.names.prefix}.{family.names.proj}") for family in families)
        args.target_regex = rf"^(?!.*expert)(({_roots(families)})\..*_proj|{projections})$"
    frozen = args.freeze_parameters_ratio or args.freeze_parameters or args.freeze_parameters_regex
    if args.tuner_type == "full" and not frozen:
        args.freeze_parameters_ratio = 1.0
        args.trainable_parameters_regex = rf"^({_roots(_families(args.model))})\."
    if os.path.isdir(args.model or ""):
        check_folder(args.model)
        _ = Checkpoint(args.model).config  # ms-swift reads it next, and expects no other than a sound one
        _check_engine(Checkpoint(args.model).family, knobs.engine)
        args.check_model = False  # asks a hub whether a folder is the newest version; a folder is what was asked for
    if get_device_count() == 0 and not is_torch_mps_available():
        # Without it ms-swift refuses bf16 on a machine without a GPU, and several processes train unsynchronised.
        args.use_cpu = True
    # The backbone runs without gradients and the head is called K times: there is nothing to gain from
    # checkpointing, and under ZeRO-3 a checkpointed reused module gives wrong gradients.
    args.gradient_checkpointing = False
    # It compresses the labels to the last rows, which breaks their alignment with deeper steps.
    args.use_logits_to_keep = False
    if args.tuner_type == "full" and knobs.backbone_lora:
        raise FastMTPError(
            "fastmtp_backbone_lora does not work with --tuner_type full, whose checkpoints hold the backbone too, with "
            "the adapter in it; use fastmtp or lora"
        )
    _check(args)


def _has_template(model: str | None) -> bool:
    """Whether a folder has a chat template, by which rows are rendered."""
    return os.path.isdir(model or "") and bool(load_tokenizer(str(model)).chat_template)


def _check_engine(family: Family, engine: str) -> None:
    """Raises `FastMTPError` where there is no graph of that engine; says so where another engine has another one."""
    family.graph(engine)
    other = {"sglang": "vllm", "vllm": "sglang"}.get(engine)
    if other and (mismatch := family.mismatch(engine, other)):
        logger.info(f"fastmtp_engine {engine}; served by {ENGINE_NAMES[other]} the head would be one {mismatch}")


def _refuse(args: Any, unsupported: tuple[tuple[str, Any, str], ...]) -> None:
    for name, fine, why in unsupported:
        value = getattr(args, name, None)
        if value is not None and value != fine:
            raise FastMTPError(f"--{name} {value} does not work with --model_type fastmtp: {why}")


def _prepare_data(args: Any) -> None:
    """Files of rows with `messages` are read by our own reader; what ms-swift's templates would do is refused."""
    if args.use_chat_template is False:
        return  # `swift pt`: texts, not conversations
    if not args.columns:
        args.dataset = [own_name(name) for name in _listed(args.dataset)]
        args.val_dataset = [own_name(name) for name in _listed(args.val_dataset)]
    _refuse(args, _OF_OTHER_TEMPLATES)
    strategy, _, others = str(args.loss_scale or "default").partition("+")
    if strategy not in BASE_STRATEGIES or others:
        raise FastMTPError(
            f"--loss_scale {args.loss_scale} does not work with --model_type fastmtp: {_RENDERED}; it can be "
            f"{', '.join(BASE_STRATEGIES)}"
        )


def _listed(names: Any) -> list[str]:
    """From Python, one name need not be a list."""
    return [names] if isinstance(names, str) else list(names or [])


def _families(model: str | None) -> list[Family]:
    """The model's own row, or, where it is no folder yet, those whose paths no config.json changes."""
    if os.path.isdir(model or ""):
        return [Checkpoint(str(model)).family]
    return [family for family in FAMILIES if "{N}" not in family.names.prefix]


def _roots(families: list[Family]) -> str:
    return "|".join(re.escape(root) for family in families for root in family.roots)


def _check(args: Any) -> None:
    _refuse(args, _UNSUPPORTED)
    if args.loss_type == "fastmtp" and getattr(args, "is_binary_loss_scale", None) is False:
        raise FastMTPError("--is_binary_loss_scale false does not work with --loss_type fastmtp: rows count or do not")
    if args.packing or args.padding_free:
        _check_packing("packing" if args.packing else "padding_free", args)
    if args.tuner_type not in ("fastmtp", "full", "lora"):
        raise FastMTPError(
            f"--tuner_type {args.tuner_type} is not supported with --model_type fastmtp; use fastmtp, full or lora"
        )
    # For models with experts peft turns any target into bare names of modules, which the backbone has too.
    if args.tuner_type == "lora" and any(".experts." in name for name in _tensor_names(args.model)):
        raise FastMTPError(
            "--tuner_type lora does not work with a mixture of experts: peft would put LoRA on the backbone too; use "
            "--tuner_type fastmtp, which trains the whole MTP head, and leave out --lora_... and --target_..."
        )


def _check_packing(name: str, args: Any) -> None:
    families, need = _families(args.model), f"--{name} needs an attention that keeps documents apart"
    if not any(supports_flash_attention(import_class(family.backbone)) for family in families):
        raise FastMTPError(f"{need}, and transformers has none for {families[0].architectures[0]}; drop --{name}")
    if args.attn_impl not in _FLASH:
        raise FastMTPError(f"{need}; add --attn_impl flash_attention_2 (GPU), or drop --{name}")


def _tensor_names(model: str | None) -> list[str]:
    return list(read_headers(model).entries) if model and any(Path(model).glob("*.safetensors")) else []
