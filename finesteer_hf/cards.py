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
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from huggingface_hub import ModelCardData
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from jinja2 import Environment, StrictUndefined


if TYPE_CHECKING:
    from finesteer_hf.adapter import SteeringAdapter


CARD_NAME = "README.md"
TEMPLATE_NAME = "adapter_card.md"
PLACEHOLDER = "this-folder-or-its-repo"
_START = "<!-- finesteer_hf:start"
_END = "<!-- finesteer_hf:end -->"
_SECTION = re.compile(rf"{re.escape(_START)}(?P<written>.*?)-->.*?{re.escape(_END)}", re.DOTALL)


def write_card(adapter: SteeringAdapter, directory: Path, repo_id: str | None = None) -> Path:
    """Write the adapter's `README.md` into a folder, merged into the one that is there.

    Args:
        adapter: a fitted adapter.
        directory: an existing folder.
        repo_id: Hub id that the card's example loads; by default a placeholder, since a card may be published and a
            folder's path should not.

    Returns:
        Path of the README. One whose metadata is no readable YAML is left as it is, with a warning.
    """
    directory = Path(directory)
    path = directory / CARD_NAME
    existing = path.read_text(encoding="utf-8-sig") if path.exists() else ""
    body = render_section(adapter, repo_id or PLACEHOLDER)
    try:
        text = merge_card(existing, body, card_metadata(adapter))
    except (yaml.YAMLError, ValueError) as error:
        warnings.warn(f"{path} was left as it is: its metadata block cannot be read ({error}).", stacklevel=2)
        return path
    handle, temporary = tempfile.mkstemp(dir=directory, prefix=".readme-")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)
    return path


def card_metadata(adapter: SteeringAdapter) -> dict[str, Any]:
    """The card's YAML metadata, as huggingface_hub defines it; without a base that is only a local path."""
    config = adapter.config
    base = config.base_model_name_or_path
    on_hub = base is not None and is_hub_id(base)
    data = ModelCardData(
        library_name="finesteer_hf",
        base_model=base if on_hub else None,
        pipeline_tag="text-generation",
        tags=["steering", "activation-steering", config.steering_type.lower()],
    ).to_dict()
    if on_hub:
        data["base_model_relation"] = "adapter"
    return data


def is_hub_id(name: str) -> bool:
    """Whether a base model's name can be a Hub id and is no path of this machine."""
    return re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) is not None and not Path(name).exists()


def render_section(adapter: SteeringAdapter, adapter_argument: str) -> str:
    """Our part of the card, from the packaged template."""
    config = adapter.config
    base = config.base_model_name_or_path
    if base and not is_hub_id(base):
        base = Path(base).name
    numbers = sum(tensor.numel() for tensor in adapter.tensors.values())
    facts = [
        ("method", f"`{config.steering_type}`"),
        ("base model", f"`{base}`" if base else "not recorded"),
        ("base commit", f"`{config.base_model_revision}`" if config.base_model_revision else "not recorded"),
        ("steered tokens", config.positions),
        ("strength", f"{config.strength:g}" if isinstance(config.strength, (int, float)) else config.strength),
        ("parameters", f"{numbers:,}"),
    ]
    base_text = f"[`{base}`](https://huggingface.co/{base})" if base and is_hub_id(base) else f"`{base}`"
    template = Environment(undefined=StrictUndefined, keep_trailing_newline=True, autoescape=False).from_string(
        template_text(TEMPLATE_NAME)
    )
    return template.render(
        title=f"{config.steering_type} steering adapter",
        method=config.steering_type,
        base_text=base_text,
        base_argument=base or "base/model",
        adapter_argument=adapter_argument,
        facts=facts,
        data_facts=[],
        evaluation=[],
        evaluation_note="",
        gate_facts=[],
        figures=[],
    )


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
    existing = existing.replace("\r\n", "\n")
    theirs: dict[str, Any] = {}
    block = REGEX_YAML_BLOCK.search(existing)
    text = existing
    if block is not None:
        loaded = yaml.safe_load(block.group(2))
        if loaded is not None and not isinstance(loaded, dict):
            raise ValueError("it must be a mapping")
        theirs = loaded or {}
        text = existing[: block.start()] + existing[block.end() :]
    section = _SECTION.search(text)
    merged = _merge_metadata(theirs, metadata, _written_before(section))
    ours = f"{_START} {json.dumps(metadata, sort_keys=True)} -->\n{body.strip()}\n{_END}"
    if section is not None:
        text = text[: section.start()] + ours + text[section.end() :]
    else:
        text = f"{text.rstrip()}\n\n{ours}\n" if text.strip() else f"{ours}\n"
    header = yaml.safe_dump(merged, sort_keys=False, allow_unicode=True)
    return f"---\n{header}---\n{text if text.startswith(chr(10)) else chr(10) + text}"


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
