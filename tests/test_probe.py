"""`fastmtp doctor --probe`: each fault that a converter may plant is named with its repair, a sound head is not
accused, and one that learned nothing is told from one that did."""

import json
import shutil

import pytest
import torch
from helpers.broken_models import HEAD
from helpers.checkpoints import cut_vocabulary
from helpers.learning import learned
from helpers.models import CHECKPOINTS, RANDOM, random_mimo, save_checkpoint, tensors_of
from helpers.paths import TINY
from safetensors.torch import save_file

from swift_fastmtp.cli import main
from swift_fastmtp.errors import FastMTPError
from swift_fastmtp.export.folders import export_draft
from swift_fastmtp.export.init_head import initial_head
from swift_fastmtp.families.table import FAMILIES
from swift_fastmtp.simulate import probe as module
from swift_fastmtp.simulate.acceptance import Text
from swift_fastmtp.simulate.probe import MAX_NEW_TOKENS, PROMPTS, distinct_positions, probe
from swift_fastmtp.simulate.repairs import known_repairs, repaired
from swift_fastmtp.simulate.simulate import simulate

FEW = PROMPTS[:6]


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    """A file of fewer prompts than are built in."""
    file = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in FEW))
    return file


@pytest.fixture(scope="module")
def gemma_norms(tmp_path_factory):
    """A Qwen3.5, whose norms multiply by 1 + weight, with a head that learned the answers to the prompts."""
    work = tmp_path_factory.mktemp("qwen3_5")
    base = save_checkpoint(RANDOM["qwen3_5"], work / "base")
    learned(base, work, FEW, MAX_NEW_TOKENS, 40, chat_template=None)
    return work / "full"


def changed(base, folder, change):
    """A copy of a checkpoint, in one file, with its MTP layer changed.

    `change` gets the layer's tensors by their names in it, and gives those that are replaced."""
    shutil.copytree(base, folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    prefix = HEAD if base == TINY else "mtp."
    tensors = tensors_of(base)
    layer = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    tensors |= {prefix + name: tensor.contiguous() for name, tensor in change(layer).items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def only(probed):
    """The one verdict."""
    (verdict,) = probed.verdicts
    return verdict


# What a converter does to a layer.


def added(number, *parts):
    """A number added to the norms whose names hold one of the parts."""

    def change(layer):
        norms = {name: tensor for name, tensor in layer.items() if "norm" in name}
        chosen = [name for name in norms if not parts or any(part in name for part in parts)]
        return {name: norms[name] + number for name in chosen}

    return change


def halves_exchanged(layer):
    (name,) = [name for name in layer if name in ("input_proj.weight", "fc.weight")]
    left, right = layer[name].chunk(2, dim=1)
    return {name: torch.cat([right, left], 1)}


def inputs_exchanged(layer):
    return {**halves_exchanged(layer), **input_norms_exchanged(layer)}


def input_norms_exchanged(layer):
    pairs = (
        ("hidden_layernorm.weight", "token_layernorm.weight"),
        ("pre_fc_norm_hidden.weight", "pre_fc_norm_embedding.weight"),
    )
    one, other = next(pair for pair in pairs if pair[0] in layer)
    return {one: layer[other], other: layer[one]}


def gates_exchanged(layer):
    (name,) = [name for name in layer if name.endswith("gate_proj.weight")]
    other = name.replace("gate_proj", "up_proj")
    return {name: layer[other], other: layer[name]}


BLOCK = ("input_layernorm", "post_attention_layernorm", "q_norm", "k_norm")
BESIDE = ("hidden_layernorm", "token_layernorm", "final_layernorm")
TINY_FAULTS = {
    "norms without their +1": (added(-1), "with 1 added to its norms"),
    "norms with a +1 too many": (added(1), "with 1 taken from its norms"),
    "+1 lost in the block": (added(-1, *BLOCK), "with 1 added to the norms of its block"),
    "+1 lost beside the block": (added(-1, *BESIDE), "with 1 added to the norms beside its block"),
    "halves": (halves_exchanged, "with the halves of input_proj exchanged"),
    "inputs": (inputs_exchanged, "with its two inputs exchanged"),
}
GEMMA_FAULTS = {
    "norms without their +1": (added(-1), "with 1 added to its norms"),
    "the +1 twice": (added(1), "with 1 taken from its norms"),
    "norms of the inputs": (input_norms_exchanged, "with pre_fc_norm_hidden and pre_fc_norm_embedding exchanged"),
    "halves": (halves_exchanged, "with the halves of fc exchanged"),
    "gates": (gates_exchanged, "with gate and up projection exchanged"),
}


@pytest.fixture(scope="module")
def sound(gemma_norms, prompts):
    """What the probe says of each layer before anything is done to it."""
    return {folder: probe(folder, prompts=prompts) for folder in (TINY, gemma_norms)}


def assert_named(base, sound, fault, repair, tmp_path, prompts):
    probed = probe(changed(base, tmp_path / "model", fault), prompts=prompts)
    verdict = only(probed)
    assert verdict.level == "error" and f"; {repair} " in verdict.what, probed
    # Both numbers are there, and the second is that of the sound layer.
    broken, restored = probed.measured[:2]
    assert broken.text in verdict.what and restored.text in verdict.what
    assert abs(restored.rate - sound[base].measured[0].rate) < 0.02
    assert restored.rate > broken.rate + 0.1


@pytest.mark.parametrize("case", TINY_FAULTS)
def test_a_fault_of_the_tiny_model_is_named(case, sound, tmp_path, prompts):
    assert_named(TINY, sound, *TINY_FAULTS[case], tmp_path, prompts)


@pytest.mark.parametrize("case", GEMMA_FAULTS)
def test_a_fault_of_norms_that_add_one_is_named(case, gemma_norms, sound, tmp_path, prompts):
    assert_named(gemma_norms, sound, *GEMMA_FAULTS[case], tmp_path, prompts)


def input_norms_apart(layer):
    """The same function, with the hidden state's norm four times as large and its half of the projection a quarter.

    The tiny model's two norms are so alike that it does not matter which is which."""
    norm, projection = layer["hidden_layernorm.weight"], layer["input_proj.weight"]
    left, right = projection.chunk(2, dim=1)
    return {"hidden_layernorm.weight": 4 * norm, "input_proj.weight": torch.cat([left / 4, right], 1)}


def test_exchanged_norms_of_the_inputs_are_named(sound, tmp_path, prompts):
    apart = changed(TINY, tmp_path / "apart", input_norms_apart)
    assert probe(apart, prompts=prompts).verdicts == []
    repair = "with hidden_layernorm and token_layernorm exchanged"

    def fault(layer):
        return input_norms_exchanged(layer | input_norms_apart(layer)) | {
            "input_proj.weight": input_norms_apart(layer)["input_proj.weight"]
        }

    assert_named(TINY, sound, fault, repair, tmp_path, prompts)


def test_sound_layers_have_no_finding(sound):
    assert [probed.verdicts for probed in sound.values()] == [[], []]
    assert [probed.measured[0].name for probed in sound.values()] == ["as it is", "as it is"]


def test_the_numbers_are_those_of_simulate(sound, prompts):
    """The same texts, the same definitions: to the last digit."""
    (base,) = simulate(str(TINY), [], str(prompts), max_new_tokens=MAX_NEW_TOKENS)
    as_it_is = sound[TINY].measured[0]
    assert as_it_is.counts.marginal == base.marginal and as_it_is.counts.conditional == base.conditional
    assert as_it_is.tau == pytest.approx(base.tau_micro[-1], rel=1e-12)
    assert f"{base.marginal[0]:.1%}" in sound[TINY].text


def test_it_says_the_same_again(sound, prompts):
    again = probe(TINY, prompts=prompts)
    assert again.text == sound[TINY].text


# Layers that learned nothing of this model.


def at_random(layer):
    torch.manual_seed(5)
    matrices = {name: tensor for name, tensor in layer.items() if tensor.ndim > 1}
    return {name: torch.randn_like(tensor) * tensor.std() for name, tensor in matrices.items()}


def of_another_backbone(layer):
    """The trained layer of a model that computes the same with its channels in another order."""
    torch.manual_seed(5)
    width = len(layer["input_layernorm.weight"])
    order = torch.randperm(width)
    moved = {name: tensor[order] for name, tensor in layer.items() if "norm" in name}
    moved["input_proj.weight"] = layer["input_proj.weight"][order][:, torch.cat([order, order + width])]
    for part in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj"):
        moved[f"{part}.weight"] = layer[f"{part}.weight"][:, order]
    for part in ("self_attn.o_proj", "mlp.down_proj"):
        moved[f"{part}.weight"] = layer[f"{part}.weight"][order]
    return moved


@pytest.mark.parametrize("change", [at_random, of_another_backbone])
def test_a_layer_that_knows_nothing_of_the_model(change, tmp_path, prompts):
    probed = probe(changed(TINY, tmp_path / "model", change), prompts=prompts)
    verdict = only(probed)
    assert verdict.level == "error" and "no better than random weights" in verdict.what
    assert "random, or of another model" in verdict.why and "fastmtp graft" in verdict.fix


def test_another_seeds_layer(gemma_norms, tmp_path, prompts):
    def change(layer):
        other = RANDOM["qwen3_5"](9, vocab=6144, std=0.1).head.state_dict()
        return {name: other[name].to(tensor.dtype) for name, tensor in layer.items()}

    probed = probe(changed(gemma_norms, tmp_path / "model", change), prompts=prompts)
    assert "no better than random weights" in only(probed).what


def worn(layer):
    """Noise in the projection: what much training of the backbone leaves of a layer."""
    torch.manual_seed(5)
    weight = layer["input_proj.weight"]
    return {"input_proj.weight": weight + 1.3 * weight.std() * torch.randn_like(weight)}


def test_a_stale_layer_is_weak(tmp_path, prompts):
    """One that drafts, but not much."""
    probed = probe(changed(TINY, tmp_path / "model", worn), prompts=prompts, start=initial_head)
    verdict = only(probed)
    assert verdict.level == "warning" and verdict.what.startswith("weak: "), probed
    assert "swift sft --model_type fastmtp" in verdict.fix
    assert "last decoder layer, untrained" in probed.text


def test_training_that_made_it_worse(tmp_path, prompts):
    draft = changed(TINY, tmp_path / "draft", worn)
    layer = {name: tensor for name, tensor in tensors_of(draft).items() if name.startswith(HEAD)}
    save_file(layer, draft / "model.safetensors", metadata={"format": "pt"})
    weak, worse = probe(draft, TINY, prompts).verdicts
    assert weak.what.startswith("weak: ")
    assert worse.level == "warning" and "the base model's own head does better" in worse.what


def test_repeated_text_counts_once():
    """`1 2 3 4` three times, and in another answer."""
    repeated = Text([9, 8, 1, 2, 3, 4, 1, 2, 3, 4, 1, 2, 3, 4, 7, 7, 7], 2, 14)
    again = Text([4, 1, 2, 3, 4, 1, 2], 1, 5)
    new, old = [True], [False]
    assert distinct_positions([repeated, again]).tolist() == 5 * new + 5 * old + 2 * new + 4 * old


@pytest.mark.matrix
def test_trained_for_the_other_engine(tmp_path, prompts):
    """The hidden state from before the final norm is what vLLM drafts MiMo's from."""
    base = save_checkpoint(lambda seed, std, **sizes: random_mimo(seed, **sizes), tmp_path / "base")
    learned(base, tmp_path, FEW, MAX_NEW_TOKENS, 40, chat_template=None, engine="vllm")
    assert probe(tmp_path / "full", prompts=prompts, engine="vllm").verdicts == []
    verdict = only(probe(tmp_path / "full", prompts=prompts))
    assert verdict.level == "warning" and "; with what vLLM computes " in verdict.what
    assert "serve it with vLLM" in verdict.fix


# Each change is one that a family can have, and is undone.


@pytest.mark.parametrize("family", [row.name for row in FAMILIES])
def test_every_repair_of_every_family_can_be_tried(family):
    model = RANDOM[family]()
    before = {name: tensor.clone() for name, tensor in model.head.state_dict().items()}
    graph = model.head.graph
    repairs = known_repairs(model, "sglang")
    assert len({repair.name for repair in repairs}) == len(repairs) >= 11
    with torch.no_grad():
        for repair in repairs:
            with repaired(model, repair):
                now = model.head.state_dict()
                same = all(torch.equal(now[name], tensor) for name, tensor in before.items())
                assert same == (repair.change is None), repair.name
                assert (model.head.graph == graph) == (repair.graph is None), repair.name
    after = model.head.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items()) and model.head.graph == graph


@pytest.mark.matrix
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_random_layer_of_every_family(name, bases, prompts):
    """Every family runs, with every repair and beside every yardstick that it has; no repair is taken for the cause."""
    probed = probe(bases(name), prompts=prompts, start=initial_head)
    assert probed.measured, probed.text
    assert only(probed).level == "error" and "no better than random weights" in only(probed).what


# The folders that may be given.


def test_a_layer_alone(trained, tmp_path, prompts, sound):
    """A training checkpoint, and the draft-only folder that is made of it: the same layer on the same base."""
    shutil.copyfile(TINY / "config.json", trained / "config.json")
    export_draft(trained, tmp_path / "draft")
    of_checkpoint, of_draft = (probe(folder, prompts=prompts) for folder in (trained, tmp_path / "draft"))
    assert of_checkpoint.measured[0].counts.marginal == pytest.approx(of_draft.measured[0].counts.marginal, abs=0.02)
    assert of_draft.measured[1].name == "the base's own"
    assert of_draft.measured[1].counts.marginal == sound[TINY].measured[0].counts.marginal
    (trained / "fastmtp.json").unlink()
    assert "name its model with --model" in probe(trained).text
    named = probe(trained, model=TINY, prompts=prompts)
    assert named.measured[0].counts.marginal == of_checkpoint.measured[0].counts.marginal


def parts(folder):
    """The tiny model without its MTP layer, as `folder`/lost, and that layer as `folder`/draft."""
    lost, draft = (changed(TINY, folder / name, lambda _: {}) for name in ("lost", "draft"))
    layer = {name: tensor for name, tensor in tensors_of(TINY).items() if name.startswith(HEAD)}
    rest = {name: tensor for name, tensor in tensors_of(TINY).items() if name not in layer}
    save_file(rest, lost / "model.safetensors", metadata={"format": "pt"})
    save_file(layer, draft / "model.safetensors", metadata={"format": "pt"})
    return lost, draft


def test_a_layer_whose_model_has_none(tmp_path, prompts, sound):
    """A draft beside a model that lost its own."""
    lost, draft = parts(tmp_path)
    probed = probe(draft, lost, prompts, start=initial_head)
    assert probed.measured, probed.text
    assert probed.measured[0].counts.marginal == sound[TINY].measured[0].counts.marginal
    assert probed.verdicts == [] and "last decoder layer" in probed.text
    config = json.loads((lost / "config.json").read_text())
    (lost / "config.json").write_text(json.dumps({**config, "architectures": ["LlamaForCausalLM"]}))
    assert "is a LlamaForCausalLM, which is not run as a Qwen2ForCausalLM here" in probe(draft, lost).text


def test_a_base_model_without_a_chat_template(gemma_norms, tmp_path, prompts):
    """It goes on from the prompt."""
    folder = shutil.copytree(gemma_norms, tmp_path / "model")
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    del settings["chat_template"]
    path.write_text(json.dumps(settings))
    assert probe(folder, prompts=prompts).measured


def test_what_cannot_be_loaded_is_said_in_one_line(tmp_path, monkeypatch):
    config = json.loads((TINY / "config.json").read_text())
    quantized = changed(TINY, tmp_path / "quantized", lambda _: {})
    (quantized / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "awq"}}))
    without_tokenizer = cut_vocabulary(tmp_path / "cut", 100)
    lost, _ = parts(tmp_path)
    results = {folder: probe(folder) for folder in (quantized, without_tokenizer, lost)}
    monkeypatch.setattr(module, "SHARE", 1e-9)
    results[TINY] = probe(TINY)
    reasons = ["quantization_config is 'awq'", "holds no tokenizer", "lost its MTP layer", "GB are free here"]
    for probed, reason in zip(results.values(), reasons, strict=True):
        assert probed.text.startswith("probe: nothing was measured: ") and reason in probed.text
        assert "\n" not in probed.text and probed.verdicts == []


def test_bad_prompts_are_refused(tmp_path):
    with pytest.raises(FastMTPError, match="holds no rows"):
        (tmp_path / "empty.jsonl").touch()
        probe(TINY, prompts=tmp_path / "empty.jsonl")


def test_the_command(tmp_path, prompts, capsys):
    """Its findings count as the doctor's own do."""
    main(["doctor", str(TINY), "--probe_prompts", str(prompts)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("probe: 6 greedy answers, ") and lines[-1] == f"{TINY}: 0 errors, 0 warnings"
    broken = changed(TINY, tmp_path / "model", added(-1))
    with pytest.raises(SystemExit) as end:
        main(["doctor", str(broken), "--probe_prompts", str(prompts)])
    output = capsys.readouterr().out
    assert end.value.code == 1 and f"{broken}: 1 errors, 0 warnings" in output
    assert "    why: its norms were written without their +1\n    fix: add 1 to " in output
