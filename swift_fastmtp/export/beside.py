"""Export of a head that was trained beside a model that cannot take it: one that is quantized, or has no MTP layer.

Its base is a draft-only folder (`graft_draft.py`), and there is no full checkpoint to write: what is served is the
model as it is, with a draft-only folder beside it. That folder is written here, in the precision that the model
computes in, where the checkpoint itself holds float32 and a run's files.
"""

import os
from pathlib import Path

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.quantization import read_quantization
from ..errors import FastMTPError
from ..files.known_files import read_object
from .folders import export_draft, export_full, refuse_worse
from .graft_draft import graft_draft


def export_trained(
    checkpoint: str | Path,
    output_dir: str | Path,
    base_model: str | Path | None = None,
    remote_code: bool = True,
    token_maps: str | Path | None = None,
    draft_only: bool = False,
    even_if_worse: bool = False,
) -> Path:
    """Write what is served of any checkpoint: arguments and errors as `export_full`, or with draft_only `export_draft`;
    a draft-only folder in any case where the model cannot take the layer."""
    trained = Checkpoint(checkpoint)
    target = target_beside(trained, base_model)
    if target is None:
        write = export_draft if draft_only else export_full
        return write(checkpoint, output_dir, base_model, remote_code, token_maps, even_if_worse)
    if not even_if_worse:
        refuse_worse(trained)
    export_beside(trained, target, output_dir, token_maps)
    return target.folder


def target_beside(trained: Checkpoint, named: str | Path | None) -> Checkpoint | None:
    """The model that a checkpoint's head was trained beside; None where it was trained in one that holds the layer.

    Args:
        trained: the checkpoint
        named: `--model`: the draft-only folder, or the model that it drafts for; default: what it was trained for

    Raises `FastMTPError` if it was trained for another.
    """
    recorded = trained.settings.get("base_model")
    if not recorded or not os.path.isfile(os.path.join(recorded, "config.json")):
        return None
    origin = Checkpoint(recorded)
    if not origin.has_backbone() or _takes_the_layer(origin, trained):
        return None
    target = Checkpoint(named).target if named else origin
    trained.check_backbone(target)
    return target


def _takes_the_layer(model: Checkpoint, trained: Checkpoint) -> bool:
    """Whether a full checkpoint can be written: the layer is there, in numbers that are written here."""
    if read_quantization(model.config, model.folder):
        try:
            if not model.blocks:
                return False
        except FastMTPError:  # another quantization than FP8 in blocks
            return False
    return any(trained.family.owns(name) for name in model.entries)


def export_beside(
    trained: Checkpoint, target: Checkpoint, output_dir: str | Path, token_maps: str | Path | None
) -> None:
    """Write the draft-only folder; arguments as `export_full`.

    Raises `FastMTPError` naming the file, key or tensor that does not fit.
    """
    if (trained.folder / "adapter_config.json").exists():
        raise FastMTPError(
            f"{trained}: is a LoRA adapter of a layer beside {target}, which is not merged here; train with "
            "--tuner_type fastmtp"
        )
    # A graft forgets which backbone the layer was trained for, and its token map; here both are right.
    settings = {**trained.settings, "base_model": os.path.abspath(target.folder)}
    if dataset := read_object(trained.folder / "args.json").get("dataset"):
        settings["dataset"] = dataset
    graft_draft(target, trained, output_dir, settings, token_maps)
