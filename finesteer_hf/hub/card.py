"""The model card of an adapter: written at save, merged into an existing README.

Our section is between two markers and is replaced as a whole; text outside the markers and the user's metadata are
kept. The start marker stores the metadata that we wrote, so a value that is unchanged since is updated and a value
that the user changed is kept.
"""

from __future__ import annotations

import json
import re
import warnings
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import EvalResult, ModelCardData
from jinja2 import Environment, StrictUndefined

from finesteer_hf.adapters.base_models import is_hub_id
from finesteer_hf.adapters.staging import replacing
from finesteer_hf.hub.card_facts import adapter_facts, base_name, figures_of, is_estimate, plain
from finesteer_hf.hub.card_story import tell
from finesteer_hf.hub.readme import CARD_NAME, Readme, ReadmeError, Section, merge_metadata, put_section


if TYPE_CHECKING:
    from finesteer_hf.adapters.adapter import SteeringAdapter


TEMPLATE_NAME = "adapter_card.md"
PLACEHOLDER = "this-folder-or-its-repo"
DOSE_PLOT, GATE_PLOT = "dose_response.png", "gate_scores.png"
PLOT_NAMES = (DOSE_PLOT, GATE_PLOT)
_START = "<!-- finesteer_hf:start"
_END = "<!-- finesteer_hf:end -->"
# Starts of headings, quotes, fences and lists.
_BLOCK_START = re.compile(r"[#>=~]|[-+*](?=\s)")


def write_card(
    adapter: SteeringAdapter, directory: Path, repo_id: str | None = None, subfolder: str | None = None
) -> Path:
    """Write the adapter's `README.md` and its plots into a folder, merged into an existing README.

    Args:
        adapter: a fitted adapter.
        directory: an existing folder.
        repo_id: Hub id that the card's example loads; by default a placeholder, since a card may be published and a
            local path should not.
        subfolder: the adapter's folder in that repo, for the example.

    Returns:
        Path of the README. If it cannot be merged, it is left unchanged, with a warning.
    """
    directory = Path(directory)
    for name, content in render_card(adapter, directory, repo_id, subfolder).items():
        if content is None:
            (directory / name).unlink(missing_ok=True)
        else:
            with replacing(directory / name) as path:
                path.write_bytes(content)
    return directory / CARD_NAME


def render_card(
    adapter: SteeringAdapter, directory: Path, repo_id: str | None = None, subfolder: str | None = None
) -> dict[str, bytes | None]:
    """The files of a card by name, as `write_card` writes them; None for a plot that the card no longer shows.

    Writes nothing. Empty, with a warning, if the existing README cannot be merged.
    """
    plots = draw_plots(adapter)
    body = render_section(adapter, repo_id or PLACEHOLDER, subfolder, plots)
    path = directory / CARD_NAME
    try:
        text = merge_card(Readme.read(path), body, card_metadata(adapter))
    except ReadmeError as error:
        warn_unmerged(path, error)
        return {}
    pictures = {name: plots[name].png if name in plots else None for name in PLOT_NAMES}
    return {CARD_NAME: text.encode("utf-8"), **pictures}


def warn_unmerged(path: Path, error: ReadmeError) -> None:
    """Warn that a README cannot be merged and is left unchanged."""
    warnings.warn(f"{path} cannot be merged and was left unchanged: {error}.", stacklevel=3)


def card_metadata(adapter: SteeringAdapter) -> dict[str, Any]:
    """The card's YAML metadata, as huggingface_hub defines it; a base that is only a local path is left out."""
    config = adapter.config
    base = config.base_model_name_or_path
    on_hub = base is not None and is_hub_id(base)
    results = eval_results(figures_of(adapter, "evaluation", list))
    data = ModelCardData(
        library_name="finesteer_hf",
        base_model=base if on_hub else None,
        pipeline_tag="text-generation",
        tags=["steering", "activation-steering", config.steering_type.lower()],
        model_name=f"{config.steering_type} steering adapter" if results else None,
        eval_results=results or None,
    ).to_dict()
    if on_hub:
        data["base_model_relation"] = "adapter"
    return data


def eval_results(rows: list[Any]) -> list[EvalResult]:
    """The steered figures of an evaluation, in the format of the Hub's metadata."""
    known = [row for row in rows if isinstance(row, dict) and is_estimate(row.get("steered"))]
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=_slug(str(row.get("dataset"))),
            dataset_name=plain(str(row.get("dataset"))),
            metric_type=_slug(str(row.get("metric"))),
            metric_name=plain(str(row.get("metric"))),
            metric_value=round(row["steered"]["value"], 4),
        )
        for row in known
        if row["steered"]["value"] is not None
    ]


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


@dataclass(frozen=True)
class CardPlot:
    """A plot of the card; the alt text says in words what it shows."""

    path: str
    png: bytes
    caption: str
    alt: str


def draw_plots(adapter: SteeringAdapter) -> dict[str, CardPlot]:
    """Plots of the fit's report by file name: the dose-response curve, the gate's scores."""
    report = figures_of(adapter, "report", dict)
    plots = {}
    for name, key, draw in ((DOSE_PLOT, "dose_response", _draw_dose), (GATE_PLOT, "gate_scores", _draw_gate)):
        if not report.get(key):
            continue
        try:
            plot = draw(name, report, adapter)
        except (TypeError, ValueError, KeyError, AttributeError, IndexError) as error:
            warnings.warn(
                f"The card has no {name}: `fit.report.{key}` does not hold figures of a fit ({error}).", stacklevel=2
            )
            continue
        if plot is not None:
            plots[name] = plot
    return plots


def _draw_dose(name: str, report: dict[str, Any], adapter: SteeringAdapter) -> CardPlot:
    from finesteer_hf.method_api import DosePoint
    from finesteer_hf.views.plot_style import png
    from finesteer_hf.views.plots import plot_dose_response

    points = [DosePoint.from_report(point) for point in report["dose_response"]]
    leads = (report.get("objective") or {}).get("criterion", "sayable")
    drawn = plot_dose_response(points, chosen=float(adapter.config.strength), leads=leads)
    caption = "Dose response on held-out rows: the wanted answers, and how far general prompts shift."
    return CardPlot(name, png(drawn.figure, dpi=110), caption, drawn.alt)


def _draw_gate(name: str, report: dict[str, Any], adapter: SteeringAdapter) -> CardPlot | None:
    from finesteer_hf.views.plot_style import png
    from finesteer_hf.views.plots import plot_gate_scores

    scores = report["gate_scores"]
    if not scores["ir"] and not scores["general"]:
        return None
    drawn = plot_gate_scores(scores["ir"], scores["general"], threshold=scores.get("threshold"))
    caption = "Scores of the gate on held-out queries to steer and on general ones."
    return CardPlot(name, png(drawn.figure, dpi=110), caption, drawn.alt)


def render_section(adapter: SteeringAdapter, repo: str, subfolder: str | None, plots: dict[str, CardPlot]) -> str:
    """Our section of the card, from the packaged template."""
    base = adapter.config.base_model_name_or_path
    name = base_name(adapter)
    environment = Environment(undefined=StrictUndefined, keep_trailing_newline=True, autoescape=False)
    environment.filters["cell"] = escape_markdown
    return environment.from_string(template_text(TEMPLATE_NAME)).render(
        method=adapter.config.steering_type,
        base=name or "the-base-model",
        base_link=f"[`{base}`](https://huggingface.co/{base})"
        if base and is_hub_id(base)
        else code(name or "a model"),
        repo=repo,
        subfolder=subfolder,
        facts=adapter_facts(adapter),
        story=tell(adapter),
        figures=list(plots.values()),
    )


def escape_markdown(text: str) -> str:
    """Escape a value so that Markdown only shows it: on one line, no HTML, no link, no image, no block.

    Every value in a card goes through this; `[13.3, 28.9]` alone is not a link and stays readable.
    """
    line = plain(text).replace("&", "&amp;").replace("<", "&lt;").replace("`", "&#96;").replace("|", "\\|")
    for mark in "([:":
        line = line.replace(f"]{mark}", f"]&#{ord(mark)};")
    return f"\\{line}" if _BLOCK_START.match(line) else line


def code(text: str) -> str:
    """A value as a code span, without characters that would end the span or the cell, or be HTML outside of it."""
    return f"`{re.sub(r'[`<>|]', '_', plain(text)) or '_'}`"


def merge_card(readme: Readme, body: str, metadata: dict[str, Any]) -> str:
    """Put our section and metadata into a README; returns its new text.

    Args:
        readme: the existing README.
        body: our section, without markers.
        metadata: our YAML metadata.
    """
    section = Section.find(readme.text, _START, _END)
    merged = merge_metadata(readme.metadata, metadata, _written_before(section))
    # A comment ends at the first `-->`, even inside a value.
    written = json.dumps(metadata, sort_keys=True).replace("<", "\\u003c").replace(">", "\\u003e")
    ours = f"{_START} {written} -->\n{body.strip()}\n{_END}"
    return readme.write(merged, put_section(readme.text, section, ours))


def _written_before(section: Section | None) -> dict[str, Any]:
    try:
        written = json.loads(section.header) if section is not None else {}
    except (ValueError, RecursionError):
        return {}
    return written if isinstance(written, dict) else {}


def template_text(name: str) -> str:
    """A card template, from the wheel or from `hub_cards/templates` of a source checkout.

    Raises:
        FileNotFoundError: if neither place has it.
    """
    packaged = resources.files("finesteer_hf") / "hub_cards" / name
    if packaged.is_file():
        return packaged.read_text(encoding="utf-8")
    checkout = Path(__file__).resolve().parents[2] / "hub_cards" / "templates" / name
    if checkout.is_file():
        return checkout.read_text(encoding="utf-8")
    raise FileNotFoundError(f"The card template {name} is missing from the package; reinstall finesteer_hf.")
