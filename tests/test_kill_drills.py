"""kill -9 at random moments, and at the renames: started again, every verb ends as if nobody had killed it.

Seeded: the same moments of the run's duration each time, though not the same instructions.
"""

import itertools
import json
import random
import shutil
import subprocess
import time
from functools import partial

import pytest
from helpers.broken_models import broken_model, lose_mtp
from helpers.kill_forks import Forks
from helpers.mix_rows import PLENTY, rows_of, write
from helpers.paths import ROOT, TINY
from helpers.swift_runs import sft_args, swift, write_rows
from safetensors.torch import load_file

from swift_fastmtp.swift_plugin.resume import what_is_missing

pytestmark = pytest.mark.matrix


@pytest.fixture(scope="module")
def forks():
    forks = Forks()
    yield forks
    forks.close()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, rows):
    out = tmp_path_factory.mktemp("checkpoint") / "run"
    swift(*sft_args(TINY, rows, out, max_steps=1, save_steps=1))
    return out / "checkpoint-1"


@pytest.fixture(scope="module")
def lost(tmp_path_factory):
    return broken_model(tmp_path_factory.mktemp("lost") / "model", lose_mtp)


@pytest.fixture(scope="module")
def prompts():
    return (ROOT / "examples/prompts/train.jsonl").read_text(encoding="utf-8").splitlines()


def export(folder, source, request):
    return ["export", "--adapters", request.getfixturevalue("checkpoint"), "--output_dir", folder / "out"]


def graft(folder, source, request):
    return ["graft", "--model", request.getfixturevalue("lost"), "--donor", TINY, "--output_dir", folder / "out"]


def clean(folder, source, request):
    rows = write_rows(source / "rows.jsonl", 1200)
    words = ["clean", "--inputs", rows, "--output", folder / "out.jsonl", "--removed", folder / "removed.jsonl"]
    return [*words, "--skip_filters", "language"]


def mix(folder, source, request):
    path = source / "mix.jsonl"
    write(path, rows_of({group: 10 * number for group, number in PLENTY.items()}))
    return ["mix", "--inputs", path, "--output_dir", folder / "out"]


def vocab(folder, source, request):
    rows = write_rows(source / "vocab.jsonl", 1500)
    return ["vocab", "--inputs", rows, "--model", TINY, "--output_dir", folder / "out", "--sizes", "1024", "2048"]


def distill(folder, source, request):
    prompts = request.getfixturevalue("prompts")
    (source / "prompts.jsonl").write_text("\n".join(prompts[:24]) + "\n", encoding="utf-8")
    words = ["distill", "--model", TINY, "--prompts", source / "prompts.jsonl", "--output", folder / "out.jsonl"]
    return [*words, "--max_new_tokens", "16", "--batch_size", "4"]


def simulate(folder, source, request):
    (source / "eval.jsonl").write_text("\n".join(request.getfixturevalue("prompts")[:8]) + "\n", encoding="utf-8")
    words = ["simulate", "--model", TINY, "--dataset", source / "eval.jsonl", "--output_dir", folder / "out"]
    return [*words, "--max_new_tokens", "16"]


# The verb, its output that appears last, and how often it is killed.
DRILLS = [
    (export, "out", 28),
    (graft, "out", 28),
    (clean, "out.jsonl", 48),
    (mix, "out", 28),
    (vocab, "out", 24),
    (distill, "out.jsonl", 24),
    (simulate, "out/simulate.json", 16),
]


def contents(folder):
    """Every file below a folder by name, hidden ones too; without times and the folder's own name."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if not path.is_file():
            continue
        data = path.read_bytes()
        if path.suffix == ".json" and isinstance(value := json.loads(data), dict):
            value = {key: value[key] for key in value if key not in ("command", "utc", "provenance")}
            data = json.dumps(value).replace(str(folder), "FOLDER").encode()
        found[str(path.relative_to(folder))] = data
    return found


def moments(rng, seconds, folder, done):
    """When to kill, without end: at any time of a run, around the moment when something appears in its folder, or when
    one of its files is there and the last is not. `seconds["run"]` is what a run takes, as far as is known."""
    for number in itertools.count():
        if number % 3 == 0:
            yield (lambda: True), rng.uniform(0, seconds["run"])
        elif number % 3 == 1:
            yield (
                partial(hidden, folder),
                rng.choice([rng.uniform(0, 0.002), rng.uniform(0, 0.02), rng.uniform(0, 0.3)]),
            )
        else:
            yield partial(renaming, folder, done), 0.0


def names(folder):
    """Names at the top of a folder and one below, as long as they are there."""
    found = []
    for path in folder.iterdir():
        found.append(path.name)
        try:
            found += [below.name for below in path.iterdir()]
        except OSError:
            continue
    return found


def hidden(folder):
    return any(name.endswith(".tmp") for name in names(folder))


def renaming(folder, done):
    """One of its files has its name, or all have, and what was hidden may not be gone."""
    first = {"out.jsonl": "removed.jsonl", "out/simulate.json": "out/simulate.png"}.get(done, done)
    return (folder / first).exists() or (folder / done).exists()


@pytest.mark.parametrize(("verb", "done", "kills"), DRILLS, ids=[drill[0].__name__ for drill in DRILLS])
def test_killed_and_started_again(verb, done, kills, forks, tmp_path, request):
    quiet, folder = tmp_path / "quiet", tmp_path / "round"
    quiet.mkdir()
    words = verb(quiet, tmp_path, request)
    start = time.monotonic()
    status, output = forks.start(words).wait()
    seconds = {"run": time.monotonic() - start}
    assert status == 0, output
    want = contents(quiet)
    words = verb(folder, tmp_path, request)
    counted = dict.fromkeys(("rounds", "killed", "hidden files left", "between renames", "output there"), 0)
    for happened, delay in moments(random.Random(verb.__name__), seconds, folder, done):
        enough = counted["killed"] >= kills // 2 and counted["hidden files left"] >= 2
        enough &= counted["between renames"] >= 2 or verb is not clean
        if counted["rounds"] >= (kills if enough else 4 * kills):
            break
        counted["rounds"] += 1
        folder.mkdir()
        status, output = forks.start(words).kill_when(happened, delay)
        whole = (folder / done).exists()
        counted["killed"] += status < 0
        counted["hidden files left"] += hidden(folder)
        counted["between renames"] += (folder / "removed.jsonl").exists() and not whole
        counted["output there"] += whole
        # Started again: it does the rest, or says that its output is there.
        start = time.monotonic()
        status, output = forks.start(words).wait()
        if not whole:
            # The first run of all is slower than those after it: moments after a run's end kill nobody.
            seconds["run"] = min(seconds["run"], time.monotonic() - start)
        assert status == int(whole), output
        assert "Traceback" not in output and ("already exists" in output) == whole, output
        assert contents(folder) == want, (sorted(contents(folder)), sorted(want))
        assert not [name for name in names(folder) if name.startswith(".") or name.endswith(".parts")]
        shutil.rmtree(folder)
    print(f"{verb.__name__}: {seconds['run']:.1f} s, {counted}")
    assert enough


@pytest.fixture
def small_disk(tmp_path):
    """A function that mounts a disk of so many bytes, or gives the one that is there another size."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(size, *remount):
        options = ",".join([*remount, f"size={size // 4096 * 4096 + 4096}"])
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        if subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("a disk of its own needs root")
        return folder

    yield mount
    subprocess.run(["umount", str(folder)], capture_output=True, check=False)


@pytest.mark.parametrize(("verb", "done"), [drill[:2] for drill in DRILLS], ids=[drill[0].__name__ for drill in DRILLS])
def test_the_disk_gets_full(verb, done, forks, small_disk, tmp_path, request):
    """One line that names an output, nothing half-written; with more space, the same command does the rest."""
    quiet = tmp_path / "quiet"
    quiet.mkdir()
    status, output = forks.start(verb(quiet, tmp_path, request)).wait()
    assert status == 0, output
    want = contents(quiet)
    size = sum(path.stat().st_size for path in quiet.rglob("*") if path.is_file())
    stopped = 0
    disk = small_disk(size)
    words = verb(disk, tmp_path, request)
    for share in (0.02, 0.2, 0.5, 0.8, 0.95):
        small_disk(int(size * share), "remount")
        status, output = forks.start(words).wait()
        assert status in (0, 1) and "Traceback" not in output, output
        if status:
            last = output.strip().splitlines()[-1]
            assert last.startswith("fastmtp: error: ") and str(disk) in last and "No space left on device" in last, (
                output
            )
            assert not (disk / done).exists() and not hidden(disk)
        stopped += status
        small_disk(16 * size, "remount")
        if status:
            status, output = forks.start(words).wait()
            assert status == 0, output
        assert contents(disk) == want
        for path in disk.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert stopped >= 2


def test_the_disk_gets_full_while_a_checkpoint_is_saved(forks, small_disk, tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", 48)
    disk = small_disk(8 * 2**20)  # one checkpoint of 6 MB, not two
    words = sft_args(TINY, rows, disk / "run", max_steps=4, save_steps=2)
    status, output = forks.start(words).wait()
    line = output.strip().splitlines()[-1]
    assert status == 1 and line.startswith(f"fastmtp: error: {disk}/run/checkpoint-4: cannot be written"), output[
        -3000:
    ]
    assert what_is_missing(disk / "run/checkpoint-2") is None
    assert not list((disk / "run").glob(".*")) and not (disk / "run/checkpoint-4").exists()
    small_disk(64 * 2**20, "remount")
    status, output = forks.start([*words, "--resume_from_checkpoint", disk / "run"]).wait()
    assert status == 0 and what_is_missing(disk / "run/checkpoint-4") is None, output[-3000:]


def test_training_is_killed_and_resumed(forks, tmp_path):
    """Kills while checkpoints are written and between them; the checkpoints are whole, and the end is the same."""
    rows = write_rows(tmp_path / "rows.jsonl", 12)
    flags = {
        "per_device_train_batch_size": 2,
        "save_steps": 1,
        "max_steps": 4,
        "val_dataset": f"{rows}#4",
        "eval_steps": 1,
        "metric_for_best_model": "mtp_tau",
        "create_checkpoint_symlink": "true",
        "save_total_limit": 2,
    }
    quiet, out = tmp_path / "quiet", tmp_path / "run"
    start = time.monotonic()
    run = forks.start(sft_args(TINY, rows, quiet, **flags))
    while not (quiet / "args.json").exists():
        time.sleep(0.001)
    began = time.monotonic()
    status, output = run.wait()
    assert status == 0, output[-3000:]
    seconds = time.monotonic() - began
    print(f"sft: {began - start:.1f} s before training, {seconds:.1f} s of it")
    want = {path.name for path in quiet.iterdir()}
    rng, kills, counted = random.Random("sft"), 0, {"hidden": 0, "after the last": 0, "before the first": 0}
    while kills < 16:
        words = sft_args(TINY, rows, out, **flags)
        for _ in range(rng.randint(1, 2)):
            moment = rng.choice(("any", "saving", "end"))
            if moment == "any":
                happened, delay = partial(at_any, out, "args.json"), rng.uniform(0, seconds)
            elif moment == "saving":
                step = rng.choice([1, 2, 3, 4])
                happened = partial(at_any, out, f".checkpoint-{step}.tmp", f"checkpoint-{step}")
                delay = rng.choice([0.0, rng.uniform(0, 0.05), rng.uniform(0, 0.3)])
            else:
                happened, delay = partial(at_any, out, "checkpoint-4"), rng.choice([0.0, rng.uniform(0, 0.5)])
            began_again = [*words, "--resume_from_checkpoint", out] if checkpoints(out) else words
            status, output = forks.start(began_again).kill_when(happened, delay)
            kills += status < 0
            assert status < 0 or status == 0, output[-3000:]
            counted["hidden"] += bool(list(out.glob(".checkpoint-*")))
            counted["after the last"] += (out / "checkpoint-4").exists()
            counted["before the first"] += not checkpoints(out)
            for checkpoint in checkpoints(out):
                assert what_is_missing(checkpoint) is None, checkpoint
        began_again = [*words, "--resume_from_checkpoint", out] if checkpoints(out) else words
        status, output = forks.start(began_again).wait()
        assert status == 0 and "Traceback" not in output, output[-3000:]
        assert "5/4" not in output
        assert {path.name for path in out.iterdir()} == want
        for path in sorted(quiet.glob("checkpoint-*")):
            step = int(path.name.partition("-")[2])
            state = json.loads((out / f"checkpoint-{step}" / "trainer_state.json").read_text())
            assert state["global_step"] == step and state["best_global_step"]
            tensors = load_file(out / f"checkpoint-{step}" / "model.safetensors")
            same = load_file(quiet / f"checkpoint-{step}" / "model.safetensors")
            assert tensors.keys() == same.keys() and all(tensors[name].equal(same[name]) for name in same)
        for link in ("best", "last"):
            assert (out / link).resolve() == out / (quiet / link).resolve().name
        shutil.rmtree(out)
    print(f"sft: {kills} kills", counted)
    assert counted["hidden"] and counted["after the last"]


def at_any(folder, *names_):
    return any((folder / name).exists() for name in names_)


def checkpoints(out):
    return sorted(out.glob("checkpoint-*"))
