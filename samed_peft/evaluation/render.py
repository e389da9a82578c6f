"""Render the package's Jinja templates; each value in them is escaped unless it was rendered here."""

import functools
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from samed_peft.io import read_text

_TEMPLATES = Path(__file__).parent / "templates"


@functools.cache
def _environment() -> Environment:
    return Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )


def render(template: str, **values: Any) -> Markup:
    """A template's text with these values."""
    return Markup(_environment().get_template(template).render(values))


def asset(name: str) -> Markup:
    """The text of a style sheet or script; its line ends are the same on every system, as a page names its hash."""
    return Markup(read_text(_TEMPLATES / name))
