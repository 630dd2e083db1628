"""A run is compared with the head that it began with (`method/comparison.py`)."""

import json
import random

import pytest
import torch
from helpers.hidden import cache_of, states_of
from helpers.models import quantized
from helpers.paths import ROOT, TINY
from helpers.swift_runs import logged, sft_args, swift, write_rows

from swift_fastmtp.checkpoint.checkpoint import Checkpoint
from swift_fastmtp.data.chat_template import load_tokenizer
from swift_fastmtp.data.distill import distill
from swift_fastmtp.data.examples import training_examples
from swift_fastmtp.errors import FastMTPError
from swift_fastmtp.export.beside import export_trained
from swift_fastmtp.export.doctor import examine
from swift_fastmtp.export.folders import export_full
from swift_fastmtp.export.graft import graft
from swift_fastmtp.files.rows import read_rows
from swift_fastmtp.files.staging import write_json
from swift_fastmtp.method.comparison import compare, context_changes, shown_changes, shown_contexts, why_withheld
from swift_fastmtp.method.metrics import part_of_context, tau_of_rows
from swift_fastmtp.model.loading import load_model
from swift_fastmtp.report.model_card import make_card
from swift_fastmtp.simulate.acceptance import Text, greedy_acceptance


def rows(count, rate, seed):
    """`row_counts` of rows of 20 tokens, K = 1."""
    rng = random.Random(seed)
    return [[[sum(rng.random() < rate for _ in range(20))], [20]] for _ in range(count)]


def test_worse_is_an_interval_below_zero():
    change = compare(rows(60, 0.7, 1), rows(60, 0.5, 2))
    assert change.worse and not change.better and change.high < 0
    assert compare(rows(60, 0.5, 2), rows(60, 0.7, 1)).better


def test_noise_of_few_rows_is_no_verdict():
    change = compare(rows(3, 0.6, 1), rows(3, 0.5, 2))
    assert not change.worse and not change.better
    assert not compare([[[20], [20]]], [[[0], [20]]]).worse


def test_other_rows_are_not_compared():
    assert compare(rows(4, 0.5, 1), rows(5, 0.5, 1)) is None
    assert compare([], rows(5, 0.5, 1)) is None


def test_a_marked_checkpoint_is_not_exported(tmp_path):
    change = compare(rows(60, 0.7, 1), rows(60, 0.5, 2))
    compared = {"step": 4, "loss": "ce", "validation": change.to_dict()}
    assert "hard labels" in why_withheld(compared)
    assert why_withheld({"instead_of": compared}) is None and why_withheld(None) is None
    write_json({"compared": compared, "base_model": "examples/tiny-mimo"}, tmp_path / "fastmtp.json")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FastMTPError, match=r"worse than the head its run began with.*--even_if_worse"):
        export_full(tmp_path, tmp_path / "out", "examples/tiny-mimo")


def test_what_a_settings_file_says_is_shown():
    change = compare(rows(60, 0.7, 1), rows(60, 0.5, 2))
    assert list(shown_changes({"compared": {"validation": change.to_dict()}})) == ["validation rows"]
    assert not shown_changes({}) and not shown_changes({"compared": {"validation": {"before": "x"}}})


def test_context_by_context():
    """A part of which the initial head saw other positions, or nothing, is not compared."""
    now = [(0, 64, 2.5, 10), (64, 128, 2.0, 4)]
    parts = context_changes([[0, 64, 2.25, 10], [64, 128, 1.0, 5]], now)
    assert [part["before"] for part in parts] == [2.25, None]
    assert shown_contexts(parts) == "0 to 63: 2.25 -> 2.50, 64 to 127: 2.00"
    assert shown_contexts(context_changes(None, now)) == "0 to 63: 2.50, 64 to 127: 2.00"
    assert shown_contexts(context_changes(None, [])) == "no draft"


# Whole runs. The rows of `helpers/swift_runs.py` are random words, so they are what the tiny model would never say.


def self_distilled(path, count):
    """Greedy responses of the tiny model: what its head drafts best."""
    prompts = (ROOT / "examples/prompts/train.jsonl").read_text(encoding="utf-8").splitlines()[:count]
    source = path.with_suffix(".prompts.jsonl")
    source.write_text("\n".join(prompts) + "\n", encoding="utf-8")
    distill(str(TINY), str(source), str(path), max_new_tokens=40, temperature=0.0)
    return path


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    return self_distilled(tmp_path_factory.mktemp("own") / "own.jsonl", 24)


def taus_that_simulate_sees(rows):
    """tau of the tiny model's own head by tokens before the draft: every position of the simulator's acceptance, one by
    one."""
    model, tokenizer = load_model(TINY, torch.float32), load_tokenizer(str(TINY))
    texts = []
    for row in read_rows(rows):
        (example,) = training_examples(tokenizer, row)
        asked, answered = example.parts
        texts.append(Text(example.ids, len(asked.ids), len(example.ids)))
        assert answered.trained
    (accepted,) = greedy_acceptance(model, texts, 0, 4, label="")
    parts = {}
    for text, accepted_KA in zip(texts, accepted, strict=True):
        answer = text.end - text.start
        for t in range(answer - 1):
            part = parts.setdefault(part_of_context(text.start + t + 1), [[0] * 3, [0] * 3])
            for k in range(1, min(3, answer - 1 - t) + 1):
                part[0][k - 1] += bool(accepted_KA[:k, t].all())
                part[1][k - 1] += 1
    return [[*part, pytest.approx(tau_of_rows([counts])), counts[1][0]] for part, counts in sorted(parts.items())]


def knobs(**values):
    return json.dumps({f"fastmtp_{name}": value for name, value in values.items()})


def infer(checkpoint, dataset, result):
    options = ["--max_new_tokens", "2", "--stream", "false", "--result_path", result]
    swift("infer", "--adapters", checkpoint, "--val_dataset", f"{dataset}#1", *options)
    assert result.read_text()


def warnings_of(done):
    return [line for line in (done.stdout + done.stderr).splitlines() if line.startswith("[WARNING")]


def settings_of(folder):
    return json.loads((folder / "fastmtp.json").read_text())


LINKS = {"lr_scheduler_type": "constant", "create_checkpoint_symlink": "true"}
HURTS = {**LINKS, "learning_rate": "2e-2", "max_steps": 4, "save_steps": 2}


@pytest.fixture(scope="module")
def hurt(tmp_path_factory, own):
    """Hard labels, random answers, a high rate."""
    folder = tmp_path_factory.mktemp("hurt")
    out, dataset = folder / "run", write_rows(folder / "rows.jsonl", 24)
    args = sft_args(TINY, dataset, out, val_dataset=own, eval_steps=2, model_kwargs=knobs(loss="ce"), **HURTS)
    return out, args, swift(*args)


@pytest.mark.matrix
def test_data_that_hurts_ends_with_the_initial_head(hurt, tmp_path):
    out, _, done = hurt
    reasons = [line for line in warnings_of(done) if "worse than the head its run began with" in line]
    assert len(reasons) == 1 and "hard labels" in reasons[0] and str(out / "initial") in reasons[0]
    assert "the initial head, before the first step: validation: tau" in done.stdout + done.stderr
    for link in ("best", "last"):
        assert (out / link).resolve() == (out / "initial").resolve()
    initial, base = Checkpoint(out / "best"), Checkpoint(TINY)
    assert all(torch.equal(initial.read(name), base.read(name).float()) for name in initial.file_of)
    assert settings_of(out / "checkpoint-4")["compared"]["validation"]["worse"]

    refused = swift("export", "--adapters", out / "checkpoint-4", "--output_dir", tmp_path / "no", check=False)
    assert refused.returncode == 1 and not (tmp_path / "no").exists()
    assert "worse than the head its run began with" in refused.stderr.strip().splitlines()[-1]
    allowed = ["--model_kwargs", knobs(on_worse="keep"), "--output_dir", tmp_path / "kept"]
    swift("export", "--adapters", out / "checkpoint-4", *allowed)
    export_full(out / "checkpoint-4", tmp_path / "even", even_if_worse=True)
    assert (tmp_path / "kept/config.json").exists() and (tmp_path / "even/config.json").exists()
    with pytest.raises(FastMTPError, match="is the head that its run began with"):
        export_full(out / "best", tmp_path / "same")

    assert any("found it worse" in finding.what for finding in examine(out / "checkpoint-4"))
    assert "on the run's validation rows" in make_card(tmp_path / "kept")
    infer(out / "best", out.parent / "rows.jsonl", tmp_path / "out.jsonl")


@pytest.mark.matrix
def test_a_resumed_run_compares_with_what_was_measured_before_its_first_step(hurt, tmp_path):
    """From the checkpoint of step 2, into another folder, and from a folder that lost the measurement."""
    out, args, _ = hurt
    resumed = swift(*args, "--output_dir", tmp_path / "run", "--resume_from_checkpoint", out / "checkpoint-2")
    assert "before the first step" not in resumed.stdout + resumed.stderr
    assert (tmp_path / "run/initial.json").read_bytes() == (out / "initial.json").read_bytes()
    assert settings_of(tmp_path / "run/checkpoint-4")["compared"] == settings_of(out / "checkpoint-4")["compared"]
    assert (tmp_path / "run/best").resolve() == tmp_path / "run/initial"


@pytest.mark.matrix
@pytest.mark.parametrize("tuner", ["full", "lora"])
def test_other_tuners_end_with_the_initial_head_too(tuner, own, tmp_path):
    dataset = write_rows(tmp_path / "rows.jsonl", 24)
    changes = {**HURTS, "tuner_type": tuner, **({"lora_rank": 8, "learning_rate": "1e-1"} if tuner == "lora" else {})}
    args = sft_args(
        TINY, dataset, tmp_path / "run", val_dataset=own, eval_steps=2, model_kwargs=knobs(loss="ce"), **changes
    )
    done = swift(*args)
    assert (tmp_path / "run/best").resolve() == tmp_path / "run/initial", warnings_of(done)
    initial, base = Checkpoint(tmp_path / "run/best"), Checkpoint(TINY)
    assert all(torch.equal(initial.read(name), base.read(name).float()) for name in initial.file_of)
    source = "--model" if tuner == "full" else "--adapters"
    trained = tmp_path / "run/checkpoint-4"
    refused = swift("export", source, trained, "--output_dir", tmp_path / "no", check=False)
    assert refused.returncode == 1
    assert "worse than the head its run began with" in refused.stderr.strip().splitlines()[-1]
    swift("export", source, trained, "--output_dir", tmp_path / "kept", "--model_kwargs", knobs(on_worse="keep"))
    infer(tmp_path / "run/best", dataset, tmp_path / "out.jsonl")


@pytest.mark.matrix
def test_better_here_and_worse_on_rows_of_another_kind(own, tmp_path):
    """Trained and validated on the same random answers, compared on self-distilled ones too; through the hidden-state
    cache, and beginning from a checkpoint."""
    dataset = write_rows(tmp_path / "rows.jsonl", 24)
    cache = {"hidden_cache": str(tmp_path / "cache"), "hidden_cache_gb": 1.0}
    chosen = knobs(loss="ce", other_val_dataset=f"{own}#20", **cache)
    changes = {**LINKS, "learning_rate": "5e-3", "max_steps": 24, "save_steps": 12}
    args = sft_args(TINY, dataset, tmp_path / "run", val_dataset=dataset, eval_steps=12, model_kwargs=chosen, **changes)
    done = swift(*args)
    compared = settings_of(tmp_path / "run/checkpoint-24")["compared"]
    assert not compared["validation"]["worse"] and compared["other_val_dataset"]["worse"], compared
    assert compared["other_val_dataset"]["rows"] == 20
    assert any("worse than the initial head on fastmtp_other_val_dataset" in line for line in warnings_of(done))
    assert (tmp_path / "run/best").resolve().name.startswith("checkpoint-")

    # From that head on, with a rate that ruins it: what is handed out is that head, not the model's own.
    start = ["--adapters", tmp_path / "run/checkpoint-24"]
    args = sft_args(TINY, own, tmp_path / "on", val_dataset=dataset, eval_steps=2, **HURTS)
    swift(*args, *start)
    assert (tmp_path / "on/best").resolve() == tmp_path / "on/initial"
    initial, began = Checkpoint(tmp_path / "on/best"), Checkpoint(tmp_path / "run/checkpoint-24")
    assert all(torch.equal(initial.read(name), began.read(name)) for name in began.file_of)


@pytest.mark.matrix
def test_a_head_beside_its_model_without_the_backbone(own, tmp_path):
    """The layer of a draft-only folder, on hidden states in the form of an engine's; the head is not exported."""
    target = quantized(TINY, tmp_path / "target", (64, 64), ("norm", "embed_tokens", "lm_head", "mtp"))
    graft(target, tmp_path / "draft", TINY, draft_only=True)
    dataset = write_rows(tmp_path / "rows.jsonl", 8)
    model, tokenizer = load_model(TINY, torch.float32), load_tokenizer(str(TINY))
    cache = cache_of(tmp_path / "cache", target, 192)
    for row in [*read_rows(dataset), *read_rows(own)]:
        for example in training_examples(tokenizer, row):
            cache.put([torch.tensor(example.ids)], [states_of(model, example.ids)])
    del cache  # one run writes at a time
    chosen = knobs(loss="ce", hidden_cache=str(tmp_path / "cache"))
    args = sft_args(
        tmp_path / "draft", dataset, tmp_path / "run", val_dataset=own, eval_steps=2, model_kwargs=chosen, **HURTS
    )
    done = swift(*args)
    assert "no backbone is loaded" in done.stdout + done.stderr
    assert (tmp_path / "run/best").resolve() == tmp_path / "run/initial"
    initial, began = Checkpoint(tmp_path / "run/best"), Checkpoint(tmp_path / "draft")
    assert all(torch.equal(initial.read(name), began.read(name).float()) for name in initial.file_of)
    with pytest.raises(FastMTPError, match="worse than the head its run began with"):
        export_trained(tmp_path / "run/checkpoint-4", tmp_path / "no")
    export_trained(tmp_path / "run/checkpoint-4", tmp_path / "kept", even_if_worse=True)


@pytest.mark.matrix
def test_two_processes_hand_out_the_initial_head(hurt, own, tmp_path):
    changes = {**HURTS, "use_cpu": "true", "per_device_train_batch_size": 2}
    dataset = hurt[0].parent / "rows.jsonl"
    args = sft_args(
        TINY, dataset, tmp_path / "run", val_dataset=own, eval_steps=2, model_kwargs=knobs(loss="ce"), **changes
    )
    swift(*args, processes=2)
    assert (tmp_path / "run/best").resolve() == tmp_path / "run/initial"
    one, two = (json.loads((out / "initial.json").read_text()) for out in (hurt[0], tmp_path / "run"))
    assert one["tau_by_context"] == two["tau_by_context"]
    one, two = (settings_of(out / "checkpoint-4")["compared"]["validation"] for out in (hurt[0], tmp_path / "run"))
    assert (two["rows"], two["before"]) == (one["rows"], one["before"])


@pytest.mark.matrix
def test_a_good_run_says_what_it_won_and_is_that_of_a_run_without_validation_rows(own, tmp_path):
    out, plain = tmp_path / "run", tmp_path / "plain"
    done = swift(*sft_args(TINY, own, out, val_dataset=own, eval_steps=2, **LINKS))
    text = done.stdout + done.stderr
    assert text.count("the initial head, before the first step") == 1
    assert text.count("against the initial head: validation: tau") == 3
    assert (out / "best").resolve().name.startswith("checkpoint-") and not (out / "initial").exists()
    before = json.loads((out / "initial.json").read_text())["tau_by_context"]["validation"]
    assert before == taus_that_simulate_sees(own) and len(before) > 1
    compared = settings_of(out / "checkpoint-6")["compared"]
    parts = compared["tau_by_context"]["validation"]
    assert [part["before"] for part in parts] == [round(tau, 4) for _, _, tau, _ in before]
    assert text.count("tau by tokens before the draft: validation: 0 to 63: ") == 3
    assert compared["step"] == 6 and not compared["validation"]["worse"]
    assert compared["validation"]["now"] == pytest.approx(logged(out, "eval_mtp_tau")[2], abs=1e-4)

    done = swift(*sft_args(TINY, own, plain, **{**LINKS, "create_checkpoint_symlink": "false"}))
    assert "is not compared with the head that it begins with" in done.stdout + done.stderr
    assert not (plain / "initial.json").exists()
    one, other = Checkpoint(out / "checkpoint-6"), Checkpoint(plain / "checkpoint-6")
    assert all(torch.equal(one.read(name), other.read(name)) for name in other.file_of)


@pytest.mark.engine
def test_a_run_that_keeps_a_worse_head_says_so(run, tmp_path):
    """The tests' own run, on rows of random words."""
    out, done = run
    kept = [line for line in warnings_of(done) if "kept, as fastmtp_on_worse says" in line]
    assert len(kept) == 1 and settings_of(out / "checkpoint-6")["compared"]["validation"]["worse"]
    assert not (out / "initial").exists()
    export_full(out / "checkpoint-6", tmp_path / "full")
