"""Heads, rows and sizes that belong to another model are refused where they enter."""

import json
import shutil

import pytest
import torch
from helpers.broken_models import broken
from helpers.paths import TINY
from helpers.swift_runs import write_rows
from safetensors.torch import load_file, save_file

from swift_fastmtp.checkpoint.weight_files import INDEX_FILE
from swift_fastmtp.data.clean import clean
from swift_fastmtp.data.distill import distill
from swift_fastmtp.data.mix import mix
from swift_fastmtp.errors import FastMTPError
from swift_fastmtp.export.doctor import examine
from swift_fastmtp.export.folders import export_full
from swift_fastmtp.export.inspection import inspect_model
from swift_fastmtp.model.loading import load_model
from swift_fastmtp.serving.launch import serve_flags
from swift_fastmtp.simulate.simulate import simulate
from swift_fastmtp.vocab.build import vocab


@pytest.mark.parametrize("size", [7, 6143, 6145, 10**18, -5, 0])
def test_vocab_size_is_the_number_of_rows(size, trained, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(TINY, model)
    values = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**values, "vocab_size": size}))
    rows, out = str(write_rows(tmp_path / "rows.jsonl", 4)), str(tmp_path / "out")
    refusing = {
        "simulate": lambda: simulate(str(model), [], rows),
        "distill": lambda: distill(str(model), rows, out),
        "vocab": lambda: vocab([rows], str(model), out),
        "clean": lambda: clean([rows], out, model=str(model)),
        "mix": lambda: mix([rows], out, model=str(model)),
        "export": lambda: export_full(trained, out, model),
        "serve-args": lambda: serve_flags(model),
        "training": lambda: load_model(model, torch.float32),
    }
    for verb, run in refusing.items():
        with pytest.raises(FastMTPError, match=rf"config\.json: vocab_size is {size}\b"):
            run()
        assert not (tmp_path / "out").exists(), verb
    assert any(f.level == "error" and f"vocab_size is {size}" in f.what for f in examine(model))
    if 0 <= size < 2**24:  # else there is nothing that could be shown
        inspection = inspect_model(model)
        assert not inspection.trainable and any(f"vocab_size is {size}" in reason for reason in inspection.reasons)


def test_simulate_takes_no_head_of_another_backbone(trained, tmp_path):
    rows = str(write_rows(tmp_path / "rows.jsonl", 4))
    other = broken(tmp_path / "other", {"model.layers.0.mlp.up_proj.weight": 0.5})
    with pytest.raises(FastMTPError, match=r"checkpoint: this head was trained for another backbone than .*other"):
        simulate(str(other), [str(trained)], rows, answers="given")
    assert len(simulate(str(TINY), [str(trained)], rows, answers="given")) == 2


def test_doctor_misses_what_the_index_lists(tmp_path):
    """A tensor that the model needs, in no file: engines keep random values there."""
    model = tmp_path / "model"
    shutil.copytree(TINY, model)
    tensors = load_file(model / "model.safetensors")
    gone = "model.layers.1.mlp.up_proj.weight"
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, "model.safetensors")}
    del tensors[gone]
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    (model / INDEX_FILE).write_text(json.dumps(index))
    (finding,) = [f for f in examine(model) if f.level == "error"]
    assert f"lists {gone} in model.safetensors, which no file holds" in finding.what


IMPOSSIBLE = {
    "token_ids": {"token_ids": [5, 6144]},
    "prompt": {"token_ids": [5], "prompt_token_ids": [10**12]},
    "negative": {"token_ids": [5, -1]},
    "text": {"token_ids": ["5"]},
}


@pytest.mark.parametrize("case", IMPOSSIBLE)
def test_token_ids_that_the_model_does_not_have(case, tmp_path):
    """They used to end `swift sft` in an IndexError."""
    rows = write_rows(tmp_path / "rows.jsonl", 3)
    answer = {"role": "assistant", "content": "an answer of some words", **IMPOSSIBLE[case]}
    with open(rows, "a") as file:
        file.write(json.dumps({"messages": [{"role": "user", "content": "what?"}, answer], "id": "bad"}) + "\n")
    clean(
        [str(rows)],
        str(tmp_path / "clean.jsonl"),
        model=str(TINY),
        removed=str(tmp_path / "removed.jsonl"),
        filters=["asked"],
    )
    removed = [json.loads(line) for line in (tmp_path / "removed.jsonl").read_text().splitlines()]
    assert [row["id"] for row in removed if row["removed_by"] == "asked"] == ["bad"]
    with pytest.raises(FastMTPError, match=r"rows\.jsonl:4: token ids that no row of this model has"):
        mix([str(rows)], str(tmp_path / "mixed"), model=str(TINY), shares=["general=1"])
    assert not (tmp_path / "mixed").exists()
