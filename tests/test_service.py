"""A service under a load: by queueing theory, by arithmetic, and by what its parts promise."""

import json
from dataclasses import replace

import pytest
from helpers.paths import TINY
from hypothesis import given, settings
from hypothesis import strategies as st

from swift_fastmtp.cli import main
from swift_fastmtp.simulate.service import Drafting, Load, capacity, play, servers_needed
from swift_fastmtp.simulate.step_times import StepTimes

NO_HEAD = Drafting({1: 0}, [0.8, 0.6])
TWO = Drafting({1: 2}, [0.8, 0.6])
# A step takes longer the more answers are decoded, and with drafts.
TIMES = StepTimes({(0, 1): 10, (0, 8): 17, (2, 1): 15, (2, 8): 50}, "by hand", paused={1: 12, 8: 20}, prompt=5)


@pytest.mark.parametrize("busy", [0.3, 0.6])
def test_one_at_a_time_is_a_textbook_queue(busy):
    """M/D/1: answers of one token, so the prompt is all there is; mean wait = busy * seconds / (2 (1 - busy))."""
    times = StepTimes({(0, 1): 1}, "by hand", prompt=100)
    served = play(Load(busy / 0.1, [(7, 1)], 1), NO_HEAD, times)
    assert served.first_token[0] == pytest.approx(0.1 + busy * 0.1 / (2 * (1 - busy)), rel=0.06)
    assert served.answer == served.first_token


def test_a_server_that_nobody_disturbs():
    """20 tokens: the prompt, and 19 steps without drafts; with two drafts always accepted, 7 steps."""
    rare = Load(0.01, [(100, 20)], 8)
    assert play(rare, NO_HEAD, TIMES).answer[1] == pytest.approx(0.005 + 19 * 0.010)
    assert play(rare, Drafting({1: 2}, [1.0, 1.0]), TIMES).answer[1] == pytest.approx(0.005 + 7 * 0.015)
    far = replace(TIMES, on_the_way=30)
    assert play(rare, NO_HEAD, far).first_token[1] == pytest.approx(0.005 + 0.030)
    assert play(rare, NO_HEAD, TIMES).at_once == pytest.approx(1.0, abs=0.01)


def test_times_between_those_that_are_known():
    assert TIMES.seconds(0, 1, paused=False) == 0.010
    assert TIMES.seconds(0, 4, paused=False) == pytest.approx(0.013)
    assert TIMES.seconds(0, 15, paused=False) == pytest.approx(0.024)
    assert TIMES.seconds(0, 8, paused=True) == 0.020
    assert TIMES.seconds(2, 8, paused=True) == 0.050
    falling = StepTimes({(0, 1): 9, (0, 2): 8}, "by hand")
    assert falling.seconds(0, 4, paused=False) == 0.008
    assert TIMES.prompt_seconds(1000) == 0.005


@settings(deadline=None, max_examples=20)  # each plays 4,000 requests
@given(
    st.lists(st.tuples(st.integers(1, 300), st.integers(2, 60)), min_size=1, max_size=4),
    st.integers(1, 12),
    st.sampled_from([NO_HEAD, TWO, Drafting({1: 2, 4: 0}, [0.8, 0.6])]),
)
def test_a_server_near_its_capacity_gives_what_is_asked(lengths, most, drafting):
    """Tokens per second are those that are asked for, as long as it keeps up."""
    rate = 0.5 * capacity(Load(1.0, lengths, most), drafting, TIMES)
    served = play(Load(rate, lengths, most), drafting, TIMES)
    asked = rate * sum(answer for _, answer in lengths) / len(lengths)
    assert served.tokens_per_second == pytest.approx(asked, rel=0.15)
    assert 0 < served.at_once <= most
    assert served.first_token[1] <= served.answer[1] and served.answer[1] <= served.answer[2]


def test_the_capacity_is_where_waiting_begins():
    load = Load(1.0, [(100, 40)], 8)
    most = capacity(load, TWO, TIMES)
    below, above = (play(Load(share * most, load.lengths, 8), TWO, TIMES) for share in (0.7, 1.3))
    assert below.first_token[2] < 1 < above.first_token[1]
    # 8 answers of 40 tokens, the first from the prompt, 2.4 a step of 50 ms.
    assert most == pytest.approx(1 / (0.005 + 39 * 0.050 / (8 * 2.4)))


def test_as_few_servers_as_are_fast_enough():
    load = Load(40.0, [(100, 40)], 8)
    keeping_up = servers_needed(load, TWO, TIMES, None)
    assert (keeping_up - 1) * 0.95 * capacity(load, TWO, TIMES) < 40 <= keeping_up * 0.95 * capacity(load, TWO, TIMES)
    limit = 0.6
    enough = servers_needed(load, TWO, TIMES, limit)
    assert enough > keeping_up
    assert play(Load(40 / enough, load.lengths, 8), TWO, TIMES).answer[2] <= limit
    assert play(Load(40 / (enough - 1), load.lengths, 8), TWO, TIMES).answer[2] > limit
    assert servers_needed(load, TWO, TIMES, 0.1) is None  # alone it takes longer


def test_from_the_command_line(tmp_path, capsys):
    words = ["simulate", "--model", str(TINY), "--dataset", "examples/prompts/eval.jsonl", "--max_rows", "4"]
    words += ["--max_new_tokens", "16", "--costs", "h20", "--output_dir", str(tmp_path / "out")]
    main([*words, "--request_rates", "100", "20000", "--within", "0.5"])
    printed = capsys.readouterr().out
    assert "95 % of the answers within 0.5 s" in printed and "no head" in printed and "by load" in printed
    offers = json.loads((tmp_path / "out/simulate.json").read_text())["services"]
    assert [(offer["rate"], offer["name"]) for offer in offers][:5] == [
        (100.0, name) for name in ("no head", "K=1", "K=2", "K=3", "by load")
    ]
    assert all(later["servers"] >= earlier["servers"] for earlier, later in zip(offers[:5], offers[5:], strict=True))
    with pytest.raises(SystemExit, match="--request_rates: needs --costs"):
        main([*words[:-4], "--output_dir", str(tmp_path / "none"), "--request_rates", "1"])
    with pytest.raises(SystemExit, match="must be positive"):
        main([*words[:-1], str(tmp_path / "none"), "--request_rates", "0"])
