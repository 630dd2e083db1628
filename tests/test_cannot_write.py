"""What could not be written, and why: each error with its own way out, of the file that it is about."""

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.paths import TINY

from swift_fastmtp.checkpoint.mtp_tensors import save_tensors
from swift_fastmtp.errors import FastMTPError, cannot_write
from swift_fastmtp.files import provenance as module
from swift_fastmtp.files.provenance import git_revision, provenance
from swift_fastmtp.files.rows import write_rows
from swift_fastmtp.files.staging import new_folder, try_output, write_json
from swift_fastmtp.simulate.simulate import simulate

HOW = {
    errno.ENOSPC: "free space",
    errno.EDQUOT: "quota",
    errno.EACCES: "choose another folder",
    errno.EPERM: "choose another folder",
    errno.EROFS: "read-only",
    errno.EFBIG: "ulimit -f",
    errno.ENAMETOOLONG: "shorter name",
    errno.EMFILE: "ulimit -n",
    errno.EIO: "disk",
}


@pytest.mark.parametrize("number", HOW, ids=errno.errorcode.get)
def test_each_error_has_its_own_way_out(number, tmp_path):
    """Space is the matter of two of them only."""
    out = tmp_path / "out"
    with pytest.raises(FastMTPError) as error, new_folder(out) as folder:
        raise OSError(number, os.strerror(number), str(folder / "model.safetensors"))
    message = str(error.value)
    assert (
        message.startswith(f"{out}: cannot be written ({os.strerror(number)}: model.safetensors)")
        and "\n" not in message
    )
    assert HOW[number] in message and ("free space" in message) == (number in (errno.ENOSPC, errno.EDQUOT))
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk(tmp_path):
    """The kernel's own error for it."""
    full = r"No space left on device.*free space"
    with pytest.raises(FastMTPError, match=full) as error, new_folder(tmp_path / "out"), open("/dev/full", "w") as file:
        file.write("x")
    assert str(error.value).startswith(str(tmp_path / "out"))


def test_what_cannot_be_read_is_not_the_outputs_fault(tmp_path):
    with pytest.raises(FastMTPError) as error, new_folder(tmp_path / "out"):
        shutil.copyfile(tmp_path / "gone.json", tmp_path / "x")
    assert str(error.value).startswith(f"{tmp_path / 'gone.json'}: cannot be read (No such file or directory)")
    with pytest.raises(FastMTPError) as error, write_rows(tmp_path / "rows.jsonl"):
        raise PermissionError(errno.EACCES, "Permission denied", "/data/source.jsonl")
    assert str(error.value).startswith("/data/source.jsonl: cannot be read (Permission denied); make it readable")


def test_our_own_errors_pass(tmp_path):
    with pytest.raises(FastMTPError, match=r"^as it was$"), new_folder(tmp_path / "out"):
        raise FastMTPError("as it was")


def test_a_part_of_the_path_is_a_file(tmp_path):
    (tmp_path / "file").write_text("x")
    path = tmp_path / "file" / "out"
    for write in (
        lambda: new_folder(path).__enter__(),
        lambda: try_output(path),
        lambda: write_rows(path).__enter__(),
        lambda: write_json({}, path),
        lambda: save_tensors({"x": torch.zeros(1)}, path),
    ):
        with pytest.raises(FastMTPError) as error:
            write()
        assert "choose another" in str(error.value) and "free space" not in str(error.value), error.value


def test_a_name_that_is_too_long(tmp_path):
    with pytest.raises(FastMTPError, match="choose a shorter name"), new_folder(tmp_path / ("x" * 300)):
        pass


def test_errors_without_a_number(tmp_path):
    """Libraries raise bare `OSError` with a text of several lines."""
    with pytest.raises(FastMTPError) as error, new_folder(tmp_path / "out"):
        raise OSError("Can't load it.\nSorry")
    assert str(error.value) == f"{tmp_path / 'out'}: cannot be written (Can't load it. Sorry)"
    assert "free space" in str(cannot_write("a", ValueError("I/O error: No space left on device (os error 28)")))


@pytest.fixture
def vendored(tmp_path):
    """A user's repository with one commit; `put(PATH)` copies the package there."""
    root = tmp_path / "theirs"
    root.mkdir()
    git(root, "init", "-q")
    git(root, "commit", "-q", "--allow-empty", "-m", "theirs")

    def put(*parts):
        package = root.joinpath(*parts, "swift_fastmtp")
        package.mkdir(parents=True)
        shutil.copyfile(Path(module.__file__).parents[1] / "__init__.py", package / "__init__.py")
        return package

    return root, put


def git(folder, *words):
    who = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    environment = {n: v for n, v in os.environ.items() if not n.startswith("GIT_")}
    command = ["git", "-C", str(folder), *who, *words]
    return subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout.strip()


def test_a_users_repository_is_not_ours(vendored):
    root, put = vendored
    assert git_revision(put(".venv", "lib", "python3.12", "site-packages")) is None
    third_party = put("third_party")
    at_top = put()
    assert git_revision(third_party) is None and git_revision(at_top) is None
    git(root, "add", "-A", ".")
    git(root, "commit", "-q", "-m", "all")
    assert git_revision(third_party) is None


def test_our_own_checkout(vendored, monkeypatch):
    """Its top holds the package, and tracks it; whatever a hook's variables say."""
    root, put = vendored
    package = put()
    git(root, "add", "-A", ".")
    git(root, "commit", "-q", "-m", "ours")
    head = git(root, "rev-parse", "HEAD")
    assert git_revision(package) == head
    monkeypatch.setenv("GIT_DIR", "/nonexistent")
    assert git_revision(package) == head


def test_without_git_there_is_no_revision(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert provenance()["git_revision"] is None


@pytest.mark.matrix
def test_simulate_without_git(tmp_path):
    """It used to stop after all its work."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"messages": [{"role": "user", "content": "one two"}]}\n')
    command = [sys.executable, "-m", "swift_fastmtp.cli", "simulate", "--model", TINY, "--dataset", rows]
    command += ["--max_new_tokens", "4", "--output_dir", tmp_path / "out"]
    environment = {**os.environ, "PATH": str(tmp_path)}
    done = subprocess.run([str(w) for w in command], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert '"git_revision": null' in (tmp_path / "out" / "simulate.json").read_text()


def test_simulate_knows_before_its_work_that_it_cannot_write(tmp_path, monkeypatch):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"messages": [{"role": "user", "content": "one two"}]}\n')
    monkeypatch.setattr("swift_fastmtp.simulate.simulate.make_texts", lambda *_: pytest.fail("worked first"))
    with pytest.raises(FastMTPError, match=r"rows\.jsonl/out/simulate\.json: cannot be written"):
        simulate(str(TINY), [], str(rows), output_dir=str(rows / "out"))
