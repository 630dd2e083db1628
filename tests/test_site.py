"""The site: it builds without a warning, has every page in its order, and shows what the code has.

A broken link, a missing anchor or a page that is not in the nav is a warning of mkdocs; `--strict` makes it an error.
"""

import ast
import re
import subprocess
import sys
from dataclasses import fields

import pytest
from helpers.paths import ROOT

from swift_fastmtp.cli import VERBS
from swift_fastmtp.method.config import FastMTPConfig

PACKAGE = ROOT / "swift_fastmtp"


def test_lists_are_indented_as_the_site_reads_them():
    """What follows in a list's item has four spaces; GitHub takes three, the site does not."""
    pages = [*(ROOT / "docs").rglob("*.md"), *PACKAGE.rglob("*.md")]
    for page in pages:
        wrong = re.findall(r"^ {2,3}(?:```|\* |\d+\. |\|).*", page.read_text(encoding="utf-8"), re.M)
        assert wrong == [], page


def literals():
    """The texts of the package, adjacent ones joined; what an f-string fills in stands between two of them."""
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield " ".join(node.value.split())


def test_troubleshooting_shows_lines_that_the_program_prints():
    page = (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8")
    known = "\n".join(literals())
    lines = re.findall(r"^ *```text\n(.*?)\n *```", page, re.S | re.M)
    assert len(lines) > 10
    for line in lines:
        for piece in line.split("..."):
            assert piece.strip(" ;:") in known, piece


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-5000:]
    return folder


@pytest.mark.matrix
def test_builds_without_a_warning(site):
    pages = {page.relative_to(ROOT / "docs").with_suffix("").as_posix() for page in (ROOT / "docs").rglob("*.md")}
    built = {page.relative_to(site).with_suffix("").as_posix() for page in site.rglob("*.html")}
    assert {page for page in pages if not page.endswith("README")} <= built
    assert (site / "source/swift_fastmtp/families/index.html").exists()  # a page outside docs/


@pytest.mark.matrix
def test_reference_has_every_verb_option_and_knob(site):
    verbs = (site / "verbs.html").read_text(encoding="utf-8")
    for name in VERBS:
        assert f'id="fastmtp-{name}"' in verbs
        printed = subprocess.run(
            [sys.executable, "-m", "swift_fastmtp.cli", name, "--help"], capture_output=True, text=True, check=True
        ).stdout
        options = set(re.findall(r"^  (--\w+)", printed, re.M))
        section = verbs.split(f'id="fastmtp-{name}"')[1].split("<h2")[0]
        assert (
            options == set(re.findall(r"<code>(--\w+)</code>", section.split("<tbody>")[-1])) or name == "plugin-path"
        )
    knobs = (site / "knobs.html").read_text(encoding="utf-8")
    assert all(f"<code>fastmtp_{field.name}</code>" in knobs for field in fields(FastMTPConfig))


@pytest.mark.matrix
def test_nothing_is_loaded_from_elsewhere(site):
    """It is read without a network."""
    for page in site.rglob("*.html"):
        assert not re.findall(r'<(?:script|link|img)[^>]* (?:src|href)="https?://', page.read_text(encoding="utf-8"))
