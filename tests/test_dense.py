"""Dense models without a layout of their own get MiMo's layer, and compute what they computed, bit for bit."""

import json

import pytest
import torch
from helpers.engine import Server, VLLMServer
from helpers.models import DENSE, save_dense
from helpers.paths import TINY
from helpers.swift_runs import sft_args, swift, write_rows
from helpers.target_forms import without_layer
from transformers import AutoModelForCausalLM

from swift_fastmtp.checkpoint.checkpoint import Checkpoint
from swift_fastmtp.data.distill import distill
from swift_fastmtp.errors import FastMTPError
from swift_fastmtp.export.doctor import examine
from swift_fastmtp.export.folders import export_full
from swift_fastmtp.export.graft import ADDED_FILE, graft
from swift_fastmtp.export.inspection import inspect_model
from swift_fastmtp.model.loading import load_model
from swift_fastmtp.serving.flags import command
from swift_fastmtp.serving.launch import serve_flags
from swift_fastmtp.swift_plugin.tuner import FastMTPTuner

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 256,
}


def forget(folder, *keys):
    """config.json without keys, which then mean what the model's own configuration class takes for them."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({key: value for key, value in config.items() if key not in keys}))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", DENSE)
def test_logits_are_the_same_bits(kind, tied, tmp_path):
    changes = {"tie_word_embeddings": tied}
    if kind == "llama":
        changes["rope_parameters"] = LLAMA3_ROPE
    if kind == "mistral":
        changes["sliding_window"] = None
    model = save_dense(tmp_path / "model", kind, **changes)
    report = graft(model, tmp_path / "out", init_from_last_layer=True)
    ids = torch.randint(0, 6144, (2, 40))
    with torch.no_grad():
        want = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)(ids).logits
        ours = load_model(tmp_path / "out", torch.float32)
        assert torch.equal(ours(ids).logits, want)
    assert report.family == "mimo" and inspect_model(tmp_path / "out").trainable and not examine(tmp_path / "out")
    added = {name for name, file in Checkpoint(tmp_path / "out").file_of.items() if file.name == ADDED_FILE}
    biases = 0 if kind == "qwen2" else 6
    assert len(added) == biases + tied
    # What the model had is linked, not written again.
    assert (model / "model.safetensors").stat().st_nlink == 2


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_a_trained_head_alone_is_a_donor(kind, tmp_path):
    """What `swift sft` writes is a few MB; with the plain model it makes the model that is served."""
    model = save_dense(tmp_path / "model", kind, tie_word_embeddings=True)
    graft(model, tmp_path / "out", init_from_last_layer=True)
    trained = load_model(tmp_path / "out", torch.float32)
    with torch.no_grad():
        for parameter in trained.head_parameters().values():
            parameter.normal_()
    trained.model_dir = str(tmp_path / "out")
    FastMTPTuner.save_pretrained(trained, str(tmp_path / "head"))
    graft(model, tmp_path / "again", donor=tmp_path / "head")
    again = load_model(tmp_path / "again", torch.float32)
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, trained.state_dict()[name]), name


def test_keys_that_config_json_leaves_out_mean_what_they_meant(tmp_path):
    """Llama takes the number of heads for a missing num_key_value_heads, Qwen2 takes 32."""
    model = save_dense(tmp_path / "model", "llama", num_key_value_heads=2)
    forget(model, "num_key_value_heads", "head_dim", "attention_bias", "mlp_bias")
    graft(model, tmp_path / "out", init_from_last_layer=True)
    config = Checkpoint(tmp_path / "out").config
    assert (config["num_key_value_heads"], config["head_dim"]) == (2, 32)


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("llama", {"attention_bias": True}, "attention_bias is True"),
        ("llama", {"mlp_bias": True}, "mlp_bias is True"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act is gelu"),
        ("mistral", {"sliding_window": 64}, "sliding_window is 64"),
    ],
)
def test_what_is_no_qwen2_is_refused(kind, changes, message, tmp_path):
    model = save_dense(tmp_path / "model", kind, **changes)
    with pytest.raises(FastMTPError, match=message) as error:
        graft(model, tmp_path / "out", init_from_last_layer=True)
    assert "config.json" in str(error.value) and not (tmp_path / "out").exists()


def test_inspect_says_that_it_can_be_done(tmp_path):
    (reason,) = inspect_model(save_dense(tmp_path / "model", "llama")).reasons
    assert "fastmtp graft --init_from_last_layer" in reason


@pytest.mark.matrix
def test_a_llama_is_trained_and_served(tmp_path):
    """`swift sft`, export, stock vLLM and SGLang: the text is what transformers' own Llama writes."""
    model = save_dense(tmp_path / "llama", "llama", tie_word_embeddings=True)
    graft(model, tmp_path / "grafted", init_from_last_layer=True)
    rows = write_rows(tmp_path / "rows.jsonl", 8)
    swift(*sft_args(tmp_path / "grafted", rows, tmp_path / "run", max_steps=2, save_steps=2))
    export_full(tmp_path / "run/checkpoint-2", tmp_path / "export")
    prompts = torch.randint(3, 6144, (4, 12))
    llama = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    generated = [llama.generate(prompt[None], max_new_tokens=24, do_sample=False, pad_token_id=0) for prompt in prompts]
    want = [ids[0, 12:].tolist() for ids in generated]
    flags = command(serve_flags(tmp_path / "export", "vllm", 3))
    with VLLMServer(flags, tmp_path / "vllm.log") as server:
        assert [server.complete(flags[2], prompt, 24)[0] for prompt in prompts.tolist()] == want
    with Server(command(serve_flags(tmp_path / "export", "sglang", 3)), tmp_path / "sglang.log") as server:
        assert [record["output_ids"] for record in server.generate(prompts.tolist(), 24)] == want


def answers_of(model, folder, name):
    output = folder / f"{name}.jsonl"
    distill(str(model), str(folder / "prompts.jsonl"), str(output), max_new_tokens=8, temperature=0.0)
    return [json.loads(line)["messages"] for line in output.read_text().splitlines()]


def test_distill_needs_no_layer(tmp_path):
    """What a model answers before it gets one is what it answers with one, and the layer is fitted on it."""
    model = save_dense(tmp_path / "model", "llama")
    rows = [json.dumps({"prompt": f"the number {number}"}) for number in range(8)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(rows))
    before = answers_of(model, tmp_path, "before")
    graft(model, tmp_path / "out", init_from_last_layer=True, fit_on=str(tmp_path / "before.jsonl"))
    assert answers_of(tmp_path / "out", tmp_path, "after") == before
    assert all(turns[1]["token_ids"] for turns in before)


def test_distill_of_a_model_that_lost_its_layer(tmp_path):
    without_layer(tmp_path / "lost")
    rows = [json.dumps({"prompt": f"the number {number}"}) for number in range(3)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(rows))
    assert answers_of(tmp_path / "lost", tmp_path, "lost") == answers_of(TINY, tmp_path, "whole")


def test_distill_of_a_model_that_cannot_answer_here(tmp_path):
    """One line each, and no answers."""
    model = save_dense(tmp_path / "model", "llama")
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt": "one"}))
    path = model / "config.json"
    config = json.loads(path.read_text())
    quantized = {"quantization_config": {"quant_method": "awq", "bits": 4}}
    for changes, line in (
        ({"num_hidden_layers": 3}, r"tensor model.layers.2.\S+ is missing"),
        (quantized, r"is quantized \(awq\); ask a server of it: --base_url"),
        ({"model_type": "no such type"}, "transformers cannot build it"),
    ):
        path.write_text(json.dumps({**config, **changes}))
        with pytest.raises(FastMTPError, match=line):
            answers_of(model, tmp_path, "none")
    assert not (tmp_path / "none.jsonl").exists()
