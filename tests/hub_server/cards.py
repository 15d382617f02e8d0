"""What the Hub reads out of a repository's README.md: metadata, tags, and the mistakes it refuses."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any

import yaml


FRONT_MATTER = re.compile(r"\A\s*---[ \t]*\r?\n(.*?)^---[ \t]*\r?$", re.DOTALL | re.MULTILINE)
REPO_ID = re.compile(r"[\w.-]{1,96}(/[\w.-]{1,96})?")


def parse_card(text: str) -> dict[str, Any]:
    """The YAML front matter of a card; {} without one. Raises yaml.YAMLError when it is not valid YAML."""
    match = FRONT_MATTER.match(text)
    data = yaml.safe_load(match.group(1)) if match else None
    if data is not None and not isinstance(data, dict):
        raise yaml.YAMLError("the metadata of a card is a mapping")
    return data or {}


def check_card(text: str) -> tuple[list[str], list[str]]:
    """Errors (the upload is refused) and warnings of a card."""
    try:
        data = parse_card(text)
    except yaml.YAMLError as error:
        return [f"Invalid YAML in the metadata: {error}"], []
    errors = [
        f'"base_model" with value "{base}" is not valid. Use a model id from https://hf.co/models.'
        for base in as_list(data.get("base_model"))
        if not REPO_ID.fullmatch(str(base))
    ]
    return errors, [] if data else ["empty or missing yaml metadata in repo card"]


def repo_tags(card: dict[str, Any], files: Collection[str]) -> list[str]:
    """Tags by which the Hub lists and filters a repository, derived from its card and its file names."""
    tags = [*as_list(card.get("library_name"))]
    tags += ["safetensors"] if any(path.endswith(".safetensors") for path in files) else []
    tags += [*as_list(card.get("pipeline_tag")), *as_list(card.get("tags")), *as_list(card.get("language"))]
    tags += [f"dataset:{name}" for name in as_list(card.get("datasets"))]
    bases = as_list(card.get("base_model"))
    tags += [f"base_model:{base}" for base in bases]
    tags += [f"base_model:{base_model_relation(card, files)}:{base}" for base in bases]
    tags += [f"license:{name}" for name in as_list(card.get("license"))]
    return list(dict.fromkeys(str(tag) for tag in [*tags, "region:us"]))


def base_model_relation(card: dict[str, Any], files: Collection[str]) -> str:
    """The relation the card states, otherwise the Hub's guess from the files."""
    if "base_model_relation" in card:
        return card["base_model_relation"]
    if "adapter_config.json" in files:
        return "adapter"
    return "merge" if len(as_list(card.get("base_model"))) > 1 else "finetune"


def as_list(value: Any) -> list:
    return value if isinstance(value, list) else [] if value is None else [value]
