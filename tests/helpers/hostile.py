"""Files that somebody made to break us, and a way to run a verb on them in this process.

A model folder is the tiny model, in which one file is replaced; each form of a file is something that people really
have (a pointer, a page of HTML, half a download) or something that an attacker would try (a pipe, a link to itself, a
hundred thousand brackets).
"""

import contextlib
import io
import json
import logging
import os
import signal
import traceback
from pathlib import Path

from helpers.paths import TINY
from swift_fastmtp.cli import main

LONG = "x" * 300
DEEP = b"[" * 100_000
FORMS = {
    "empty": b"",
    "null": b"null",
    "number": b"5",
    "list": b"[]",
    "list of lists": b"[[]]",
    "list of numbers": b"[1, 2]",
    "text": b'"x"',
    "object": b"{}",
    "half": b'{"a": ',
    "html": b"<!DOCTYPE html><html><body>Not found</body></html>",
    "pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4\n",
    "not a number": b'{"a": NaN}',
    "infinite": b"Infinity",
    "huge integer": b'{"a": ' + b"9" * 5000 + b"}",
    "large integer": b"9" * 4000,
    "deep lists": DEEP,
    "deep objects": b'{"a":' * 100_000,
    "deep and closed": b'{"a": ' + b"[" * 900 + b"]" * 900 + b"}",
    "latin-1": '{"a": "ä"}'.encode("latin-1"),
    "byte order mark": b"\xef\xbb\xbf{}",
    "utf-16": '{"a": 1}'.encode("utf-16"),
    "zeros": bytes(4096),
    "half a surrogate": b'{"model_type": "\\ud800"}',
    "line end in a key": b'{"a\\nb": "c\\u001b[31m"}',
}
"""Content of a file."""


def folder_form(path):
    path.mkdir()


def pipe(path):
    os.mkfifo(path)


def loop(path):
    path.symlink_to(path.name)


def nowhere(path):
    path.symlink_to("not-there")


def endless(path):
    path.symlink_to("/dev/zero")


def long_link(path):
    path.symlink_to(LONG)


KINDS = {
    "folder": folder_form,
    "pipe": pipe,
    "loop": loop,
    "dangling link": nowhere,
    "device": endless,
    "300": long_link,
}
"""What else can have a file's name."""


def model_folder(place, without=(), like=TINY):
    """The tiny model, of links to its files."""
    place.mkdir(parents=True)
    for source in like.iterdir():
        if source.is_file() and source.name not in without:
            os.link(source, place / source.name)
    return place


def put(path, form):
    """One form of a file, in the place of what is there."""
    path.unlink(missing_ok=True)
    if callable(form):
        form(path)
    elif isinstance(form, bytes):
        path.write_bytes(form)
    else:
        path.write_text(json.dumps(form))


class SlowError(BaseException):
    """No `Exception`, so that nothing catches it."""


def run(*words, seconds=20):
    """What `fastmtp` with these words comes to, in this process: "" if it ended well or with one line, else why not."""

    def too_slow(*_):
        raise SlowError

    errors = io.StringIO()
    before = signal.signal(signal.SIGALRM, too_slow)
    signal.alarm(seconds)
    # transformers logs names as a file has them; half a surrogate among them cannot be sent from a test worker.
    logging.disable()
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(errors):
            main([str(word) for word in words])
    except SystemExit as end:
        return _judge(end.code)
    except SlowError:
        return f"took more than {seconds} s\n{traceback.format_exc()[-1500:]}"
    except BaseException:
        return traceback.format_exc()[-3000:]
    finally:
        logging.disable(logging.NOTSET)
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    return ""


def _judge(code):
    if code in (None, 0, 1):
        return ""
    if not isinstance(code, str) or not code.startswith("fastmtp: error: "):
        return f"ended with {code!r}"
    if "\n" in code or not code.isprintable():
        return f"more than a line, or control characters: {code!r}"
    return "" if len(code) < 800 else f"{len(code)} characters"


def left_over(folder):
    """Temporary files below a folder."""
    return [path for path in Path(folder).rglob("*") if path.name.endswith(".tmp")]
