"""`fastmtp run`: mistakes in a plan, in one line each; its commands; a changed plan; a run that is killed."""

import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import fields

import pytest
import yaml
from helpers.paths import ROOT, TINY
from helpers.target_forms import without_layer

from swift_fastmtp.bench.watchdog import descendants
from swift_fastmtp.checkpoint.checkpoint import Checkpoint
from swift_fastmtp.cli import _check_words, _options_of, main
from swift_fastmtp.errors import FastMTPError
from swift_fastmtp.run import state
from swift_fastmtp.run.estimate import measured
from swift_fastmtp.run.measure import Answers, Training
from swift_fastmtp.run.plan import Verbs, read_run_plan
from swift_fastmtp.run.process import run_command
from swift_fastmtp.run.stages import resumed, stages
from swift_fastmtp.run.state import State, locked
from swift_fastmtp.swift_plugin.names import argument_names

PROMPTS = ROOT / "examples/prompts/train.jsonl"
EVAL = ROOT / "examples/prompts/eval.jsonl"
# Keys of a plan that the runs below have instead of the tiny model's, for a drill with another one: JSON.
DRILL_PLAN = json.loads(os.environ.get("FASTMTP_DRILL_PLAN", "{}"))
RUN_SECONDS = 3600 if DRILL_PLAN else 570


@pytest.fixture
def plan(tmp_path):
    """A function that writes a plan, with changes to it, and returns its file."""

    def write(**changes):
        values = {"model": str(TINY), "prompts": str(PROMPTS), "output_dir": str(tmp_path / "out"), **changes}
        path = tmp_path / "plan.yaml"
        path.write_text(yaml.safe_dump({key: value for key, value in values.items() if value is not None}))
        return str(path)

    return write


def refused(*words):
    """The one line that `fastmtp run` ends with."""
    with pytest.raises(SystemExit) as ended:
        main(["run", *words])
    message = str(ended.value)
    assert message.startswith("fastmtp: error: ") and "\n" not in message
    return message.removeprefix("fastmtp: error: ")


def commands(capsys, *words):
    """What a dry run would run, without comments."""
    main(["run", *words, "--dry_run"])
    script = capsys.readouterr().out.partition("\n\n")[2]
    return [shlex.split(line) for line in script.splitlines() if not line.startswith("#")]


MISTAKES = {
    "unknown key": ({"promts": "x"}, "unknown key 'promts'; did you mean prompts?"),
    "no model": ({"model": None}, "lacks model"),
    "model is not there": ({"model": "/nonexistent"}, "/nonexistent"),
    "prompts are not there": ({"prompts": "/nonexistent.jsonl"}, "/nonexistent.jsonl"),
    "unknown option": ({"distill": {"max_new_token": 3}}, "distill.max_new_token: `fastmtp distill` has no such "
                       "option; did you mean max_new_tokens?"),
    "ours to give": ({"mix": {"inputs": ["a"]}}, "mix: `inputs` has no place below it; `fastmtp run` gives it; leave"),
    "a key": ({"distill": {"api_key": "k"}}, "distill: `api_key` has no place below it; give it in OPENAI_API_KEY"),
    "impossible value": ({"clean": {"min_answer_tokens": "few"}}, "clean: argument --min_answer_tokens: invalid int "
                         "value: 'few'"),
    "unknown argument": ({"train": {"learning_rat": 1}}, "train.learning_rat: `swift sft` has no such argument; "
                         "did you mean learning_rate?"),
    "no recipe": ({"train": {"recipe": "/nonexistent.yaml"}}, "/nonexistent.yaml"),
    "not an engine": ({"engine": "tgi"}, "engine: must be 'none', 'sglang' or 'vllm'"),
    "bench without one": ({"bench": {"rounds": 1}}, "bench: needs an engine that serves the trained head"),
    "two tasks": ({"tasks": [str(EVAL), str(PROMPTS)]}, "without an engine they are one file of prompts"),
    "no address": ({"base_url": "host:30000"}, "base_url"),
    "no validation": ({"mix": {"val_ratio": 0}}, "mix.val_ratio: must be above 0"),
    "no mapping": ({"distill": 7}, "distill: must be a valid dictionary"),
    "not switched off": ({"train": False}, "train: must be a valid dictionary"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_and_nothing_is_written(name, plan, tmp_path):
    changes, message = MISTAKES[name]
    path = plan(**changes)
    line = refused(path)
    assert line.startswith(path) and message in line, line
    assert not (tmp_path / "out").exists()


def test_without_a_plan(capsys):
    assert "lacks prompts" in refused("--model", str(TINY))
    names = [words[1] for words in commands(capsys, "--model", str(TINY), "--prompts", str(PROMPTS))]
    assert names == ["inspect", "distill", "clean", "mix", "sft", "simulate", "export"]


def test_commands_are_the_verbs(plan, capsys, tmp_path):
    """Options of a plan are those of the verb, and go before ours."""
    path = plan(
        seed=3,
        tasks=str(EVAL),
        base_url=["http://a:1", "http://b:2"],
        distill={"max_new_tokens": 9, "chat_template_kwargs": {"enable_thinking": False}},
        mix={"shares": {"zh": 0.5, "code": 0.5}, "seed": 5},
        train={
            "recipe": str(ROOT / "recipes/quickstart_cpu.yaml"),
            "model_kwargs": {"fastmtp_beta": 0.5},
            "launcher": ["srun", "-N2"],
            "environment": {"NPROC_PER_NODE": 8},
            "bf16": True,
        },
        vocab={"sizes": [512, 1024]},
    )
    out = tmp_path / "out"
    main(["run", path, "--dry_run"])
    script = capsys.readouterr().out
    by_name = {words[1]: words for words in commands(capsys, path)}
    distill = by_name["distill"]
    assert distill[distill.index("--base_url") + 1 :][:2] == ["http://a:1", "http://b:2"]
    assert "--max_new_tokens" in distill and '{"enable_thinking": false}' in distill
    mix = by_name["mix"]
    assert mix[mix.index("--shares") + 1 :][:2] == ["code=0.5", "zh=0.5"] and mix[mix.index("--seed") + 1] == "5"
    (train,) = [line for line in script.splitlines() if "swift sft" in line]
    assert train.startswith(f"NPROC_PER_NODE=8 srun -N2 swift sft {ROOT}/recipes/quickstart_cpu.yaml --model ")
    assert "--seed 45 " in train and "--bf16 true" in train
    assert "--model_kwargs '{\"fastmtp_beta\": 0.5}'" in train and "--model_type" not in train
    assert by_name["clean"][-2:] == ["--decontaminate", str(EVAL)]
    assert f"--token_map {out}/maps/*.pt --by language" in script  # for a shell
    assert by_name["export"][-2:] == ["--token_maps", f"{out}/simulate/maps.json"]
    assert list(by_name)[-4:] == ["srun", "vocab", "simulate", "export"]
    assert not out.exists()


def plain_qwen2(folder):
    """The tiny model as a save through transformers leaves it."""
    without_layer(folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def test_a_model_without_a_layer(plan, capsys, tmp_path):
    """Refused at once, or the plan says where the layer comes from, and that model is trained."""
    model = plain_qwen2(tmp_path / "plain")
    line = refused(plan(model=model))
    assert "lost its MTP layer" in line and "in a plan: `graft: {donor: BASE}`, or `graft: on`" in line
    assert "nowhere" in refused(plan(model=model, graft={"donor": "nowhere"}))
    assert "graft: `draft_only` has no place" in refused(plan(model=model, graft={"draft_only": True}))

    grafted = str(tmp_path / "out/with-mtp")
    first = commands(capsys, plan(model=model, graft={"donor": str(TINY)}))
    assert [words[1] for words in first][:4] == ["graft", "inspect", "distill", "clean"]
    assert first[0][2:] == ["--model", model, "--output_dir", grafted, "--donor", str(TINY)]
    later = commands(capsys, plan(model=model, graft=True))
    assert [words[1] for words in later][:6] == ["distill", "clean", "mix", "graft", "inspect", "sft"]
    assert later[3][6:9] == ["--init_from_last_layer", "--fit_on", str(tmp_path / "out/mixed/train.jsonl")]
    assert later[4][2] == grafted
    for words in later[5:]:
        assert words[words.index("--model") + 1] == grafted
    main(["run", plan(model=model, graft=True), "--dry_run"])
    assert "not known for each checkpoint" in capsys.readouterr().out
    assert "graft: not together with `engine`" in refused(plan(model=model, graft=True, engine="sglang"))


def test_a_dry_run_estimates_from_files(plan, capsys):
    main(["run", plan(distill={"num_answers": 2}), "--dry_run"])
    printed = capsys.readouterr().out
    count = len(PROMPTS.read_text(encoding="utf-8").splitlines())
    assert f"answers: {2 * count:,} answers, at most 4,096 tokens each" in printed
    assert "8.81 MB as stored" in printed


def settings(**changes):
    """What ms-swift says of the quickstart's training."""
    return {
        "per_device_train_batch_size": 16,
        "global_world_size": 1,
        "gradient_accumulation_steps": 1,
        "num_train_epochs": 6.0,
        "max_length": 512,
        "packing": False,
        **changes,
    }


def made_estimate(path, number, answers=None, training=None):
    """The estimate of a plan from given measurements."""
    made = read_run_plan([path], {}, Verbs(_options_of, _check_words))
    took = {"answers": 10, "at_once": 5, "tokens": 1000, "num_bytes": 4000, "seconds": 20.0, "start_seconds": 3.0}
    took |= {"memory": 10**9, "in_process": True, "whole": True, **(answers or {})}
    steps = {"kept": 0.8, "num_bytes": 400.0, "tokens": 128.0, "answer_tokens": 100.0, "longest": 200, "fitting": 1.0}
    steps |= {"steps": 8, "step_seconds": 0.5, "start_seconds": 12.0, "memory": 2 * 10**9, "gpu_memory": None}
    steps |= {"settings": settings(), **(training or {})}
    return measured(made, stages(made), number, Answers(**took), Training(**steps))


def test_an_estimate_is_what_was_measured_multiplied(plan):
    recipe = {"recipe": str(ROOT / "recipes/quickstart_cpu.yaml")}
    made = made_estimate(plan(mix={"val_ratio": 0.1}, tasks=str(EVAL), train=recipe), 1000)
    needs = made.needs
    assert needs["distill"].seconds == 3 + 100 * 20 and needs["distill"].disk == 400_000
    assert needs["clean"].disk == needs["mix"].disk == 0.8 * 400_000
    # 720 rows in batches of 16, six times; evaluated before the first step and every 50th, on 80 rows.
    steps = 45 * 6
    assert f"train: {steps} steps, 6 epochs of 720 rows of 128 tokens, 16 to a step" in made.text()
    share = (needs["train"].seconds - 12 - steps * 0.5) / (6 * 80 * 0.5 / 16)
    assert 1 / 3 < share < 1
    # Checkpoints: the limit of the recipe, and one that is being written.
    head = 12 * 468_224
    assert needs["train"].disk == 3 * head
    # As many answers as there are prompts for tasks, as long as the others, at their rate; two heads.
    answered, passes = 68 * 100 / 50, 2 * 68 * 100 * 0.5 / 16 / 128
    assert needs["simulate"].seconds == pytest.approx(3 + answered + passes)
    assert needs["export"].seconds is None and made.text().count("the whole") == 1


def test_an_estimate_of_training_goes_by_its_arguments(plan):
    def trained(train, **changes):
        made = made_estimate(
            plan(train={"save_total_limit": 2, **train}), 1000, training={"settings": settings(**changes)}
        )
        return made.needs["train"], made.text()

    assert "train: 7 steps, 0.14 epochs" in trained({"max_steps": 7})[1]
    assert "train: 78 steps, 6 epochs" in trained({}, gradient_accumulation_steps=4)[1]
    packed = trained({"packing": True}, packing=True, per_device_train_batch_size=1)[1]
    assert "rows of 128 tokens packed into 512, 1 to a step" in packed and "train: 1,194 steps" in packed
    assert " more memory " not in packed  # a packed sequence is as long as the measured ones
    assert "max_length (512) needs" in trained({})[1]
    assert " 0 evaluations" in trained({"eval_strategy": "no"})[1]
    deepspeed, _ = trained({"deepspeed": "zero2", "save_steps": 10})
    assert deepspeed.disk == 3 * 16 * 468_224
    limited = made_estimate(plan(mix={"tokens": "20K"}), 1000).text()
    assert "of 200 rows of 128 tokens" in limited  # 100 tokens of each are an answer


def test_an_estimate_that_cannot_know_says_so(plan):
    cut = made_estimate(plan(), 1000, {"whole": False})
    assert "only the answers that ended within the minute were counted" in cut.text()
    remote = made_estimate(plan(base_url="http://a:1"), 1000, {"in_process": False})
    assert remote.needs["simulate"].seconds is None and "simulate: not estimated" in remote.text()


def test_an_estimate_of_a_benchmark(plan, monkeypatch):
    """Every pass of every server at the speed of one answer among many, and their starts."""
    monkeypatch.chdir(ROOT)
    changes = {"tasks": ["smoke"], "bench": {"num_steps": [1, 2], "max_new_tokens": 50, "rounds": 2}}
    made = made_estimate(plan(engine="sglang", **changes), 1000, {"in_process": False, "server_seconds": 40.0})
    asked = int(re.search(r"5 servers, ([\d,]+) answers of 50 tokens, 6 starts of a server, 40 s each", made.text())[1])
    # 50 tokens per second of 5 at once: 10 of each.
    assert made.needs["bench"].seconds == pytest.approx(6 * 40 + asked * 50 / 10)


def test_a_plan_for_vllm_trains_for_its_graph(plan, capsys):
    def knobs(**changes):
        words = next(words for words in commands(capsys, plan(engine="vllm", **changes)) if words[1] == "sft")
        return json.loads(words[words.index("--model_kwargs") + 1])

    assert knobs() == {"fastmtp_engine": "vllm"}
    assert knobs(train={"model_kwargs": {"fastmtp_beta": 0.5}}) == {"fastmtp_beta": 0.5, "fastmtp_engine": "vllm"}
    assert knobs(train={"model_kwargs": {"fastmtp_engine": "sglang"}}) == {"fastmtp_engine": "sglang"}
    main(["run", plan(engine="vllm", python="/opt/engine/bin/python"), "--dry_run"])
    assert "/opt/engine/bin/vllm serve " in capsys.readouterr().out


def test_with_an_engine(plan, capsys, monkeypatch):
    """The server for the answers is the benchmark's baseline; both know what this machine needs."""
    monkeypatch.chdir(ROOT)
    machine = "tests/serving/cpu_plan.yaml"
    path = plan(engine="sglang", python=sys.executable, tasks=["smoke"], bench={"num_steps": [2], "max_new_tokens": 8})
    main(["run", path, machine, "--dry_run"])
    script = capsys.readouterr().out
    assert f"{sys.executable} -m sglang.launch_server --model-path {TINY}" in script
    assert "--device cpu" in script and "--base_url http://127.0.0.1:30000" in script
    names = [words[1] for words in commands(capsys, path, machine)]
    assert names == ["inspect", "distill", "clean", "mix", "sft", "export", "bench", "report", "card"]


def test_the_last_stage_can_be_named(plan, capsys):
    assert [words[1] for words in commands(capsys, plan(), "--until", "mix")] == ["inspect", "distill", "clean", "mix"]
    assert "this plan has inspect, distill" in refused(plan(), "--until", "bench")


def test_what_another_plan_made_is_not_mixed_in(plan, tmp_path):
    """The record of a folder beside its files, without the work."""
    verbs, out = Verbs(_options_of, _check_words), tmp_path / "out"

    def made(**changes):
        return stages(read_run_plan([plan(**changes)], {}, verbs))

    def stopped(*others):
        with pytest.raises(FastMTPError) as error:
            State(out).check(*others, "plan.yaml", redo=False)
        return str(error.value)

    (out / "mixed").mkdir(parents=True)
    for stage in made()[:4]:
        State(out).begin(stage)
    for name in ("distilled.jsonl", "clean.jsonl"):
        (out / name).touch()
    State(out).check(made(), "plan.yaml", redo=False)
    State(out).check(made(distill={"concurrency": 3}, base_url="http://a:1"), "plan.yaml", redo=False)
    line = stopped(made(mix={"val_ratio": 0.1}))
    assert line.startswith(f"plan.yaml: mix.val_ratio is 0.1, and {out} was begun with 'not given'; ")
    assert "distill.seed is 1, " in stopped(made(seed=1))
    assert "clean.decontaminate is " in stopped(made(tasks=str(EVAL)))
    # A result is gone from which a later one was made.
    (out / "clean.jsonl").unlink()
    assert f"{out}/clean.jsonl is not there, and {out}/mixed was made from it" in stopped(made())
    State(out).check(made(), "plan.yaml", redo=True)
    assert not (out / "mixed").exists() and (out / "distilled.jsonl").exists()
    State(out).check(made(mix={"val_ratio": 0.1}), "plan.yaml", redo=False)
    # Training that goes on has been begun with the same plan.
    (out / "clean.jsonl").touch()
    (out / "mixed").mkdir()
    (out / "train/checkpoint-1").mkdir(parents=True)
    train = resumed(made()[4])
    assert train.words[-2:] == ["--resume_from_checkpoint", f"{out}/train"]
    State(out).begin(train)
    State(out).check(made(), "plan.yaml", redo=False)
    # A record that nobody can read is no reason to begin again over its files.
    (out / "run.json").write_text('{"stages": {"mix": 7}}')
    with pytest.raises(FastMTPError, match=r"run.json.mix: must be an object, not 7"):
        State(out)


def test_two_runs_in_one_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(state, "WAIT_SECONDS", 0.3)
    out = tmp_path / "out"
    with locked(out), pytest.raises(FastMTPError, match="another `fastmtp run` works in it"), locked(out):
        pass


def test_a_command_ends_when_its_time_is_over(tmp_path):
    mark = tmp_path / "pid"
    with locked(tmp_path / "out") as lock:
        assert run_command(["sh", "-c", 'exit "$STATUS"'], lock, {"STATUS": "3"}).status == 3
        since = tmp_path / "since"
        slow = f"echo $$ > {mark}; sleep 1; touch {since}; sleep 60"
        ended = run_command(["sh", "-c", slow], lock, seconds=0.5, since=since)
        assert ended.status is None and since.exists() and ended.seconds < 30
        # What the largest of its processes held, and not those of another command.
        large = run_command([sys.executable, "-c", "len(b'x' * 200_000_000)"], lock)
        assert ended.memory < 50_000_000 < 200_000_000 < large.memory < 400_000_000
        with pytest.raises(FastMTPError, match="no-such-command: cannot be started"):
            run_command(["no-such-command"], lock)
    with pytest.raises(ProcessLookupError):
        os.kill(int(mark.read_text()), 0)
    with locked(tmp_path / "out"):  # the watchdogs, which had it too, have ended
        pass


def test_no_secret_is_written(plan, capsys, tmp_path, monkeypatch):
    """What a variable holds is given to the command, and shown as the plan wrote it."""
    monkeypatch.setenv("LOGIN", "somebody:hunter2hunter2")
    path = plan(base_url=["http://${LOGIN}@host:1"])
    main(["run", path, "--dry_run"])
    printed = capsys.readouterr().out
    assert '"http://${LOGIN}@host:1"' in printed and "hunter2" not in printed
    line = refused(plan(engine="sglang", environment={"HF_TOKEN": "hf_abcdefghijkl"}))
    assert "environment: HF_TOKEN stands in the plan, which is copied; write `${HF_TOKEN}` for it" in line


def test_arguments_of_ms_swift_are_all_known():
    names = argument_names()
    assert {"learning_rate", "model_kwargs", "deepspeed", "dataset", "num_train_epochs"} <= set(names)


@pytest.mark.matrix
def test_arguments_of_ms_swift_are_those_of_its_class():
    from swift.arguments import SftArguments

    assert {field.name for field in fields(SftArguments)} <= set(argument_names())


def test_examples_are_plans(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert len((ROOT / "examples/quickstart.yaml").read_text().splitlines()) <= 11
    names = [words[1] for words in commands(capsys, "examples/quickstart.yaml")]
    assert names == ["inspect", "distill", "clean", "mix", "sft", "simulate", "export"]


@pytest.mark.parametrize("name", ["README.md", "README_zh.md"])
def test_the_readmes_plan(name, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    text = (ROOT / name).read_text(encoding="utf-8")
    plan = text[text.index("```yaml\n") + 8 :].partition("```")[0]
    (tmp_path / "plan.yaml").write_text(plan.replace("MODEL", str(TINY)).replace("prompts.jsonl", str(PROMPTS)))
    (train,) = [words for words in commands(capsys, str(tmp_path / "plan.yaml")) if "sft" in words]
    assert train[:3] == ["swift", "sft", "recipes/mimo_7b_rl_8xh20.yaml"]


@pytest.mark.parametrize("script", ["examples/slurm.sh", "examples/quickstart.sh"])
def test_scripts_are_bash(script):
    done = subprocess.run(["bash", "-n", ROOT / script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_plan_of_the_slurm_script(capsys, tmp_path, monkeypatch):
    """Its text as bash writes it: a server on each machine, training over all of them."""
    monkeypatch.chdir(ROOT)
    script = (ROOT / "examples/slurm.sh").read_text()
    part = script[script.index("plan=$OUT") : script.index("# The answers")]
    values = {"MODEL": str(TINY), "PROMPTS": str(PROMPTS), "OUT": str(tmp_path), "SLURM_NNODES": "2"}
    values |= {"RECIPE": "recipes/mimo_7b_rl_8xh20.yaml", "PATH": os.environ["PATH"]}
    subprocess.run(["bash", "-euc", f"hosts=(host-1 host-2)\n{part}"], env=values, check=True)
    main(["run", str(tmp_path / "plan.yaml"), "--dry_run"])
    (train,) = [line for line in capsys.readouterr().out.splitlines() if "swift sft" in line]
    assert train.startswith(
        "NNODES=2 MASTER_ADDR=host-1 MASTER_PORT=29500 NPROC_PER_NODE=8 srun --ntasks-per-node=1 bash -c "
        """'NODE_RANK=$SLURM_NODEID exec "$@"' swift swift sft recipes/mimo_7b_rl_8xh20.yaml --model """
    )
    # What each machine runs.
    line = shlex.split(train)
    own = line[line.index("bash") : line.index("swift") + 1]
    done = subprocess.run(
        [*own, "env"], env={**values, "SLURM_NODEID": "1"}, capture_output=True, text=True, check=True
    )
    assert "NODE_RANK=1" in done.stdout.splitlines()


# What follows runs the stages.


def few(path, every, count=None):
    """Some of the lines of a file of the examples."""
    lines = PROMPTS.read_text(encoding="utf-8").splitlines() if every else EVAL.read_text(encoding="utf-8").splitlines()
    path.write_text("\n".join(lines[:: every or 1][:count]) + "\n", encoding="utf-8")
    return str(path)


def small(folder, **changes):
    """A plan whose stages take seconds."""
    values = {
        "model": str(TINY),
        "prompts": few(folder / "prompts.jsonl", 40),
        "tasks": few(folder / "eval.jsonl", 0, 6),
        "output_dir": str(folder / "out"),
        "distill": {"max_new_tokens": 24, "batch_size": 4},
        "mix": {"val_ratio": 0.1},
        "train": {
            "recipe": str(ROOT / "recipes/quickstart_cpu.yaml"),
            "max_steps": 3,
            "save_steps": 1,
            "eval_steps": 1,
            "report_to": "none",
            "model_kwargs": {"fastmtp_on_worse": "keep"},
        },
        "simulate": {"max_new_tokens": 8},
        **DRILL_PLAN,
        **changes,
    }
    path = folder / "plan.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def start(plan, *words, log=None):
    command = [sys.executable, "-m", "swift_fastmtp.cli", "run", str(plan), *words]
    output = open(log or plan.with_suffix(".log"), "ab")  # noqa: SIM115
    with output:
        return subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=ENVIRONMENT, cwd=ROOT, start_new_session=True
        )


def finish(plan, *words):
    log = plan.with_suffix(".last")
    log.unlink(missing_ok=True)
    assert start(plan, *words, log=log).wait(timeout=RUN_SECONDS) == 0, log.read_text(errors="replace")[-4000:]
    return log.read_text(errors="replace")


def result(out):
    """What a run has made, as far as it does not hold times and places."""
    files = {str(path.relative_to(out)): path.read_bytes() for path in sorted((out / "export").iterdir())}
    files["export/fastmtp.json"] = files["export/fastmtp.json"].replace(str(out).encode(), b"OUT")
    for name in ("distilled.jsonl", "clean.jsonl", "mixed/train.jsonl", "train/best/model.safetensors"):
        files[name] = (out / name).read_bytes()
    heads = json.loads((out / "simulate/simulate.json").read_text())["heads"]
    return files, [{key: value for key, value in head.items() if key != "head"} for head in heads]


@pytest.fixture(scope="module")
def quiet(tmp_path_factory):
    """A run that nobody disturbed: its plan, what it printed, what it made, and the seconds of its stages."""
    plan = small(tmp_path_factory.mktemp("quiet"))
    printed = finish(plan)
    out = plan.parent / "out"
    record = json.loads((out / "run.json").read_text())["stages"]
    return plan, printed, result(out), {name: stage["seconds"] for name, stage in record.items()}


@pytest.mark.matrix
def test_the_whole_way_and_nothing_twice(quiet):
    plan, printed, _, _ = quiet
    out = plan.parent / "out"
    for number, name in enumerate(("inspect", "distill", "clean", "mix", "train", "simulate", "export"), 1):
        assert f"== {number}/7 {name} (" in printed
    assert "measured: 4 answers" in printed and "measured: 8 steps of training" in printed
    # Training of three steps is mostly its start, which was measured; nothing of the measurement is left.
    record = json.loads((out / "run.json").read_text())
    estimated, taken = record["estimate"]["needs"], record["stages"]
    assert 0.2 < estimated["train"]["seconds"] / taken["train"]["seconds"] < 5
    assert 0.3 < estimated["distill"]["disk"] / taken["distill"]["disk"] < 3
    for name in ("distill", "train"):
        assert 0.5 < estimated[name]["memory"] / taken[name]["memory"] < 2
    assert estimated["simulate"]["seconds"] and not (out / "estimate").exists()
    page = (out / "run.html").read_text(encoding="utf-8")
    assert page.count("<svg ") == 2 and "swift sft" in page and "measured: 4 answers" in page
    assert "estimated" in page and "the whole" in page
    script = (out / "commands.sh").read_text()
    assert f"swift sft {ROOT}/recipes/quickstart_cpu.yaml" in script and os.access(out / "commands.sh", os.X_OK)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}
    again = finish(plan)
    assert "== 5/7 train: " in again and "$ " not in again
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}


@pytest.mark.matrix
def test_a_changed_plan(quiet):
    """Refused with the key; made again from the changed stage on, and no earlier one."""
    plan = quiet[0]
    values = yaml.safe_load(plan.read_text())
    changed = plan.with_name("changed.yaml")
    changed.write_text(yaml.safe_dump({**values, "simulate": {"max_new_tokens": 9}}))
    line = refused(str(changed))
    assert "simulate.max_new_tokens is 9, and " in line and "was begun with 8" in line and "--redo" in line
    out = plan.parent / "out"
    trained = (out / "train/best/model.safetensors").stat().st_mtime_ns
    assert "simulate.max_new_tokens is 9" in refused(str(changed), "--until", "mix")
    printed = finish(changed, "--redo")
    assert "made again from here" in printed and "== 6/7 simulate (" in printed and "== 7/7 export (" in printed
    assert (out / "train/best/model.safetensors").stat().st_mtime_ns == trained
    # Another input is another plan too.
    with open(values["prompts"], "a", encoding="utf-8") as file:
        file.write('{"prompt": "one more"}\n')
    assert "distill.prompts is " in refused(str(changed))


@pytest.mark.matrix
def test_token_maps_behind_stages_done_by_hand(quiet, tmp_path):
    """Made of the answers, chosen by the simulator, put into the export. Whoever takes over runs lines of commands.sh;
    what they made is taken."""
    source, out = quiet[0].parent / "out", tmp_path / "out"
    plan = small(tmp_path, vocab={"sizes": [512, 1024], "held_out": 0.2}, train={})
    for name in ("mixed", "train"):
        shutil.copytree(source / name, out / name)
    for name in ("distilled.jsonl", "clean.jsonl"):
        shutil.copy(source / name, out)
    printed = finish(plan)
    for name in ("distilled.jsonl", "clean.jsonl", "mixed", "train/best"):
        assert f"{out}/{name} is there, not made by this run; taken as it is" in printed
    assert "$ fastmtp vocab" in printed and "--by language" in printed and "== 8/8 export (" in printed
    chosen = json.loads((out / "simulate/maps.json").read_text())
    exported = json.loads((out / "export/config.json").read_text())
    assert ("--token_maps" in printed) == bool(chosen) == any("map" in key for key in exported)
    assert f"{out}/maps/" in printed and "*.pt" not in printed
    assert (out / "run.html").read_text(encoding="utf-8").count("512.pt") > 1
    assert "$ " not in finish(plan)


@pytest.mark.matrix
def test_a_layer_is_made_on_the_way(tmp_path):
    """From a plain Qwen2 to an export with a head."""
    keep = {"skip_filters": ["truncated"]}  # there are too few rows for a fit otherwise
    plan = small(tmp_path, model=plain_qwen2(tmp_path / "plain"), graft={"max_rows": 16}, clean=keep)
    printed = finish(plan)
    assert "the layer that is trained is made of the answers first" in printed and "== 4/8 graft (" in printed
    assert Checkpoint(tmp_path / "out/export").trainable_family.name == "mimo"
    assert "$ " not in finish(plan)


def kill_all(process, everything):
    """SIGKILL: `fastmtp run` and its group, or everything that it started as well."""
    for each in [process.pid, *(descendants(process.pid) if everything else [])]:
        try:
            os.kill(each, signal.SIGKILL)
        except ProcessLookupError:
            continue
    process.wait()


# Where the drill kills: training saves a checkpoint at each step.
DRILL = ["estimate: 4 of", "estimate: 8 steps", "distill", "clean", "mix", "train", "train", "simulate", "export"]


@pytest.mark.matrix
def test_killed_in_every_stage_it_ends_as_if_nobody_had(quiet, tmp_path):
    """Each time at a random moment of a stage; every other time with everything that it has started."""
    _, _, want, seconds = quiet
    plan = small(tmp_path)
    rng = random.Random(0)
    killed = []
    for number, name in enumerate(DRILL):
        log = plan.with_suffix(f".{number}")
        process = start(plan, log=log)
        header = name if name.startswith("estimate") else f" {name} ("
        while process.poll() is None and header not in log.read_text(errors="replace"):
            time.sleep(0.02)
        deadline = time.monotonic() + rng.uniform(0, seconds.get(name, 5.0))
        while process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        if process.poll() is None:
            killed.append(name)
            kill_all(process, everything=number % 2 == 1)
    finish(plan)
    print(f"killed in or after the beginning of {killed}")
    assert len(killed) >= 5
    assert result(tmp_path / "out") == want
    assert not [path for path in (tmp_path / "out").rglob("*") if path.name.endswith((".tmp", ".parts"))]
    assert not (tmp_path / "out/estimate").exists()
    assert json.loads((tmp_path / "out/run.json").read_text())["estimate"]["needs"]["train"]["seconds"] > 0
    assert (tmp_path / "out/run.html").exists()
