"""The best K by load: what is computed from times and tau, and the files that engines read."""

import json
from dataclasses import asdict

import pytest
from helpers.bench_results import TASKS, results, run
from helpers.fake_engine import FakeEngine
from helpers.paths import TINY
from hypothesis import given
from hypothesis import strategies as st

from swift_fastmtp.bench.bench import bench
from swift_fastmtp.bench.costs import read_step_times, with_paused_servers
from swift_fastmtp.bench.plan import make_plan
from swift_fastmtp.cli import main
from swift_fastmtp.errors import FastMTPError
from swift_fastmtp.method.metrics import step_seconds
from swift_fastmtp.serving.launch import serve_flags
from swift_fastmtp.serving.schedule_flags import read_schedule
from swift_fastmtp.simulate.cost import StepParts, Weights
from swift_fastmtp.simulate.gpus import GPUS
from swift_fastmtp.simulate.schedule import depths_by_load, schedule, schedule_line, schedule_table
from swift_fastmtp.simulate.step_times import StepTimes, predicted_step_times, roofline

# MiMo-7B in bfloat16 (config.json): hidden 4096; 36 layers, 32 attention heads, 8 key-value heads of 128; 11008 wide.
LAYER = 2 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 11008)
MIMO = StepParts(Weights(36 * LAYER, 0, 1), Weights(LAYER + 2 * 2 * 4096**2, 0, 1), 2 * 4096, 151_680, 2)
MIMO_CACHE = 36 * 2 * 8 * 128 * 2
# The paper, Table 1: tau of the trained head.
TAU = [1.81, 2.37, 2.73]


def test_the_fastest_k_at_each_load():
    times = {
        (0, 1): 10,
        (1, 1): 12,
        (3, 1): 14,
        (0, 8): 10,
        (1, 8): 13,
        (3, 8): 30,
        (0, 32): 10,
        (1, 32): 40,
        (3, 64): 1,
    }
    depths = depths_by_load([1.8, 2.2, 2.6], StepTimes(times, "measured"))
    assert [(d.batch_size, d.num_steps) for d in depths] == [(1, 3), (8, 1), (32, 0)]
    assert depths[0].speedups == pytest.approx([1.0, 1.8 * 10 / 12, None, 2.6 * 10 / 14])
    assert schedule_line(depths) == "schedule: from 32 answers at once on drafts do not pay"
    assert schedule(depths) == {n: {"candidate_steps": [k]} for n, k in (("1", 3), ("8", 1), ("32", 0))}
    # Where no drafts by schedule takes its time, too: 20 ms for 10 at 32 at once, less than 40 / 1.8 for one draft.
    paused = depths_by_load([1.8, 2.2, 2.6], StepTimes(times, "measured", paused={8: 40, 32: 20}))
    assert [(d.num_steps, d.speedups[0]) for d in paused] == [(3, 1.0), (1, 0.25), (0, 0.5)]
    assert schedule_line(paused).endswith("do not pay; a server without a head is up to 2.00x as fast there")
    assert "no drafts" in schedule_table(paused).splitlines()[0]
    assert "no drafts" not in schedule_table(depths).splitlines()[0]
    with pytest.raises(FastMTPError, match="needs steps without drafts"):
        depths_by_load([1.8], StepTimes({(1, 1): 10}, "measured"))


@given(st.lists(st.integers(0, 7), min_size=1, max_size=12), st.integers(1, 9))
def test_a_schedule_says_the_same_in_every_form(steps, first):
    """Ranges of vLLM and slots of SGLang give each batch size the K that was best at the size below or at it."""
    sizes = [first + 3 * i for i in range(len(steps))]
    times = {}
    for size, best in zip(sizes, steps, strict=True):
        times |= {(K, size): 1.0 if best == K else 1000.0 for K in range(8)}
        times[0, size] = 1.0
    depths = depths_by_load([1.5] * 7, StepTimes(times, "measured"))
    entries = schedule(depths)
    assert next(iter(entries)) == "1"
    for size in range(1, sizes[-1] + 5):
        at = max((s for s in sizes if s <= size), default=sizes[0])
        slot = max(int(s) for s in entries if int(s) <= size)  # SGLang: AdaptiveSpeculativeParams._find_closest_bs
        assert entries[str(slot)]["candidate_steps"] == [steps[sizes.index(at)]]


def test_a_roofline_of_the_papers_model():
    """One request: the paper's K = 3. Large batches: an H20 has little arithmetic, so drafting stops paying there."""

    def depths(gpu):
        milliseconds, paused = roofline(MIMO, MIMO_CACHE, GPUS[gpu], 3, 151_680, 1024)
        return depths_by_load(TAU, StepTimes(milliseconds, "predicted", paused=paused))

    h20, h100 = depths("h20"), depths("h100")
    assert h20[0].num_steps == h100[0].num_steps == 3
    assert h20[0].speedups[3] == pytest.approx(2.0, abs=0.06)  # cost.py without attention: 2.03; the paper: 1.81
    assert [d.num_steps for d in h20] == sorted((d.num_steps for d in h20), reverse=True)
    # No drafts by schedule costs more than one draft there; a server without a head is faster than both.
    assert h20[-1].num_steps == 1 and h20[-1].speedups[0] < h20[-1].speedups[1] < 1
    assert schedule_line(h20).startswith("schedule: from 64 answers at once on drafts do not pay; a server without")
    assert h100[-1].num_steps > 1


def test_a_step_reads_the_experts_that_its_tokens_take():
    weights = Weights(shared=10, experts=80, share=2 / 8)
    assert weights.used == 30
    assert weights.read(1) == 30
    assert weights.read(2) == 10 + 80 * (1 - 0.75**2)
    assert weights.read(1000) == pytest.approx(90)


def test_steps_are_timed_at_full_load_only():
    # Two answers at once from second 1 to second 3: a step of 0.5 seconds; alone, one of 0.1.
    slow, fast = [0.5] * 4, [0.1] * 10
    first = (0.0, [1.0, *slow, *fast])
    second = (0.0, [1.0, *slow])
    assert step_seconds([first, second], 2) == pytest.approx([0.5] * 2)
    assert step_seconds([first, second], 1) == pytest.approx([0.1])
    assert step_seconds([first, second], 3) == []
    late = (0.0, [1.0, 1.0, 0.0, 1.0, 0.0])  # read in pairs
    assert step_seconds([late], 1) == pytest.approx([0.5])


def test_flags_of_both_engines(tmp_path):
    file = tmp_path / "adaptive.json"
    file.write_text(json.dumps({n: {"candidate_steps": [k]} for n, k in (("1", 3), ("8", 1), ("32", 0))}))
    words = [word for flag in serve_flags(TINY, "sglang", schedule=str(file)) for word in flag.words]
    assert words[-3:] == ["--speculative-adaptive", "--speculative-adaptive-config", str(file)]
    assert words[words.index("--speculative-num-steps") + 1] == "3"
    config = json.loads(serve_flags(TINY, "vllm", schedule=str(file))[-1].words[1])
    assert config["num_speculative_tokens"] == 3
    assert config["num_speculative_tokens_per_batch_size"] == [[1, 7, 3], [8, 31, 1], [32, 32, 0]]


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ('{"1": {"candidate_steps": [1, 3]}}', "'1': must be a batch size with one K"),
        ('{"1": {"candidate_steps": [true]}}', "must be a batch size with one K"),
        ('{"1": 3}', "must be a batch size with one K"),
        ('{"one": {"candidate_steps": [1]}}', "'one': must be a batch size"),
        ('{"2": {"candidate_steps": [1]}}', "has no entry for a batch size of 1"),
        ('{"1": {"candidate_steps": [0]}}', "makes drafts at no load"),
        ("[]", "adaptive.json"),
    ],
)
def test_a_file_that_is_no_schedule(text, what, tmp_path):
    file = tmp_path / "adaptive.json"
    file.write_text(text)
    with pytest.raises(FastMTPError, match=what):
        serve_flags(TINY, "sglang", schedule=str(file))
    with pytest.raises(FastMTPError, match="leave one out"):
        serve_flags(TINY, "sglang", num_steps=2, schedule=str(file))
    if "1" in text and what.startswith("makes"):
        assert read_schedule(file) == {1: 0}


@pytest.mark.parametrize(("costs", "what"), [("h21", "nor a GPU that is known"), ("none.json", "none.json")])
def test_costs_that_are_none(costs, what, tmp_path):
    words = ["simulate", "--model", str(TINY), "--dataset", "examples/prompts/eval.jsonl", "--costs"]
    with pytest.raises(SystemExit) as stopped:
        main([*words, costs if costs == "h21" else str(tmp_path / costs)])
    assert what in str(stopped.value) and "\n" not in str(stopped.value)


def test_a_prediction_reads_the_checkpoint():
    times = predicted_step_times(str(TINY), "h20", 2, 6144, 0)
    assert times.milliseconds[2, 1] > times.milliseconds[1, 1] > times.milliseconds[0, 1] > 0
    longer = predicted_step_times(str(TINY), "h20", 2, 6144, 1024)
    assert longer.milliseconds[0, 8] > times.milliseconds[0, 8]


def test_a_plan_serves_by_load(tmp_path):
    """`schedule` of a server; and what `bench --costs` adds for each head, whose results say what a pause costs."""
    file = tmp_path / "adaptive.json"
    file.write_text(json.dumps({"1": {"candidate_steps": [3]}, "8": {"candidate_steps": [0]}}))
    servers = {
        "baseline": {},
        "fixed": {"folder": str(TINY)},
        "scheduled": {"folder": str(TINY), "schedule": str(file)},
    }
    plan = make_plan({"model": str(TINY), "num_steps": [1], "servers": with_paused_servers(servers)})
    assert list(plan.launches) == ["baseline", "fixed-k1", "scheduled", "fixed-paused"]
    scheduled, paused = plan.launches["scheduled"], plan.launches["fixed-paused"]
    assert (scheduled.server.num_steps, scheduled.server.schedule) == (3, {"1": 3, "8": 0})
    assert scheduled.command[-2:] == ["--speculative-adaptive-config", str(file)]
    assert paused.server.schedule["1"] == 0 and "--speculative-adaptive" in paused.command
    assert "schedule" not in plan.record()["servers"]["fixed-k1"]
    # What is decided already is not paused: a baseline with a folder of its own, a command, a schedule.
    decided = {"base": {"folder": "x", "method": "baseline"}, "other": {"folder": "x", "command": ["serve"]}}
    assert with_paused_servers({**decided, "by load": servers["scheduled"]}).keys() == {*decided, "by load"}
    with pytest.raises(FastMTPError, match=r"servers\.odd: `schedule` says"):
        make_plan({"model": str(TINY), "servers": {"odd": {"schedule": str(file)}}})
    with pytest.raises(FastMTPError, match=r"servers\.odd: `schedule` says how many drafts"):
        make_plan({"model": str(TINY), "servers": {"odd": {**servers["scheduled"], "num_steps": 2}}})

    value = bench_results(
        {name: launch.server for name, launch in plan.launches.items()},
        [
            ("baseline", 1, 10),
            ("fixed-k1", 1, 15),
            ("fixed-paused", 1, 12),
            ("fixed-paused", 2, 14),
            ("scheduled", 8, 20),
        ],
    )
    (tmp_path / "results.json").write_text(json.dumps(value))
    times = read_step_times(str(tmp_path / "results.json"))
    assert times.milliseconds == pytest.approx({(0, 1): 10, (1, 1): 15})
    assert times.paused == pytest.approx({1: 12, 2: 14, 8: 20})
    # 41 ms to the first token: a step's time for the prompt, the rest on the way.
    assert (times.prompt, times.on_the_way) == pytest.approx((10, 31))


def bench_results(servers, steps):
    """A results.json; `steps`: server, answers at once, milliseconds of a step."""
    runs = []
    for name, concurrency, milliseconds in steps:
        drafts = servers[name].num_steps
        seconds = milliseconds / 1000
        measured = run(name, "long_answers", 1.0 + 0.5 * bool(drafts), 100.0, 100.0, drafts, concurrency=concurrency)
        runs.append({**measured, "step": {"p50": seconds, "p90": seconds, "p99": seconds}})
    return results(
        {name: asdict(server) for name, server in servers.items()}, runs, {"long_answers": TASKS["mt_bench"]}
    )


def test_costs_are_measured_and_used(tmp_path, capsys):
    """`bench --costs` asks as many questions as are on their way at once; `simulate --costs` takes what it measured."""
    with FakeEngine() as base, FakeEngine(num_steps=2) as drafting:
        base.event_pause = drafting.event_pause = 0.1  # so that two answers are on their way at once
        urls = [f"baseline={base.url}", f"tuned={drafting.url}"]
        results = bench(
            str(tmp_path / "costs"), base_urls=urls, costs=True, model=str(TINY), concurrency=[1, 2], warmup=0
        )
    assert {(run.server, run.concurrency): run.num_requests for run in results.runs} == {
        (server, size): size for server in ("baseline", "tuned") for size in (1, 2)
    }
    assert "ms per step" in capsys.readouterr().out
    times = read_step_times(str(tmp_path / "costs/results.json"))
    assert set(times.milliseconds) == {(K, size) for K in (0, 2) for size in (1, 2)}
    assert times.token_map is None
    words = ["simulate", "--model", str(TINY), "--dataset", "examples/prompts/eval.jsonl", "--max_rows", "2"]
    words += ["--max_new_tokens", "8", "--costs", str(tmp_path / "costs/results.json")]
    main([*words, "--output_dir", str(tmp_path / "out")])
    assert "speed over no drafts by load" in capsys.readouterr().out
    assert [depth["batch_size"] for depth in json.loads((tmp_path / "out/simulate.json").read_text())["by_load"]] == [
        1,
        2,
    ]
    assert "1" in json.loads((tmp_path / "out/adaptive.json").read_text())
