"""Render the Jinja templates of reports; every value in them is escaped unless it was rendered before."""

import functools
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from samed_peft.errors import printable
from samed_peft.evaluation import tables
from samed_peft.io import read_text
from samed_peft.metrics import METRICS, format_metric

_TEMPLATES = Path(__file__).parent / "templates"


@functools.cache
def _environment(*, is_markdown: bool) -> Environment:
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=not is_markdown,
        finalize=_escaped if is_markdown else _visible,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals |= {"table": _table, "tables": tables, "metrics": METRICS, "format_metric": format_metric}
    return environment


def _escaped(value: Any) -> Any:
    return value if isinstance(value, Markup) else tables.markdown_text(value)


def _visible(value: Any) -> Any:
    return printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _table(*columns: Any, **options: Any) -> Markup:
    return Markup(tables.markdown_table(*columns, **options))


def render(template: str, **values: Any) -> Markup:
    """The text that a template (.md.jinja for Markdown, otherwise markup) makes of these values."""
    environment = _environment(is_markdown=template.endswith(".md.jinja"))
    return Markup(environment.get_template(template).render(values).strip() + "\n")


def asset(name: str) -> Markup:
    """The text of a style sheet or script, with the same line ends on every system, as pages name its hash."""
    return Markup(read_text(_TEMPLATES / name))
