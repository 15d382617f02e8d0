"""The loopback Hub: start it, look into it, commit to it without a client, order faults."""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from types import TracebackType

from . import routes_files, routes_repos
from .errors import HubError
from .faults import Faults, RequestLog
from .store import Commit, Repo, Store
from .wire import Server


ROUTE_MODULES = (routes_repos, routes_files)


@dataclass(frozen=True)
class User:
    name: str
    orgs: tuple[str, ...] = ()

    def owns(self, namespace: str) -> bool:
        return namespace == self.name or namespace in self.orgs


class HubServer:
    """A small Hugging Face Hub on 127.0.0.1, at a free port, with its files in a folder of its own.

    Use as a context manager, or call `start` and `stop`. The user `user` (token `hf_user`) is there from the start and
    is a member of the organisation `org`.

    Attributes:
        url: the endpoint, `http://127.0.0.1:PORT`.
        token: the token of the first user.
        requests: every request that came in, see `RequestLog`.
        faults: what is to go wrong, see `Fault`.
        crashes: tracebacks of exceptions inside the server; empty unless the server has a bug.
        page_size: entries in one page of a list.
        lfs: patterns of the file names that clients have to upload by LFS. With `()` every file travels inside the
            commit, which works with xet turned on as well.
    """

    def __init__(self, lfs: Sequence[str] = ("*.safetensors", "*.bin", "*.gguf")) -> None:
        self.lfs = tuple(lfs)
        self.token = "hf_user"
        self.users = {self.token: User("user", ("org",))}
        self.requests = RequestLog()
        self.faults = Faults()
        self.crashes: list[str] = []
        self.page_size = 1000
        self.stopping = threading.Event()
        self._folder = tempfile.TemporaryDirectory(prefix="loopback-hub-", ignore_cleanup_errors=True)
        self.store = Store(Path(self._folder.name))
        self._server = Server(self)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def start(self) -> HubServer:
        self._thread.start()
        return self

    def stop(self) -> None:
        """Close every connection and delete all files."""
        self.stopping.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
        self._server.close_connections()
        self._folder.cleanup()

    def __enter__(self) -> HubServer:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    # Users

    def add_user(self, name: str, token: str, orgs: Sequence[str] = ()) -> User:
        self.users[token] = User(name, tuple(orgs))
        return self.users[token]

    def user_of(self, authorization: str | None) -> User | None:
        """The user behind an Authorization header, None without one; raises 401 for an unknown token."""
        if authorization is None:
            return None
        user = self.users.get(authorization.removeprefix("Bearer "))
        if user is None:
            raise HubError(401, "Invalid credentials in Authorization header")
        return user

    def upload_mode(self, path: str) -> str:
        return "lfs" if any(fnmatch(path.split("/")[-1], pattern) for pattern in self.lfs) else "regular"

    # Without a client

    def repo(self, repo_id: str, repo_type: str = "model") -> Repo:
        """A repository by its id; raises HubError (404) if there is none."""
        return self.store.get(repo_type, repo_id)

    def commit(
        self,
        repo_id: str,
        files: Mapping[str, bytes | str],
        *,
        deleted: Iterable[str] = (),
        message: str = "commit",
        revision: str = "main",
        private: bool = False,
        repo_type: str = "model",
    ) -> str:
        """Commit files, and create the repository (in any namespace) if it is not there.

        Paths are taken as they are: `../evil` makes the repository that a careful client has to refuse.

        Args:
            files: content by path; a `str` is encoded as UTF-8.
            deleted: paths of files, or of folders when they end in a slash.
            private: only read when the repository is created.

        Returns:
            The hash of the commit.
        """
        with self.store.lock:
            if (repo_type, repo_id) not in self.store.repos:
                self.store.create(repo_type, repo_id, private, author="user")
            repo = self.repo(repo_id, repo_type)
            added = {
                path: self.store.put(
                    content.encode() if isinstance(content, str) else content, self.upload_mode(path) == "lfs"
                )
                for path, content in files.items()
            }
            return self.store.commit(repo, revision, added, deleted, title=message)[0].sha

    def tag(self, repo_id: str, tag: str, revision: str = "main", repo_type: str = "model") -> None:
        """Make a tag, or move an existing one, which no client can."""
        repo = self.repo(repo_id, repo_type)
        repo.tags[tag] = repo.resolve(revision)

    def commits(self, repo_id: str, revision: str = "main", repo_type: str = "model") -> list[Commit]:
        """History of a revision, newest first."""
        return list(self.repo(repo_id, repo_type).resolve(revision).history())

    def files(self, repo_id: str, revision: str = "main", repo_type: str = "model") -> dict[str, bytes]:
        """Every file of a revision by path."""
        commit = self.repo(repo_id, repo_type).resolve(revision)
        return {path: self.store.path(blob.sha256).read_bytes() for path, blob in sorted(commit.files.items())}
