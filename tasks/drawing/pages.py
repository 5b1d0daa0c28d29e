"""HTML pages from the templates in this folder; everything that a page is given is escaped."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

_ENVIRONMENT = Environment(
    loader=FileSystemLoader(Path(__file__).parent),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
)


def render(template: str, **values: Any) -> str:
    """The page of `{template}.html.jinja`. Raises jinja2.UndefinedError for a value that it misses."""
    return _ENVIRONMENT.get_template(f"{template}.html.jinja").render(**values)


def as_url(png: bytes) -> str:
    """The bytes of a PNG as an address that needs no further request."""
    return "data:image/png;base64," + base64.b64encode(png).decode()
