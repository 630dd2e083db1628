"""What a saved model looks like that kept its MTP layers, and how a save through transformers loses them."""

import json
import shutil

import torch
from transformers import AutoModelForImageTextToText, Qwen2Config, Qwen2ForCausalLM

from helpers.paths import TINY
from helpers.swift_runs import sft_args
from swift_fastmtp.checkpoint.checkpoint import Checkpoint
from swift_fastmtp.checkpoint.shards import tensor_hashes
from swift_fastmtp.export.doctor import examine
from swift_fastmtp.export.graft import HEAD_FILE
from swift_fastmtp.export.inspection import inspect_model
from swift_fastmtp.model.head import import_class
from swift_fastmtp.swift_plugin.keep_asked import KEEP


def stock_mimo(folder):
    """The tiny model under the type of its backbone, which stock ms-swift loads without code of the folder."""
    shutil.copytree(TINY, folder)
    config = json.loads((folder / "config.json").read_text())
    del config["auto_map"]
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "qwen2"}))
    (folder / "configuration_mimo.py").unlink()
    return folder


def stock_args(name, base, rows, output_dir, **changes):
    """A short run of ms-swift's own model type."""
    own = {
        "model_type": name,
        "template": "qwen",
        "tuner_type": "full",
        "torch_dtype": "bfloat16",
        "bf16": "false",
        "use_cpu": "true",
        "learning_rate": "1e-3",
        "max_steps": 4,
        "callbacks": KEEP,
    }
    return sft_args(base, rows, output_dir, **{**own, **changes})


def save_through_transformers(base, folder, **options):
    """A model as a trainer saves it: what its transformers class loads of it."""
    checkpoint = Checkpoint(base)
    config = {}
    cls = import_class(checkpoint.family.backbone)
    if "vision_config" in checkpoint.config:
        cls = AutoModelForImageTextToText
    if checkpoint.family.name == "mimo":
        settings = {k: v for k, v in checkpoint.config.items() if k not in ("auto_map", "model_type")}
        cls, config = Qwen2ForCausalLM, {"config": Qwen2Config(**settings)}
    cls.from_pretrained(base, dtype=torch.bfloat16, **config).save_pretrained(folder, **options)
    return folder


def hashes_of(folder):
    """Name → dtype, shape and the hash of the bytes of every tensor."""
    entries = Checkpoint(folder).entries
    hashes = {}
    for file in {entry.file for entry in entries.values()}:
        hashes.update(tensor_hashes(file))
    return {name: (entry.dtype, entry.shape, hashes[name]) for name, entry in entries.items()}


def assert_kept(folder, base, before=None):
    """The base's MTP tensors with their bytes, and everything that reads a checkpoint takes it.

    `before` is `hashes_of` the folder as it was saved, where that is known.
    """
    family = Checkpoint(base).family
    now, theirs = hashes_of(folder), hashes_of(base)
    mtp = {name for name in theirs if family.owns(name)}
    assert mtp and {n for n in now if family.owns(n)} == mtp
    assert {n: now[n] for n in mtp} == {n: theirs[n] for n in mtp}
    if before is not None:
        assert {n: h for n, h in now.items() if n not in mtp} == before
    # Every file that there is, is listed, and transformers reads the same ones.
    checkpoint = Checkpoint(folder)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {name: file.name for name, file in checkpoint.file_of.items()}
    assert index["metadata"]["total_size"] == sum(checkpoint.sizes().values())
    assert {file.name for file in folder.glob("*.safetensors")} == set(index["weight_map"].values())
    assert checkpoint.chosen.read_by_transformers and not list(folder.glob(".*"))
    assert checkpoint.config["architectures"] == Checkpoint(base).config["architectures"]
    inspection = inspect_model(folder)
    assert inspection.trainable and inspection.mtp_layers == 1 and inspection.mtp_files == [HEAD_FILE]
    # Nothing but what holds for the base too: engines that draft with no model of its family.
    assert {finding.what for finding in examine(folder)} <= {finding.what for finding in examine(base)}
