"""`swift export --adapters CHECKPOINT --output_dir OUT` for model type `fastmtp`."""

from typing import Any

from swift.utils import get_logger

from ..checkpoint.checkpoint import Checkpoint
from ..errors import FastMTPError
from ..export.beside import export_trained
from .knobs import knobs_of

logger = get_logger()


def export_checkpoint(args: Any) -> None:
    """Full checkpoint from a checkpoint of any tuner type (`fastmtp`, `full`, `lora`)."""
    if args.ckpt_dir is None:
        raise FastMTPError("swift export: name the trained checkpoint with --adapters (tuner type full: --model)")
    if args.output_dir is None:
        raise FastMTPError("swift export: name the folder to write with --output_dir")
    # With tuner type `full`, `--model` is the trained checkpoint, and the base is what its args.json names.
    base = export_trained(
        args.ckpt_dir,
        args.output_dir,
        args.model_dir if args.adapters else None,
        even_if_worse=knobs_of(args).on_worse == "keep",
    )
    if Checkpoint(args.output_dir).has_backbone():
        logger.info(f"exported {args.output_dir} (base {base})")
    else:
        logger.info(
            f"exported {args.output_dir}, a draft-only folder: {base} cannot take the layer and is served with it "
            f"beside; `fastmtp serve-args {args.output_dir}` says how"
        )
