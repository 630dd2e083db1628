"""A backbone that is served with a LoRA adapter: training, simulation and distillation see base plus adapter, none of
it is written, and a server with the adapter drafts as simulated."""

import json
import shutil

import pytest
import torch
from helpers.adapters import TARGETS, save_adapter
from helpers.engine import Server
from helpers.models import CHECKPOINTS
from helpers.paths import ROOT, TINY
from helpers.swift_runs import logged, sft_args, swift
from helpers.vllm_jobs import VLLMJobs
from peft import PeftModel
from safetensors.torch import load_file, save_file

from swift_fastmtp.checkpoint.checkpoint import Checkpoint
from swift_fastmtp.checkpoint.mtp_tensors import read_head
from swift_fastmtp.data.chat_template import load_tokenizer
from swift_fastmtp.data.distill import distill
from swift_fastmtp.errors import FastMTPError
from swift_fastmtp.export.doctor import examine
from swift_fastmtp.export.folders import export_draft, export_full, save_trained
from swift_fastmtp.files.copies import file_hash
from swift_fastmtp.files.rows import read_rows
from swift_fastmtp.method.config import FastMTPConfig
from swift_fastmtp.model.backbone_lora import check_lora, lora_hash
from swift_fastmtp.model.hidden_cache import states_depend_on
from swift_fastmtp.model.loading import head_shapes, load_head, load_model
from swift_fastmtp.serving.flags import command
from swift_fastmtp.serving.launch import serve_flags
from swift_fastmtp.simulate.acceptance import draft_rounds, make_texts
from swift_fastmtp.simulate.simulate import simulate

STEPS = 3
EVAL = ROOT / "examples" / "prompts" / "eval.jsonl"


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    return [save_adapter(TINY, folder / name, seed) for seed, name in enumerate(("first", "second"))]


def test_the_backbone_is_pefts_and_the_layer_is_the_bases(adapters):
    ids = torch.randint(0, 1000, (2, 12))
    plain, merged = load_model(TINY, torch.float32), load_model(TINY, torch.float32, backbone_lora=adapters[0])
    before = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
    with torch.no_grad():
        ours = merged(input_ids=ids).logits
        theirs = PeftModel.from_pretrained(plain, adapters[0])(input_ids=ids).logits
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    after = merged.state_dict()
    assert after.keys() == before.keys() and not any("lora" in name for name in after)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    layers = sum(1 for name in before if name.startswith("model.layers.") and name.split(".")[-2] in TARGETS)
    weights = {name for name in changed if name.endswith(".weight")}
    assert changed == weights and len(weights) <= layers
    assert len(weights) == len(TARGETS) * merged.config.num_hidden_layers
    assert not any(merged.family.owns(name) for name in changed)
    assert not any(parameter.requires_grad for parameter in merged.parameters())


def test_caches_know_the_adapter(adapters):
    keys = []
    for folder in (None, *adapters):
        model = load_model(TINY, torch.float32, backbone_lora=folder)
        keys.append(json.dumps(states_depend_on(model, "abc", None, None)))
    assert len(set(keys)) == 3
    config = json.loads((adapters[0] / "adapter_config.json").read_text())
    before = lora_hash(adapters[0])
    (adapters[0] / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 8}))
    assert lora_hash(adapters[0]) != before
    (adapters[0] / "adapter_config.json").write_text(json.dumps(config))


def change(folder, to, **config):
    """A copy of an adapter with another configuration."""
    shutil.copytree(folder, to)
    path = to / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    return to


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"use_dora": True}, "engines serve no DoRA"),
        ({"bias": "all"}, "no biases of adapters"),
        ({"modules_to_save": ["lm_head"]}, "no whole modules"),
        ({"peft_type": "LOHA"}, "only LoRA can be merged"),
    ],
)
def test_what_engines_do_not_serve_is_refused(config, message, adapters, tmp_path):
    with pytest.raises(FastMTPError, match=message) as error:
        check_lora(change(adapters[0], tmp_path / "other", **config))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("base_model.model.lm_head.lora_A.weight", "changes what target and draft share"),
        ("base_model.model.model.embed_tokens.lora_embedding_A", "changes what target and draft share"),
        ("base_model.model.model.mtp_layers.0.self_attn.q_proj.lora_A.weight", "lies in the MTP layer"),
        ("base_model.model.model.layers.77.self_attn.q_proj.lora_A.weight", "has no place for model.layers.77"),
    ],
)
def test_tensors_with_no_place_are_refused(name, message, adapters, tmp_path):
    shutil.copytree(adapters[0], tmp_path / "other")
    file = tmp_path / "other" / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({**tensors, name: next(iter(tensors.values())).clone()}, file, metadata={"format": "pt"})
    with pytest.raises(FastMTPError, match=message) as error:
        load_model(TINY, torch.float32, backbone_lora=tmp_path / "other")
    assert "\n" not in str(error.value)


def test_an_adapter_of_another_model_and_none_at_all_are_one_line(adapters, tmp_path):
    other = CHECKPOINTS["glm4_moe"](tmp_path / "model")
    for folder, message in ((adapters[0], "lies in the MTP layer"), (other, r"holds no adapter_config\.json")):
        with pytest.raises(FastMTPError, match=message) as error:
            load_model(other, torch.float32, backbone_lora=folder)
        assert "\n" not in str(error.value)


def trained_beside(adapter, folder):
    """A checkpoint of a head that was trained beside an adapter, by its settings; its values are moved a little."""
    model = load_model(TINY, torch.float32, backbone_lora=adapter)
    model.model_dir = str(TINY)
    model.fastmtp = FastMTPConfig(backbone_lora=str(adapter))
    with torch.no_grad():
        for parameter in model.head_parameters().values():
            parameter.mul_(1.01)
    save_trained(model, folder)
    return folder


def test_the_export_is_a_layer_beside_base_and_adapter(adapters, tmp_path):
    checkpoint = trained_beside(adapters[0], tmp_path / "checkpoint")
    with pytest.raises(FastMTPError, match=r"with the adapter .*first.*--draft_only"):
        export_full(checkpoint, tmp_path / "full")
    assert not (tmp_path / "full").exists()
    export_draft(checkpoint, tmp_path / "draft")
    assert examine(tmp_path / "draft") == []
    named = f"first={adapters[0]}"
    words = command(serve_flags(tmp_path / "draft"))
    assert words[words.index("--lora-paths") - 1 :][:3] == ["--enable-lora", "--lora-paths", named]
    assert words[words.index("--model-path") + 1] == str(TINY)
    words = command(serve_flags(tmp_path / "draft", "vllm"))
    assert words[words.index("--lora-modules") + 1] == named and "--max-lora-rank" not in words
    assert words[-2] == "--speculative-config"
    high = change(adapters[0], tmp_path / "high", r=48)
    settings = tmp_path / "draft" / "fastmtp.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "backbone_lora": str(high)}))
    words = command(serve_flags(tmp_path / "draft", "vllm"))
    assert words[words.index("--max-lora-rank") + 1] == "64"


def test_simulate_and_distill_are_of_base_and_adapter(adapters, tmp_path, capsys):
    options = {"num_steps": 1, "max_rows": 3, "max_new_tokens": 8}
    answers = str(tmp_path / "answers.jsonl")
    simulate(str(TINY), [], str(EVAL), answers=answers, backbone_lora=str(adapters[0]), **options)
    with pytest.raises(FastMTPError, match="generated with backbone_lora"):
        simulate(str(TINY), [], str(EVAL), answers=answers, **options)
    kept = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()[1:]]
    model = load_model(TINY, torch.float32, backbone_lora=adapters[0])
    for answer in kept:
        ids = torch.tensor([answer["prompt"] + answer["answer"]])
        greedy = model(input_ids=ids).logits[0].argmax(-1).tolist()
        assert greedy[len(answer["prompt"]) - 1 : -1] == answer["answer"]
    # The same job is not continued with another adapter, and servers have their own.
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(EVAL.read_text(encoding="utf-8").splitlines(keepends=True)[:2]), encoding="utf-8")
    texts = []
    for number, adapter in enumerate((None, *map(str, adapters))):
        output = tmp_path / f"{number}.jsonl"
        distill(str(TINY), str(prompts), str(output), max_new_tokens=8, temperature=0, backbone_lora=adapter)
        texts.append([row["messages"][-1]["content"] for row in read_rows(output)])
    assert texts[0] != texts[1] != texts[2]
    with pytest.raises(FastMTPError, match="--served_model_name"):
        distill(str(TINY), str(prompts), str(tmp_path / "x.jsonl"), base_urls=["http://x"], backbone_lora=answers)


# With the real `swift`, and real engines.


@pytest.mark.matrix
def test_training_beside_an_adapter(adapters, rows, tmp_path):
    """The run is that of the merged model, and the base is left alone; LoRA of the head too."""
    before = {path.name: file_hash(path) for path in TINY.iterdir() if path.is_file()}
    knob = ["--model_kwargs", json.dumps({"fastmtp_backbone_lora": str(adapters[0])})]
    merged = shutil.copytree(TINY, tmp_path / "merged")
    model = load_model(TINY, torch.float32, backbone_lora=adapters[0])
    save_file(model.state_dict(), merged / "model.safetensors", metadata={"format": "pt"})
    swift(*sft_args(TINY, rows, tmp_path / "run", max_steps=2), *knob)
    swift(*sft_args(merged, rows, tmp_path / "same", max_steps=2))
    swift(*sft_args(TINY, rows, tmp_path / "lora", max_steps=2, tuner_type="lora"), *knob)
    for ours, theirs in zip(logged(tmp_path / "run"), logged(tmp_path / "same"), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
    assert logged(tmp_path / "lora")[0] == pytest.approx(logged(tmp_path / "run")[0], rel=1e-4)
    trained, of_merged = (load_file(tmp_path / run / "checkpoint-2/model.safetensors") for run in ("run", "same"))
    start = load_file(TINY / "model.safetensors")
    moved = max((trained[name] - start[name]).abs().max() for name in trained)
    away = max((trained[name] - of_merged[name]).abs().max() for name in trained)
    assert trained.keys() == of_merged.keys() and away < 0.1 * moved
    assert {path.name: file_hash(path) for path in TINY.iterdir() if path.is_file()} == before
    for run in ("run", "lora"):
        checkpoint = tmp_path / run / "checkpoint-2"
        with pytest.raises(FastMTPError, match="--draft_only"):
            export_full(checkpoint, tmp_path / "full")
        export_draft(checkpoint, tmp_path / f"draft-{run}")
        assert "--lora-paths" in command(serve_flags(tmp_path / f"draft-{run}"))
    refused = swift(*sft_args(TINY, rows, tmp_path / "full", tuner_type="full"), *knob, check=False)
    assert refused.returncode == 1 and "does not work with --tuner_type full" in refused.stderr.splitlines()[-1]


def simulated(adapter, head, prompts, tokens, engine):
    """Text and accepted drafts of each round for prompts, of the base with an adapter and the head of a folder."""
    model = load_model(TINY, torch.float32, backbone_lora=adapter)
    model.fastmtp = FastMTPConfig(num_speculative_steps=STEPS, engine=engine)
    load_head(model, read_head(Checkpoint(head), model.family, head_shapes(Checkpoint(TINY))))
    rows = read_rows(EVAL, prompts)
    texts = make_texts(model, load_tokenizer(str(TINY)), rows, tokens, "generate", 4)
    return texts, draft_rounds(model, texts, 0, 8)[STEPS - 1]


@pytest.mark.matrix
def test_one_sglang_server_drafts_for_base_and_adapters_with_one_layer(adapters, tmp_path):
    """The printed command with a second adapter: requests of the base and of both in one batch, each with its own text
    and the rounds of the one layer beside that text's model."""
    export_draft(trained_beside(adapters[0], tmp_path / "checkpoint"), tmp_path / "draft")
    words = command(serve_flags(tmp_path / "draft"))
    words.insert(words.index("--lora-paths") + 2, f"second={adapters[1]}")
    cases = {None: None, "first": adapters[0], "second": adapters[1]}
    expected = {name: simulated(adapter, tmp_path / "draft", 4, 24, "sglang") for name, adapter in cases.items()}
    with Server([*words, "--lora-backend", "torch_native"], tmp_path / "log") as server:
        prompts, names = [], []
        for name, (texts, _) in expected.items():
            prompts += [text.ids[: text.start] for text in texts]
            names += [name] * len(texts)
        answers = iter(server.generate(prompts, 24, lora_path=names))
    seen = []
    for texts, rounds in expected.values():
        for text, accepted in zip(texts, rounds, strict=True):
            answer = next(answers)
            assert answer["output_ids"] == text.ids[text.start : text.end]
            assert answer["meta_info"]["spec_verify_ct"] == len(accepted)
            assert answer["meta_info"]["spec_num_correct_drafts"] == sum(accepted)
        seen.append([text.ids for text in texts])
    assert seen[0] != seen[1] != seen[2]


@pytest.mark.matrix
def test_one_vllm_engine_drafts_for_base_and_adapters_with_one_layer(adapters, tmp_path):
    cases = {None: None, "first": adapters[0], "second": adapters[1]}
    expected = {name: simulated(adapter, TINY, 4, 24, "vllm") for name, adapter in cases.items()}
    questions = [[text.ids[: text.start] for text in texts] for texts, _ in expected.values()]
    loras = [None, *map(str, adapters)]
    with VLLMJobs(tmp_path / "log") as vllm:
        answered = vllm.run(
            TINY, questions, 24, STEPS, loras=loras, trust_remote_code=True, enable_lora=True, max_loras=2
        )
    for (texts, rounds), answers in zip(expected.values(), answered, strict=True):
        assert [answer.ids for answer in answers] == [text.ids[text.start : text.end] for text in texts]
        assert [answer.accepted for answer in answers] == rounds
