"""A report as one self-contained HTML file: tables, plots, answers side by side."""

from __future__ import annotations

import base64
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal

from jinja2 import Environment, PackageLoader, StrictUndefined

from finesteer_hf.views.plot_style import Drawn, png


Mark = Literal["good", "bad", ""]


@dataclass(frozen=True)
class Headline:
    """A figure at the top of a report; the mark says whether it is a win or a loss, the detail says it in words."""

    label: str
    value: str
    detail: str = ""
    mark: Mark = ""


@dataclass(frozen=True)
class Table:
    """A table of strings; figures include their n and interval. Marks, one per row, colour the last cells."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    title: str = ""
    note: str = ""
    marks: Sequence[Mark] = ()


@dataclass(frozen=True)
class Plot:
    """A plot of the report, for light and for dark pages.

    Attributes:
        draw: draws it, given `dark`: a function of `views.plots` with its other arguments bound.
        caption: what it is, for all readers; what it shows in numbers is its own alt text.
    """

    draw: Callable[..., Drawn]
    caption: str

    @cached_property
    def light(self) -> Drawn:
        """The plot for a light page."""
        return self.draw(dark=False)

    @property
    def alt(self) -> str:
        """What it shows, for readers who do not see it."""
        return self.light.alt

    @property
    def images(self) -> dict[str, str]:
        """The PNGs for `light` and `dark` pages as text, for data URIs."""
        figures = {"light": self.light.figure, "dark": self.draw(dark=True).figure}
        return {page: base64.b64encode(png(figure)).decode("ascii") for page, figure in figures.items()}


@dataclass(frozen=True)
class Answer:
    """One condition's answer; the mark says whether it is the wanted one."""

    condition: str
    text: str
    mark: Mark = ""
    remark: str = ""


@dataclass(frozen=True)
class Exchange:
    """A prompt and the answers of several conditions."""

    prompt: str
    answers: Sequence[Answer]


@dataclass
class Section:
    """A part of a report."""

    title: str
    text: Sequence[str] = ()
    tables: list[Table] = field(default_factory=list)
    plots: list[Plot] = field(default_factory=list)
    exchanges: list[Exchange] = field(default_factory=list)
    plots_title: str = "Plots"
    exchanges_title: str = "Answers side by side"


@dataclass
class Report:
    """Everything that goes into the file.

    Attributes:
        title: heading.
        lead: what was done, in a sentence or two.
        headline: the few figures that matter.
        sections: in order.
        provenance: versions, seed, time.
    """

    title: str
    lead: str
    headline: list[Headline] = field(default_factory=list)
    sections: list[Section] = field(default_factory=list)
    provenance: dict[str, str] = field(default_factory=dict)


def render_report(report: Report) -> str:
    """The report as HTML; prompts and answers are escaped."""
    environment = Environment(
        loader=PackageLoader("finesteer_hf.views"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    return environment.get_template("report.html.jinja").render(report=report)


def write_report(report: Report, path: str | Path) -> Path:
    """Write the report; an earlier one is replaced only when the new one is complete.

    Args:
        report: its content.
        path: an `.html` file; its folder is created.

    Returns:
        The path.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = render_report(report)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".report-")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)
    return path
