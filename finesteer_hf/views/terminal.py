"""Where steering acted, for a terminal: tokens on a coloured background, or with bars below where there is no colour."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.style import Style
from rich.table import Table
from rich.text import Text

from finesteer_hf.views.by_token import SteeredTokens
from finesteer_hf.views.token_text import shown


# From grey to orange, in even steps of lightness: black text is readable on all of them (contrast 6.6 and more), they
# stand out on black and on white, and they differ in lightness as well as in hue.
RAMP = ("#919191", "#a0937f", "#af956c", "#bf9857", "#d09b3e", "#e6a31e", "#f7b733", "#ffcb52")
BARS = "▁▂▃▄▅▆▇█"


def step(share: float, full: float) -> int:
    """The step of a share, 1 to `len(RAMP)` in even steps up to `full`; 0 only where the share is 0."""
    # Shares are float32: a step ends where it says, not a rounding error before.
    exact = round(share / full * len(RAMP), 5)
    return 0 if share <= 0 else min(max(math.ceil(exact), 1), len(RAMP))


class TokensInTerminal:
    """A rich renderable of a view: the tokens, a legend, the gates, the sites.

    Colours where the console has them. Without (a pipe, `NO_COLOR`), a line of bars stands below each line of tokens,
    and `Q` below the query.

    Args:
        view: what `steering_by_token` returned.
        full: the share that gets the last colour; by default the largest one in the view.

    Example:
        >>> rich.print(TokensInTerminal(steering_by_token(model, tokenizer, "Bats are")))
    """

    def __init__(self, view: SteeredTokens, full: float | None = None) -> None:
        self.view = view
        self.full = full or view.deepest_colour

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        coloured = console.color_system is not None and not console.no_color
        prompt = range(self.view.prompt_length)
        answer = range(self.view.prompt_length, len(self.view.tokens))
        for name, part in (("prompt", prompt), ("answer", answer)):
            if part:
                yield Text(name, style="bold")
                for line in self._lines(part, options.max_width):
                    yield from self._coloured(line) if coloured else self._with_bars(line)
                yield Text()
        yield self._legend(coloured)
        yield from self._readings()
        if self.view.sites:
            yield Text()
            yield self._sites()

    def _lines(self, part: range, width: int) -> Iterator[list[int]]:
        """Tokens line by line: broken after their own line breaks, and where the terminal ends."""
        line: list[int] = []
        used = 0
        for token in part:
            cells = cell_len(shown(self.view.tokens[token]))
            if line and used + cells > width:
                yield line
                line, used = [], 0
            line.append(token)
            used += cells
            if "\n" in self.view.tokens[token]:
                yield line
                line, used = [], 0
        if line:
            yield line

    def _coloured(self, line: list[int]) -> Iterator[Text]:
        text = Text(no_wrap=False, overflow="fold")
        for token in line:
            text.append(shown(self.view.tokens[token]), self._style(token))
        yield text

    def _style(self, token: int) -> Style:
        query = token == self.view.query
        level = step(float(self.view.largest[token]), self.full)
        look = Style(bold=query, underline=query)
        return look + Style(color="#000000", bgcolor=RAMP[level - 1]) if level else look

    def _with_bars(self, line: list[int]) -> Iterator[Text]:
        tokens = [shown(self.view.tokens[token]) for token in line]
        yield Text("".join(tokens), overflow="fold")
        below = ""
        for token, text in zip(line, tokens, strict=True):
            level = step(float(self.view.largest[token]), self.full)
            bars = (BARS[level - 1] if level else " ") * cell_len(text)
            below += "Q" + bars[1:] if token == self.view.query else bars
        yield Text(below.rstrip() or " ", overflow="fold")

    def _legend(self, coloured: bool) -> Text:
        text = Text("|delta| / |h|: 0 ")
        for level, bar in enumerate(BARS):
            text.append("  " if coloured else bar, Style(bgcolor=RAMP[level]) if coloured else None)
        text.append(f" {self.full:.3g}; ")
        text.append("query", Style(bold=True, underline=True) if coloured else None)
        text.append(": decides the gate" if coloured else " (Q): decides the gate")
        return text

    def _readings(self) -> Iterator[Text]:
        if not self.view.adapters:
            yield Text("No adapter acts.")
        for reading in self.view.adapters:
            yield Text(reading.in_words())

    def _sites(self) -> Table:
        table = Table(box=None, pad_edge=False, header_style="bold")
        table.add_column("site")
        for name in ("largest", "mean of prompt", "mean of answer"):
            table.add_column(name, justify="right")
        for site, column in zip(self.view.sites, self.view.shares.T, strict=True):
            parts = column[: self.view.prompt_length], column[self.view.prompt_length :]
            table.add_row(str(site), _number(column.max()), *(_number(p.mean()) if len(p) else "-" for p in parts))
        return table


def _number(share: torch.Tensor) -> str:
    return f"{float(share):.3f}"
