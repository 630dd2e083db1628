"""The package as users install it: a wheel with the autoload file, which costs other processes nothing."""

import json
import os
import pkgutil
import re
import subprocess
import sys
import tarfile
import zipfile

import pytest
import yaml
from helpers.paths import ROOT

from swift_fastmtp import __version__
from swift_fastmtp.swift_plugin import autoload

PROBE = (
    "import site, sys; site.addsitedir(sys.argv[1]); import json\n"
    "finders = [f.__name__ for f in sys.meta_path if getattr(f, '__module__', '').startswith('swift_fastmtp')]\n"
    "print(json.dumps([finders, sorted(m for m in sys.modules if m.split('.')[0] in"
    " ('swift', 'torch', 'transformers', 'swift_fastmtp'))]))"
)


def probe(site, **env):
    """What a bare Python process (no other site-packages) has loaded after reading that folder's .pth files."""
    command = [sys.executable, "-I", "-S", "-c", PROBE, str(site)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, **env})
    return done.stdout


def test_wheel_carries_the_autoload_file_and_nothing_foreign(installed):
    names = zipfile.ZipFile(installed[0]).namelist()
    assert {"swift_fastmtp_autoload.pth", "swift_fastmtp_autoload.start"} <= set(names)
    assert "swift_fastmtp/swift_plugin/plugin/fastmtp_plugin.py" in names
    templates = {path.relative_to(ROOT).as_posix() for path in (ROOT / "swift_fastmtp").rglob("*.j2")}
    assert len(templates) > 4 and templates <= set(names)
    assert not [n for n in names if n.startswith(("tests", "examples"))]


@pytest.mark.matrix
def test_archives_for_the_package_index(tmp_path):
    """`twine check` is part of the script, which ends if anything in it fails."""
    dist = tmp_path / "dist"
    subprocess.run([ROOT / ".ci/release", "archives"], env={**os.environ, "DIST": str(dist)}, check=True)
    (wheel,) = dist.glob("*.whl")
    (archive,) = dist.glob("*.tar.gz")
    hooks = {"swift_fastmtp_autoload.pth", "swift_fastmtp_autoload.start"}
    assert hooks <= set(zipfile.ZipFile(wheel).namelist())
    with tarfile.open(archive) as source:
        names = {name.partition("/")[2] for name in source.getnames()}
    assert hooks | {"setup.py", "LICENSE", "swift_fastmtp/swift_plugin/plugin/fastmtp_plugin.py"} <= names


def test_autoload_waits_and_loads_nothing(installed):
    finders, modules = json.loads(probe(installed[1]))
    assert finders == ["_Finder"]
    assert modules == ["swift_fastmtp", "swift_fastmtp.swift_plugin", "swift_fastmtp.swift_plugin.autoload"]


def test_autoload_can_be_switched_off(installed):
    assert json.loads(probe(installed[1], SWIFT_FASTMTP_AUTOLOAD="0"))[0] == []


def test_the_start_file_calls_what_the_pth_file_calls(installed):
    """PEP 829: one `pkg.mod:callable` a line, called without arguments; it takes the place of the .pth of its name."""
    site = installed[1]
    (line,) = (site / "swift_fastmtp_autoload.start").read_text().splitlines()
    assert pkgutil.resolve_name(line) is autoload.install
    module, _, function = line.partition(":")
    pth = (site / "swift_fastmtp_autoload.pth").read_text().strip()
    assert pth == f"import {module} as _; _.{function}()"


def test_importing_the_package_is_cheap():
    code = "import swift_fastmtp, sys; sys.exit('torch' in sys.modules or 'swift' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_version_is_the_same_everywhere():
    setup = re.search(r'version="(.*)"', (ROOT / "setup.py").read_text())[1]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"]
    assert setup == citation == __version__
    assert f"\n## {setup} " in (ROOT / "CHANGELOG.md").read_text()
