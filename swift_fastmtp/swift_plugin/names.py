"""The names of `swift sft`'s arguments, read from ms-swift's and transformers' source and not imported.

Importing ms-swift takes ten seconds; a misspelt key of a plan should be refused at once, and not hours later when
training begins. What is read may be more than what one command takes, never less (`tests/test_run.py`).
"""

import ast
from importlib.util import find_spec
from pathlib import Path

from ..errors import FastMTPError


def argument_names() -> list[str]:
    """Every name that an arguments class of ms-swift has, sorted.

    Raises `FastMTPError` if ms-swift is not installed.
    """
    swift = _folder("swift")
    if swift is None:
        raise FastMTPError("`swift sft` is not installed: pip install 'swift_fastmtp[train]'")
    files = [*swift.rglob("*arg*.py"), *swift.rglob("*arg*/*.py")]
    transformers = _folder("transformers")
    if transformers is not None:
        files += transformers.glob("training_args*.py")
    return sorted({name for file in files for name in _fields(file)})


def _folder(package: str) -> Path | None:
    spec = find_spec(package)
    places = spec.submodule_search_locations if spec else None
    return Path(next(iter(places))) if places else None


def _fields(file: Path) -> set[str]:
    """The annotated names of a file's classes."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ClassDef):
            lines = [line for line in node.body if isinstance(line, ast.AnnAssign)]
            names |= {line.target.id for line in lines if isinstance(line.target, ast.Name)}
    return names
