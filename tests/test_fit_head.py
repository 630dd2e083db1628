"""The projection of a fresh head is the least-squares map to what the last decoder layer reads."""

import shutil

import pytest
import torch
from helpers.paths import TINY
from helpers.swift_runs import write_rows
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from swift_fastmtp.checkpoint.checkpoint import Checkpoint
from swift_fastmtp.errors import FastMTPError
from swift_fastmtp.export.fit_head import RIDGES, Sums, solve, texts_of
from swift_fastmtp.export.graft import graft
from swift_fastmtp.files.rows import read_rows
from swift_fastmtp.model.loading import load_model
from swift_fastmtp.simulate.simulate import simulate

PROJ = "model.mtp_layers.0.input_proj.weight"


@pytest.fixture(scope="module")
def lost(tmp_path_factory):
    """The tiny model without its MTP layer, as a Qwen2."""
    folder = tmp_path_factory.mktemp("lost") / "model"
    shutil.copytree(TINY, folder)
    path = folder / "model.safetensors"
    kept = {name: tensor for name, tensor in load_file(path).items() if "mtp_layers" not in name}
    save_file(kept, path, {"format": "pt"})
    return folder


def sums_of(inputs, outputs):
    return Sums(inputs.T @ inputs, inputs.T @ outputs, float(outputs.square().sum()), len(inputs))


@settings(max_examples=30, deadline=None)
@given(
    positions=st.integers(12, 40),
    widths=st.tuples(st.integers(1, 6), st.integers(1, 4)),
    ridge=st.sampled_from(RIDGES),
    seed=st.integers(0, 99),
)
def test_the_map_is_the_ridge_regressions(positions, widths, ridge, seed):
    """Against least squares with the ridge as rows of their own, and the error against the residuals."""
    g = torch.Generator().manual_seed(seed)
    inputs = torch.randn(positions, widths[0], generator=g, dtype=torch.float64)
    outputs = torch.randn(positions, widths[1], generator=g, dtype=torch.float64)
    sums = sums_of(inputs, outputs)
    weight = solve(sums, ridge)
    added = (ridge * inputs.square().sum(0).mean()).sqrt() * torch.eye(widths[0], dtype=torch.float64)
    rows = torch.cat([inputs, added]), torch.cat([outputs, outputs.new_zeros(widths[0], widths[1])])
    torch.testing.assert_close(weight, torch.linalg.lstsq(*rows).solution.T)
    residual = (outputs - inputs @ weight.T).square().sum() / outputs.square().sum()
    assert sums.error(weight) == pytest.approx(float(residual), abs=1e-9)


def test_a_fitted_head_is_the_best_map_and_drafts(lost, tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", 40)
    plain = graft(lost, tmp_path / "plain", init_from_last_layer=True)
    report = graft(lost, tmp_path / "fitted", init_from_last_layer=True, fit_on=str(rows))
    assert any("projection fitted on" in note for note in report.notes) and len(report.notes) > len(plain.notes)

    # Only the projection is another.
    before, after = Checkpoint(tmp_path / "plain"), Checkpoint(tmp_path / "fitted")
    changed = [name for name in before.names if not torch.equal(before.read(name), after.read(name))]
    assert changed == [PROJ]

    # It is the least-squares map of the texts that were not held out, computed here from the states at once.
    model = load_model(tmp_path / "fitted", torch.float32)
    texts = list(texts_of(tmp_path / "fitted", str(rows), None))
    assert len(texts) == len(read_rows(str(rows)))
    inputs, outputs = [], []
    norm = torch.nn.functional.rms_norm
    for number, ids in enumerate(texts):
        if number % 8 == 7:
            continue
        with torch.no_grad():
            states = model.model(torch.tensor([ids]), output_hidden_states=True)
        hidden = states.last_hidden_state[0, :-1]
        embeds = model.model.embed_tokens(torch.tensor(ids[1:])).detach()
        pair = [norm(x, x.shape[-1:], eps=model.config.rms_norm_eps) for x in (hidden, embeds)]
        inputs.append(torch.cat(pair, -1).double())
        outputs.append(states.hidden_states[-2][0, 1:].double())
    sums = sums_of(torch.cat(inputs), torch.cat(outputs))
    errors = [float((solve(sums, ridge) - after.read(PROJ).double()).abs().max()) for ridge in RIDGES]
    assert min(errors) < 0.02  # the stored one is rounded to bfloat16; of other ridges the map is far off

    # And it drafts where the average of both did not.
    prompts = TINY.parents[0] / "prompts/eval.jsonl"
    options = {"max_rows": 6, "max_new_tokens": 16, "num_steps": 1}
    (average,) = simulate(str(tmp_path / "plain"), [], str(prompts), **options)
    (fitted,) = simulate(str(tmp_path / "fitted"), [], str(prompts), **options)
    assert fitted.marginal[0] > average.marginal[0] + 0.05


def test_too_few_rows_or_a_donor(lost, tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", 5)
    with pytest.raises(FastMTPError, match="a fit needs at least 8 rows"):
        graft(lost, tmp_path / "out", init_from_last_layer=True, fit_on=str(rows))
    with pytest.raises(FastMTPError, match="--fit_on fits a new layer"):
        graft(lost, tmp_path / "out", donor=TINY, fit_on=str(rows))
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))
