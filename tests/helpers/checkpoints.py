"""Checkpoints made of the tiny model: a trained head, and the model in several files."""

import json
import shutil

from safetensors.torch import load_file, save_file

from helpers.broken_models import HEAD
from helpers.paths import TINY
from swift_fastmtp.checkpoint.checkpoint import Checkpoint


def write_trained(folder, added=0.5):
    """A head-only checkpoint, as the tuner writes it, with other values than the base's: so much is added to each."""
    folder.mkdir()
    head = {n: t.float() + added for n, t in load_file(TINY / "model.safetensors").items() if n.startswith(HEAD)}
    save_file(head, folder / "model.safetensors")
    settings = {"base_model": str(TINY), "base_fingerprint": Checkpoint(TINY).fingerprint}
    (folder / "fastmtp.json").write_text(json.dumps(settings))
    return folder


def shard(model, folder):
    """The tiny model as three shards with an index; MTP tensors lie in two of them."""
    shutil.copytree(model, folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names, weight_map = sorted(tensors), {}
    for i in range(3):
        part = names[i::3] if i < 2 else [n for n in names[2::3] if not n.startswith(HEAD)]
        rest = [] if i != 1 else [n for n in names[2::3] if n.startswith(HEAD)]
        file = f"model-{i + 1:05}-of-00003.safetensors"
        save_file({n: tensors[n] for n in part + rest}, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(part + rest, file))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def cut_vocabulary(folder, size):
    """The tiny model with the first so many tokens only, and without a tokenizer."""
    folder.mkdir()
    tensors = load_file(TINY / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = tensors[name][:size].clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((TINY / "config.json").read_text())
    config |= {"vocab_size": size, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0}
    (folder / "config.json").write_text(json.dumps(config))
    shutil.copyfile(TINY / "configuration_mimo.py", folder / "configuration_mimo.py")
    return folder
