"""The head that a run began with, as a checkpoint like those of the run: for a run that made it worse."""

import shutil
from pathlib import Path
from typing import Any

from ..checkpoint.checkpoint import SETTINGS_FILE, WEIGHTS_FILE, Checkpoint
from ..checkpoint.fp8_config import without_quantization
from ..checkpoint.mtp_tensors import head_reader, save_tensors
from ..files.known_files import read_object
from ..files.staging import new_folder, remove_at_once, write_json
from .folders import TOKENIZER_FILES


def save_initial(
    began_with: str | Path, model_dir: str | Path, trained: str | Path, folder: str | Path, settings: dict[str, Any]
) -> None:
    """Write `folder`, in place of one that is there.

    Args:
        began_with: a full checkpoint, or a checkpoint of a run (head only, or a LoRA adapter).
        model_dir: what `--model` named.
        trained: a checkpoint of the run, for the tokenizer and arguments beside the head.
        settings: content of its `fastmtp.json`.

    Raises `FastMTPError` naming the tensor or the file.
    """
    from ..model.loading import head_shapes  # torch models only from here on

    trained, folder, source = Path(trained), Path(folder), Checkpoint(began_with)
    shapes_of = Checkpoint(model_dir)
    expected = head_shapes(shapes_of)
    if (source.folder / "adapter_config.json").exists():
        from .lora import merge_head

        read = merge_head(shapes_of, source.folder).__getitem__
    else:
        read = head_reader(source, shapes_of.family, expected)
    if folder.exists():
        remove_at_once(folder)
    with new_folder(folder) as out:
        for name in TOKENIZER_FILES:
            if (trained / name).exists():
                shutil.copyfile(trained / name, out / name)
        if run := read_object(trained / "args.json"):
            write_json({**run, "tuner_type": "fastmtp"}, out / "args.json")  # the form it is in, whatever trained
        for code in shapes_of.folder.glob("*.py"):
            shutil.copyfile(code, out / code.name)
        config = shapes_of.config
        write_json(without_quantization(config) if shapes_of.blocks else config, out / "config.json")
        write_json(settings, out / SETTINGS_FILE)
        save_tensors({name: read(name) for name in expected}, out / WEIGHTS_FILE)
