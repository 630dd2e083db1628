"""What `fastmtp inspect` takes from config.json alone is what the layer itself has, for every row of the table."""

import dataclasses
import json
from functools import cache

import pytest
from helpers.models import RANDOM, random_ernie, random_glm_5_2
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from swift_fastmtp.checkpoint.checkpoint import Checkpoint
from swift_fastmtp.checkpoint.layer_shapes import stated_shapes
from swift_fastmtp.errors import FastMTPError
from swift_fastmtp.families.table import FAMILIES
from swift_fastmtp.model.config import AutoConfig
from swift_fastmtp.model.head import import_class
from swift_fastmtp.model.loading import head_shapes

KINDS = {**RANDOM, "ernie with biases": lambda: random_ernie(bias=True), "glm 5.2": random_glm_5_2}
SIZES = (
    *("hidden_size", "intermediate_size", "ffn_hidden_size", "moe_intermediate_size", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim"),
    *("v_head_dim", "index_n_heads", "index_head_dim", "num_experts", "num_local_experts", "n_routed_experts"),
    *("n_shared_experts", "num_shared_experts", "shared_expert_intermediate_size"),
)
# RoPE wants pairs; 5 shows that what it does not take is left to transformers.
HEADS = dict.fromkeys(("head_dim", "qk_rope_head_dim"), st.sampled_from([8, 16, 24, 5]))
HEADS["hidden_size"] = st.sampled_from([16, 32, 48, 20])
FLAGS = ("attention_bias", "use_bias", "use_qkv_bias", "use_qk_norm")
ANYTHING = (None, "x", -1, 0, 1, 1.5, True, [], {}, [1], ["x"], {"a": 1}, {"rope_type": "x"}, {"rope_theta": 0})


@cache
def config_of(kind):
    """config.json as transformers saves it."""
    return json.loads(KINDS[kind]().config.to_json_string())


@cache
def keys_of(kind):
    known = AutoConfig.for_model(config_of(kind)["model_type"])
    return sorted({*config_of(kind), *(field.name for field in dataclasses.fields(known)), "auto_map", "rope_scaling"})


def folder_of(tmp_path, config):
    tmp_path.mkdir(exist_ok=True)
    (tmp_path / "config.json").write_text(json.dumps(config))
    return Checkpoint(tmp_path)


def check_agrees(checkpoint):
    """Returns whether config.json alone told. Where it did, the layer can be built, and has these tensors."""
    try:
        stated = stated_shapes(checkpoint)
    except FastMTPError:
        return False
    if stated is not None:
        assert stated == head_shapes(checkpoint), checkpoint.config
    return stated is not None


@pytest.mark.parametrize("kind", KINDS)
def test_config_json_alone_tells(kind, tmp_path):
    assert check_agrees(folder_of(tmp_path, config_of(kind)))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), kind=st.sampled_from(sorted(KINDS)))
def test_for_any_sizes(data, kind, tmp_path):
    config = dict(config_of(kind))
    for key in [key for key in SIZES if key in config]:
        config[key] = data.draw(HEADS.get(key, st.integers(1, 12)), key)
    for key in [key for key in FLAGS if key in config]:
        config[key] = data.draw(st.booleans(), key)
    for key in data.draw(st.lists(st.sampled_from([*SIZES, *FLAGS]), max_size=2), "left out"):
        config.pop(key, None)
    check_agrees(folder_of(tmp_path, config))


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), kind=st.sampled_from(sorted(KINDS)), value=st.sampled_from(ANYTHING))
def test_what_transformers_refuses_is_left_to_transformers(data, kind, value, tmp_path):
    """So that `inspect` calls nothing trainable that could not be loaded."""
    key = data.draw(st.sampled_from(keys_of(kind)))
    check_agrees(folder_of(tmp_path, {**config_of(kind), key: value}))


@pytest.mark.parametrize("key", ["hidden_size", "num_key_value_heads", "max_position_embeddings"])
def test_a_number_of_another_type_is_not_taken(key, tmp_path):
    assert not check_agrees(folder_of(tmp_path, {**config_of("qwen3_next"), key: "x"}))


@pytest.mark.parametrize("family", FAMILIES, ids=lambda row: row.name)
def test_what_transformers_drops_without_a_word(family):
    ignored = getattr(import_class(family.backbone), "_keys_to_ignore_on_load_unexpected", None)
    assert family.ignored == tuple(ignored or ())
