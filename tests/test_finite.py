"""A number that is not finite stops whatever meets it, and says where it comes from: it is never scored or saved."""

import re
import subprocess
import sys

import pytest
import torch
from helpers.broken_models import broken
from helpers.models import tensors_of
from helpers.paths import TINY
from helpers.swift_runs import sft_args, swift, write_rows
from helpers.tiers import some_now
from hypothesis import given, settings
from hypothesis import strategies as st

from swift_fastmtp.checkpoint.finite import NotFiniteError, not_finite
from swift_fastmtp.data.chat_template import load_tokenizer
from swift_fastmtp.data.distill import distill
from swift_fastmtp.data.generate import generate
from swift_fastmtp.errors import FastMTPError
from swift_fastmtp.export.doctor import examine
from swift_fastmtp.model.hidden_cache import HiddenCache
from swift_fastmtp.model.loading import load_model
from swift_fastmtp.simulate.simulate import simulate

LAYER = "model.layers.1.mlp.up_proj.weight"
HEAD = "model.mtp_layers.0.input_proj.weight"
# What breaks the tiny model → what is said of it.
BROKEN = {
    "backbone": ({LAYER: float("nan")}, {}, rf"model\.layers\.1 is the first that is not; {LAYER} holds NaN"),
    "norm": ({"model.norm.weight": float("inf")}, {}, r"model\.norm is the first that is not; model\.norm\.weight"),
    "output matrix": ({"lm_head.weight": float("nan")}, {}, r"lm_head\.weight holds NaN"),
    "config": ({}, {"rms_norm_eps": float("nan")}, r"config\.json: rms_norm_eps is nan, it must be a number"),
}


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("few") / "rows.jsonl", 6)


@settings(deadline=None)
@given(
    st.lists(st.floats(width=16), min_size=1, max_size=40),
    st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64]),
)
def test_vectors_that_are_not_finite(values, dtype):
    vector = torch.tensor([values], dtype=torch.float64).to(dtype)
    assert not_finite(vector).tolist() == [not bool(vector.isfinite().all())]


@pytest.mark.parametrize("answers", ["generate", "given"])
@pytest.mark.parametrize("case", BROKEN)
def test_simulate_scores_no_such_model(case, answers, few, tmp_path):
    """It used to say 100 % at every depth, tau 4.00."""
    tensors, config, message = BROKEN[case]
    model = broken(tmp_path / "model", tensors, config)
    with pytest.raises(FastMTPError, match=message) as raised:
        simulate(str(model), [], str(few), answers=answers, max_new_tokens=8, output_dir=str(tmp_path / "out"))
    if case in ("backbone", "norm") or (case, answers) == ("output matrix", "generate"):
        assert str(raised.value).startswith("row ") and "token " in str(raised.value)
    assert not (tmp_path / "out" / "simulate.json").exists()


@pytest.mark.parametrize("case", BROKEN)
def test_distill_writes_no_such_answer(case, few, tmp_path):
    """It used to write `!!!!`, token 0."""
    tensors, config, message = BROKEN[case]
    model = broken(tmp_path / "model", tensors, config)
    place = "" if case == "config" else r"rows\.jsonl:\d+, token \d+: .*"
    with pytest.raises(FastMTPError, match=f"{place}{message}"):
        distill(str(model), str(few), str(tmp_path / "out.jsonl"), max_new_tokens=4, temperature=0.0)
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize("case", ["backbone", "norm", "output matrix"])
def test_doctor_reads_every_number_of_the_backbone(case, tmp_path):
    tensors, config, _ = BROKEN[case]
    (finding,) = examine(broken(tmp_path / "model", tensors, config))
    assert finding.level == "error" and finding.what.startswith(f"{next(iter(tensors))} holds NaN or infinity")


def test_a_row_of_the_embedding_that_nothing_reads_does_no_harm(few, tmp_path):
    model = broken(tmp_path / "model", {"model.embed_tokens.weight": float("nan")})  # of token 0
    (result,) = simulate(str(model), [], str(few), answers="given")
    (sound,) = simulate(str(TINY), [], str(few), answers="given")
    assert result.marginal == sound.marginal


def test_the_row_and_token_of_the_first_one():
    """Of a batch whose second row alone reads the broken embedding, after three tokens."""
    model, tokenizer = load_model(TINY, torch.float32), load_tokenizer(str(TINY))
    sound = [i for i in range(500, 512) if i != 510]
    with torch.no_grad():
        model.model.embed_tokens.weight[510] = float("nan")
    ids = torch.tensor([sound[:6], [*sound[:3], 510, *sound[3:5]]])
    with pytest.raises(NotFiniteError, match=r"batch row 2, token 4: .*model\.embed_tokens is the first") as raised:
        model(input_ids=ids, labels=ids)
    assert (raised.value.row, raised.value.token) == (1, 3)
    with pytest.raises(NotFiniteError, match=r"batch row 2, token 7: the next token's logits .*embed_tokens"):
        generate(model, tokenizer, [sound[:3], [*sound[:5], 510]], 4)


def test_drafts_of_a_broken_layer(few, tmp_path):
    """The model's own text is sound; its drafts would all be token 0."""
    model = load_model(TINY, torch.float32)
    with torch.no_grad():
        model.head_tensors()[HEAD].view(-1)[3] = float("nan")
    ids = torch.arange(500, 508)[None]
    with pytest.raises(NotFiniteError, match=rf"draft step 1 of the MTP layer is not finite: {HEAD} holds NaN"):
        model(input_ids=ids, labels=ids)


def test_states_of_a_cache_are_looked_at(tmp_path):
    model = load_model(TINY, torch.float32)
    ids = torch.arange(500, 508)[None]
    options = {"key": {}, "width": model.config.hidden_size, "dtype": torch.float32, "max_bytes": 10**6}
    model.hidden_cache = HiddenCache(tmp_path / "cache", **options)
    model(input_ids=ids, labels=ids)
    states = tmp_path / "cache" / "states-0.bin"
    stored = bytearray(states.read_bytes())
    stored[400:404] = b"\xff\xff\xff\xff"  # a NaN
    states.write_bytes(stored)
    with pytest.raises(NotFiniteError, match=rf"token 1: .*it is from {tmp_path / 'cache'}; delete that folder"):
        model(input_ids=ids, labels=ids)


@pytest.mark.engine
@pytest.mark.parametrize("case", some_now(["backbone", "output matrix"], ["backbone"]))
def test_swift_sft_stops_at_the_first_step(case, rows, tmp_path):
    """It used to end with exit status 0, loss 0, and a "best" head."""
    tensors, config, message = BROKEN[case]
    out = tmp_path / "out"
    done = swift(*sft_args(broken(tmp_path / "model", tensors, config), rows, out), check=False)
    assert done.returncode == 1
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("fastmtp: error:")]
    assert line.startswith("fastmtp: error: step 1, batch row ")
    assert re.search(message, line)
    assert not list(out.glob("checkpoint-*"))


@pytest.mark.engine
def test_swift_sft_that_diverges_keeps_its_sound_checkpoints(rows, tmp_path):
    """The first step has learning rate 0, the second one that breaks the layer; what is saved holds numbers."""
    out = tmp_path / "out"
    schedule = {"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 1, "max_grad_norm": 0, "save_steps": 1}
    done = swift(*sft_args(TINY, rows, out, learning_rate="1e36", **schedule), check=False)
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("fastmtp: error:")]
    assert done.returncode == 1 and line.startswith("fastmtp: error: step 3")
    assert "not finite" in line and "--learning_rate" in line
    saved = sorted(out.glob("checkpoint-*"))
    assert saved[0].name == "checkpoint-1"
    for folder in saved:
        assert all(bool(t.isfinite().all()) for t in tensors_of(folder).values())


def test_numbers_of_a_command_line_are_finite(few):
    for value in ("nan", "inf", "-inf", "1e999"):
        words = ["simulate", "--model", str(TINY), "--dataset", str(few), f"--temperature={value}"]
        done = subprocess.run(
            [sys.executable, "-m", "swift_fastmtp.cli", *words], capture_output=True, text=True, check=False
        )
        assert done.returncode == 2 and f"--temperature: invalid number value: '{value}'" in done.stderr
