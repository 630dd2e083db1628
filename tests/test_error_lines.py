"""Every error that users read is one line, and begins with what it is about: a file, a row, a key, a knob, a flag.

Read from the source, so that no message is left out; one that a function or a constant holds counts as filled in. What
cannot be seen there, other tests hold: which row, which key, which of two files.
"""

import ast
import re

import pytest
from helpers.paths import ROOT

from swift_fastmtp.errors import MAX_LINE, FastMTPError

PACKAGE = ROOT / "swift_fastmtp"
# Among the first words stands a name: a value that is filled in, a flag, a knob, a key or a file.
NAMES = re.compile(r"[^;]{0,60}?(\{\}|--\w|fastmtp_\w|`\w|^[\w. ]+: |\w\.jsonl?\b)")
# Messages without one → why.
NAMELESS = {
    "its counts contradict each other": "stands behind the file and the line that hold the counts",
    "the model's chat template writes tool calls otherwise": "stands behind the row; the model is the run's only one",
    "the head, its optimi": "about memory that is not there, with the flag that says how much there is",
    "the files have no run": "about all files of the command line together",
    "no results file; name": "none was named",
    "no answer is longer than one token": "about all rows together",
    "a counting process was killed": "the system did not say which, or why",
}


def subclasses(trees):
    """FastMTPError, and every class of the package that is made of it."""
    names = {"FastMTPError"}
    for _ in range(3):
        for tree in trees.values():
            for node in ast.walk(tree):
                if isinstance(node, ast.ClassDef) and names & {ast.unparse(base) for base in node.bases}:
                    names.add(node.name)
    return names


def template(node):
    """The text of a message, with {} for everything that is filled in; of two texts, one on which the other ends."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(template(value) for value in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return template(node.left) + template(node.right)
    return "{}"


def messages():
    """(where, text) of every error that the package makes of a text."""
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in sorted(PACKAGE.rglob("*.py"))}
    classes = subclasses(trees)
    for path, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and node.args and ast.unparse(node.func) in classes:
                yield f"{path.relative_to(ROOT)}:{node.lineno}", template(node.args[0])


MESSAGES = dict(messages())


def test_every_error_begins_with_what_it_is_about():
    assert len(MESSAGES) > 200
    nameless = {where: text for where, text in MESSAGES.items() if not NAMES.match(text)}
    unexplained = {where: text for where, text in nameless.items() if not text.startswith(tuple(NAMELESS))}
    assert unexplained == {}
    stale = [start for start in NAMELESS if not any(text.startswith(start) for text in nameless.values())]
    assert stale == []


def test_every_error_is_one_line():
    assert [where for where, text in MESSAGES.items() if "\n" in text] == []


@pytest.mark.parametrize("name", ["a\nb", "a\r\nfastmtp: error: b", "\x1b[31m", "x" * 10_000])
def test_whatever_is_filled_in(name):
    message = str(FastMTPError(f"{name}: not found"))
    assert len(message.splitlines()) == 1 and message.isprintable() and len(message) <= MAX_LINE + 5
    assert message.endswith(": not found")


@pytest.mark.parametrize("text", ["{}: not found", "--sizes: too many", "`history` must be a list", "of plan.json"])
def test_a_name(text):
    assert NAMES.match(text)


@pytest.mark.parametrize("text", ["something went wrong", "bad input; see {}", "this is not possible; drop it"])
def test_no_name(text):
    assert not NAMES.match(text)
