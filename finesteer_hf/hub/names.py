"""Names of repos, revisions and folders: parsed, and checked before any request."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import PurePosixPath

from huggingface_hub.utils import validate_repo_id


_REPO_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
# What git refuses in the name of a branch or tag, as far as it matters in a URL.
_BAD_REF = re.compile(r"[\x00-\x20\x7f~^:?*\[\\]|\.\.|@\{|//|^[/.-]|[/.]$|\.lock$")


def split_name(name: str, subfolder: str | None, revision: str | None) -> tuple[str, str | None, str | None]:
    """Parse `org/name/folder@revision`.

    Args:
        name: `name`, `org/name` or `org/name/folder`, with or without `@revision`.
        subfolder: a folder given separately.
        revision: a revision given separately.

    Returns:
        The repo's id, the folder in it (None: its root) and the revision (None: the default branch).

    Raises:
        ValueError: if two different folders or revisions are given, or one is not a valid name.
    """
    path, at, suffix = name.partition("@")
    if at and not suffix:
        raise ValueError(f"{name!r} ends in '@': write org/name@revision, or org/name alone.")
    if suffix and revision is not None and revision != suffix:
        raise ValueError(f"{name!r} names revision {suffix!r}, but revision={revision!r} was given. Give one.")
    parts = path.split("/")
    inner = "/".join(parts[2:]) or None
    if inner and subfolder is not None and subfolder != inner:
        raise ValueError(f"{name!r} names folder {inner!r}, but subfolder={subfolder!r} was given. Give one.")
    check_ref("revision", suffix or revision)
    check_subfolder(inner)
    return "/".join(parts[:2]), inner or subfolder, suffix or revision


def is_repo_name(text: str) -> bool:
    """Whether a text can name a Hub repo, or a folder in one; most local paths cannot."""
    parts = text.partition("@")[0].split("/")
    return _REPO_ID.fullmatch("/".join(parts[:2])) is not None and not text.startswith(".") and ".." not in parts


def check_repo_id(repo_id: str) -> None:
    """Raise `ValueError` for an invalid repo id."""
    if not _REPO_ID.fullmatch(repo_id):
        raise ValueError(
            f"{repo_id!r} is not a Hub id: write org/name. Give a branch as revision=, a version as tag=."
        )
    validate_repo_id(repo_id)


def check_ref(what: str, name: str | None) -> None:
    """Raise `ValueError` for an invalid tag, branch or commit name."""
    if name is not None and (not name or _BAD_REF.search(name)):
        raise ValueError(f"{what}={name!r} is not a valid name of a tag, branch or commit.")


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
    """Names for an error message: sorted, and at most `most`."""
    ordered = sorted(names)
    if not ordered:
        return "none"
    return ", ".join(map(repr, ordered[:most])) + (f" and {len(ordered) - most} more" if len(ordered) > most else "")
