"""Tokens in a terminal and as HTML: the right shade for each share, readable without colour, nothing obeyed or fetched."""

from __future__ import annotations

import io
import re
from html import unescape
from html.parser import HTMLParser

import pytest
import torch
from matplotlib.colors import to_rgb
from rich.console import Console

from finesteer_hf.sites import Site
from finesteer_hf.views.by_token import SteeredTokens
from finesteer_hf.views.html import tokens_html, tokens_page
from finesteer_hf.views.terminal import BARS, RAMP, TokensInTerminal, step
from finesteer_hf.views.token_text import shown


def view(tokens, shares, prompt_length=2):
    ids = tuple(range(len(tokens)))
    return SteeredTokens(
        tuple(tokens), ids, prompt_length, (Site("resid_post", 1),), torch.tensor(shares)[:, None], ()
    )


VIEW = view(["What", "?", " <b>", "\x1b[31m", "so", "\n"], [0.0, 0.2, 0.4, 0.8, 0.01, 0.8])


def printed(seen, width=80, **kwargs):
    file = io.StringIO()
    Console(file=file, width=width, **kwargs).print(TokensInTerminal(seen))
    return file.getvalue()


def test_steps_are_even_and_only_zero_is_nothing():
    assert [step(share, 0.8) for share in (0.0, 1e-9, 0.1, 0.11, 0.8, 2.0)] == [0, 1, 1, 2, 8, 8]
    assert len(RAMP) == len(BARS) == 8


def test_the_colours_grow_lighter_under_black_text():
    light = [0.2126 * r**2.2 + 0.7152 * g**2.2 + 0.0722 * b**2.2 for r, g, b in map(to_rgb, RAMP)]
    assert light == sorted(light) and min(light) > 0.25, "black text has a contrast above 6"


def test_a_terminal_with_colours_has_one_for_each_share():
    text = printed(VIEW, force_terminal=True, color_system="truecolor")
    for token, share in zip(VIEW.tokens, VIEW.largest.tolist(), strict=True):
        level = step(share, 0.8)
        red, green, blue = (int(RAMP[level - 1][i : i + 2], 16) for i in (1, 3, 5))
        colour = f"48;2;{red};{green};{blue}m" if level else ""
        assert f"{colour}{shown(token)}" in text
    assert "\x1b[31m" not in text, "a token's control characters reach no terminal"
    assert re.search(r"\x1b\[1;4;[0-9;]*m\?", text), "the query is bold and underlined"


def test_without_colours_bars_stand_below_the_tokens():
    lines = printed(VIEW).splitlines()
    assert lines[:3] == ["prompt", "What?", "    Q"]
    assert lines[4:7] == ["answer", " <b>\\u001b[31mso↵", "▄" * 4 + "█" * 10 + "▁▁█"]
    assert not any("\x1b" in line for line in lines)
    assert "0 ▁▂▃▄▅▆▇█ 0.8; query (Q)" in lines[8]


def test_lines_are_as_wide_as_the_terminal_and_bars_follow():
    seen = view([f"word{n} " for n in range(9)], [0.5] * 9)
    lines = printed(seen, width=20).splitlines()
    assert lines[3:6] == ["", "answer", "word2 word3 word4 "] and max(map(len, lines)) <= 20
    assert lines[6].rstrip() == "█" * 18


def test_a_view_without_an_answer_or_an_adapter_says_so():
    seen = SteeredTokens(("hello",), (1,), 1, (), torch.zeros(1, 0), ())
    text = printed(seen)
    assert "No adapter acts." in text and "answer" not in text and "site " not in text
    assert "added nothing at any of the 1 tokens" in tokens_html(seen)


class Reader(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.open, self.titles, self.text = [], [], [], ""

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        if tag not in ("meta",):
            self.open.append(tag)
        self.titles += [value for name, value in attributes if name == "title"]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "span":
            self.text += data


def test_html_has_each_number_escapes_texts_and_fetches_nothing():
    reader = Reader()
    reader.feed(tokens_page(VIEW))
    assert reader.open == [] and not {"script", "link", "img", "iframe"} & set(reader.tags)
    assert reader.text == "What? <b>\\u001b[31mso↵\n"
    assert reader.titles == [
        "token 1, share 0",
        "token 2, query, share 0.2 at resid_post[1]",
        "token 3, share 0.4 at resid_post[1]",
        "token 4, share 0.8 at resid_post[1]",
        "token 5, share 0.01 at resid_post[1]",
        "token 6, share 0.8 at resid_post[1]",
    ]
    text = tokens_html(VIEW)
    assert "&lt;b&gt;" in text and "url(" not in text and "@import" not in text
    assert "prefers-color-scheme: dark" in text and VIEW.describe() in unescape(text)
    assert re.findall(r"<span[^>]*--s:([\d.]+)", text) == ["0.000", "0.250", "0.500", "1.000", "0.012", "1.000"]
    assert text.count('class="query"') == 1


@pytest.mark.parametrize(("full", "first"), [(None, "1.000"), (1.6, "0.500"), (0.4, "1.000")])
def test_views_can_share_a_scale(full, first):
    assert re.findall(r'--s:([\d.]+)" title', tokens_html(VIEW, full))[3] == first
