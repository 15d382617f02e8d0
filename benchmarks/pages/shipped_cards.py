"""What the scripts that write `hub_cards/` share: an adapter as it ships, with a base that everybody can name."""

from __future__ import annotations

import argparse
import dataclasses
import shutil
from pathlib import Path
from typing import Any

from finesteer_hf.adapters.adapter import SteeringAdapter
from finesteer_hf.adapters.fingerprint import fingerprint
from finesteer_hf.hub.card import CARD_NAME, PLACEHOLDER


HUB_CARDS = Path(__file__).resolve().parents[2] / "hub_cards"


def arguments_of(description: str | None, source: str, help_text: str) -> argparse.ArgumentParser:
    """A parser with what both scripts take: where the fitted adapters are, or `--again` for those that ship already."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(source, type=Path, nargs="?", help=help_text)
    parser.add_argument("--to", type=Path, default=HUB_CARDS)
    parser.add_argument(
        "--again", action="store_true", help="write the adapters in --to once more, with their base and card renewed"
    )
    return parser


def ship(
    adapter: SteeringAdapter, folder: Path, *, base: str, model: Any, preamble: str, changes: dict[str, str]
) -> None:
    """Write an adapter and its card, in place of what is there.

    Args:
        adapter: fitted, or shipped before.
        folder: where it goes, `hub_cards/<name>`.
        base: what it names as its base.
        model: that base, for its fingerprint.
        preamble: what the card says after our section.
        changes: texts of the card that are replaced.
    """
    config = dataclasses.replace(
        adapter.config,
        base_model_name_or_path=base,
        base_model_revision=None,
        base_model_fingerprint=fingerprint(model),
    )
    shutil.rmtree(folder, ignore_errors=True)
    dataclasses.replace(adapter, config=config).save_pretrained(folder)
    card = folder / CARD_NAME
    text = card.read_text(encoding="utf-8")
    for old, new in {PLACEHOLDER: f"hub_cards/{folder.name}", **changes}.items():
        text = text.replace(old, new)
    card.write_text(f"{text.rstrip()}\n{preamble}", encoding="utf-8")
    print(f"wrote {folder.relative_to(folder.parents[1])}")
