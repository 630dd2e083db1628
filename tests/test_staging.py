"""What killed runs leave is taken away by the next that writes the same place, and nothing else is."""

import multiprocessing
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.paths import TINY

from swift_fastmtp.checkpoint.mtp_tensors import save_tensors
from swift_fastmtp.data.clean import clean
from swift_fastmtp.data.distill import distill
from swift_fastmtp.data.mix import mix
from swift_fastmtp.errors import FastMTPError
from swift_fastmtp.export.folders import export_draft, export_full
from swift_fastmtp.export.graft import graft
from swift_fastmtp.files.rows import write_rows
from swift_fastmtp.files.staging import LOCK, hidden_folder, new_folder, take_away_leftovers, try_output, write_json
from swift_fastmtp.report.report import report
from swift_fastmtp.simulate.simulate import simulate
from swift_fastmtp.vocab.build import vocab


@pytest.fixture
def hold():
    """A function that starts a process which has `path` staged, and waits until it is."""
    processes = []

    def start(path):
        code = f"""
from pathlib import Path
from swift_fastmtp.files.staging import staged
with staged(Path({str(path)!r})) as made:
    made.mkdir()
    (made / "shard").write_text("x" * 1000)
    print("ready", flush=True)
    input()
"""
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        process = subprocess.Popen([sys.executable, "-c", code], **pipes)
        processes.append(process)
        assert process.stdout.readline()
        return process

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def write_folder(path):
    with new_folder(path) as folder:
        (folder / "x").write_text("x")


def write_lines(path):
    with write_rows(path) as file:
        file.write("x")


WRITERS = [
    write_folder,
    write_lines,
    lambda path: write_json({}, path),
    lambda path: save_tensors({"x": torch.zeros(1)}, path),
]


@pytest.mark.parametrize("write", WRITERS)
def test_a_dead_runs_folder_goes_and_a_live_runs_stays(write, hold, tmp_path):
    dead, live = hold(tmp_path / "out"), hold(tmp_path / "out")
    other = hold(tmp_path / "out2")
    for process in (dead, other):
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert len(list(tmp_path.iterdir())) == 3
    write(tmp_path / "out")
    left = sorted(path.name for path in tmp_path.iterdir())
    assert len(left) == 3 and left[0].startswith(".out.") and left[1].startswith(".out2.") and left[2] == "out"
    assert len(list((tmp_path / left[0]).rglob("shard"))) == 1  # the live one's, untouched
    assert live.poll() is None


def test_what_we_did_not_make_stays(tmp_path):
    """Folders and files of users that look like ours; an empty one may be of a run killed before it had its lock."""
    (tmp_path / ".out.abcdefgh.tmp").mkdir()
    (tmp_path / ".out.abcdefgh.tmp" / "mine").write_text("x")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / LOCK).write_text("")
    (tmp_path / ".out.link0000.tmp").symlink_to(tmp_path / "elsewhere")
    (tmp_path / ".out.12345678.tmp").write_text("a file")
    (tmp_path / ".out.123.tmp").write_text("of another length")
    (tmp_path / ".out.empty000.tmp").mkdir()
    before = {path.name for path in tmp_path.iterdir()}
    write_folder(tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == before - {".out.empty000.tmp"} | {"out"}
    assert (tmp_path / ".out.abcdefgh.tmp" / "mine").exists() and (tmp_path / "elsewhere" / LOCK).exists()


def test_half_removed_leftovers_go(tmp_path):
    """A run that was killed while it took a leftover away: the lock is the last that goes."""
    folder = tmp_path / ".out.abcdefgh.tmp"
    folder.mkdir()
    (folder / LOCK).touch()
    write_folder(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def make_many(path):
    for _ in range(2000):
        with hidden_folder(path) as folder:
            (folder / "x").touch()


def take_away_again_and_again(path):
    while True:
        take_away_leftovers(path)


def test_a_folder_that_has_no_lock_yet_is_made_again_when_another_run_takes_it_away(tmp_path):
    """Once a chmod stood between the folder's making and its locking, outside the retry: one of the makers failed."""
    context = multiprocessing.get_context("fork")
    path = tmp_path / "out"
    takers = [context.Process(target=take_away_again_and_again, args=(path,), daemon=True) for _ in range(2)]
    makers = [context.Process(target=make_many, args=(path,)) for _ in range(2)]
    for process in takers + makers:
        process.start()
    for process in makers:
        process.join()
    for process in takers:
        process.kill()
    assert [process.exitcode for process in makers] == [0, 0]


def test_a_trial_takes_no_folder_away_that_another_run_needs(tmp_path, monkeypatch):
    """Runs that begin together, as the shards of one job, try the same new folder."""
    removed = []
    monkeypatch.setattr(Path, "rmdir", lambda folder: removed.append(folder))
    try_output(tmp_path / "new" / "out")
    assert removed == []


def test_long_names(tmp_path):
    for name in ("x" * 250, "名" * 84):
        write_folder(tmp_path / name)
        assert (tmp_path / name / "x").exists()
    with pytest.raises(FastMTPError, match="choose a shorter name"):
        try_output(tmp_path / ("x" * 300))


def test_trying_leaves_nothing(tmp_path):
    try_output(tmp_path / "not" / "there" / "yet")
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_another_run_finished_meanwhile_is_not_overwritten(tmp_path):
    path = tmp_path / "rows.jsonl"
    with pytest.raises(FastMTPError, match="already exists"), write_rows(path) as file:
        file.write("ours")
        path.write_text("theirs")
    assert path.read_text() == "theirs" and [p.name for p in tmp_path.iterdir()] == ["rows.jsonl"]


# Each with inputs that are not there: the place is tried before anything is read.
VERBS = {
    "export": lambda out: export_full("no", out),
    "export --draft_only": lambda out: export_draft("no", out),
    "graft": lambda out: graft("no", out, donor=str(TINY)),
    "clean": lambda out: clean(["no"], out),
    "mix": lambda out: mix(["no"], out),
    "vocab": lambda out: vocab(["no"], "no", out),
    "distill": lambda out: distill("no", "no", out),
    "simulate": lambda out: simulate("no", [], "no", output_dir=out),
    "report": lambda out: report(["no"], out),
}


@pytest.mark.parametrize("verb", VERBS)
def test_the_place_is_tried_before_the_work(verb, tmp_path):
    (tmp_path / "file").write_text("x")
    for out in (tmp_path / "file" / "out", tmp_path / "file" / "deep" / "out", tmp_path / ("x" * 300), "/proc/out"):
        with pytest.raises(FastMTPError) as error:
            VERBS[verb](str(out))
        message = str(error.value)
        assert message.startswith(str(out)) and "cannot be written" in message and "\n" not in message, message
        assert "; " in message and ".tmp" not in message, message
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
