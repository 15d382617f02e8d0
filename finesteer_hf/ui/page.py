"""The page itself, in gradio: what is where, and which function answers which control."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import gradio as gr

from finesteer_hf.errors import SteeringError
from finesteer_hf.ui.answers import Pair, Question, answer_pair
from finesteer_hf.ui.gauges import CSS, expert_bars, gate_gauge, panel, progress_bar
from finesteer_hf.ui.own_fit import HOW_TO_WRITE, METHODS, Step, Wish, example_pairs, fit_own
from finesteer_hf.ui.workbench import Workbench
from finesteer_hf.views.html import tokens_html


# What a user can mend is shown as a message; anything else is a bug and keeps its traceback.
MENDABLE = (SteeringError, ValueError, OSError)
MOST_SCALE = 3.0
# Calls that run the model take turns.
RUNS_MODEL: dict[str, Any] = {"concurrency_id": "model", "concurrency_limit": 1}
# Fonts of whoever looks at it: the page fetches nothing.
_FONTS = ("system-ui", "sans-serif")
THEME = gr.themes.Soft(primary_hue="blue", font=_FONTS, font_mono=("ui-monospace", "monospace"))


def taught(function: Callable[..., Any]) -> Callable[..., Any]:
    """Show errors that a user can mend as a message on the page, until it is closed."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except MENDABLE as error:
            raise as_message(error) from error

    return run


def as_message(error: BaseException) -> gr.Error:
    """An error as the page shows it."""
    return gr.Error(str(error), duration=None, title="That did not work", print_exception=False)


def build_page(bench: Workbench) -> gr.Blocks:
    """The page for a model with adapters."""
    with gr.Blocks(title=f"finesteer: {bench.name}", analytics_enabled=False) as page:
        gr.Markdown(f"# finesteer\n`{bench.name}`, unsteered and steered.")
        # A visitor sees the adapters that were there from the start and those that they added.
        mine = gr.State([])
        with gr.Tab("Ask", elem_id="tab-ask"):
            picker = _ask_tab(bench)
        with gr.Tab("Load an adapter", elem_id="tab-load"):
            _load_tab(bench, mine, picker)
        with gr.Tab("Fit your own", elem_id="tab-fit"):
            _fit_tab(bench, mine, picker)
    return page


def _ask_tab(bench: Workbench) -> gr.Dropdown:
    first = next(iter(bench.own), None)
    with gr.Row():
        with gr.Column(scale=1, min_width=260):
            picker = gr.Dropdown(list(bench.own), value=first, label="Adapter", elem_id="adapter")
            scale = gr.Slider(
                0,
                MOST_SCALE,
                value=1.0,
                step=0.05,
                label="Strength",
                info="1 is what the fit chose, 0 is unsteered",
                elem_id="strength",
            )
            with gr.Accordion("More", open=False):
                system = gr.Textbox("", label="System message", lines=2, elem_id="system")
                tokens = gr.Slider(8, 512, value=64, step=8, label="Most tokens of an answer", elem_id="tokens")
        with gr.Column(scale=3):
            question = gr.Textbox(
                "",
                label="Question",
                placeholder="Ask, and press Enter",
                submit_btn="Ask",
                stop_btn="Stop",
                elem_id="question",
            )
            with gr.Row(equal_height=True):
                unsteered = gr.Textbox("", label="Unsteered", lines=4, interactive=False, elem_id="unsteered")
                steered = gr.Textbox("", label="Steered", lines=4, interactive=False, elem_id="steered")
            with gr.Row():
                gate = gr.HTML(_gate_of(bench, first), elem_id="gate", padding=True, container=True)
                experts = gr.HTML(_experts_of(bench, first), elem_id="experts", padding=True, container=True)
            tokens_of = gr.HTML("", elem_id="by-token")
            if examples := bench.examples():
                gr.Examples([[text] for text in examples], [question], label="Try one")
    shown = [unsteered, steered, gate, experts, tokens_of]

    def ask(text: str, name: str | None, factor: float, before: str, most: int) -> Iterator[tuple[Any, ...]]:
        try:
            if name is None:
                raise ValueError("No adapter is loaded. Load one, or fit your own, in the tabs above.")
            adapter = bench.adapter(name)
            for pair in answer_pair(bench, Question(text, name, factor, before, int(most))):
                yield _shown(pair, adapter)
        except MENDABLE as error:
            raise as_message(error) from error

    def again(text: str, *rest: Any) -> Iterator[tuple[Any, ...]]:
        # Moving the slider before the first question is no mistake. Without any yield gradio empties the outputs.
        if text.strip():
            yield from ask(text, *rest)
        else:
            yield tuple(gr.skip() for _ in shown)

    @taught
    def meters(name: str | None) -> tuple[str, str]:
        return _gate_of(bench, name), _experts_of(bench, name)

    inputs = [question, picker, scale, system, tokens]
    asked = question.submit(ask, inputs, shown, show_progress="hidden", **RUNS_MODEL)
    moved = scale.change(again, inputs, shown, show_progress="hidden", trigger_mode="always_last", **RUNS_MODEL)
    chosen = picker.change(meters, [picker], [gate, experts], show_progress="hidden").then(
        again, inputs, shown, show_progress="hidden", **RUNS_MODEL
    )
    question.stop(None, cancels=[asked, moved, chosen])
    return picker


def _shown(pair: Pair, adapter: Any) -> tuple[Any, ...]:
    """What the outputs of a question get: the answers so far, and the rest once it is known.

    At the start the rest is emptied, so that nothing of the last question stands beside this one.
    """
    rest: list[Any] = [gr.skip(), gr.skip(), gr.skip()]
    if pair.reading is not None or not (pair.unsteered or pair.steered):
        rest[:2] = gate_gauge(adapter, pair.reading), expert_bars(adapter, pair.reading)
    if pair.view is not None:
        rest[2] = panel("Where steering acted", tokens_html(pair.view))
    elif not (pair.unsteered or pair.steered):
        rest[2] = ""
    return pair.unsteered, pair.steered, *rest


def _gate_of(bench: Workbench, name: str | None) -> str:
    return "" if name is None else gate_gauge(bench.adapter(name), None)


def _experts_of(bench: Workbench, name: str | None) -> str:
    return "" if name is None else expert_bars(bench.adapter(name), None)


def _load_tab(bench: Workbench, mine: gr.State, picker: gr.Dropdown) -> None:
    what = "Hub id (org/name)" + (", or a folder" if bench.folders else "")
    with gr.Row():
        source = gr.Dropdown([], label="Adapter", info=what, allow_custom_value=True, elem_id="source", scale=3)
        revision = gr.Dropdown(
            [],
            label="Revision",
            info="Branch, tag or commit; empty: main",
            allow_custom_value=True,
            elem_id="revision",
        )
    with gr.Row():
        search = gr.Button("Search the Hub for adapters of this model", elem_id="search")
        load = gr.Button("Load", variant="primary", elem_id="load")
    said = gr.Markdown(elem_id="loaded")

    @taught
    def find() -> tuple[Any, str]:
        found = bench.found_on_hub()
        told = f"Found {len(found)}." if found else "Found none. Type the id of one that you know."
        return gr.update(choices=found), told

    @taught
    def versions(text: str | None) -> Any:
        return gr.update(choices=bench.revisions(text or ""), value=None)

    @taught
    def fetch(text: str | None, version: str | None, own: list[str]) -> tuple[Any, ...]:
        loaded = bench.load(text or "", version)
        own = [*own, loaded.name]
        told = f"Loaded `{loaded.name}`. It is chosen in the tab Ask.{_remarks(loaded.remarks)}"
        return own, gr.update(choices=[*bench.own, *own], value=loaded.name), told

    search.click(find, None, [source, said])
    source.input(versions, [source], [revision])
    load.click(fetch, [source, revision, mine], [mine, picker, said], **RUNS_MODEL)


def _fit_tab(bench: Workbench, mine: gr.State, picker: gr.Dropdown) -> None:
    gr.Markdown(f"{HOW_TO_WRITE} A hundred pairs or more are worth fitting; ten are the least for FINESTEER.")
    pairs = gr.Textbox("", label="Pairs", lines=6, max_lines=12, elem_id="pairs")
    with gr.Row():
        name = gr.Textbox("mine", label="Name", elem_id="own-name")
        method = gr.Dropdown(list(METHODS), value=METHODS[0], label="Method", elem_id="method")
    with gr.Accordion("Prompts to leave alone", open=False):
        general = gr.Textbox(
            "",
            label="One a line; empty: those of the package",
            info="Your own are better.",
            lines=4,
            elem_id="general",
        )
    with gr.Row():
        example = example_pairs(bench)
        fill = gr.Button("Fill in an example", visible=bool(example), elem_id="fill")
        start = gr.Button("Fit", variant="primary", elem_id="fit")
        stop = gr.Button("Stop", variant="stop", elem_id="stop-fit")
    bar_of = gr.HTML(elem_id="progress")
    said = gr.Markdown(elem_id="fitted")
    archive = gr.DownloadButton("Download the adapter (zip)", visible=False, elem_id="download")

    def fit(text: str, called: str, kind: str, alone: str, own: list[str]) -> Iterator[tuple[Any, ...]]:
        keep = gr.skip(), gr.skip()
        yield (*keep, progress_bar("reading the pairs", 0, ""), "", gr.update(visible=False))
        try:
            for event in fit_own(bench, Wish(text, called.strip() or "mine", kind, alone)):
                if isinstance(event, Step):
                    share = event.done / max(event.total, 1)
                    yield (
                        *keep,
                        progress_bar(event.task, share, f"{event.done} of {event.total}"),
                        gr.skip(),
                        gr.skip(),
                    )
                    continue
                own = [*own, event.name]
                told = (
                    f"Fitted `{event.name}` on {event.rows} pairs, strength {event.strength:g}. It is chosen in the tab "
                    f"Ask.{_remarks(event.remarks)}"
                )
                choices = gr.update(choices=[*bench.own, *own], value=event.name)
                yield own, choices, "", told, gr.update(value=event.archive, visible=True)
        except MENDABLE as error:
            yield (*keep, "", f"**That did not work.** {error}", gr.skip())

    fill.click(lambda: example, None, [pairs])
    fitting = start.click(
        fit,
        [pairs, name, method, general, mine],
        [mine, picker, bar_of, said, archive],
        show_progress="hidden",
        **RUNS_MODEL,
    )
    stop.click(lambda: ("", "Stopped; nothing was fitted."), None, [bar_of, said], cancels=[fitting])


def _remarks(texts: tuple[str, ...]) -> str:
    return "".join(["\n"] * bool(texts) + [f"\n- {text}" for text in texts])


def launch(page: gr.Blocks, *, host: str = "127.0.0.1", port: int | None = None) -> str:
    """Start serving a page and return its address; `page.block_thread()` then waits for ctrl-C.

    Args:
        page: what `build_page` returns.
        host: address to listen on.
        port: port; None takes the first free one from 7860.

    Raises:
        OSError: if the port is taken.
    """
    _, address, _ = page.queue().launch(
        server_name=host,
        server_port=port,
        theme=THEME,
        css=CSS,
        footer_links=[],
        quiet=True,
        share=False,
        ssr_mode=False,
        prevent_thread_lock=True,
    )
    return str(address)
