"""Branches and tags of a repo: where a commit goes, and its tag."""

from __future__ import annotations

import time
from dataclasses import dataclass

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
from huggingface_hub.hf_api import GitRefs

from finesteer_hf.errors import PushError
from finesteer_hf.hub.integrity import FAILURES
from finesteer_hf.hub.names import listed


# Seconds before a failed commit or tag is sent again.
PAUSES = (0.5, 2.0)


@dataclass(frozen=True)
class Branch:
    """Where a commit goes, and its parent commit."""

    repo_id: str
    name: str
    head: str


def prepare_branch(api: HfApi, repo_id: str, tag: str | None, revision: str | None, private: bool | None) -> Branch:
    """Check the repo, create it and the branch if missing, and raise for an impossible push."""
    refs = _refs(api, repo_id, private)
    tags = {ref.name for ref in refs.tags}
    if tag in tags:
        raise ValueError(
            f"{repo_id} already has a tag {tag!r}, and a version must not change. Nothing was pushed. Existing "
            f"tags: {listed(tags)}. Choose another, or first HfApi().delete_tag({repo_id!r}, tag={tag!r})."
        )
    name = revision or "main"
    heads = {ref.name: ref.target_commit for ref in refs.branches}
    if name in heads:
        return Branch(repo_id, name, heads[name])
    if name in tags:
        raise ValueError(
            f"{name!r} is a tag of {repo_id}; commits go to branches. Existing branches: {listed(heads)}."
        )
    if not name.startswith("refs/pr/"):
        api.create_branch(repo_id, branch=name, exist_ok=True)
    return Branch(repo_id, name, head_of(api, repo_id, name))


def _refs(api: HfApi, repo_id: str, private: bool | None) -> GitRefs:
    try:
        refs = api.list_repo_refs(repo_id)
    except RepositoryNotFoundError:
        api.create_repo(repo_id, private=private, exist_ok=True)
        return api.list_repo_refs(repo_id)
    if private is not None and bool(api.model_info(repo_id).private) is not private:
        raise ValueError(
            f"{repo_id} exists and is {'public' if private else 'private'}, which private={private} does not change. "
            f"Nothing was pushed. Change it first with HfApi().update_repo_settings({repo_id!r}, private={private}), "
            "or leave private= out."
        )
    return refs


def head_of(api: HfApi, repo_id: str, branch: str) -> str:
    sha = api.model_info(repo_id, revision=branch).sha
    assert sha is not None
    return sha


def tag_commit(api: HfApi, repo_id: str, tag: str, commit: str) -> None:
    """Tag a commit; distinguishes a lost response from a tag that someone else made."""
    pauses = list(PAUSES)
    while True:
        try:
            return api.create_tag(repo_id, tag=tag, revision=commit)
        except FAILURES as error:
            failure = error
        try:
            there = {ref.name: ref.target_commit for ref in api.list_repo_refs(repo_id).tags}
        except FAILURES:
            there = {}
        if there.get(tag) == commit:
            return None
        if tag in there or not pauses:
            why = (
                "someone else made one in the meantime, on another commit"
                if tag in there
                else reason_of(failure, repo_id)
            )
            raise PushError(
                f"The adapter was pushed to {repo_id} as commit {commit}, but the tag {tag!r} was not created: {why}. "
                f"Create one with HfApi().create_tag({repo_id!r}, tag=..., revision={commit!r})."
            ) from failure
        time.sleep(pauses.pop(0))


def reason_of(error: Exception, repo_id: str) -> str:
    """The Hub's error, with advice if there is any."""
    status = status_of(error)
    if status in (401, 403):
        return (
            f"the Hub does not let this token write to {repo_id}. Sign in with `hf auth login`, or give token= one with "
            f"write access to {repo_id.split('/')[0]!r}; without it, create_pr=True opens a pull request ({error})."
        )
    return str(error)


def status_of(error: Exception) -> int | None:
    return error.response.status_code if isinstance(error, HfHubHTTPError) else None
