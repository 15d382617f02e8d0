"""The model card of an adapter: written at save, merged into what a README already says.

Our part stands between two markers and is replaced as a whole; text outside the markers and metadata that the user
wrote are kept. What metadata we wrote is remembered in the start marker, so a value that nobody changed since follows
the adapter, and a value that somebody changed stays.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
import warnings
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from huggingface_hub import EvalResult, ModelCardData
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from jinja2 import Environment, StrictUndefined

from finesteer_hf.card_facts import adapter_facts, base_name, is_hub_id
from finesteer_hf.card_story import tell


if TYPE_CHECKING:
    from finesteer_hf.adapter import SteeringAdapter


CARD_NAME = "README.md"
TEMPLATE_NAME = "adapter_card.md"
PLACEHOLDER = "this-folder-or-its-repo"
DOSE_PLOT, GATE_PLOT = "dose_response.png", "gate_scores.png"
PLOT_NAMES = (DOSE_PLOT, GATE_PLOT)
_START = "<!-- finesteer_hf:start"
_END = "<!-- finesteer_hf:end -->"
_SECTION = re.compile(rf"{re.escape(_START)}(?P<written>.*?)-->.*?{re.escape(_END)}", re.DOTALL)
_LISTING_START = "<!-- finesteer_hf:adapters:start -->"
_LISTING_END = "<!-- finesteer_hf:adapters:end -->"
_LISTING_HEAD = ("## Steering adapters in this repo", "", "| folder | method | base model |", "|---|---|---|")
_LISTING = re.compile(
    rf"{re.escape(_LISTING_START)}.*?\|---\|---\|---\|\n(?P<rows>.*?)\n?{re.escape(_LISTING_END)}", re.DOTALL
)


def write_card(
    adapter: SteeringAdapter, directory: Path, repo_id: str | None = None, subfolder: str | None = None
) -> Path:
    """Write the adapter's `README.md` and its plots into a folder, merged into the README that is there.

    Args:
        adapter: a fitted adapter.
        directory: an existing folder.
        repo_id: Hub id that the card's example loads; by default a placeholder, since a card may be published and a
            folder's path should not.
        subfolder: folder of that repo which holds the adapter, for the example.

    Returns:
        Path of the README. One whose metadata is no readable YAML is left as it is, with a warning.
    """
    directory = Path(directory)
    path = directory / CARD_NAME
    plots = draw_plots(adapter)
    body = render_section(adapter, repo_id or PLACEHOLDER, subfolder, plots)
    try:
        text = merge_card(_read(path), body, card_metadata(adapter))
    except (yaml.YAMLError, ValueError) as error:
        warnings.warn(f"{path} was left as it is: its metadata block cannot be read ({error}).", stacklevel=2)
        return path
    for name in PLOT_NAMES:
        if name in plots:
            _replace(directory / name, plots[name].png)
        else:
            # One of an adapter that was saved here before, and that the card no longer shows.
            (directory / name).unlink(missing_ok=True)
    _replace(path, text.encode("utf-8"))
    return path


def _replace(path: Path, content: bytes) -> None:
    """Put a file in place once it is complete."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".card-")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)


def card_metadata(adapter: SteeringAdapter) -> dict[str, Any]:
    """The card's YAML metadata, as huggingface_hub defines it; without a base that is only a local path."""
    config = adapter.config
    base = config.base_model_name_or_path
    on_hub = base is not None and is_hub_id(base)
    results = eval_results(config.fit.get("evaluation", []))
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


def eval_results(rows: list[dict[str, Any]]) -> list[EvalResult]:
    """The steered figures of an evaluation, as the Hub's metadata wants them."""
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=_slug(row["dataset"]),
            dataset_name=row["dataset"],
            metric_type=_slug(row["metric"]),
            metric_name=row["metric"],
            metric_value=round(row["steered"]["value"], 4),
        )
        for row in rows
        if row.get("steered") and row["steered"]["value"] is not None
    ]


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


@dataclass(frozen=True)
class CardPlot:
    """A plot of the card."""

    path: str
    png: bytes
    caption: str


def draw_plots(adapter: SteeringAdapter) -> dict[str, CardPlot]:
    """Plots of what the fit kept: the dose-response curve, the gate's scores; by file name."""
    report = adapter.config.fit.get("report", {})
    if not any(report.get(name) for name in ("dose_response", "gate_scores")):
        return {}
    from finesteer_hf.evaluation.plots import plot_dose_response, plot_gate_scores, png
    from finesteer_hf.methods.base import DosePoint

    plots = {}
    curve = report.get("dose_response")
    if curve:
        points = [DosePoint.from_report(point) for point in curve]
        leads = (report.get("objective") or {}).get("criterion", "sayable")
        figure = plot_dose_response(points, chosen=float(adapter.config.strength), leads=leads)
        caption = "Dose response on held-out rows: the wanted answers, and how far general prompts shift."
        plots[DOSE_PLOT] = CardPlot(DOSE_PLOT, png(figure, dpi=110), caption)
    scores = report.get("gate_scores")
    if scores and (scores["ir"] or scores["general"]):
        figure = plot_gate_scores(scores["ir"], scores["general"], threshold=scores.get("threshold"))
        caption = "Scores of the gate on held-out queries that are to be steered and on general ones."
        plots[GATE_PLOT] = CardPlot(GATE_PLOT, png(figure, dpi=110), caption)
    return plots


def render_section(adapter: SteeringAdapter, repo: str, subfolder: str | None, plots: dict[str, CardPlot]) -> str:
    """Our part of the card, from the packaged template."""
    base = adapter.config.base_model_name_or_path
    name = base_name(adapter)
    environment = Environment(undefined=StrictUndefined, keep_trailing_newline=True, autoescape=False)
    environment.filters["cell"] = _cell
    return environment.from_string(template_text(TEMPLATE_NAME)).render(
        method=adapter.config.steering_type,
        base=name or "the-base-model",
        base_link=f"[`{base}`](https://huggingface.co/{base})" if base and is_hub_id(base) else f"`{name}`",
        repo=repo,
        subfolder=subfolder,
        facts=adapter_facts(adapter),
        story=tell(adapter),
        figures=list(plots.values()),
    )


def _cell(text: str) -> str:
    """A text inside a Markdown table: on one line, and neither a column's end nor HTML."""
    line = " ".join(text.split())
    return line.replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|")


def merge_card(existing: str, body: str, metadata: dict[str, Any]) -> str:
    """Put our section and metadata into a README's text.

    Args:
        existing: the README's text, empty if there is none.
        body: our section, without markers.
        metadata: our YAML metadata.

    Raises:
        ValueError: if the existing metadata block is no mapping.
        yaml.YAMLError: if it cannot be parsed.
    """
    readme = _Readme.parse(existing)
    section = _SECTION.search(readme.text)
    merged = _merge_metadata(readme.metadata, metadata, _written_before(section))
    ours = f"{_START} {json.dumps(metadata, sort_keys=True)} -->\n{body.strip()}\n{_END}"
    return readme.write(merged, _put(readme.text, section, ours))


def merge_repo_card(adapter: SteeringAdapter, folder: Path, subfolder: str) -> Path:
    """List an adapter of a subfolder in the README of its repo, beside whatever that says.

    Args:
        adapter: the adapter.
        folder: a copy of the repo's root.
        subfolder: where in the repo the adapter is.

    Returns:
        Path of the README. One whose metadata is no readable YAML is left as it is, with a warning.
    """
    path = Path(folder) / CARD_NAME
    existing = _read(path)
    metadata = {name: value for name, value in card_metadata(adapter).items() if name != "model-index"}
    try:
        readme = _Readme.parse(existing)
    except (yaml.YAMLError, ValueError) as error:
        warnings.warn(f"{path} was left as it is: its metadata block cannot be read ({error}).", stacklevel=2)
        return path
    section = _LISTING.search(readme.text)
    ours = f"| [`{subfolder}`](./{subfolder}/{CARD_NAME}) |"
    rows = [line for line in section["rows"].splitlines() if line.strip()] if section else []
    rows = [row for row in rows if not row.startswith(ours)]
    rows.append(f"{ours} {adapter.config.steering_type} | `{base_name(adapter) or 'not recorded'}` |")
    listing = "\n".join([_LISTING_START, *_LISTING_HEAD, *sorted(rows), _LISTING_END])
    merged = _merge_metadata(readme.metadata, metadata, {})
    bases = [readme.metadata.get("base_model"), metadata.get("base_model")]
    named = dict.fromkeys(name for base in bases if base for name in ([base] if isinstance(base, str) else base))
    if len(named) > 1:
        merged["base_model"] = list(named)
    _replace(path, readme.write(merged, _put(readme.text, section, listing)).encode("utf-8"))
    return path


@dataclass(frozen=True)
class _Readme:
    """A README in its two parts.

    Attributes:
        metadata: its YAML block, read.
        block: the block as it was written, `---` lines included; empty if there is none.
        text: what follows.
        newline: the line ends that the file uses.
    """

    metadata: dict[str, Any]
    block: str
    text: str
    newline: str

    @classmethod
    def parse(cls, raw: str) -> _Readme:
        newline = "\r\n" if "\r\n" in raw else "\n"
        raw = raw.replace("\r\n", "\n")
        block = REGEX_YAML_BLOCK.search(raw)
        if block is None:
            return cls({}, "", raw, newline)
        metadata = yaml.safe_load(block.group(2))
        if metadata is not None and not isinstance(metadata, dict):
            raise ValueError("it must be a mapping")
        return cls(metadata or {}, block.group(0), raw[: block.start()] + raw[block.end() :], newline)

    def write(self, metadata: dict[str, Any], text: str) -> str:
        block = self.block
        # Written anew only where it changes: a user's comments and order would be lost for nothing.
        if not block or metadata != self.metadata:
            block = f"---\n{yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True)}---\n"
        return f"{block}{text if text.startswith(chr(10)) else chr(10) + text}".replace("\n", self.newline)


def _read(path: Path) -> str:
    """A README's text with the line ends that it has; empty if there is none."""
    return path.read_bytes().decode("utf-8-sig") if path.exists() else ""


def _put(text: str, section: re.Match[str] | None, ours: str) -> str:
    """Put a section in the place of its former self, or at the end."""
    if section is not None:
        return text[: section.start()] + ours + text[section.end() :]
    return f"{text.rstrip()}\n\n{ours}\n" if text.strip() else f"{ours}\n"


def _written_before(section: re.Match[str] | None) -> dict[str, Any]:
    if section is None:
        return {}
    try:
        written = json.loads(section["written"])
    except json.JSONDecodeError:
        return {}
    return written if isinstance(written, dict) else {}


def _merge_metadata(theirs: dict[str, Any], ours: dict[str, Any], before: dict[str, Any]) -> dict[str, Any]:
    """A user's value wins, unless it is the one that we wrote last time; tags are united."""
    merged = {k: v for k, v in theirs.items() if k == "tags" or k not in before or before[k] != v or k in ours}
    for key, value in ours.items():
        if key == "tags":
            present = theirs.get("tags") or []
            present = [present] if isinstance(present, str) else list(present)
            kept = [tag for tag in present if tag not in before.get("tags", [])]
            merged["tags"] = list(dict.fromkeys([*kept, *value]))
        elif key not in theirs or theirs[key] == before.get(key):
            merged[key] = value
    return merged


def template_text(name: str) -> str:
    """A card template: from the wheel, or from `hub_cards/templates` of a source checkout.

    Raises:
        FileNotFoundError: if neither place has it.
    """
    packaged = resources.files("finesteer_hf") / "hub_cards" / name
    if packaged.is_file():
        return packaged.read_text(encoding="utf-8")
    checkout = Path(__file__).resolve().parents[1] / "hub_cards" / "templates" / name
    if checkout.is_file():
        return checkout.read_text(encoding="utf-8")
    raise FileNotFoundError(f"The card template {name} is missing from the package; reinstall finesteer_hf.")
