"""What every page has in common: its template's environment, its style, and that it appears whole or not at all."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from galenic import __version__
from galenic.runtime import atomic_path

HERE = Path(__file__).parent


def render(template: str, filters: dict[str, Callable[..., str]], **content: Any) -> str:
    """Returns a page, every value in it escaped unless it is `Markup`.

    Args:
        template: file in this folder.
        filters: name -> function, for the template.
        content: the template's values; one that is missing is an error.
    """
    environment = Environment(
        loader=FileSystemLoader(HERE, encoding="utf-8"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= filters
    style = Markup((HERE / "style.css").read_text(encoding="utf-8"))
    return environment.get_template(template).render(style=style, version=__version__, **content)


def write(file: Path, page: str) -> None:
    """Writes a page, atomically."""
    with atomic_path(file) as temporary:
        temporary.write_text(page, encoding="utf-8")
