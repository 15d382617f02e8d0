"""How plots look: light or dark, in colours that colour-blind people tell apart, with marks that need no colour."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import cycle
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text


class Drawn(NamedTuple):
    """A plot.

    Attributes:
        figure: the figure.
        alt: what it shows, in words and numbers, for readers who do not see it.
    """

    figure: Figure
    alt: str


class Look(NamedTuple):
    """How one of several things in a plot looks: no two share their colour, line and marker."""

    colour: str
    line: Any
    marker: str


_LINES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (1, 1)))
_MARKERS = "osD^vP"


@dataclass(frozen=True)
class Theme:
    """The colours of a plot on a light or a dark page.

    Attributes:
        paper: the background.
        ink: texts and marks.
        grey: axes and reference lines.
        grid: grid lines.
        palette: Okabe and Ito's colours, those that are too close to the paper left out.
    """

    paper: str
    ink: str
    grey: str
    grid: str
    palette: tuple[str, ...]

    def looks(self) -> Iterator[Look]:
        """Looks for things that are told apart, the first ones the furthest."""
        for colour, line, marker in zip(cycle(self.palette), cycle(_LINES), cycle(_MARKERS), strict=False):
            yield Look(colour, line, marker)

    def axes(self, width: float, height: float, rows: int = 1, *, sharex: bool = False) -> tuple[Figure, list[Axes]]:
        """An empty figure of one column of axes; sizes in inches."""
        figure = Figure(figsize=(width, height), layout="constrained", facecolor=self.paper)
        axes = figure.subplots(rows, 1, sharex=sharex, squeeze=False)[:, 0]
        for axis in axes:
            axis.set_facecolor(self.paper)
            axis.spines[["top", "right"]].set_visible(False)
            axis.spines[["left", "bottom"]].set_color(self.grey)
            axis.tick_params(colors=self.ink, labelsize=9)
            axis.grid(axis="y", color=self.grid, linewidth=0.8)
            axis.set_axisbelow(True)
        return figure, list(axes)

    def finish(self, figure: Figure, alt: str) -> Drawn:
        """The plot with all its texts in the ink of the theme, and dollars in names as what they are, not as formulas."""
        for text in figure.findobj(Text):
            text.set_color(self.ink)
            text.set_parse_math(False)
        return Drawn(figure, alt)


# Yellow is too light for lines on white; blue is too dark on a dark page.
_BLUE, _ORANGE, _GREEN, _PURPLE, _SKY, _VERMILION = "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00"
_YELLOW = "#F0E442"
LIGHT = Theme("#ffffff", "#222222", "#767676", "#e6e6e6", (_BLUE, _VERMILION, _GREEN, _ORANGE, _PURPLE, _SKY))
DARK = Theme("#15181c", "#e6e8eb", "#8d969f", "#2f353c", (_SKY, _VERMILION, _GREEN, _ORANGE, _PURPLE, _YELLOW))


def theme(dark: bool) -> Theme:
    """The theme of a page."""
    return DARK if dark else LIGHT


def png(figure: Figure, *, dpi: int = 150) -> bytes:
    """A figure as the bytes of a PNG file."""
    FigureCanvasAgg(figure)
    buffer = io.BytesIO()
    # No software version in the metadata: the same figure gives the same bytes.
    figure.savefig(buffer, format="png", dpi=dpi, metadata={"Software": None})
    return buffer.getvalue()
