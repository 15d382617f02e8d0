"""Where an adapter's files come from and go to: a folder, or a repo of the Hub at one commit."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError

from finesteer_hf.config import CONFIG_NAME, WEIGHTS_NAME


@dataclass(frozen=True)
class AdapterFiles:
    """Local paths of an adapter's files, and the commit that they came from."""

    config: Path
    weights: Path | None
    revision: str | None = None


def resolve_adapter_files(
    name_or_path: str | Path,
    *,
    revision: str | None = None,
    subfolder: str | None = None,
    weights: bool = True,
    **download_kwargs: Any,
) -> AdapterFiles:
    """Find an adapter's files, downloading them if they are on the Hub.

    Args:
        name_or_path: a folder, `org/name` or `org/name@revision`.
        revision: branch, tag or commit.
        subfolder: folder inside the repo.
        weights: whether the tensors are wanted beside the config.
        **download_kwargs: as for `hf_hub_download`.

    Raises:
        FileNotFoundError: if there is no adapter.
    """
    folder = Path(name_or_path)
    if folder.is_dir():
        folder = folder / subfolder if subfolder else folder
        config, tensors = folder / CONFIG_NAME, folder / WEIGHTS_NAME
        for path in (config, *((tensors,) if weights else ())):
            if not path.is_file():
                raise FileNotFoundError(
                    f"{folder} holds no {path.name}; it is no steering adapter, or only a part of one."
                )
        return AdapterFiles(config, tensors if weights else None)
    repo_id, _, suffix = str(name_or_path).partition("@")
    if repo_id.count("/") > 1 or repo_id.startswith((".", "/", "~")):
        raise FileNotFoundError(f"There is no folder {str(name_or_path)!r}, and it is no Hub id of the form org/name.")
    revision = revision or suffix or None
    try:
        config = Path(hf_hub_download(repo_id, CONFIG_NAME, revision=revision, subfolder=subfolder, **download_kwargs))
        commit = config.parents[1 if subfolder else 0].name
        tensors = Path(hf_hub_download(repo_id, WEIGHTS_NAME, revision=commit, subfolder=subfolder, **download_kwargs))
    except EntryNotFoundError as error:
        raise FileNotFoundError(f"{repo_id} holds no steering adapter: {error}") from error
    return AdapterFiles(config, tensors, commit)
