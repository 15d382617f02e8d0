"""Names of base models: how an adapter names the model that it was fitted on, and how that name is resolved.

A name is a Hub id, the id of a model that ships with the package, or `local:` and a folder's name. The last keeps the
folder's name but not its path: people can read it, but nothing can load it.
"""

from __future__ import annotations

import re
from pathlib import Path, PureWindowsPath
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id


LOCAL = "local:"
_COMMIT = re.compile(r"[0-9a-f]{40}")


#: Models inside the package, by id: their folders.
PACKAGED = {"playground": str(Path(__file__).parents[1] / "playground" / "weights")}


def located(name: str) -> str:
    """What to give transformers' `from_pretrained`: the folder of a packaged model, any other name as it is.

    Raises:
        FileNotFoundError: if the installation lacks a packaged model's weights.
    """
    folder = PACKAGED.get(name)
    if folder is None:
        return name
    if not (Path(folder) / "model.safetensors").is_file():
        raise FileNotFoundError(
            f"{folder} has no model.safetensors; reinstall finesteer-hf, "
            f"or train it: python -m finesteer_hf.playground.train --out {folder}"
        )
    return folder


def is_hub_id(name: str) -> bool:
    """Whether a base model's name can be a Hub id: not a packaged model, not a local path."""
    return names_a_repo(name) and not Path(name).exists()


def names_a_repo(name: str) -> bool:
    """Whether a name has the form of a Hub id, even if a folder of that name exists."""
    if name in PACKAGED:
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def is_public(name: str | None) -> bool:
    """Whether others can find a base model by this name."""
    return name is not None and (name in PACKAGED or is_hub_id(name))


def public_name(name: str | None) -> str | None:
    """A base model's name without local paths: of a folder only its name."""
    if not name or name.startswith(LOCAL) or name in PACKAGED or names_a_repo(name):
        return name or None
    return f"{LOCAL}{last_part(name)}"


def without_paths(fit: dict[str, Any]) -> dict[str, Any]:
    """A fit's provenance with publishable data names: a path is cut to its last part."""
    made = dict(fit)
    for key in ("data", "eval_data", "general_data"):
        source = fit.get(key)
        if not isinstance(source, dict):
            continue
        name = source.get("id")
        if isinstance(name, str) and name and (Path(name).exists() or not names_a_repo(name)):
            made[key] = {**source, "id": last_part(name)}
    return made


def last_part(path: str) -> str:
    """The last part of a path of any operating system."""
    return PureWindowsPath(path).name or "folder"


def base_of(model: Any) -> tuple[str | None, str | None]:
    """Name and commit of a loaded model, as an adapter stores them.

    A folder in the Hub's cache gets the name of its repo, and the package's own folder that of the packaged model.

    Args:
        model: a causal LM of transformers.
    """
    path = getattr(model.config, "_name_or_path", "") or ""
    commit = getattr(model.config, "_commit_hash", None)
    folder = Path(path)
    if not path or path in PACKAGED or not folder.exists():
        return public_name(path), commit
    for name, place in PACKAGED.items():
        if folder.resolve() == Path(place).resolve():
            return name, None
    repo = folder.parent.parent.name.removeprefix("models--").replace("--", "/")
    if folder.parent.name == "snapshots" and _COMMIT.fullmatch(folder.name) and names_a_repo(repo):
        return repo, commit or folder.name
    return f"{LOCAL}{last_part(str(folder.resolve()))}", commit
