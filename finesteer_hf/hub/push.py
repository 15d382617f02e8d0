"""Push an adapter: one commit on top of the commit that was read.

The Hub never has a partial push: the files and the merged card are in one commit with `parent_commit`, which fails if
the branch has moved. If only other files changed, the card is merged again and the commit is retried once on top; if
the adapter's own files changed, the push stops with an error.
"""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError
from huggingface_hub.hf_api import RepoFile

from finesteer_hf.adapters.base_models import PACKAGED, is_public, names_a_repo, public_name
from finesteer_hf.errors import PushConflictError, PushError
from finesteer_hf.hub.branches import PAUSES, Branch, head_of, prepare_branch, reason_of, status_of, tag_commit
from finesteer_hf.hub.card import warn_unmerged, write_card
from finesteer_hf.hub.generate_code import write_custom_generate
from finesteer_hf.hub.integrity import FAILURES, TooLarge, download, git_blob_sha1
from finesteer_hf.hub.names import check_ref, check_repo_id, check_subfolder
from finesteer_hf.hub.readme import CARD_NAME, MOST_README_BYTES, ReadmeError
from finesteer_hf.hub.repo_card import write_repo_card


if TYPE_CHECKING:
    from finesteer_hf.adapters.adapter import SteeringAdapter


def push_adapter(
    adapter: SteeringAdapter,
    repo_id: str,
    *,
    tag: str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    private: bool | None = None,
    commit_message: str | None = None,
    commit_description: str | None = None,
    token: str | bool | None = None,
    subfolder: str | None = None,
    custom_generate: bool = False,
    base_model: str | None = None,
) -> CommitInfo:
    """Upload an adapter in one commit, with its card merged into the repo's README.

    Args:
        adapter: a fitted adapter.
        repo_id: `org/name`, or `name` in the token's own namespace; created if missing.
        tag: name for the new commit; must not exist yet, so that a version never changes.
        revision: branch to commit to, created from `main` if missing; by default `main`.
        create_pr: whether to open a pull request instead of changing the branch.
        private: visibility of a new repo; an existing repo with the other visibility is an error.
        commit_message: title of the commit.
        commit_description: description of the commit.
        token: Hub token, if not the signed-in one.
        subfolder: folder of the repo for the adapter, so that one repo can hold several.
        custom_generate: whether to add `custom_generate/generate.py`, so that plain transformers steers with
            `model.generate(**inputs, custom_generate=repo_id, trust_remote_code=True)`.
        base_model: Hub id of the base model, if the adapter was fitted on a folder.

    Returns:
        The commit: `oid`, `commit_url` and, with `create_pr`, `pr_url`. If no file changed, the existing commit.

    Raises:
        AdapterFileError: if the tensors do not match the config.
        ValueError: if the tag exists, `tag` and `create_pr` are both given, a name is invalid, or the adapter names no
            base that others can load.
        PushConflictError: if someone else changed the adapter's files in the meantime; nothing was pushed.
        PushError: if the Hub rejected the push; the message says what is on the Hub.
    """
    adapter = with_public_base(adapter, base_model).published()
    adapter.check_tensors()
    if tag is not None and create_pr:
        raise ValueError("A tag names a commit of a branch: merge the pull request first, then tag it.")
    check_repo_id(repo_id)
    check_ref("tag", tag)
    check_ref("revision", revision)
    check_subfolder(subfolder)
    api = HfApi(token=token)
    message = commit_message or f"Upload {adapter.config.steering_type} adapter" + (f" {tag}" if tag else "")
    try:
        if "/" not in repo_id:
            repo_id = f"{api.whoami()['name']}/{repo_id}"
        branch = prepare_branch(api, repo_id, tag, revision, private)
        with tempfile.TemporaryDirectory(prefix="finesteer-push-") as folder:
            push = _Push(api, adapter, branch, subfolder, custom_generate, Path(folder), message, commit_description)
            commit = push.open_pull_request() if create_pr else push.commit()
    except HfHubHTTPError as error:
        raise PushError(f"Nothing was pushed to {repo_id}: {reason_of(error, repo_id)}") from error
    if tag is not None:
        tag_commit(api, repo_id, tag, commit.oid)
    return commit


def with_public_base(adapter: SteeringAdapter, base_model: str | None) -> SteeringAdapter:
    """The adapter with a base that others can load, by which the Hub finds adapters.

    Args:
        adapter: a fitted adapter.
        base_model: Hub id to use instead of the adapter's own base.

    Raises:
        ValueError: if there is none.
    """
    name = adapter.config.base_model_name_or_path
    if base_model is None:
        if not is_public(name):
            raise ValueError(
                f"The adapter was fitted on {public_name(name) or 'an unnamed base'!r}, which nobody else can load "
                "and the Hub cannot find. Name its model on the Hub: base_model='org/name'."
            )
        return adapter
    if not names_a_repo(base_model) and base_model not in PACKAGED:
        raise ValueError(f"base_model={base_model!r} is not a Hub id of the form org/name.")
    commit = adapter.config.base_model_revision if base_model == name else None
    config = dataclasses.replace(adapter.config, base_model_name_or_path=base_model, base_model_revision=commit)
    return dataclasses.replace(adapter, config=config)


@dataclass
class _Push:
    """One push in progress."""

    api: HfApi
    adapter: SteeringAdapter
    branch: Branch
    subfolder: str | None
    custom_generate: bool
    folder: Path
    message: str
    description: str | None

    def commit(self) -> CommitInfo:
        """Commit to the branch; retry if that is safe."""
        repo_id, name, parent = self.branch.repo_id, self.branch.name, self.branch.head
        merged_again, pauses = False, list(PAUSES)
        while True:
            files = self.write(parent)
            try:
                return self.send(files, parent)
            except FAILURES as error:
                status, failure = status_of(error), error
            if status is not None and status < 500 and status not in (408, 412, 429):
                raise failure
            head = self.head_after(failure)
            if head == parent:
                if not pauses:
                    raise PushError(
                        f"The Hub rejected the commit to {repo_id}: {failure}. Nothing was pushed, {name} is still "
                        f"at {parent[:8]}. Push again."
                    ) from failure
                time.sleep(pauses.pop(0))
            elif self.holds(files, head):
                # The commit arrived, but its response was lost: sent again it changes nothing, and the response names
                # it.
                parent = head
            elif merged_again or not self.unchanged(files, parent, head):
                raise PushConflictError(
                    f"Someone else pushed to {repo_id} in the meantime: {name} is now at {head[:8]}, not {parent[:8]}. "
                    "Nothing was pushed. Check the repo, then push again to put your version on top."
                ) from failure
            else:
                merged_again, parent = True, head

    def open_pull_request(self) -> CommitInfo:
        """Open a pull request; sent only once, since a second one might be a duplicate."""
        try:
            return self.send(self.write(self.branch.head), self.branch.head, create_pr=True)
        except FAILURES as error:
            if (status := status_of(error)) is not None and status < 500:
                raise
            raise PushError(
                f"The Hub did not answer the pull request for {self.branch.repo_id}: {error}. Check whether it "
                "was opened before you push again."
            ) from error

    def send(self, files: Mapping[str, Path], parent: str, create_pr: bool = False) -> CommitInfo:
        return self.api.create_commit(
            self.branch.repo_id,
            [CommitOperationAdd(path, source) for path, source in files.items()],
            commit_message=self.message,
            commit_description=self.description,
            revision=self.branch.name,
            create_pr=create_pr,
            parent_commit=parent,
        )

    def write(self, parent: str) -> dict[str, Path]:
        """Write all files to upload, with cards merged with a commit's; returns local paths by path in the repo."""
        shutil.rmtree(self.folder)
        directory = self.folder / (self.subfolder or "")
        directory.mkdir(parents=True)
        self.adapter.write_files(directory)
        cards, unread = {}, set()
        for path in self.cards:
            try:
                cards[path] = self.fetch(path, parent)
            except TooLarge as error:
                warn_unmerged(Path(path), ReadmeError(str(error)))
                unread.add(path)
        name = f"{self.branch.repo_id}/{self.subfolder}" if self.subfolder else self.branch.repo_id
        write_card(self.adapter, directory, name)
        if self.subfolder:
            write_repo_card(self.adapter, self.folder, self.subfolder)
        if self.custom_generate:
            write_custom_generate(self.folder, name)
        found = sorted(path for path in self.folder.rglob("*") if path.is_file())
        files = {path.relative_to(self.folder).as_posix(): path for path in found}
        # A card that cannot be merged is not sent: the Hub would validate content that is not ours.
        return {
            path: source
            for path, source in files.items()
            if path not in unread and cards.get(path) != source.read_bytes()
        }

    @property
    def cards(self) -> list[str]:
        """READMEs of the repo that the push merges into."""
        return [CARD_NAME, f"{self.subfolder}/{CARD_NAME}"] if self.subfolder else [CARD_NAME]

    def fetch(self, path: str, commit: str) -> bytes | None:
        """Copy a file of the repo into the folder, if there is one; returns its content."""
        try:
            source = download(
                self.branch.repo_id, path, revision=commit, token=self.api.token, most_bytes=MOST_README_BYTES
            )
        except EntryNotFoundError:
            return None
        content = source.read_bytes()
        (self.folder / path).write_bytes(content)
        return content

    def head_after(self, failure: Exception) -> str:
        """The branch's commit after a commit that may or may not have arrived."""
        try:
            return head_of(self.api, self.branch.repo_id, self.branch.name)
        except FAILURES as error:
            raise PushError(
                f"The push to {self.branch.repo_id} failed ({failure}), and the Hub's state is unknown ({error}). "
                f"{self.branch.name} was at {self.branch.head[:8]} before: check it, then push again."
            ) from failure

    def holds(self, files: Mapping[str, Path], commit: str) -> bool:
        """Whether a commit has exactly these files."""
        there = self.entries(files, commit)
        for path, source in files.items():
            entry, content = there.get(path), source.read_bytes()
            if entry is None or entry.size != len(content):
                return False
            operation = CommitOperationAdd(path, content)
            ours = operation.upload_info.sha256.hex() if entry.lfs else git_blob_sha1(content)
            if ours != (entry.lfs.sha256 if entry.lfs else entry.blob_id):
                return False
        return True

    def unchanged(self, files: Mapping[str, Path], before: str, after: str) -> bool:
        """Whether the files except cards are the same in two commits."""
        ours = [path for path in files if Path(path).name != CARD_NAME]
        old, new = self.entries(ours, before), self.entries(ours, after)
        return {p: e.blob_id for p, e in old.items()} == {p: e.blob_id for p, e in new.items()}

    def entries(self, paths: Mapping[str, Path] | list[str], commit: str) -> dict[str, RepoFile]:
        found = self.api.get_paths_info(self.branch.repo_id, list(paths), revision=commit)
        return {entry.path: entry for entry in found if isinstance(entry, RepoFile)}
