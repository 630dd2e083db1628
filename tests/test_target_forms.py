"""Targets in every form that people publish: a layer is grafted beside them, trained for them, and served with them."""

import json

import pytest
import torch
from helpers import target_matrix
from helpers.models import save_tied
from helpers.paths import ROOT, TINY
from helpers.served_texts import STEPS, asked, simulated_rounds
from helpers.target_forms import QUANTIZED, modelopt, without_layer
from helpers.target_matrix import DENSE
from helpers.vllm_jobs import VLLMJobs

from swift_fastmtp.checkpoint.checkpoint import Checkpoint
from swift_fastmtp.errors import FastMTPError
from swift_fastmtp.export.beside import export_trained
from swift_fastmtp.export.doctor import examine
from swift_fastmtp.export.folders import save_trained
from swift_fastmtp.export.graft import graft
from swift_fastmtp.export.inspection import inspect_model
from swift_fastmtp.files.copies import file_hash
from swift_fastmtp.method.config import FastMTPConfig
from swift_fastmtp.model.hidden_cache import EngineStates, HiddenCache
from swift_fastmtp.model.loading import load_model
from swift_fastmtp.model.without_backbone import load_without_backbone
from swift_fastmtp.serving.flags import command
from swift_fastmtp.serving.launch import serve_flags
from swift_fastmtp.simulate.probe import PROMPTS, probe


def gradients(model, ids):
    model.freeze_backbone()
    model.train()
    model.fastmtp = FastMTPConfig(num_speculative_steps=2)
    model(input_ids=ids, labels=ids).loss.backward()
    return {name: parameter.grad for name, parameter in model.head_parameters().items()}


def states_from(model, target, folder, ids):
    """A cache of an engine's states, which the model has computed."""
    positions = torch.arange(ids.shape[1])[None]
    states = model.backbone_states(ids, None, positions, torch.zeros_like(ids))[0]
    origin = EngineStates("SGLang", "0.5.23", "float32", None, states.shape[1])
    cache = HiddenCache.from_engine(folder, Checkpoint(target).fingerprint, origin, 2**30)
    cache.put([ids[0]], [states])
    return cache


def trained_alike(whole, target, draft, folder):
    """The layer in `draft` beside `target` gets the gradients of the whole model. Returns what was trained."""
    torch.manual_seed(0)
    ids = torch.randint(0, 6000, (1, 20))
    part = load_without_backbone(Checkpoint(draft), Checkpoint(target), torch.float32)
    part.hidden_cache = states_from(whole, target, folder, ids)
    of_part, of_whole = gradients(part, ids), gradients(whole, ids)
    assert of_part.keys() == of_whole.keys() and len(of_part) > 10
    assert all(torch.equal(of_part[name], of_whole[name]) for name in of_whole)
    return part


@pytest.mark.parametrize("form", QUANTIZED)
def test_a_quantized_target(form, tmp_path, ran):
    """From graft to export, and what the probe says; nothing of the target changes."""
    target, draft = tmp_path / "target", tmp_path / "draft"
    numbers = QUANTIZED[form](target)
    before = {path.name: file_hash(path) for path in target.iterdir()}
    assert any("--draft_only" in reason for reason in inspect_model(target).reasons)
    with pytest.raises(FastMTPError, match=r"is quantized .*--draft_only"):
        graft(target, tmp_path / "full", TINY)
    assert graft(target, draft, TINY, draft_only=True).tensors == 16
    layer, donor = Checkpoint(draft), Checkpoint(TINY)
    names = [name for name in donor.names if donor.family.owns(name)]
    assert sorted(layer.names) == sorted(names) and "quantization_config" not in layer.config
    assert all(torch.equal(layer.read(name), donor.read(name)) for name in names)
    assert examine(draft) == [] and layer.trained_for is None
    ran("graft", form)

    whole = load_model(TINY, torch.float32)
    whole.load_state_dict({name: tensor.float() for name, tensor in numbers.items()}, strict=False)
    part = trained_alike(whole, target, draft, tmp_path / "cache")
    ran("train", form)

    # What was trained is exported as a folder that both engines take.
    part.model_dir = str(draft)
    for parameter in part.head_parameters().values():
        parameter.data += 0.01
    save_trained(part.requires_grad_(False), tmp_path / "checkpoint")
    for name, named in (("recorded", None), ("target", target), ("draft", draft)):
        out = tmp_path / f"exported-{name}"
        assert export_trained(tmp_path / "checkpoint", out, named) == target
        exported = Checkpoint(out)
        assert not exported.has_backbone() and set(exported.dtypes().values()) == {"bfloat16"}
        assert exported.settings["base_fingerprint"] == Checkpoint(target).fingerprint
        assert examine(out) == []
        assert "unquant" in command(serve_flags(out))
        speculative = json.loads(command(serve_flags(out, "vllm"))[-1])
        assert speculative["model"] == str(out)
    assert {path.name: file_hash(path) for path in target.iterdir()} == before


def test_the_probe_reads_fp8_blocks(tmp_path, ran):
    """Of the quantized forms it runs this one; the layer accepts what it does beside the numbers."""
    QUANTIZED["FP8 blocks"](tmp_path / "target")
    graft(tmp_path / "target", tmp_path / "draft", TINY, draft_only=True)
    probed = probe(tmp_path / "draft", prompts=few_prompts(tmp_path))
    assert probed.measured[0].counts.marginal[0] > 0.5 and probed.verdicts == []
    ran("probe", "FP8 blocks")


def few_prompts(folder):
    file = folder / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in PROMPTS[:4]))
    return file


def test_the_probe_does_not_read_others(tmp_path):
    for form in (*QUANTIZED.keys() - {"FP8 blocks"},):
        folder = tmp_path / form.replace(" ", "-")
        folder.mkdir()
        QUANTIZED[form](folder / "target")
        graft(folder / "target", folder / "draft", TINY, draft_only=True)
        said = probe(folder / "draft")
        assert said.text.startswith("probe: nothing was measured: ") and "\n" not in said.text


def test_a_plain_target(tmp_path, ran):
    without_layer(tmp_path / "target")
    graft(tmp_path / "target", tmp_path / "draft", TINY, draft_only=True)
    assert examine(tmp_path / "draft") == []
    ran("graft", "MiMo, plain")
    trained_alike(load_model(TINY, torch.float32), tmp_path / "target", tmp_path / "draft", tmp_path / "cache")
    ran("train", "MiMo, plain")
    assert probe(tmp_path / "draft", prompts=few_prompts(tmp_path)).measured
    ran("probe", "MiMo, plain")


@pytest.mark.parametrize("form", DENSE)
def test_a_tied_dense_target(form, tmp_path, ran):
    target, draft = save_tied(tmp_path / "target", DENSE[form]), tmp_path / "draft"
    before = {path.name: file_hash(path) for path in target.iterdir()}
    graft(target, draft, init_from_last_layer=True, draft_only=True)
    assert examine(draft) == []
    assert {path.name: file_hash(path) for path in target.iterdir()} == before
    ran("graft", form)
    graft(target, tmp_path / "whole", init_from_last_layer=True)
    trained_alike(load_model(tmp_path / "whole", torch.float32), target, draft, tmp_path / "cache")
    ran("train", form)


def test_the_table_is_what_tests_recorded():
    page = (ROOT / "docs" / "graft.md").read_text(encoding="utf-8")
    assert target_matrix.table() in page


def test_every_cell_ran_or_says_why_not():
    shown = target_matrix.read()["shown"]
    for form in target_matrix.FORMS:
        for stage in target_matrix.STAGES:
            has_reason = form in target_matrix.NOT_RUN.get(stage, {})
            assert (stage in shown[form]) != has_reason, (form, stage)


@pytest.mark.parametrize("form", QUANTIZED)
def test_vllm_is_told_to_leave_the_layer_out(form, tmp_path):
    """What the target's own quantization says stays, and the layer's modules by vLLM's names are added."""
    QUANTIZED[form](tmp_path / "target")
    graft(tmp_path / "target", tmp_path / "draft", TINY, draft_only=True)
    words = command(serve_flags(tmp_path / "draft", "vllm"))
    settings = json.loads(words[words.index("--hf-overrides") + 1])["quantization_config"]
    own = json.loads((tmp_path / "target" / "config.json").read_text())["quantization_config"]
    changed = {key for key in settings if settings[key] != own.get(key)}
    assert len(changed) == 1 and own.keys() <= settings.keys()
    (key,) = changed
    text = json.dumps(settings[key])
    assert "model.layers.4" in text.replace("[.]", ".")
    assert all(entry in settings[key] for entry in own.get(key) or ())


def test_vllm_is_told_so_where_config_json_says_nothing(tmp_path):
    """Older exports of ModelOpt, as nvidia/DeepSeek-V3.1-NVFP4: vLLM takes the object of hf_quant_config.json, which
    must name the method (0.32.0 `modelopt.py`, `_extract_modelopt_quant_algo`)."""
    target = tmp_path / "target"
    modelopt(target, in_config=False)
    assert inspect_model(target).quantization == "modelopt"
    graft(target, tmp_path / "draft", TINY, draft_only=True)
    words = command(serve_flags(tmp_path / "draft", "vllm"))
    settings = json.loads(words[words.index("--hf-overrides") + 1])["quantization_config"]
    declared = json.loads((target / "hf_quant_config.json").read_text())["quantization"]
    assert settings["quant_method"] == "modelopt" and settings["quantization"]["group_size"] == 16
    excluded = settings["quantization"]["exclude_modules"]
    assert excluded[: len(declared["exclude_modules"])] == declared["exclude_modules"]
    assert "model.layers.4.*" in excluded
    words = command(serve_flags(tmp_path / "draft"))
    assert words[words.index("--speculative-draft-model-quantization") + 1] == "unquant"


# With a real engine.

SERVED = ("AWQ", "compressed-tensors int4", "compressed-tensors FP8", "AutoRound")


@pytest.mark.matrix
def test_vllm_drafts_beside(tmp_path, ran):
    """Its kernels compute in half precision, so rounds are compared by their sum.

    Without what `serve-args` prints, vLLM builds the layer quantized: it stops, or (compressed-tensors FP8) accepts
    nothing.
    """
    prompts = asked()
    with VLLMJobs(tmp_path / "log") as vllm:
        for form in SERVED:
            folder = tmp_path / form.replace(" ", "-")
            folder.mkdir()
            target, draft = folder / "target", folder / "draft"
            numbers = QUANTIZED[form](target)
            graft(target, draft, TINY, draft_only=True)
            words = command(serve_flags(draft, "vllm"))
            overrides = json.loads(words[words.index("--hf-overrides") + 1])
            options = {"dtype": "bfloat16", "trust_remote_code": True, "hf_overrides": overrides}
            (drafted,) = vllm.run(target, [prompts], 48, STEPS, draft=draft, **options)
            answers = [answer.ids for answer in drafted]
            rounds = sum(len(answer.accepted) for answer in drafted)
            assert rounds == pytest.approx(simulated_rounds(numbers, prompts, answers, "vllm"), rel=0.1), form
            assert rounds < 0.6 * sum(map(len, answers)), form
            ran("vLLM", form)
