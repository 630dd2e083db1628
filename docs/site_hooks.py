"""What the site shows that no page holds: files beside docs/ that pages link to, and tables made from the code.

mkdocs calls the functions named `on_*` (mkdocs.yml, `hooks`). A link from a page to a file of the repository outside
docs/ leads, on the site, to a page below source/ that shows this file. Where a page has `<!-- made from the code: NAME
-->`, the text of `GENERATED[NAME]` is put.
"""

import argparse
import os
import re
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

from swift_fastmtp.cli import VERBS
from swift_fastmtp.method.config import FastMTPConfig
from swift_fastmtp.options import add_options

ROOT = Path(__file__).parent.parent
LINK = re.compile(r"(\]\()(?!https?:|mailto:|#)([^)#\s]+)")
MARK = re.compile(r"<!-- made from the code: (\w+) -->")
# A title as vLLM's issues have them, which is no link: # [Bug][CPU] ...
REPORT = re.compile(r"^# \[(.*?)\]\[(.*?)\]")
LANGUAGES = {".py": "python", ".yaml": "yaml", ".sh": "bash", ".json": "json"}


def on_files(files: Files, config: Any) -> Files:
    """Adds a page for each file outside docs/ that a page links to, and for those that such a page links to."""
    waiting = [ROOT / "docs" / file.src_uri for file in files.documentation_pages()]
    while waiting:
        page = waiting.pop()
        if page.suffix != ".md":
            continue
        for _, target in LINK.findall(page.read_text(encoding="utf-8")):
            path = _linked(page, target)
            uri = _uri(path) if path else ""
            if path and uri.startswith("source/") and not files.get_file_from_path(uri):
                files.append(_shown(config, path, uri))
                waiting.append(path)
    return files


def on_page_markdown(markdown: str, page: Any, files: Files, **_: Any) -> str:
    """Turns links that lead out of docs/, and puts in what is made from the code."""
    markdown = MARK.sub(lambda match: GENERATED[match[1]](), markdown)
    markdown = REPORT.sub(r"# \\[\1\\]\\[\2\\]", markdown)
    uri = page.file.src_uri
    path = ROOT / uri.removeprefix("source/") if uri.startswith("source/") else ROOT / "docs" / uri
    if path.suffix != ".md" or not path.exists():
        return markdown  # a page that shows a file as it is

    def turned(match: re.Match[str]) -> str:
        target = _linked(path, match[2])
        shown = _uri(target) if target else None
        if not shown or not files.get_file_from_path(shown):
            return match[0]  # mkdocs says so
        return match[1] + os.path.relpath(shown, Path(uri).parent).replace(os.sep, "/")

    return LINK.sub(turned, markdown)


def _linked(page: Path, target: str) -> Path | None:
    path = Path(os.path.normpath(page.parent / target))
    return path if path.exists() and path.is_relative_to(ROOT) else None


def _uri(path: Path) -> str:
    """Where the site has a file of the repository."""
    if path.is_relative_to(ROOT / "docs") and not path.is_dir():
        return path.relative_to(ROOT / "docs").as_posix()
    name = path.relative_to(ROOT).as_posix()
    return f"source/{name}" if path.suffix == ".md" else f"source/{name}.md"


def _shown(config: Any, path: Path, uri: str) -> File:
    name = path.relative_to(ROOT).as_posix()
    if path.is_dir():
        rows = [f"* `{each.name}`" for each in sorted(path.iterdir()) if not each.name.startswith((".", "__"))]
        text = "\n".join((f"# {name}/", "", *rows))
    else:
        text = path.read_text(encoding="utf-8")
        if path.suffix != ".md":
            text = f"# {name}\n\n````{LANGUAGES.get(path.suffix, 'text')}\n{text.rstrip()}\n````\n"
    return File.generated(config, uri, content=text)


def verbs() -> str:
    """A section for each verb with its options, as `fastmtp VERB --help` prints them."""
    lines = []
    for name, verb in VERBS.items():
        summary = str(verb.run.__doc__).partition("\n")[0]
        lines += [f"## fastmtp {name}", "", f"{summary[0].upper()}{summary[1:]}.", ""]
        options = Options()
        for place in verb.places:
            add_options(options, place, verb.words, verb.names)
        if options.rows:
            lines += ["| option | takes | |", "|---|---|---|", *options.rows, ""]
    return "\n".join(lines)


class Options(argparse.ArgumentParser):
    """What `add_options` gives a parser, as the rows of a table."""

    def __init__(self) -> None:
        self.rows: list[str] = []
        super().__init__(add_help=False)

    def add_argument(self, name: str, **settings: Any) -> argparse.Action:  # type: ignore[override]
        """Keeps the row as well."""
        shown = f"`{name if name.startswith('-') else settings['metavar']}`"
        if settings.get("required") or not name.startswith("-"):
            shown += " (required)"
        self.rows.append(f"| {shown} | {_takes(settings)} | {_cell(settings['help'].replace('%%', '%'))} |")
        return super().add_argument(name, **settings)


def _takes(settings: dict[str, Any]) -> str:
    if "choices" in settings:
        return ", ".join(f"`{each}`" for each in settings["choices"])
    if settings.get("action") == "store_true":
        return ""
    kind = {"int": "integer", "str": "text"}.get(settings["type"].__name__, settings["type"].__name__.strip("_"))
    return f"{kind}, several" if "nargs" in settings else kind


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


def knobs() -> str:
    """The table of `FastMTPConfig`'s fields."""
    lines = ["| knob | variable | default | |", "|---|---|---|---|"]
    for f in fields(FastMTPConfig):
        default = str(f.default) or '""'
        lines.append(f"| `fastmtp_{f.name}` | `FASTMTP_{f.name.upper()}` | `{default}` | {_cell(f.metadata['help'])} |")
    return "\n".join(lines)


GENERATED: dict[str, Callable[[], str]] = {"verbs": verbs, "knobs": knobs}
