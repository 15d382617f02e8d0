"""Untrusted READMEs, and active content in values of a card: nothing hangs, breaks out or reaches a terminal."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import pytest
from computing_time import at_most
from hub_server import HubServer
from huggingface_hub import ModelCard
from small_adapters import small_adapter
from typer.testing import CliRunner

from finesteer_hf.hub.card import code, escape_markdown, write_card
from finesteer_hf.hub.readme import MOST_README_BYTES
from finesteer_hf.hub.repo_card import write_repo_card


START, END = "<!-- finesteer_hf:start", "<!-- finesteer_hf:end -->"
LISTING = "<!-- finesteer_hf:adapters:start -->"
WRITERS = {
    "card": lambda folder: write_card(small_adapter(), folder),
    "root": lambda folder: write_repo_card(small_adapter(), folder, "x"),
}


def yaml_bomb(levels: int = 25) -> str:
    lines = ["a0: &a0 [x, x]", *(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]" for n in range(1, levels))]
    return "\n".join(lines)


def block(content: str) -> bytes:
    return f"---\n{content}\n---\n# Mine\n".encode()


LEFT_ALONE = {
    "a list": block("- a\n- list"),
    "a text": block("just a text"),
    "unclosed": block("a: [unclosed"),
    "tags of numbers": block("tags: 5"),
    "tags in tags": block("tags: [[a], b]"),
    "tags by name": block("tags: {a: 1}"),
    "a base of numbers": block("base_model: 7"),
    "bases in bases": block("base_model: [[org/a]]"),
    "keys of numbers": block("1: a"),
    "keys of lists": block("? [a]\n: b"),
    "nested flow": block("a: " + "[" * 3000 + "]" * 3000),
    "nested block": block("\n".join("  " * depth + "a:" for depth in range(200))),
    "nested without an end": block("a: " + "{" * 3000),
    "aliases": block(yaml_bomb()),
    "itself": block("a: &a\n  b: *a"),
    "a python object": block("a: !!python/object/apply:os.system [ls]"),
    "a date that is none": block("a: 2001-99-99"),
    "an integer of too many digits": block("a: " + "9" * 5000),
    "a long block": block("\n".join(f"k{number}: v" for number in range(10_000))),
    "utf-16": "---\ntags: [a]\n---\n".encode("utf-16"),
    "latin-1": "# Grüße\n".encode("latin-1"),
    "a picture": b"\x89PNG\r\n\x1a\n" + bytes(range(256)),
    "too large": b"x" * (MOST_README_BYTES + 1),
}


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("name", LEFT_ALONE)
def test_a_readme_that_cannot_be_merged_is_left_unchanged(tmp_path: Path, name: str, writer: str) -> None:
    path = tmp_path / "README.md"
    path.write_bytes(LEFT_ALONE[name])
    with at_most(3), pytest.warns(UserWarning, match=r"cannot be merged and was left unchanged"):
        WRITERS[writer](tmp_path)
    assert path.read_bytes() == LEFT_ALONE[name]
    assert [p.name for p in tmp_path.iterdir()] == ["README.md"]


MERGED = {
    "starts": f"{START}\n" * 20_000,
    "starts without line ends": START * 20_000,
    "starts and ends of comments": f"{START} -->" * 15_000,
    "ends": f"{END}\n" * 20_000,
    "listings": f"{LISTING}\n|---|---|---|\n" * 10_000,
    "line ends": "\n" * 900_000,
    "fences": "---\n-" * 100_000,
    "spaces": " " * 900_000 + "---",
    "no end": "---\n" + "a: b\n" * 100_000,
    "metadata of ours that is none": f"{START} {{{{{{ -->\n{END}\n",
    "metadata of ours that is deep": f"{START} {'[' * 100_000} -->\n{END}\n",
    "metadata of ours that is odd": f'{START} {{"tags": 5, "base_model": [[1]]}} -->\n{END}\n',
    "a null byte": "a\0b",
    "empty metadata": "---\n---\n# Mine\n",
}


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("name", MERGED)
def test_slow_readmes_are_merged_at_once_and_do_not_grow(tmp_path: Path, name: str, writer: str) -> None:
    path = tmp_path / "README.md"
    path.write_bytes(MERGED[name].encode())
    with at_most(3), warnings.catch_warnings():
        warnings.simplefilter("error")
        WRITERS[writer](tmp_path)
        first = path.read_bytes()
        WRITERS[writer](tmp_path)
    assert path.read_bytes() == first
    assert ModelCard(first.decode()).data.library_name == "finesteer_hf"


def test_a_leftover_marker_removes_no_text(tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    path.write_text(f"Before.\n{START} {{}} -->\nMine, without an end.\n")
    for seed in range(2):
        write_card(small_adapter(seed), tmp_path)
        text = path.read_text()
        assert "Before." in text and "Mine, without an end." in text and text.count(END) == 1


def test_a_push_into_a_strangers_repo_does_not_hang_on_its_readme(hub_client: HubServer) -> None:
    for name, content in (("org/large", b"x" * (2 << 20)), ("org/utf16", LEFT_ALONE["utf-16"])):
        hub_client.commit(name, {"README.md": content})
        for kwargs in ({}, {"create_pr": True}, {"subfolder": "x"}):
            with at_most(20), pytest.warns(UserWarning, match=r"README.md cannot be merged and was left unchanged"):
                small_adapter().push_to_hub(name, **kwargs)
        files = hub_client.files(name)
        assert files["README.md"] == content and "steering_config.json" in files
        assert files["x/README.md"].startswith(b"---")
    hub_client.commit("org/markers", {"README.md": START * 1000})
    with at_most(20):
        small_adapter().push_to_hub("org/markers", create_pr=True)


# Values


EVIL = [
    "--><script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "[click](javascript:alert(1))",
    "![t](https://evil.example/track.png)",
    "[click][x]",
    "[x]: javascript:alert(1)",
    "`code` ``` fence",
    "a\n\n# Heading\n\n<b>",
    "| cell | another |",
    "# heading",
    "> quote",
    "- item",
    "--- \n---\nbase_model: org/evil",
    f"{END}\n<script>",
    f"x\n{START} {{}} -->",
    "\x1b]52;c;ZXZpbA==\x07\x1b[2J\x9b31m",
    "\u202eesrever",
    "&lt;script&gt;",
    "${{ 7*7 }} {{ 7*7 }} {% include 'x' %}",
]


@pytest.mark.parametrize("evil", EVIL, ids=range(len(EVIL)))
def test_no_value_does_anything_in_a_card(tmp_path: Path, evil: str) -> None:
    share = {"value": 0.5, "low": 0.4, "high": 0.6}
    row = {"dataset": evil, "metric": evil, "steered": share, "unsteered": evil, "p_value": evil}
    fit = {evil: evil, "data": {"id": evil, evil: [evil]}, "evaluation": [row], "report": {evil: {evil: evil}}}
    for base in (f"/home/{evil}", f"local:{evil}", "org/tiny"):
        adapter = small_adapter(base_model_name_or_path=base, fit=fit, lora=[evil])
        path = adapter.save_pretrained(tmp_path / "a") / "README.md"
        first = path.read_text(encoding="utf-8")
        assert adapter.save_pretrained(tmp_path / "a").is_dir() and path.read_text(encoding="utf-8") == first
        front, body = first.split("---\n", 2)[1:]
        assert ModelCard(first).data.to_dict().get("base_model") in (None, "org/tiny") and front
        # Besides our two comments there is no HTML, and no link or image that was not there without the values.
        assert body.count("<!--") == 2
        html = re.sub(r"<!--.*?-->|```python\n.*?\n```|`[^`\n]*`", "", body, flags=re.DOTALL)
        assert "<" not in html and "`" not in html
        links = re.findall(r"!?\[[^\]]*\](?:\([^)]*\)|\[[^\]]*\]|:)", html)
        assert links == (["[](https://huggingface.co/org/tiny)"] if base == "org/tiny" else [])
        headings = [line for line in html.splitlines() if line.startswith("#")]
        assert set(headings) >= {"# CONSTANT steering adapter"} and not any("Heading" in line for line in headings)
        assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e]", first)


def test_the_escaper_leaves_figures_readable() -> None:
    for text in ("45.0% [35.6, 54.8] n=100", "resid_post[4]", "-0.3729", "a_b*c", "p(g < 1)".replace("<", "&lt;")):
        assert escape_markdown(text.replace("&lt;", "<")) == text
    assert escape_markdown("# x") == "\\# x" and escape_markdown("- x") == "\\- x"
    assert escape_markdown("[a](b)") == "[a]&#40;b)" and code("a`b\n|c") == "`a_b _c`"


def test_show_reaches_no_terminal(tmp_path: Path) -> None:
    from finesteer_hf.cli import app

    evil = "\x1b]52;c;ZXZpbA==\x07\x1b[2J\x9b31m\x08\u202e"
    fit = {evil: evil, "data": {"id": evil}, "evaluation": [{"dataset": evil, "metric": evil}], "report": {evil: evil}}
    folder = small_adapter(base_model_name_or_path=evil, fit=fit, lora=[evil]).save_pretrained(tmp_path / "a")
    for options in ([], ["--json"]):
        done = CliRunner().invoke(app, ["show", str(folder), *options])
        assert done.exit_code == 0
        assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e]", done.stdout)
