"""The README of a repo whose adapters are in folders: the Hub reads what a repo is from the one in its root."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from huggingface_hub.repocard import REGEX_YAML_BLOCK

from finesteer_hf.cards import CARD_NAME, card_metadata


if TYPE_CHECKING:
    from finesteer_hf.adapter import SteeringAdapter


def write_repo_card(adapter: SteeringAdapter, directory: Path, subfolder: str) -> Path:
    """Put the metadata of a folder's adapter into the README of its repo's root, by which the Hub finds it.

    What stands there is kept: values as they are, tags united, text untouched. Where there is no README, one is written
    that points to the folder.

    Args:
        adapter: the adapter in the folder.
        directory: root of the repo.
        subfolder: the adapter's folder.

    Returns:
        Path of the README. One whose metadata is no readable YAML is left as it is, with a warning.
    """
    path = directory / CARD_NAME
    text = path.read_text(encoding="utf-8-sig").replace("\r\n", "\n") if path.exists() else ""
    block = REGEX_YAML_BLOCK.search(text)
    try:
        theirs: Any = (yaml.safe_load(block.group(2)) if block else None) or {}
        if not isinstance(theirs, dict):
            raise ValueError("it must be a mapping")
    except (yaml.YAMLError, ValueError) as error:
        warnings.warn(f"{path.name} was left as it is: its metadata block cannot be read ({error}).", stacklevel=2)
        return path
    ours = {name: value for name, value in card_metadata(adapter).items() if name not in ("model-index", "model_name")}
    present = theirs.get("tags") or []
    tags = [present] if isinstance(present, str) else [*present]
    merged = {**ours, **theirs, "tags": list(dict.fromkeys([*tags, *ours["tags"]]))}
    body = text[: block.start()] + text[block.end() :] if block else text
    if not body.strip():
        link = f"[{subfolder}]({subfolder}/{CARD_NAME})"
        body = f"\n# Steering adapters\n\nEach folder holds one, with a card of its own: {link}.\n"
    header = yaml.safe_dump(merged, sort_keys=False, allow_unicode=True)
    path.write_text(f"---\n{header}---\n{body if body.startswith(chr(10)) else chr(10) + body}", encoding="utf-8")
    return path
