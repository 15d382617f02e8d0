"""The README of a repo whose adapters are in folders: the Hub reads what a repo is from the one in its root."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from finesteer_hf.hub.card import card_metadata, warn_unmerged
from finesteer_hf.hub.readme import CARD_NAME, Readme, ReadmeError


if TYPE_CHECKING:
    from finesteer_hf.adapters.adapter import SteeringAdapter


def write_repo_card(adapter: SteeringAdapter, directory: Path, subfolder: str) -> Path:
    """Put the metadata of a folder's adapter into the README of its repo's root, by which the Hub finds it.

    What stands there is kept: values as they are, tags united, text untouched. Where there is no README, one is written
    that points to the folder.

    Args:
        adapter: the adapter in the folder.
        directory: root of the repo.
        subfolder: the adapter's folder.

    Returns:
        Path of the README. One that cannot be merged is left as it is, with a warning.
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
        body = f"\n# Steering adapters\n\nEach folder holds one, with a card of its own: {link}.\n"
    path.write_bytes(readme.write(merged, body).encode("utf-8"))
    return path
