"""Draw docs/images/one_call.svg: what happens in one steered call, from the prompt to the update.

python benchmarks/pictures/one_call.py
"""

from __future__ import annotations

from html import escape
from pathlib import Path


PICTURE = Path(__file__).resolve().parents[2] / "docs" / "images" / "one_call.svg"
WIDTH, HEIGHT = 880, 330
# A card of its own, so that it reads the same on a light page and on a dark one.
PAPER, INK, QUIET = "#fbfbf9", "#1f2933", "#52606d"
BLUE, GREEN, AMBER, GREY = "#dbeafe", "#d1f2df", "#fdecc8", "#eceff2"
DESCRIPTION = (
    "The prompt runs through the blocks of the model. The state of its last token, read unsteered, is the query. "
    "A gate decides from the query whether to steer, and experts give the vector. Scale times strength times gate "
    "times vector is added to the states of a block, and the model goes on to the answer. "
    "With the gate at 0 the output is the base model's, bit for bit."
)


def box(x: int, y: int, width: int, height: int, fill: str, title: str, *lines: str) -> str:
    """A rounded box, with a bold title and lines of smaller text below it."""
    middle = x + width / 2
    top = y + height / 2 - 9 * len(lines) + 5
    texts = [f'<text x="{middle}" y="{top}" class="title">{escape(title)}</text>']
    texts += [
        f'<text x="{middle}" y="{top + 18 * number}" class="small">{escape(line)}</text>'
        for number, line in enumerate(lines, start=1)
    ]
    shape = f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="9" fill="{fill}" stroke="{INK}"/>'
    return shape + "".join(texts)


def arrow(*points: tuple[int, int]) -> str:
    """A line through the points, with a head at the last one."""
    path = " ".join(f"{x},{y}" for x, y in points)
    return f'<polyline points="{path}" fill="none" stroke="{INK}" stroke-width="1.5" marker-end="url(#head)"/>'


def note(x: int, y: int, text: str) -> str:
    return f'<text x="{x}" y="{y}" class="note">{escape(text)}</text>'


def picture() -> str:
    parts = [
        box(24, 36, 140, 64, GREY, "prompt", "in a batch or alone"),
        box(214, 36, 150, 64, GREY, "blocks 0 to l", "of the base model"),
        box(600, 36, 250, 64, AMBER, "update, at block l", "H + scale · strength · g · v"),
        box(214, 150, 150, 70, BLUE, "query", "last prompt token,", "read unsteered"),
        box(430, 120, 130, 56, GREEN, "gate g", "when: 0 to 1"),
        box(430, 196, 130, 56, GREEN, "vector v", "how: experts"),
        box(660, 196, 130, 56, GREY, "answer", "blocks l+1, ..."),
        arrow((164, 68), (210, 68)),
        arrow((364, 68), (596, 68)),
        arrow((289, 100), (289, 146)),
        arrow((364, 170), (396, 170), (396, 148), (426, 148)),
        arrow((364, 200), (396, 200), (396, 224), (426, 224)),
        arrow((560, 148), (624, 148), (624, 104)),
        arrow((560, 224), (642, 224), (642, 104)),
        arrow((725, 100), (725, 192)),
        note(
            WIDTH // 2,
            288,
            "Gate and vector are computed once, in the pass that reads the prompt; each new token costs one addition.",
        ),
        note(WIDTH // 2, 310, "With g = 0 nothing is added: the output is the base model's, bit for bit."),
    ]
    style = (
        "text{font-family:system-ui,-apple-system,'Segoe UI',Helvetica,Arial,sans-serif;text-anchor:middle}"
        f".title{{font-size:15px;font-weight:600;fill:{INK}}}"
        f".small{{font-size:13px;fill:{INK}}}.note{{font-size:13px;fill:{QUIET}}}"
    )
    head = (
        '<marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" orient="auto">'
        f'<path d="M0,0 L8,4 L0,8 z" fill="{INK}"/></marker>'
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" role="img">'
        f"<title>One steered call</title><desc>{escape(DESCRIPTION)}</desc><style>{style}</style><defs>{head}</defs>"
        f'<rect x="1" y="1" width="{WIDTH - 2}" height="{HEIGHT - 2}" rx="14" fill="{PAPER}" stroke="#cbd2d9"/>'
        + "\n".join(parts)
        + "</svg>\n"
    )


if __name__ == "__main__":
    PICTURE.write_text(picture(), encoding="utf-8")
