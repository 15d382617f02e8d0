"""The root README of a repo with adapters in folders: the Hub reads only the root's metadata."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from finesteer_hf.hub.card import card_metadata, warn_unmerged
from finesteer_hf.hub.readme import CARD_NAME, Readme, ReadmeError


if TYPE_CHECKING:
    from finesteer_hf.adapters.adapter import SteeringAdapter


def write_repo_card(adapter: SteeringAdapter, directory: Path, subfolder: str) -> Path:
    """Put the metadata of a folder's adapter into the README of the repo's root, where the Hub finds it.

    An existing README keeps its values and text; tags are merged. If there is none, one is written that points to the
    folder.

    Args:
        adapter: the adapter in the folder.
        directory: root of the repo.
        subfolder: the adapter's folder.

    Returns:
        Path of the README. If it cannot be merged, it is left unchanged, with a warning.
    """
    path = directory / CARD_NAME
    try:
        readme = Readme.read(path)
    except ReadmeError as error:
        warn_unmerged(path, error)
        return path
    ours = {name: value for name, value in card_metadata(adapter).items() if name not in ("model-index", "model_name")}
    merged = {**ours, **readme.metadata, "tags": list(dict.fromkeys([*readme.texts("tags"), *ours["tags"]]))}
    body = readme.text
    if not body.strip():
        link = f"[{subfolder}]({subfolder}/{CARD_NAME})"
        body = f"\n# Steering adapters\n\nEach folder has one, with its own card: {link}.\n"
    path.write_bytes(readme.write(merged, body).encode("utf-8"))
    return path
