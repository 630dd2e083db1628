"""The order of the folders: each imports only from those above it, and no modules import each other in a circle.

Tests import from `helpers/`, never from each other.
"""

import ast
import re
from graphlib import TopologicalSorter

from helpers.paths import ROOT

import swift_fastmtp

PACKAGE = ROOT / "swift_fastmtp"
# A line may import from the lines above it; two folders on one line do not import each other.
LAYERS = """
    redaction
    errors
    files
    families
    checkpoint
    method
    model
    data
    vocab
    serving export simulate
    bench swift_plugin
    report
    options
    run
    cli
"""
# `run` makes the other verbs' commands: it needs their options, and the command line hands it the verbs themselves.
LAYER_OF = {}
for number, line in enumerate(LAYERS.split("\n")):
    LAYER_OF.update(dict.fromkeys(line.split(), number))


def name_of(path):
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__").rstrip(".")


MODULES = {name_of(path): path for path in PACKAGE.rglob("*.py")}


def imports_of(module):
    """The modules of this package that a module imports, anywhere in it."""
    path = MODULES[module]
    folder = [] if not module else module.split(".")[: None if path.name == "__init__.py" else -1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.ImportFrom):
            continue
        if node.level:
            parts = folder[: len(folder) - node.level + 1]
        elif (node.module or "").split(".")[0] == PACKAGE.name:
            parts = []
        else:
            continue
        parts += (node.module or "").removeprefix(PACKAGE.name).strip(".").split(".")
        base = ".".join(filter(None, parts))
        for alias in node.names:
            whole = f"{base}.{alias.name}".strip(".")
            found.add(whole if whole in MODULES else base)
    return found - {"", module}


IMPORTS = {module: imports_of(module) for module in MODULES}


def test_every_folder_has_its_place():
    assert {module.split(".")[0] for module in MODULES} - {""} == set(LAYER_OF)


def test_nothing_is_imported_from_below():
    upward = []
    for module, imported in IMPORTS.items():
        for other in imported:
            room, other_room = module.split(".")[0], other.split(".")[0]
            if room not in ("", other_room) and LAYER_OF[other_room] >= LAYER_OF[room]:
                upward.append(f"{module} imports {other}")
    assert upward == []
    assert len(IMPORTS["cli"]) > 10  # the imports were seen at all


def test_no_circles():
    list(TopologicalSorter(IMPORTS).static_order())  # raises CycleError, which names the circle


def test_no_test_imports_another():
    """What two tests need stands in tests/helpers; fixtures of all stand in conftest.py."""
    tests = ROOT / "tests"
    modules = {path.stem for path in tests.rglob("test_*.py")} | {"conftest"}
    assert len(modules) > 50
    wrong = []
    for path in [*tests.rglob("test_*.py"), *(tests / "helpers").glob("*.py"), tests / "conftest.py"]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            imported = []
            if isinstance(node, ast.ImportFrom):
                imported = [node.module or "", *(alias.name for alias in node.names)]
            elif isinstance(node, ast.Import):
                imported = [alias.name for alias in node.names]
            wrong += [f"{path.name}: {name}" for name in imported if name.split(".")[-1] in modules]
    assert wrong == []


def test_public_names():
    """Each is there, and docs/dev.md lists them."""
    page = (ROOT / "docs/dev.md").read_text(encoding="utf-8")
    for name in swift_fastmtp.__all__:
        assert getattr(swift_fastmtp, name).__name__ == name
        assert f"`{name}`" in page


def test_the_places_that_the_docs_name_are_there():
    page = (ROOT / "docs/dev.md").read_text(encoding="utf-8")
    places = re.findall(r"`([\w/]+(?:\.py|/))`", page)
    assert len(places) > 20
    for place in places:
        assert (PACKAGE / place).exists() or (ROOT / place).exists(), place
