"""Names of repos, revisions and folders: taken apart, and refused before any request."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import PurePosixPath

from huggingface_hub.utils import validate_repo_id


_REPO_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
# What git refuses in the name of a branch or tag, as far as it matters in an address.
_BAD_REF = re.compile(r"[\x00-\x20\x7f~^:?*\[\\]|\.\.|@\{|//|^[/.-]|[/.]$|\.lock$")


def split_name(name: str, subfolder: str | None, revision: str | None) -> tuple[str, str | None, str | None]:
    """Take `org/name/folder@revision` apart.

    Args:
        name: `name`, `org/name` or `org/name/folder`, with or without `@revision`.
        subfolder: a folder given beside it.
        revision: a revision given beside it.

    Returns:
        The repo's id, the folder in it (None: its root) and the revision (None: the default branch).

    Raises:
        ValueError: if two different folders or revisions are given, or one is no name.
    """
    path, at, suffix = name.partition("@")
    if at and not suffix:
        raise ValueError(f"{name!r} ends in '@': write org/name@revision, or org/name alone.")
    if suffix and revision is not None and revision != suffix:
        raise ValueError(f"{name!r} names the revision {suffix!r}, and revision={revision!r} another. Give one.")
    parts = path.split("/")
    inner = "/".join(parts[2:]) or None
    if inner and subfolder is not None and subfolder != inner:
        raise ValueError(f"{name!r} names the folder {inner!r}, and subfolder={subfolder!r} another. Give one.")
    check_ref("revision", suffix or revision)
    check_subfolder(inner)
    return "/".join(parts[:2]), inner or subfolder, suffix or revision


def is_repo_name(text: str) -> bool:
    """Whether a text can name a repo, or a folder in one, of the Hub; a path of this machine often cannot."""
    parts = text.partition("@")[0].split("/")
    return _REPO_ID.fullmatch("/".join(parts[:2])) is not None and not text.startswith(".") and ".." not in parts


def check_repo_id(repo_id: str) -> None:
    """Raise `ValueError` for what cannot be a repo's id."""
    if not _REPO_ID.fullmatch(repo_id):
        raise ValueError(
            f"{repo_id!r} is no Hub id: write org/name. A branch is given as revision=, a version as tag=."
        )
    validate_repo_id(repo_id)


def check_ref(what: str, name: str | None) -> None:
    """Raise `ValueError` for what cannot be the name of a tag, branch or commit."""
    if name is not None and (not name or _BAD_REF.search(name)):
        raise ValueError(f"{what}={name!r} cannot be the name of a tag, branch or commit.")


def check_subfolder(subfolder: str | None) -> None:
    """Raise `ValueError` for a folder that is not inside the repo."""
    if subfolder is None:
        return
    path = PurePosixPath(subfolder)
    if not subfolder or "\\" in subfolder or path.is_absolute() or str(path) != subfolder or ".." in path.parts:
        raise ValueError(
            f"subfolder={subfolder!r} must be a path inside the repo, such as 'truthful' or 'v2/truthful'."
        )


def listed(names: Iterable[str], most: int = 20) -> str:
    """Names for an error message: sorted, and not more than fit."""
    ordered = sorted(names)
    if not ordered:
        return "none"
    return ", ".join(map(repr, ordered[:most])) + (f" and {len(ordered) - most} more" if len(ordered) > most else "")
