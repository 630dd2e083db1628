"""Documents are Jinja templates, each in the folder `templates` beside the module that fills it in.

In a page (`*.html.j2`) every value is escaped, but for the pictures, which are marked `safe`. In Markdown a value that
users chose goes through the filter `md`.
"""

from pathlib import Path
from typing import Any

from .table import escape, markdown


def render(module: str, name: str, **values: Any) -> str:
    """The text of a template; it ends in one newline.

    Args:
        module: `__file__` of the module that fills it in.
        name: the template's file, without `.j2`.
        values: what it uses; a name that is missing here raises `jinja2.UndefinedError`.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape

    environment = Environment(
        loader=FileSystemLoader(Path(module).parent / "templates"),
        autoescape=select_autoescape(["html.j2"]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["md"] = escape
    environment.filters["markdown"] = markdown
    return environment.get_template(f"{name}.j2").render(values).rstrip("\n") + "\n"
