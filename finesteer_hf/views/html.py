"""Where steering acted, as HTML: one snippet with its own style, no script, nothing from elsewhere."""

from __future__ import annotations

from html import escape

from finesteer_hf.views.by_token import SteeredTokens
from finesteer_hf.views.token_text import shown


# A token's share `--s`, 0 to 1, is the opacity of its background and the thickness of the line below it: the line says
# the same without colour, in print and where the system forces its own colours.
STYLE = """
.finesteer-tokens { --fs-hot: 86 180 233; --fs-paper: #fff; --fs-ink: #1f2328; --fs-soft: #59636e; --fs-line: #d9dce1;
  color-scheme: light dark; margin: 0; padding: 1rem; border: 1px solid var(--fs-line); border-radius: 10px;
  background: var(--fs-paper); color: var(--fs-ink); font: 15px/1.5 system-ui, sans-serif; }
@media (prefers-color-scheme: dark) { .finesteer-tokens { --fs-hot: 0 98 158; --fs-paper: #15181c; --fs-ink: #f0f2f4;
  --fs-soft: #a4adb7; --fs-line: #343a42; } }
.finesteer-tokens b { display: block; font-size: .8em; color: var(--fs-soft); }
.finesteer-tokens p { margin: 0 0 .7rem; line-height: 2.1; overflow-wrap: anywhere; white-space: pre-wrap;
  font-family: ui-monospace, monospace; }
.finesteer-tokens p span, .finesteer-tokens i { background: rgb(var(--fs-hot) / var(--s, 0)); padding: .2em 0 .1em;
  border-bottom: calc(var(--s, 0) * 4px) solid currentColor; }
.finesteer-tokens p span.query { outline: 2px solid currentColor; outline-offset: 1px; border-radius: 2px; }
.finesteer-tokens i { display: inline-block; width: 1.4em; height: 1em; padding: 0; vertical-align: middle; }
.finesteer-tokens figcaption { font-size: .86em; color: var(--fs-soft); }
.finesteer-tokens figcaption div { margin-bottom: .4rem; }
""".strip()
LEGEND_STEPS = 5


def tokens_html(view: SteeredTokens, full: float | None = None) -> str:
    """A view as an HTML `<figure>` with its `<style>`, for a page or a notebook.

    Light and dark follow `prefers-color-scheme`; each token's title has its number; texts are escaped.

    Args:
        view: what `steering_by_token` returned.
        full: the share that gets the full colour; by default the largest one in the view.
    """
    full = full or view.deepest_colour
    parts = []
    for name, start, stop in (("prompt", 0, view.prompt_length), ("answer", view.prompt_length, len(view.tokens))):
        if stop > start:
            spans = "".join(_span(view, token, full) for token in range(start, stop))
            parts.append(f"<b>{name}</b><p>{spans}</p>")
    scale = "".join(f'<i style="--s:{n / LEGEND_STEPS:g}"></i>' for n in range(1, LEGEND_STEPS + 1))
    legend = f"|delta| / |h|, largest over sites: 0 {scale} {full:.3g}; framed: the query, which decides the gate"
    caption = f"<figcaption><div>{legend}</div>{escape(view.describe())}</figcaption>"
    return f'<figure class="finesteer-tokens"><style>{STYLE}</style>{"".join(parts)}{caption}</figure>'


def tokens_page(view: SteeredTokens, full: float | None = None) -> str:
    """The same as a whole page, for a file; arguments as for `tokens_html`."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>Where steering acted</title></head><body>{tokens_html(view, full)}</body></html>\n"
    )


def _span(view: SteeredTokens, token: int, full: float) -> str:
    share = float(view.largest[token])
    site = view.site_of(token)
    where = "" if site is None else f" at {site}"
    what = "query, " if token == view.query else ""
    title = f"token {token + 1}, {what}share {share:.4g}{where}"
    kind = ' class="query"' if token == view.query else ""
    text = escape(shown(view.tokens[token]))
    # A line break is shown, and breaks the line.
    text += "\n" * view.tokens[token].count("\n")
    return f'<span{kind} style="--s:{min(share / full, 1):.3f}" title="{escape(title)}">{text}</span>'
