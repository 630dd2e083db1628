"""Fuzzed inputs: every reader ends well or with one line, within a second, whatever it is given."""

import json
import random
import time
from collections import Counter

import pytest
import torch
from helpers.fuzz_inputs import (
    HEADER,
    INDEX,
    MAP_LIST,
    MIX,
    ODD,
    ROWS,
    SETTINGS,
    as_line,
    configs,
    fault,
    header_bytes,
    json_values,
    map_bytes,
    mutated,
    mutated_bytes,
    near,
    near_bytes,
    read_a_config,
    read_a_header,
    read_a_list,
    read_a_map,
    read_a_mix,
    read_an_index,
    read_row,
    read_settings,
)
from hypothesis import HealthCheck, given, settings

FEW = settings(
    max_examples=150, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
OBJECTS = {
    "rows": (read_row, ROWS, as_line),
    "configs": (read_a_config, configs(), as_line),
    "settings": (read_settings, [SETTINGS], as_line),
    "headers": (read_a_header, [HEADER], header_bytes),
    "indexes": (read_an_index, [INDEX], as_line),
    "map lists": (read_a_list, [MAP_LIST], as_line),
    "mixes": (read_a_mix, [json.loads('{"shares": {"a": 1.0}, "languages": {"a": ["zh"]}, "other": "a"}')], as_line),
}
"""Reader, right values, and how they are written."""


@pytest.mark.parametrize("kind", OBJECTS)
def test_objects(kind, tmp_path):
    reader, right, write = OBJECTS[kind]
    for value in right:
        assert fault(reader, write(value), tmp_path) is None

    @FEW
    @given(near(right) | json_values)
    def check(value):
        assert fault(reader, write(value), tmp_path) is None

    @FEW
    @given(near_bytes([write(value) for value in right] + [MIX.encode()]))
    def check_bytes(data):
        assert fault(reader, data, tmp_path) is None

    check()
    check_bytes()


MAPS = [[5, 6], torch.tensor([1, 2, 3]), torch.arange(4).expand(4), {"a": 1}, [], [[1]], torch.rand(3), "x"]


def test_token_maps(tmp_path):
    right = [map_bytes(value, tmp_path) for value in MAPS]

    @FEW
    @given(near_bytes(right))
    def check(data):
        assert fault(read_a_map, data, tmp_path) is None

    check()
    for value in ODD:
        assert fault(read_a_map, map_bytes(value, tmp_path), tmp_path) is None


def budget(reader, make, cases, seconds, folder):
    """So many cases from seeds 0, 1, .., or as many as the time allows. Returns how many; faults by their kinds."""
    faults, end = Counter(), time.monotonic() + seconds
    for seed in range(cases):
        if time.monotonic() > end:
            return seed, faults
        data = make(random.Random(seed))
        if found := fault(reader, data, folder):
            faults[f"{found:.200}"] += 1
            print(f"seed {seed}: {found}\n  {data[:300]!r}")
    return cases, faults


@pytest.mark.matrix
@pytest.mark.parametrize(
    ("kind", "cases", "seconds"),
    [("rows", 1_000_000, 80)] + [(kind, 100_000, 15) for kind in OBJECTS if kind != "rows"],
)
def test_many_objects(kind, cases, seconds, tmp_path, bases, capsys):
    reader, right, write = OBJECTS[kind]
    if kind == "configs":
        right = configs([bases(name) for name in ("glm4_moe", "qwen3_next")])

    def make(rng):
        data = write(mutated(rng, rng.choice(right)))
        return mutated_bytes(rng, data) if rng.random() < 0.25 else data

    count, faults = budget(reader, make, cases, seconds, tmp_path)
    with capsys.disabled():
        print(f"\n{kind}: {count} cases, {faults.total()} faults")
    assert not faults, faults.most_common(10)


@pytest.mark.matrix
def test_many_token_maps(tmp_path, capsys):
    right = [map_bytes(value, tmp_path) for value in MAPS]
    count, faults = budget(read_a_map, lambda rng: mutated_bytes(rng, rng.choice(right)), 100_000, 20, tmp_path)
    with capsys.disabled():
        print(f"\ntoken maps: {count} cases, {faults.total()} faults")
    assert not faults, faults.most_common(10)
