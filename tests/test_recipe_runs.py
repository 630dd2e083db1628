"""Every recipe through the real `swift sft`, on a CPU with a tiny model of its layout.

Only sizes, the number of processes and what a CPU does not have are other than in the recipe; several processes are
test_distributed.py's.
"""

import json

import pytest
import torch
from helpers.hidden import cache_of, states_of
from helpers.paths import ROOT, TINY
from helpers.recipes import RECIPES, values
from helpers.swift_runs import KEEP, logged, swift
from safetensors.torch import load_file

from swift_fastmtp.bench.servers import free_port
from swift_fastmtp.checkpoint.checkpoint import Checkpoint
from swift_fastmtp.data.chat_template import load_tokenizer
from swift_fastmtp.data.examples import training_examples
from swift_fastmtp.files.rows import read_rows
from swift_fastmtp.model.loading import head_shapes, load_model

pytestmark = pytest.mark.matrix

# The model that a recipe is for, by the beginning of its file's name → a tiny one of that layout.
LAYOUTS = {
    "mimo": None,
    "qwen3_5_9b": "qwen3_5_vision",
    "qwen3_5_35b": "qwen3_5_moe_vision",
    "qwen3_next": "qwen3_next",
    "glm_4_5_air": "glm4_moe",
    "glm_4_7_flash": "glm4_moe_lite",
    "deepseek_v3": "deepseek_v3",
}
RUN = [recipe for recipe in RECIPES if "cpu" not in recipe.name]
# What a CPU does not have, and sizes.
SMALL = {
    "use_hf": "false",
    "use_cpu": "true",
    "attn_impl": "sdpa",
    "padding_free": "false",
    "max_length": 256,
    "max_steps": 2,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 1,
    "eval_steps": 2,
    "save_steps": 2,
    "logging_steps": 1,
    "dataloader_num_workers": 0,
    "dataset_num_proc": 1,
    "add_version": "false",
    "check_model": "false",
    "report_to": "none",
}


def fill_cache(folder, model_dir, rows):
    """What `fastmtp hidden` gets from a server: states of every row."""
    model, tokenizer = load_model(model_dir, torch.bfloat16), load_tokenizer(str(model_dir))
    cache = cache_of(folder, model_dir, model.config.hidden_size, "bfloat16")
    for row in read_rows(rows):
        for example in training_examples(tokenizer, row):
            cache.put([torch.tensor(example.ids)], [states_of(model, example.ids)])


@pytest.mark.parametrize("recipe", RUN, ids=lambda path: path.stem)
def test_a_recipe_trains_a_tiny_model(recipe, bases, rows, tmp_path):
    name = next(layout for start, layout in LAYOUTS.items() if recipe.name.startswith(start))
    base, out, stated = bases(name) if name else TINY, tmp_path / "run", values(recipe)
    knobs = {**stated.get("model_kwargs", {}), **json.loads(KEEP)}
    if "fastmtp_hidden_cache" in knobs:
        knobs["fastmtp_hidden_cache"] = str(tmp_path / "states")
        fill_cache(tmp_path / "states", base, rows)
    paths = {"model": base, "dataset": f"fastmtp-self-distill:{rows}", "output_dir": out}
    paths["val_dataset"] = f"fastmtp-self-distill:{rows}#4"
    changes = {**SMALL, **paths, "model_kwargs": json.dumps(knobs)}
    words = [str(word) for key, value in changes.items() for word in (f"--{key}", value)]
    environment = {"DS_ACCELERATOR": "cpu"}
    if "ENV" in stated:
        environment |= {"NPROC_PER_NODE": "1", "MASTER_PORT": str(free_port())}
        words += ["--bf16", "false"]  # DeepSpeed on a CPU keeps the model's dtype, without autocast
    done = swift("sft", recipe.relative_to(ROOT), *words, env=environment)
    assert len(logged(out)) == 2 and logged(out, "eval_mtp_tau")
    saved = load_file(out / "checkpoint-2/model.safetensors")
    assert saved.keys() == head_shapes(Checkpoint(base)).keys()
    assert all(tensor.isfinite().all() for tensor in saved.values())
    if "fastmtp_hidden_cache" in knobs:
        assert "no backbone is loaded" in done.stdout + done.stderr
