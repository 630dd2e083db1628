"""A head is trained, simulated and described for the engine that will serve it (`families.family.Graph`)."""

import json

import pytest
import torch
from helpers.checkpoints import write_trained
from helpers.models import random_mimo
from helpers.paths import ROOT, TINY
from helpers.swift_runs import sft_args, swift, write_rows

from swift_fastmtp.checkpoint.checkpoint import Checkpoint
from swift_fastmtp.errors import FastMTPError
from swift_fastmtp.export.doctor import examine
from swift_fastmtp.export.folders import export_draft
from swift_fastmtp.export.inspection import inspect_model, text
from swift_fastmtp.families.table import FAMILIES, match_family
from swift_fastmtp.method.config import FastMTPConfig
from swift_fastmtp.method.losses import plain_step_losses, weighted_loss
from swift_fastmtp.method.rollout import rollout, segment_ids, step_targets
from swift_fastmtp.model.hidden_cache import states_depend_on
from swift_fastmtp.report.model_card import make_card
from swift_fastmtp.serving.flags import explain
from swift_fastmtp.serving.launch import serve_flags
from swift_fastmtp.simulate.simulate import simulate

PROMPTS = ROOT / "examples/prompts/eval.jsonl"


def family(architecture):
    return match_family({"architectures": [architecture], "num_hidden_layers": 2})


@pytest.fixture
def spread():
    """A random MiMo whose norm weights differ from channel to channel."""
    return random_mimo(0, heads=4, kv=2, dtype=torch.float32)


def states(model, ids):
    positions = torch.arange(ids.shape[1])[None]
    return model.backbone_states(ids, None, positions, segment_ids(positions))


def test_vllms_mimo_drafts_from_the_state_before_the_final_norm(spread):
    ids = torch.randint(0, 97, (1, 9))
    after = states(spread, ids)
    assert torch.equal(after, spread.model(ids).last_hidden_state) and spread.normed(after) is after
    spread.fastmtp = FastMTPConfig(engine="vllm")
    before = states(spread, ids)
    assert torch.equal(spread.normed(before), after) and not torch.allclose(before, after, atol=0.1)


@pytest.mark.parametrize("loss", ["ce", "kl", "lk"])
def test_the_teacher_is_the_models_own_distribution_all_the_same(spread, loss):
    """Trained for vLLM, the head reads states before the norm, and is compared with the output matrix after it."""
    spread.fastmtp = FastMTPConfig(engine="vllm", loss=loss)
    ids = torch.randint(0, 97, (1, 12))
    positions, segments = torch.arange(12)[None], torch.zeros(1, 12, dtype=torch.long)
    output = spread(input_ids=ids, position_ids=positions, labels=ids)

    state = []
    hook = spread.model.norm.register_forward_pre_hook(lambda _, inputs: state.append(inputs[0]))
    with torch.no_grad():
        after = spread.model(ids).last_hidden_state
    hook.remove()
    embeds = spread.model.embed_tokens(ids)
    rotary = spread.model.rotary_emb
    drafts = rollout(spread.head, state[0], embeds, positions, segments, rotary, 3, "exact")
    targets, valid = (x.flatten(1) for x in step_targets(ids, segments, ids, 3))
    rows = torch.arange(12)
    want = plain_step_losses(drafts, spread.lm_head.weight, targets, valid, spread.fastmtp, after[0], rows)
    total = weighted_loss(want.loss, spread.fastmtp.step_weights, 11)
    torch.testing.assert_close(output.loss, total, atol=1e-5, rtol=1e-5)
    spread.fastmtp = FastMTPConfig(loss=loss)
    assert abs(spread(input_ids=ids, position_ids=positions, labels=ids).loss - total) > 3e-4


def test_a_cache_of_one_engines_states_is_not_the_others(spread):
    keys = {}
    for engine in ("sglang", "vllm"):
        spread.fastmtp = FastMTPConfig(engine=engine)
        keys[engine] = states_depend_on(spread, "abc", None, None)
    assert keys["vllm"] == {**keys["sglang"], "states": "before the final norm"}


@pytest.mark.parametrize(
    ("architecture", "engine", "message"),
    [
        ("MiMoForCausalLM", "both", "vLLM drafts from the hidden state before the backbone's final norm"),
        ("Glm4MoeForCausalLM", "both", "vLLM feeds back the state before the MTP layer's final norm"),
        ("Ernie4_5_MoeForCausalLM", "both", "vLLM rotates halves"),
        ("Qwen3MoeForCausalLM", "vllm", "vLLM has no MTP for Qwen3MoeForCausalLM"),
        ("Qwen3MoeForCausalLM", "both", "vLLM has no MTP for Qwen3MoeForCausalLM"),
    ],
)
def test_no_graph_no_run(architecture, engine, message):
    with pytest.raises(FastMTPError, match=message) as error:
        family(architecture).graph(engine)
    assert "fastmtp_engine" in str(error.value) and "\n" not in str(error.value)


def test_both_is_one_graph_where_engines_agree():
    qwen = family("Qwen3NextForCausalLM")
    assert qwen.graph("both") == qwen.graph("sglang") == qwen.graph("vllm") and not qwen.differences
    assert qwen.mismatch("sglang", "vllm") is None


@pytest.mark.parametrize("row", FAMILIES, ids=lambda row: row.name)
def test_every_graph_says_where_it_was_read(row):
    for graph in (row.engines.sglang, row.engines.vllm):
        assert graph is None or ".py:" in graph.source


@pytest.mark.parametrize("values", [{"engine": "tgi"}, {"engine": "vllm", "rollout": "paper"}])
def test_impossible_engines(values):
    with pytest.raises(FastMTPError, match="fastmtp_engine"):
        FastMTPConfig(**values)


def test_simulate_measures_both_and_says_where_a_head_does_better(tmp_path, capsys):
    trained = write_trained(tmp_path / "trained", added=0.001)
    options = {"max_rows": 6, "max_new_tokens": 24, "output_dir": str(tmp_path / "out")}
    results = simulate(str(TINY), [str(trained)], str(PROMPTS), engine="both", **options)
    printed = capsys.readouterr().out
    assert [(r.head, r.engine) for r in results] == [
        (head, engine) for head in ("base", str(trained)) for engine in ("sglang", "vllm")
    ]
    assert results[0].histogram != results[1].histogram
    assert "engines: vLLM drafts from the hidden state before" in printed and "engines: base does" in printed
    record = json.loads((tmp_path / "out/simulate.json").read_text())
    assert record["engines"] == ["sglang", "vllm"] and record["heads"][1]["engine"] == "vllm"
    (alone, _) = simulate(str(TINY), [str(trained)], str(PROMPTS), engine="vllm", max_rows=6, max_new_tokens=24)
    assert alone == results[1]


@pytest.mark.engine
def test_a_head_trained_for_vllm_says_so_everywhere(tmp_path):
    run = tmp_path / "run"
    knobs = json.dumps({"fastmtp_engine": "vllm"})
    args = sft_args(TINY, write_rows(tmp_path / "rows.jsonl", 8), run, max_steps=1, save_steps=1, model_kwargs=knobs)
    log = swift(*args).stderr
    assert "fastmtp_engine vllm; served by SGLang the head would be one trained for vLLM's graph" in log
    folder = tmp_path / "draft"
    export_draft(run / "checkpoint-1", folder)
    assert Checkpoint(folder).trained_for == "vllm"

    mismatch = "trained for vLLM's graph, and vLLM drafts from the hidden state before the backbone's final norm"
    assert mismatch in explain(serve_flags(folder)) and mismatch not in explain(serve_flags(folder, "vllm"))
    assert any(mismatch in str(finding) for finding in examine(folder))
    assert not any(mismatch in str(finding) for finding in examine(folder, engine="vllm"))
    assert "trained for    vLLM" in text(inspect_model(folder))
    card = make_card(folder)
    assert "In SGLang it drafts worse" in card and "In vLLM it drafts worse" not in card
    # Simulated for the engine that it was trained for, unless another is named.
    (_, result) = simulate(str(TINY), [str(run / "checkpoint-1")], str(PROMPTS), max_rows=2, max_new_tokens=8)
    assert result.engine == "vllm"


def test_a_broken_settings_file_is_one_line(tmp_path):
    folder = write_trained(tmp_path / "trained")
    path = folder / "fastmtp.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "engine": "tgi"}))
    with pytest.raises(FastMTPError, match="engine is 'tgi', it must be one of sglang, vllm, both"):
        _ = Checkpoint(folder).trained_for


def test_untrained_models_have_no_engine_of_their_own():
    assert Checkpoint(TINY).trained_for is None
    inspection = inspect_model(TINY)
    assert inspection.engine_differences == [
        "vLLM drafts from the hidden state before the backbone's final norm, SGLang after it"
    ]
    assert "; trained for" not in explain(serve_flags(TINY, "vllm"))
