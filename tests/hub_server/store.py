"""Repositories of the loopback Hub: blobs by sha256 on disk, a commit maps paths to blobs, refs point to commits."""

from __future__ import annotations

import hashlib
import itertools
import os
import tempfile
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import IO

from .errors import HubError, entry_not_found, repo_not_found, revision_not_found


CHUNK = 1 << 20


@dataclass(frozen=True)
class Blob:
    """One stored content; `lfs` says how it was committed, which decides its ETag and its listing."""

    sha256: str
    git_sha1: str
    size: int
    lfs: bool = False

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.git_sha1

    @property
    def pointer(self) -> bytes:
        text = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {self.size}\n"
        return text.encode()

    def entry(self, path: str) -> dict:
        """The file as `tree` and `paths-info` list it."""
        if not self.lfs:
            return {"type": "file", "path": path, "size": self.size, "oid": self.git_sha1}
        lfs = {"oid": self.sha256, "size": self.size, "pointerSize": len(self.pointer)}
        return {"type": "file", "path": path, "size": self.size, "oid": git_blob_sha1(self.pointer), "lfs": lfs}


@dataclass(frozen=True)
class Commit:
    sha: str
    parent: Commit | None
    title: str
    message: str
    author: str
    date: str
    files: Mapping[str, Blob]

    def history(self) -> Iterable[Commit]:
        """This commit and its ancestors, newest first."""
        commit: Commit | None = self
        while commit is not None:
            yield commit
            commit = commit.parent

    def file(self, path: str) -> Blob:
        try:
            return self.files[path]
        except KeyError:
            raise entry_not_found(path, self.sha) from None

    def entry(self, path: str) -> dict | None:
        """The file or folder at `path` as listed, None if there is neither."""
        if path in self.files:
            return self.files[path].entry(path)
        below = {name: blob.sha256 for name, blob in self.files.items() if name.startswith(f"{path}/")}
        if not below:
            return None
        return {
            "type": "directory",
            "path": path,
            "size": 0,
            "oid": git_blob_sha1(repr(sorted(below.items())).encode()),
        }

    def tree(self, folder: str = "", recursive: bool = False) -> list[dict]:
        """Entries under `folder` in path order, folders included; raises EntryNotFound for an unknown folder."""
        prefix = f"{folder}/" if folder else ""
        paths: set[str] = set()
        for path in self.files:
            if path.startswith(prefix):
                steps = list(itertools.accumulate(path[len(prefix) :].split("/"), lambda a, b: f"{a}/{b}"))
                paths.update(prefix + step for step in (steps if recursive else steps[:1]))
        if folder and not paths:
            raise entry_not_found(folder, self.sha)
        return [entry for path in sorted(paths) if (entry := self.entry(path)) is not None]


@dataclass
class Repo:
    type: str
    id: str
    private: bool
    created_at: str
    branches: dict[str, Commit] = field(default_factory=dict)
    tags: dict[str, Commit] = field(default_factory=dict)
    pulls: dict[int, Commit] = field(default_factory=dict)
    commits: dict[str, Commit] = field(default_factory=dict)

    @property
    def namespace(self) -> str:
        return self.id.split("/")[0]

    @property
    def url_path(self) -> str:
        """`ns/name` for a model, `datasets/ns/name` for a data set: the web address without its host."""
        return self.id if self.type == "model" else f"{self.type}s/{self.id}"

    def resolve(self, revision: str) -> Commit:
        """The commit of a branch, a tag, `refs/pr/N` or a (shortened, at least 7 digits) commit hash."""
        for refs in (self.branches, self.tags):
            if revision in refs:
                return refs[revision]
        if revision.startswith("refs/pr/") and revision[8:].isdigit() and int(revision[8:]) in self.pulls:
            return self.pulls[int(revision[8:])]
        known = list(self.commits.items())
        matches = [commit for sha, commit in known if len(revision) >= 7 and sha.startswith(revision)]
        if len(matches) != 1:
            raise revision_not_found(revision, self.id)
        return matches[0]

    def head(self, revision: str) -> Commit:
        """Like `resolve`, for what a commit may be added to: a branch or a pull request."""
        if revision in self.branches or revision.startswith("refs/pr/"):
            return self.resolve(revision)
        raise revision_not_found(revision, self.id)

    def move(self, revision: str, commit: Commit) -> None:
        if revision.startswith("refs/pr/"):
            self.pulls[int(revision[8:])] = commit
        else:
            self.branches[revision] = commit


def git_blob_sha1(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def now() -> str:
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


class Store:
    """All repositories and blobs of one server; every method may be called from any thread."""

    def __init__(self, root: Path) -> None:
        self.blobs = root / "blobs"
        self.blobs.mkdir(parents=True)
        self.lock = threading.RLock()
        self.repos: dict[tuple[str, str], Repo] = {}
        self._serial = itertools.count()

    # Blobs

    def put(self, content: bytes | IO[bytes], lfs: bool = False) -> Blob:
        """Store bytes, or what is left of an open file."""
        handle, name = tempfile.mkstemp(dir=self.blobs, prefix="incoming-")
        with os.fdopen(handle, "wb") as target:
            if isinstance(content, bytes):
                target.write(content)
            else:
                while chunk := content.read(CHUNK):
                    target.write(chunk)
            size = target.tell()
        sha256, sha1 = hashlib.sha256(), hashlib.sha1(b"blob %d\0" % size)
        with open(name, "rb") as source:
            while chunk := source.read(CHUNK):
                sha256.update(chunk)
                sha1.update(chunk)
        os.replace(name, self.path(sha256.hexdigest()))
        return Blob(sha256.hexdigest(), sha1.hexdigest(), size, lfs)

    def path(self, sha256: str) -> Path:
        return self.blobs / sha256

    def lfs_blob(self, sha256: str) -> Blob | None:
        """The stored LFS object of that hash, None if it was never uploaded; nobody asks for its git hash."""
        path = self.path(sha256)
        return Blob(sha256, "", path.stat().st_size, lfs=True) if path.is_file() else None

    # Repositories

    def create(self, type_: str, repo_id: str, private: bool, author: str) -> Repo:
        """New repository whose first commit holds .gitattributes; raises 409 if it exists."""
        with self.lock:
            if (type_, repo_id) in self.repos:
                raise HubError(409, f"You already created this {type_} repo: {repo_id}")
            repo = Repo(type_, repo_id, private, now())
            attributes = self.put(b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n")
            repo.branches["main"] = self._commit(
                repo, None, {".gitattributes": attributes}, "initial commit", "", author
            )
            self.repos[type_, repo_id] = repo
            return repo

    def get(self, type_: str, repo_id: str) -> Repo:
        with self.lock:
            if (type_, repo_id) not in self.repos:
                raise repo_not_found(repo_id)
            return self.repos[type_, repo_id]

    def delete(self, type_: str, repo_id: str) -> None:
        with self.lock:
            self.get(type_, repo_id)
            del self.repos[type_, repo_id]

    # Commits

    def commit(
        self,
        repo: Repo,
        revision: str,
        added: Mapping[str, Blob],
        deleted: Iterable[str] = (),
        title: str = "commit",
        message: str = "",
        author: str = "user",
        parent: str | None = None,
        create_pr: bool = False,
    ) -> tuple[Commit, int | None]:
        """Add one commit to a branch, all or nothing.

        Args:
            deleted: paths of files, or of folders when they end in a slash.
            parent: the commit this one was made against; 412 if the branch has moved since.
            create_pr: put the commit on a new `refs/pr/N`, started from `parent` or from the branch.

        Returns:
            The commit and the number of the pull request, if one was opened.
        """
        with self.lock:
            base = repo.head(revision)
            if create_pr and parent is not None:
                base = repo.resolve(parent)
            elif parent is not None and repo.resolve(parent) is not base:
                raise HubError(412, "A commit has happened since. Please refresh and try again.")
            files = dict(base.files)
            for path in deleted:
                gone = [name for name in files if name == path or (path.endswith("/") and name.startswith(path))]
                if not gone:
                    raise HubError(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
                for name in gone:
                    del files[name]
            commit = self._commit(repo, base, {**files, **added}, title, message, author)
            if not create_pr:
                repo.move(revision, commit)
                return commit, None
            number = len(repo.pulls) + 1
            repo.pulls[number] = commit
            return commit, number

    def _commit(
        self, repo: Repo, parent: Commit | None, files: Mapping[str, Blob], title: str, message: str, author: str
    ) -> Commit:
        date, listing = now(), sorted((path, blob.sha256) for path, blob in files.items())
        seed = f"{repo.id} {next(self._serial)} {date} {parent and parent.sha} {title} {listing}"
        commit = Commit(hashlib.sha1(seed.encode()).hexdigest(), parent, title, message, author, date, dict(files))
        repo.commits[commit.sha] = commit
        return commit
