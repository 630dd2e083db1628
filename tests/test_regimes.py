"""Serving above temperature 0: the flags of every regime, what is refused, and what a report says of it."""

import json
from types import SimpleNamespace

import pytest
import torch
from helpers.bench_results import table_1
from helpers.checkpoints import write_trained
from helpers.paths import TINY

from swift_fastmtp.bench.plan import make_plan
from swift_fastmtp.checkpoint.config_file import TOKEN_MAPS_VARIABLE
from swift_fastmtp.cli import main
from swift_fastmtp.errors import FastMTPError
from swift_fastmtp.method.verification import REGIMES, regime_of
from swift_fastmtp.report.merge import load_results
from swift_fastmtp.report.tables import main_table
from swift_fastmtp.serving.flags import command, explain
from swift_fastmtp.serving.launch import serve_flags
from swift_fastmtp.serving.maps import EVERY
from swift_fastmtp.serving.routed_head import NOTHING, RoutedHead
from swift_fastmtp.serving.router import Router


@pytest.fixture
def token_map(tmp_path):
    torch.save(list(range(100)), tmp_path / "map.pt")
    return str(tmp_path / "map.pt")


@pytest.mark.parametrize("engine", ["sglang", "vllm"])
def test_every_regime_has_its_flags(engine):
    plain = command(serve_flags(TINY, engine))
    assert command(serve_flags(TINY, engine, temperature=1.0)) == command(
        serve_flags(TINY, engine, temperature=0.6, regime="rejection")
    )
    for name, regime in REGIMES.items():
        words = command(serve_flags(TINY, engine, temperature=0.6, regime=name))
        assert regime_of(words) == regime
        assert (words == plain) == (name == "greedy")
    speculative = json.loads(command(serve_flags(TINY, "vllm", temperature=1.0, regime="block"))[-1])
    assert speculative["draft_sample_method"] == "probabilistic" and speculative["rejection_sample_method"] == "block"
    assert command(serve_flags(TINY, temperature=1.0))[-1] == "--speculative-use-rejection-sampling"


def test_one_map_with_sampled_drafts_goes_through_the_plugin(token_map):
    """SGLang refuses its own map with them; with greedy drafts it takes it."""
    words = command(serve_flags(TINY, token_map=token_map, temperature=0.6))
    assert words[:3] == ["env", f"SWIFT_FASTMTP_MAPS={token_map}", "python"]
    assert not {"--speculative-token-map", "--tp-size"} & set(words)
    assert "refuses its own map" in explain(serve_flags(TINY, token_map=token_map, temperature=0.6))
    words = command(serve_flags(TINY, token_map=token_map, temperature=0.6, regime="greedy"))
    assert words == command(serve_flags(TINY, token_map=token_map))
    assert "SWIFT_FASTMTP_MAPS" in command(serve_flags(TINY, "vllm", token_map=token_map, temperature=0.6))[1]


def test_one_map_is_for_all_requests():
    made = Router.__new__(Router)
    made.head, made.identify, made.metrics = RoutedHead({EVERY: [1, 2]}, 10), None, None
    made.numbers, made.languages = {EVERY: 0}, torch.full((4,), NOTHING, dtype=torch.int32)
    requests = [SimpleNamespace(origin_input_ids=[5], output_ids=[]) for _ in range(2)]
    batch = SimpleNamespace(reqs=requests, req_pool_indices=torch.tensor([3, 1]))
    made.begin(batch)
    for _ in range(40):
        made.go_on(batch)
    assert made.languages.tolist() == [NOTHING, 0, NOTHING, 0]
    assert [request.fastmtp_language for request in requests] == [EVERY, EVERY]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "--temperature -1: must not be negative"),
        ({"regime": "block"}, "--regime block: at temperature 0 all regimes are one; give --temperature"),
    ],
)
def test_what_cannot_be_is_refused(options, message):
    with pytest.raises(FastMTPError, match=message):
        serve_flags(TINY, **options)


def test_what_an_engine_would_do_otherwise_is_refused(token_map, tmp_path):
    with pytest.raises(FastMTPError, match="older model runner, which has no block verification"):
        serve_flags(TINY, "vllm", token_map=token_map, temperature=1.0, regime="block")
    folder, adapter = write_trained(tmp_path / "trained"), tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text('{"r": 8}')
    settings = json.loads((folder / "fastmtp.json").read_text())
    (folder / "fastmtp.json").write_text(json.dumps({**settings, "backbone_lora": str(adapter)}))
    (folder / "config.json").write_bytes((TINY / "config.json").read_bytes())
    serve_flags(folder, temperature=1.0)
    serve_flags(folder, token_map=token_map, temperature=1.0, regime="greedy")
    with pytest.raises(FastMTPError, match="with adapters SGLang has no token map for sampled drafts"):
        serve_flags(folder, token_map=token_map, temperature=1.0)


@pytest.mark.parametrize(("loss", "regime", "told"), [("ce", "rejection", 1), ("ce", "greedy", 0), ("kl", "block", 0)])
def test_a_head_that_was_trained_for_another_regime_is_named(loss, regime, told, tmp_path):
    folder = write_trained(tmp_path / "trained")
    settings = json.loads((folder / "fastmtp.json").read_text())
    (folder / "fastmtp.json").write_text(json.dumps({**settings, "loss": loss}))
    (folder / "config.json").write_bytes((TINY / "config.json").read_bytes())
    for engine in ("sglang", "vllm"):
        text = explain(serve_flags(folder, engine, temperature=1.0, regime=regime))
        assert text.count("trained with `ce`") == told


def test_the_command_takes_it(capsys):
    main(["serve-args", str(TINY), "--temperature", "0.6"])
    assert "--speculative-use-rejection-sampling  " in capsys.readouterr().out


@pytest.mark.parametrize("engine", ["sglang", "vllm"])
def test_a_plan_serves_a_regime(engine, token_map):
    servers = {name: {"folder": str(TINY), "regime": name, "token_map": token_map} for name in ("greedy", "rejection")}
    launches = make_plan({"model": str(TINY), "engine": engine, "servers": {**servers, "baseline": {}}}).launches
    by_flag = engine == "sglang"
    assert ("--speculative-token-map" in launches["greedy-k3"].command) == by_flag
    assert launches["greedy-k3"].environment[TOKEN_MAPS_VARIABLE] == ("none" if by_flag else token_map)
    assert "--speculative-token-map" not in launches["rejection-k3"].command
    assert launches["rejection-k3"].environment[TOKEN_MAPS_VARIABLE] == token_map
    for name in servers:
        launch = launches[f"{name}-k3"]
        assert launch.command[0] != "env" and regime_of(launch.server.command) == REGIMES[name]
        assert launch.server.token_map == "map" and launch.server.token_map_size == 100


def test_a_report_says_how_drafts_were_made(tmp_path):
    results = table_1()
    for run in results["runs"]:
        run["temperature"] = 0.6
        run["lossless"] = None
    servers = results["servers"]
    for name, server in servers.items():
        if server["num_steps"]:
            server["command"] = command(
                serve_flags(TINY, temperature=0.6, regime="block" if "fr" in name else "greedy")
            )
    (tmp_path / "results.json").write_text(json.dumps(results))
    note = main_table(load_results([tmp_path / "results.json"]), 0.6, 1).caption
    assert "Self-data FT + FR: sampled drafts, block verification." in note
    assert "Vanilla MTP, Fixed-data FT, Self-data FT: greedy drafts, target-only acceptance." in note
    for run in results["runs"]:
        run["temperature"] = 0.0
    (tmp_path / "greedy.json").write_text(json.dumps(results))
    assert "drafts," not in main_table(load_results([tmp_path / "greedy.json"]), 0.0, 1).caption
