"""Errors of the loopback Hub, as the real one words them: status, X-Error-Code and X-Error-Message."""

from __future__ import annotations

from collections.abc import Mapping


class HubError(Exception):
    """An answer other than 2xx; `code` becomes X-Error-Code, by which clients choose their exception."""

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
        body: dict | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.headers = dict(headers or {})
        self.body = body or {}


def repo_not_found(repo_id: str, signed_in: bool = True) -> HubError:
    """404, or 401 for a visitor without a token: a private repository looks like one that does not exist."""
    if signed_in:
        return HubError(404, f"Repository not found: {repo_id}", "RepoNotFound")
    return HubError(401, "Invalid username or password.", "RepoNotFound")


def revision_not_found(revision: str, repo_id: str) -> HubError:
    return HubError(404, f"Invalid rev id: {revision} in {repo_id}", "RevisionNotFound")


def entry_not_found(path: str, commit: str) -> HubError:
    """The commit is sent along: clients then remember that it has no such file."""
    return HubError(404, f"Entry not found: {path}", "EntryNotFound", {"X-Repo-Commit": commit})
