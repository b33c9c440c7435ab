"""The templates of the report and of tables: everything but figures is escaped, nothing is loaded from elsewhere."""

import re
from functools import cache
from pathlib import Path
from typing import Any

from harness.charts import Chart, style_class
from harness.drawing import DARK, PALETTE

TEMPLATES = Path(__file__).parent / "templates"


def render(template: str, **values: object) -> str:
    """A template of ``harness/templates`` with these values; one that it lacks is an error."""
    return str(_environment().get_template(template).render(**values))


@cache
def _environment() -> Any:
    import jinja2  # imported late: only HTML needs it

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.globals |= {"light": PALETTE, "dark": DARK}
    environment.filters |= {"code": code, "figure": figure, "style_class": style_class}
    return environment


def figure(chart: Chart) -> str:
    """The chart as an ``svg`` element of the page."""
    from markupsafe import Markup

    from harness.figures import inline_svg

    drawn = inline_svg(chart)  # an element tree written as XML: its texts are escaped
    return Markup(drawn)  # nosec B704


def code(text: str) -> str:
    """Escaped, text between two backticks as code."""
    from markupsafe import Markup, escape

    parts = [escape(part) for part in re.split("`([^`]+)`", text)]
    return Markup("").join(Markup("<code>%s</code>") % part if i % 2 else part for i, part in enumerate(parts))
