"""Qwen3.5 beside its vision tower, through the real `swift`: its MTP layer kept, healed and exported.

ms-swift loads that model with the packages of its images, which this project does not need otherwise.
"""

import json
from importlib.util import find_spec

import pytest
from helpers.keep import assert_kept, stock_args
from helpers.models import CHECKPOINTS, tensors_of
from helpers.swift_runs import logged, sft_args, swift, write_rows

from swift_fastmtp.checkpoint.checkpoint import Checkpoint
from swift_fastmtp.export.doctor import examine

PACKAGES = ("qwen_vl_utils", "torchvision")
pytestmark = [
    pytest.mark.matrix,
    pytest.mark.skipif(
        None in map(find_spec, PACKAGES),
        reason=f"ms-swift loads Qwen3.5 with {' and '.join(PACKAGES)}, which are not installed",
    ),
]
OF_IMAGES = ("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>")


def with_processor(folder):
    """What the published ones have beside their weights, so that transformers can make a processor."""
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    first = 1 + max(token["id"] for token in tokenizer["added_tokens"])
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    ids = {}
    for number, content in enumerate(OF_IMAGES, start=first):
        ids[content] = number
        tokenizer["added_tokens"].append({"id": number, "content": content, **plain})
    path.write_text(json.dumps(tokenizer), encoding="utf-8")
    path = folder / "config.json"
    config = json.loads(path.read_text())
    for key in ("vision_start", "vision_end"):
        config[f"{key}_token_id"] = ids[f"<|{key}|>"]
    for key in ("image", "video"):
        config[f"{key}_token_id"] = ids[f"<|{key}_pad|>"]
    path.write_text(json.dumps(config))
    sizes = {"patch_size": 4, "temporal_patch_size": 2, "merge_size": 2}
    for kind, name in (("image", "preprocessor_config.json"), ("video", "video_preprocessor_config.json")):
        settings = {f"{kind}_processor_type": f"Qwen{2 if kind == 'image' else 3}VL{kind.title()}Processor", **sizes}
        settings["processor_class"] = "Qwen3VLProcessor"
        (folder / name).write_text(json.dumps(settings))
    return folder


def assert_healed(tuned, base, rows, work):
    """`swift sft --model_type fastmtp` on the tuned model, then an export of it that engines take."""
    swift(*sft_args(tuned, rows, work / "healed", max_steps=2))
    assert logged(work / "healed", "mtp_acc_3")
    swift("export", "--adapters", work / "healed/checkpoint-2", "--output_dir", work / "full")
    assert examine(work / "full") == []
    family, before, after = Checkpoint(base).family, tensors_of(tuned), tensors_of(work / "full")
    assert before.keys() == after.keys()
    changed = {name for name in before if not before[name].equal(after[name])}
    assert changed and all(family.owns(name) for name in changed)


@pytest.mark.parametrize("tuner", ["full", "lora"])
def test_tuned_kept_healed(tuner, tmp_path):
    base = with_processor(CHECKPOINTS["qwen3_5_vision"](tmp_path / "base"))
    rows, tuned = write_rows(tmp_path / "rows.jsonl", 16), tmp_path / "run/checkpoint-4"
    swift(*stock_args("qwen3_5", base, rows, tmp_path / "run", template="qwen3_5", tuner_type=tuner))
    if tuner == "lora":
        tuned = tmp_path / "merged"
        adapter = tmp_path / "run/checkpoint-4"
        swift("export", "--adapters", adapter, "--merge_lora", "true", "--output_dir", tuned)
    assert_kept(tuned, base)
    names = tensors_of(base).keys()
    assert tensors_of(tuned).keys() == names and any(".visual." in name for name in names)
    assert examine(tuned) == []
    assert_healed(tuned, base, rows, tmp_path)
