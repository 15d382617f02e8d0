"""Downloads that are checked against the Hub's hashes.

huggingface_hub checks the size of a download, not its hash. It names the cached file after the hash that the Hub
announces: the git hash of a small file, the SHA-256 of a large one. So the content can be checked against the name.
"""

from __future__ import annotations

import hashlib
import re
import time
from pathlib import Path
from typing import Any

from huggingface_hub import constants, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HTTPError
from huggingface_hub.utils import tqdm

from finesteer_hf.adapters.tensor_files import sha256_of
from finesteer_hf.errors import AdapterFileError


# Errors of a connection, the Hub or its storage; huggingface_hub reports a failed upload as RuntimeError.
FAILURES = (HTTPError, HfHubHTTPError, OSError, RuntimeError)
# Seconds before a failed download is retried once.
PAUSE = 0.5
_HASH = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")


class TooLarge(AdapterFileError):
    """A file is larger than the caller allows."""


def download(repo_id: str, path: str, *, most_bytes: int, revision: str | None = None, **kwargs: Any) -> Path:
    """Download a file into the cache, or find it there, and check it against its announced hash.

    A damaged cached file is downloaded again, unless no request may be made.

    Args:
        repo_id: `org/name`.
        path: path in the repo.
        most_bytes: size above which the file is not downloaded.
        revision: branch, tag or commit.
        **kwargs: as for `hf_hub_download`.

    Returns:
        Path in the cache.

    Raises:
        TooLarge: (an `AdapterFileError`) if it has more than `most_bytes`.
        AdapterFileError: if the content does not match the Hub's hash; it is then removed from the cache.
    """
    kwargs["tqdm_class"] = _bar_up_to(most_bytes, f"{path} of {repo_id}")
    try:
        local = _fetch(repo_id, path, revision, kwargs)
    except FAILURES as error:
        if not _is_passing(error):
            raise
        time.sleep(PAUSE)
        local = _fetch(repo_id, path, revision, kwargs)
    if is_intact(local):
        return local
    if kwargs.get("local_files_only") or constants.HF_HUB_OFFLINE:
        raise AdapterFileError(
            f"{path} of {repo_id} is damaged in the cache ({local}). Load it once while online to replace it."
        )
    forget(local)
    local = _fetch(repo_id, path, commit_of(local, path), {**kwargs, "force_download": True})
    if not is_intact(local):
        forget(local)
        raise AdapterFileError(
            f"{path} of {repo_id} was downloaded twice with content other than announced. Nothing was kept. Try "
            "again; if it keeps failing, the file is damaged on the Hub or on the way."
        )
    return local


def _bar_up_to(most_bytes: int, what: str) -> type[tqdm]:
    """A progress bar that stops a download that is too large.

    huggingface_hub gives it the announced size before the first byte, and the size of each piece. Asking for the size
    would take one more request for each file.
    """

    class BoundedBar(tqdm):
        def __init__(self, *args: Any, total: float | None = None, initial: float = 0, **kwargs: Any) -> None:
            self.received = initial
            super().__init__(*args, total=total, initial=initial, **kwargs)
            self.check(total or 0)

        def update(self, n: float | None = 1) -> bool | None:
            self.received += n or 0
            self.check(self.received)
            return super().update(n)

        def check(self, size: float) -> None:
            if size > most_bytes:
                self.close()
                raise TooLarge(
                    f"{what} has {int(size)} bytes or more; at most {most_bytes} are allowed. It was not downloaded."
                )

    return BoundedBar


def _fetch(repo_id: str, path: str, revision: str | None, kwargs: dict[str, Any]) -> Path:
    try:
        return Path(hf_hub_download(repo_id, path, revision=revision, **kwargs))
    except OSError as error:
        # huggingface_hub's size check raises a bare OSError, without a subclass or errno.
        if type(error) is not OSError or error.errno is not None:
            raise
        wrong_size = error
    try:
        return Path(hf_hub_download(repo_id, path, revision=revision, **{**kwargs, "force_download": True}))
    except OSError as error:
        if type(error) is not OSError or error.errno is not None:
            raise
        raise AdapterFileError(
            f"{path} of {repo_id} was downloaded twice with a size other than announced. Nothing was kept: {wrong_size}"
        ) from error


def _is_passing(error: Exception) -> bool:
    """Whether a failure may be temporary and was not retried yet: a closed connection, a 5xx."""
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code >= 500
    return isinstance(error, HTTPError)


def commit_of(local: Path, path: str) -> str:
    """The commit of a cached file, from its path `snapshots/<commit>/<path in the repo>`."""
    return local.parents[len(Path(path).parts) - 1].name


def is_intact(local: Path) -> bool:
    """Whether a cached file's content matches the hash in its blob's name; true if the cache has no blobs."""
    blob = local.resolve()
    if blob.parent.name != "blobs" or not _HASH.fullmatch(blob.name):
        return True
    if len(blob.name) == 40:
        return git_blob_sha1(blob.read_bytes()) == blob.name
    return sha256_of(blob) == blob.name


def forget(local: Path) -> None:
    """Remove a file and its blob from the cache."""
    blob = local.resolve()
    local.unlink(missing_ok=True)
    blob.unlink(missing_ok=True)


def git_blob_sha1(content: bytes) -> str:
    """git's hash of a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
