"""A layer beside a model that cannot take it: nothing of the model changes, and both engines draft with it."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from helpers.checkpoints import shard
from helpers.engine import HalfServer, Server
from helpers.learning import learned_beside
from helpers.models import gptq, save_dense
from helpers.paths import ROOT, TINY
from helpers.served_texts import STEPS, asked, simulated_rounds
from helpers.target_forms import QUANTIZED, fp8_blocks, without_layer
from helpers.vllm_jobs import VLLMJobs

from swift_fastmtp.checkpoint.checkpoint import Checkpoint
from swift_fastmtp.checkpoint.mtp_tensors import read_plain
from swift_fastmtp.errors import FastMTPError
from swift_fastmtp.export.doctor import examine
from swift_fastmtp.export.graft import graft
from swift_fastmtp.serving.flags import command
from swift_fastmtp.serving.launch import serve_flags

UNQUANTIZED = ["--speculative-draft-model-quantization", "unquant"]


def test_a_layer_from_the_last_one_of_an_fp8_model(tmp_path):
    target = tmp_path / "target"
    fp8_blocks(target)
    graft(target, tmp_path / "draft", init_from_last_layer=True, draft_only=True)
    draft, model = Checkpoint(tmp_path / "draft"), Checkpoint(target)
    last = read_plain(model, "model.layers.3.mlp.up_proj.weight").to(torch.bfloat16)
    assert torch.equal(draft.read("model.mtp_layers.0.mlp.up_proj.weight"), last)


def test_a_trained_donor_stays_trained(tmp_path):
    """How the layer was trained comes along; for which backbone does not, and a map is a path somewhere else."""
    donor = tmp_path / "donor"
    shutil.copytree(TINY, donor)
    trained = {"num_speculative_steps": 5, "engine": "vllm", "base_fingerprint": "v2:0", "token_map": "map.pt"}
    (donor / "fastmtp.json").write_text(json.dumps(trained))
    without_layer(tmp_path / "target")
    graft(tmp_path / "target", tmp_path / "draft", donor, draft_only=True)
    draft = Checkpoint(tmp_path / "draft")
    assert draft.trained_for == "vllm" and draft.settings["base_model"] == str(tmp_path / "target")
    assert {"base_fingerprint", "token_map"}.isdisjoint(draft.settings)
    assert command(serve_flags(tmp_path / "draft"))[-1] == "6"  # five drafts and the bonus token


def test_of_the_donor_only_the_layer_is_needed(tmp_path):
    """Not the files of a large model that hold nothing of it."""
    donor = shard(TINY, tmp_path / "donor")
    index = json.loads((donor / "model.safetensors.index.json").read_text())["weight_map"]
    needed = {file for name, file in index.items() if "mtp" in name}
    for path in donor.glob("*.safetensors"):
        if path.name not in needed:
            path.unlink()
    assert len(list(donor.glob("*.safetensors"))) < len(set(index.values()))
    gptq(TINY, tmp_path / "target")
    assert graft(tmp_path / "target", tmp_path / "draft", donor, draft_only=True).tensors == 16


def test_what_a_layer_was_trained_for_meets_its_target(tmp_path):
    """The state before the final norm comes from MiMo's own class in vLLM; other targets give the one after it."""
    donor = tmp_path / "donor"
    shutil.copytree(TINY, donor)
    found = {}
    for trained_for in ("sglang", "vllm"):
        (donor / "fastmtp.json").write_text(json.dumps({"num_speculative_steps": 3, "engine": trained_for}))
        for name, architecture in (("mimo", "MiMoForCausalLM"), ("qwen2", "Qwen2ForCausalLM")):
            target = tmp_path / f"{trained_for}-{name}"
            without_layer(target)
            config = json.loads((target / "config.json").read_text())
            (target / "config.json").write_text(json.dumps({**config, "architectures": [architecture]}))
            draft = tmp_path / f"draft-{trained_for}-{name}"
            graft(target, draft, donor, draft_only=True)
            found[trained_for, name] = any("another graph" in f.what for f in examine(draft, engine="vllm"))
            assert found[trained_for, name] == any("trained for" in f.why for f in serve_flags(draft, "vllm")[1:])
    assert found == {
        ("sglang", "mimo"): True,
        ("sglang", "qwen2"): False,
        ("vllm", "mimo"): False,
        ("vllm", "qwen2"): True,
    }


def test_a_dense_target_lacks_a_key(tmp_path):
    """vLLM builds the layer by the target's config.json, and a Llama's does not count MTP layers."""
    target = save_dense(tmp_path / "target", "llama", tie_word_embeddings=True)
    graft(target, tmp_path / "draft", init_from_last_layer=True, draft_only=True)
    assert examine(tmp_path / "draft") == []
    assert UNQUANTIZED[0] not in command(serve_flags(tmp_path / "draft"))
    words = command(serve_flags(tmp_path / "draft", "vllm"))
    assert json.loads(words[words.index("--hf-overrides") + 1]) == {"num_nextn_predict_layers": 1}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"init_from_last_layer": True},
            r"is quantized \(gptq\), so no layer can be made from its last one; pass --donor",
        ),
        ({"init_from_last_layer": True, "fit_on": "rows.jsonl"}, "--fit_on needs the whole model"),
        ({"donor": "other"}, "hidden_size is 192, in .* it is 96; the head does not fit"),
    ],
)
def test_misfits_are_one_line_and_leave_nothing(options, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    gptq(TINY, tmp_path / "target")
    shutil.copytree(TINY, tmp_path / "other")
    config = json.loads((TINY / "config.json").read_text())
    (tmp_path / "other" / "config.json").write_text(json.dumps({**config, "hidden_size": 96}))
    with pytest.raises(FastMTPError, match=message) as error:
        graft("target", "draft", draft_only=True, **options)
    assert "\n" not in str(error.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "target"]


def test_the_command(tmp_path):
    gptq(TINY, tmp_path / "target")
    words = [sys.executable, "-m", "swift_fastmtp.cli", "graft", "--model", tmp_path / "target", "--donor", TINY]
    done = subprocess.run(
        [*words, "--draft_only", "--output_dir", tmp_path / "draft"],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert done.returncode == 0 and f"serve it: fastmtp serve-args {tmp_path / 'draft'}" in done.stdout, done.stderr


# With real engines.

PROMPTS = ["Write a haiku.", "什么是函数？", "def main():", "Why is the sky blue?"]
TOKENS = 24


KINDS = {"llama": "Llama, tied", "qwen2": "Qwen2, tied", "mistral": "Mistral, tied"}


@pytest.mark.matrix
@pytest.mark.parametrize("kind", KINDS)
def test_sglang_drafts_for_a_tied_model(kind, tmp_path, ran):
    _, draft, texts, rounds = learned_beside(kind, tmp_path, PROMPTS, TOKENS, STEPS)
    with Server(command(serve_flags(draft)), tmp_path / "log") as server:
        answers = server.generate([text.ids[: text.start] for text in texts], TOKENS)
    for answer, text, accepted in zip(answers, texts, rounds, strict=True):
        assert answer["output_ids"] == text.ids[text.start : text.end]
        assert answer["meta_info"]["spec_verify_ct"] == len(accepted)
        assert answer["meta_info"]["spec_num_correct_drafts"] == sum(accepted)
    assert sum(map(sum, rounds)) > 0
    ran("SGLang", KINDS[kind])


@pytest.mark.matrix
@pytest.mark.parametrize("kind", KINDS)
def test_vllm_drafts_for_a_tied_model(kind, tmp_path, ran):
    """A layer of MiMo's that was trained for SGLang: beside a model of another class vLLM computes SGLang's graph."""
    target, draft, texts, rounds = learned_beside(kind, tmp_path, PROMPTS, TOKENS, STEPS)
    assert examine(draft, engine="vllm") == []
    words = command(serve_flags(draft, "vllm"))
    overrides = json.loads(words[words.index("--hf-overrides") + 1])
    with VLLMJobs(tmp_path / "log") as vllm:
        (answers,) = vllm.run(
            target, [[text.ids[: text.start] for text in texts]], TOKENS, STEPS, draft=draft, hf_overrides=overrides
        )
    assert [answer.ids for answer in answers] == [text.ids[text.start : text.end] for text in texts]
    assert [answer.accepted for answer in answers] == rounds
    assert sum(map(sum, rounds)) > 0
    ran("vLLM", KINDS[kind])


@pytest.mark.matrix
@pytest.mark.parametrize("form", ["FP8 blocks", "AWQ", "GPTQ", "AutoRound"])
def test_sglang_drafts_for_a_quantized_model(form, tmp_path, ran):
    """It computes in half precision, so rounds are compared by their sum."""
    target = tmp_path / "target"
    numbers = QUANTIZED[form](target)
    graft(target, tmp_path / "draft", TINY, draft_only=True)
    prompts = asked()
    with HalfServer(command(serve_flags(tmp_path / "draft")), tmp_path / "log") as server:
        served = server.generate(prompts, 48)
    answers = [answer["output_ids"] for answer in served]
    rounds = sum(answer["meta_info"]["spec_verify_ct"] for answer in served)
    assert rounds == pytest.approx(simulated_rounds(numbers, prompts, answers, "sglang"), rel=0.1)
    assert rounds < 0.6 * sum(map(len, answers))
    ran("SGLang", form)


@pytest.mark.matrix
def test_vllm_drafts_for_a_gptq_model(tmp_path, ran):
    """Its kernel computes in half precision, so texts are compared with its own, and rounds by their sum."""
    numbers = gptq(TINY, tmp_path / "target")
    graft(tmp_path / "target", tmp_path / "draft", TINY, draft_only=True)
    prompts = asked()
    words = command(serve_flags(tmp_path / "draft", "vllm"))
    overrides = json.loads(words[words.index("--hf-overrides") + 1])
    options = {"dtype": "bfloat16", "trust_remote_code": True, "hf_overrides": overrides}
    with VLLMJobs(tmp_path / "log") as vllm:
        (plain,) = vllm.run(tmp_path / "target", [prompts], 48, **options)
        (drafted,) = vllm.run(tmp_path / "target", [prompts], 48, STEPS, draft=tmp_path / "draft", **options)
    same = [a.ids == b.ids for a, b in zip(plain, drafted, strict=True)]
    assert sum(same) >= len(same) * 3 // 4
    answers = [answer.ids for answer in drafted]
    rounds = sum(len(answer.accepted) for answer in drafted)
    assert rounds == pytest.approx(simulated_rounds(numbers, prompts, answers, "vllm"), rel=0.1)
    assert rounds < 0.6 * sum(map(len, answers))
    ran("vLLM", "GPTQ")
