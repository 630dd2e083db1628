"""One clear error for each layout or setting that is not trained, and the page that says what is."""

import re
from types import SimpleNamespace

import pytest
import torch
from helpers import support_matrix
from helpers.models import (
    CHECKPOINTS,
    LAYER,
    broken,
    lose_mtp,
    random_ernie,
    random_qwen3_next,
)
from helpers.paths import ROOT

from swift_fastmtp.checkpoint.config_file import read_config
from swift_fastmtp.checkpoint.refusals import find_family
from swift_fastmtp.errors import FastMTPError
from swift_fastmtp.families.refused import LAYOUTS
from swift_fastmtp.families.table import FAMILIES, graph_table, layout_table, match_family, refused_table
from swift_fastmtp.model.loading import load_model
from swift_fastmtp.model.modeling import build_class
from swift_fastmtp.swift_plugin.arguments import _check_packing

BIAS = LAYER + "mlp.gate.e_score_correction_bias"
EXPERT = "mtp.layers.0.mlp.experts.1.up_proj.weight"


@pytest.fixture
def base(bases):
    return bases("qwen3_next")


@pytest.mark.parametrize(("name", "key"), [(row.name, key) for row in FAMILIES for key, _ in row.block.only])
def test_settings_that_the_classes_do_not_know_are_refused(name, key, bases):
    config = read_config(bases(name))
    trained = f'^config.json: {key} is "other"; {config["architectures"][0]} can be trained'
    with pytest.raises(FastMTPError, match=trained):
        find_family({**config, key: "other"})


def second_layer(tensors):
    tensors["mtp.layers.1.input_layernorm.weight"] = torch.ones(32)


def narrow(tensors):
    tensors["mtp.fc.weight"] = tensors["mtp.fc.weight"][:16, :32].contiguous()


ERRORS = {
    "unknown family": (None, {"architectures": ["LlamaForCausalLM"]}, "no known MTP layout; known: MiMoForCausalLM, "),
    "no architectures": (None, {"architectures": None}, "architectures [] has no known MTP layout"),
    "two layers, by the config": (None, {"num_nextn_predict_layers": 2}, "num_nextn_predict_layers is 2; FastMTP"),
    "two layers, by the tensors": (second_layer, {}, "mtp.layers.1.input_layernorm.weight; it is of a second MTP"),
    "hidden size": (narrow, {}, "the MTP layer has hidden size 16, the model 32; it belongs to another model"),
    "lost": (lose_mtp, {}, "no tensor under 'mtp.'; this checkpoint lost its MTP layer"),
    "expert missing": (lambda t: t.pop(EXPERT), {}, f"MTP tensor {EXPERT} is missing"),
    "backbone": (lambda t: t.pop("model.norm.weight"), {}, "model.norm.weight is in no file (1 such tensors)"),
    "tied": (None, {"tie_word_embeddings": True}, "tie_word_embeddings is true, but Qwen3NextForCausalLM has its own"),
}  # fmt: skip


NUMBERED_ERRORS = {
    "two layers, by the config": (None, {"num_nextn_predict_layers": 2}, "num_nextn_predict_layers is 2; FastMTP"),
    "two layers, by the tensors": (
        lambda t: t.update({"model.layers.3.enorm.weight": torch.ones(32)}),
        {},
        "unexpected MTP tensor model.layers.3.enorm.weight; it is of a second MTP layer",
    ),
    "hidden size": (
        lambda t: t.update({LAYER + "eh_proj.weight": torch.ones(16, 32)}),
        {},
        "the MTP layer has hidden size 16, the model 32; it belongs to another model",
    ),
    "lost": (lose_mtp, {}, "no tensor under 'model.layers.2.'; this checkpoint lost its MTP layer"),
    "no bias": (lambda t: t.pop(BIAS), {}, f"MTP tensor {BIAS} is missing"),
    "another depth": (None, {"num_hidden_layers": 3}, "no tensor under 'model.layers.3.'"),
    "no depth": (None, {"num_hidden_layers": None}, "num_hidden_layers is None; the MTP layer is numbered after it"),
}


LONGCAT_ERRORS = {
    "two layers, by the config": (None, {"num_nextn_predict_layers": 2}, "num_nextn_predict_layers is 2; FastMTP"),
    "two layers, by the tensors": (
        lambda t: t.update({"model.mtp.layers.1.enorm.m.weight": torch.ones(32)}),
        {},
        "unexpected MTP tensor model.mtp.layers.1.enorm.m.weight; it is of a second MTP layer",
    ),
    "no model type": (None, {"model_type": None}, 'has no model_type; add "model_type": "longcat_flash"'),
}


def one_clear_error(case, base, tmp_path):
    change, config, message = case
    with pytest.raises(FastMTPError) as error:
        load_model(broken(base, tmp_path, change, **config), torch.float32)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("case", ERRORS)
def test_one_clear_error(case, base, tmp_path):
    one_clear_error(ERRORS[case], base, tmp_path)


@pytest.mark.parametrize("case", NUMBERED_ERRORS)
def test_one_clear_error_of_a_numbered_layer(case, bases, tmp_path):
    one_clear_error(NUMBERED_ERRORS[case], bases("deepseek_v3"), tmp_path)


@pytest.mark.parametrize("case", LONGCAT_ERRORS)
def test_one_clear_error_of_longcat(case, bases, tmp_path):
    one_clear_error(LONGCAT_ERRORS[case], bases("longcat_flash"), tmp_path)


def test_a_numbered_head_is_named_by_the_folder_alone(bases):
    """`--tuner_type full` and `lora` choose parameters by a pattern, and must not reach a backbone's layer."""
    from swift_fastmtp.swift_plugin.arguments import _families, _roots

    own, others = (_roots(_families(model)) for model in (str(bases("glm4_moe")), "org/name"))
    assert re.fullmatch(own, "model.layers.2") and not re.match(own, "model.layers.1.self_attn")
    assert not re.match(others, "model.layers.2.self_attn")


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda row: row.name)
def test_known_layouts_are_refused_with_their_reason(layout):
    for name in layout.architectures:
        with pytest.raises(FastMTPError) as error:
            find_family({"architectures": [name]})
        assert f"{name} cannot be trained here: {layout.reason}" in str(error.value)


@pytest.mark.parametrize("name", ["packing", "padding_free"])
def test_packing_is_refused_where_no_attention_keeps_documents_apart(name, bases):
    args = SimpleNamespace(model=str(bases("deepseek_v32")), attn_impl="flash_attention_2")
    with pytest.raises(FastMTPError, match=f"has none for DeepseekV32ForCausalLM; drop --{name}"):
        _check_packing(name, args)


def test_keys_of_the_text_part_count():
    config = {"architectures": ["Qwen3_5ForConditionalGeneration"], "model_type": "qwen3_5"}
    with pytest.raises(FastMTPError, match="mtp_num_hidden_layers is 2"):
        find_family({**config, "text_config": {"mtp_num_hidden_layers": 2}})
    with pytest.raises(FastMTPError, match="tie_word_embeddings is True, and in text_config False"):
        find_family({**config, "tie_word_embeddings": True, "text_config": {"tie_word_embeddings": False}})
    assert find_family({**config, "text_config": {"tie_word_embeddings": True}}).name == "qwen3_5"


def test_the_block_is_the_engines_whatever_the_backbones_first_layer_is():
    sparse = random_qwen3_next().config
    sparse.mlp_only_layers, sparse.decoder_sparse_step = [0, 1], 2
    dense = random_ernie().config
    assert sparse.layer_types[0] == "linear_attention" and dense.moe_layer_start_index == 0
    with torch.device("meta"):
        heads = [build_class(match_family({"architectures": c.architectures}))(c).head for c in (sparse, dense)]
    mlps = heads[0].get_submodule("layers.0.mlp"), heads[1].get_submodule("mtp_block.0.mlp")
    assert [hasattr(mlp, "experts") for mlp in mlps] == [True, False]


def test_the_pages_are_made_from_the_tables():
    page = (ROOT / "docs/dev-families.md").read_text(encoding="utf-8")
    assert layout_table() in page and support_matrix.table() in page and refused_table() in page
    assert support_matrix.short_table() in (ROOT / "docs/families.md").read_text(encoding="utf-8")
    assert graph_table() in (ROOT / "docs/engines.md").read_text()


def test_every_architecture_is_shown(bases):
    """Every architecture of every row is a checkpoint here; MiMo has tests of its own everywhere."""
    ran = {read_config(bases(name))["architectures"][0] for name in CHECKPOINTS} | {"MiMoForCausalLM"}
    claims = support_matrix.read()["shown"]
    assert [*claims] == support_matrix.architectures() and claims.keys() == ran
    assert all(
        {"keys", "swift", "graft"} <= shown.keys() and shown.keys() & {"draft class", "server"}
        for shown in claims.values()
    )


def test_rows_do_not_share_an_architecture_or_a_path():
    names = [a for row in (*FAMILIES, *LAYOUTS) for a in row.architectures]
    assert len(set(names)) == len(names)
    for family in FAMILIES:
        family = family.at(7)
        assert match_family({"architectures": list(family.architectures), "num_hidden_layers": 7}) == family
        for path in family.layer_paths:
            assert re.fullmatch(r"[\w.]+\.[07]", path) and family.owns(f"{path}.weight")
            assert not family.is_other_layer(f"{path}.weight")
            assert family.is_other_layer(f"{path[:-1]}8.weight") and family.owns(f"{path[:-1]}8.weight")
        assert (
            not family.owns("model.layers.6.mlp.up_proj.weight")
            and not family.owns("model.layers.0.mlp.up_proj.weight")
            and not family.owns("model.norm.weight")
        )


def test_configs_of_every_model_class_are_read(tmp_path):
    """Of other layouts than ours too: `inspect` says then that it knows none, not that their config.json is broken."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    refused = []
    for model_type in CONFIG_MAPPING:
        try:
            text = CONFIG_MAPPING[model_type]().to_json_string(use_diff=False)
        except Exception:  # classes that need arguments, or packages that are not here
            continue
        (tmp_path / "config.json").write_text(text)
        try:
            read_config(tmp_path)
        except FastMTPError as error:
            refused.append(f"{model_type}: {error}")
    assert refused == []
