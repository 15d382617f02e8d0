"""Find an adapter's files in a folder, or in a Hub repo at one commit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from finesteer_hf.adapters.config import CONFIG_NAME, MAX_CONFIG_BYTES, WEIGHTS_NAME
from finesteer_hf.adapters.tensor_files import SHA256, hashed_name
from finesteer_hf.errors import AdapterFileError, HubUnreachableError, NoAdapterError
from finesteer_hf.hub.integrity import commit_of, download
from finesteer_hf.hub.names import check_subfolder, is_repo_name, listed, split_name


@dataclass(frozen=True)
class AdapterFiles:
    """Local paths of an adapter's files, and their source.

    Attributes:
        config: path of `steering_config.json`.
        source: the folder, or the repo's id (with the folder in it).
        find_weights: see `weights`.
        revision: commit that all files came from, None for a folder.
        requested: requested branch, tag or commit, None for the default branch.
    """

    config: Path
    source: str
    find_weights: Callable[[str | None, int], Path]
    revision: str | None = None
    requested: str | None = None

    @property
    def name(self) -> str:
        """The source with the requested branch or tag: `org/name@v1`."""
        return f"{self.source}@{self.requested}" if self.requested not in (None, self.revision) else self.source

    def weights(self, sha256: str | None, most_bytes: int) -> Path:
        """Path of the tensors' file, downloaded now if it is on the Hub.

        Args:
            sha256: its hash in the config, if any.
            most_bytes: largest size by the config; a larger file is not downloaded.

        Raises:
            NoAdapterError, HubUnreachableError, AdapterFileError: as for `resolve_adapter_files`.
        """
        return self.find_weights(sha256, most_bytes)


def resolve_adapter_files(
    name_or_path: str | Path,
    *,
    revision: str | None = None,
    subfolder: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
) -> AdapterFiles:
    """Find an adapter's config, downloading it if it is on the Hub, and locate its tensors.

    The config comes first: its content bounds the later downloads. It is requested by the revision's name, which also
    gives the commit; the tensors are requested by that commit, so one load never mixes two. A load from the cache
    makes one request, and none if the revision is a full commit hash, `local_files_only` is set, or `HF_HUB_OFFLINE`
    is set.

    Args:
        name_or_path: a folder, `org/name` or `org/name@revision`; `org/name/folder@revision` names a folder of the repo.
        revision: branch, tag or commit of the adapter's repo.
        subfolder: folder inside the repo or folder.
        token: Hub token, if not the signed-in one.
        cache_dir: cache folder, if not the default one.
        local_files_only: whether to use only the cache, without any request.
        force_download: whether to download files that are already in the cache.

    Raises:
        NoAdapterError: (a `FileNotFoundError`) if there is no such folder, repo, revision or adapter in it.
        HubUnreachableError: (a `ConnectionError`) if the Hub does not answer and the cache is incomplete.
        AdapterFileError: if a file is damaged or links outside its folder.
        ValueError: if arguments contradict each other, or one is not a valid name.
    """
    check_subfolder(subfolder)
    folder = Path(name_or_path)
    if folder.is_dir():
        if revision is not None:
            raise ValueError(f"{folder} is a folder and has no revisions; leave out revision={revision!r}.")
        return _folder_files(folder, subfolder)
    if not isinstance(name_or_path, str) or not is_repo_name(name_or_path):
        raise NoAdapterError(
            f"There is no folder {str(name_or_path)!r}, and it is not a Hub id (org/name or org/name@revision)."
        )
    repo_id, subfolder, revision = split_name(name_or_path, subfolder, revision)
    where = _Place(repo_id, revision, subfolder, token)
    options: dict[str, Any] = {
        "token": token,
        "cache_dir": cache_dir,
        "local_files_only": local_files_only,
        "force_download": force_download,
    }
    try:
        config = download(repo_id, where.path(CONFIG_NAME), revision=revision, most_bytes=MAX_CONFIG_BYTES, **options)
    except (EntryNotFoundError, HfHubHTTPError, HTTPError) as error:
        raise where.explain(error, local_files_only) from error
    commit = commit_of(config, where.path(CONFIG_NAME))

    def find_weights(sha256: str | None, most_bytes: int) -> Path:
        try:
            return download(repo_id, where.path(WEIGHTS_NAME), revision=commit, most_bytes=most_bytes, **options)
        except (EntryNotFoundError, HfHubHTTPError, HTTPError) as error:
            raise where.explain(error, local_files_only) from error

    return AdapterFiles(config, where.name, find_weights, commit, revision)


def _folder_files(folder: Path, subfolder: str | None) -> AdapterFiles:
    inner = folder / subfolder if subfolder else folder

    def checked(path: Path) -> Path:
        if not path.is_file():
            found = sorted(p.parent.relative_to(folder).as_posix() for p in folder.glob(f"*/{CONFIG_NAME}"))
            raise NoAdapterError(
                f"{inner} has no {path.name}; it is not a steering adapter, or an incomplete one."
                + (f" Subfolders that have one: {listed(found)}." if found else "")
            )
        _check_inside(path, folder)
        return path

    def find_weights(sha256: str | None, most_bytes: int) -> Path:
        # An interrupted or running save has the tensors under their hash; see `SteeringAdapter._write`.
        hashed = inner / hashed_name(sha256) if sha256 and SHA256.fullmatch(sha256) else None
        return checked(hashed if hashed is not None and hashed.is_file() else inner / WEIGHTS_NAME)

    return AdapterFiles(checked(inner / CONFIG_NAME), str(inner), find_weights)


def _check_inside(path: Path, folder: Path) -> None:
    """Refuse a link out of the folder; the Hub's cache links from `snapshots/<commit>` to `blobs`."""
    real, inside = path.resolve(), folder.resolve()
    if inside in real.parents:
        return
    parts = inside.parts
    if "snapshots" in parts:
        repo = Path(*parts[: len(parts) - 1 - parts[::-1].index("snapshots")])
        if real.parent == repo / "blobs":
            return
    raise AdapterFileError(f"{path} is a link to a file outside {folder}. Put the file itself there.")


@dataclass(frozen=True)
class _Place:
    """Where on the Hub an adapter was looked for; builds the error if it is missing."""

    repo_id: str
    revision: str | None
    subfolder: str | None
    token: str | bool | None

    @property
    def name(self) -> str:
        return f"{self.repo_id}/{self.subfolder}" if self.subfolder else self.repo_id

    def path(self, file: str) -> str:
        return f"{self.subfolder}/{file}" if self.subfolder else file

    def explain(self, error: Exception, local_files_only: bool) -> NoAdapterError | HubUnreachableError:
        """Say what is missing, list what exists, say what to do."""
        at = f" at revision {self.revision!r}" if self.revision else ""
        if isinstance(error, GatedRepoError):
            return NoAdapterError(
                f"{self.repo_id} is gated: ask for access on its page, then sign in with `hf auth login`."
            )
        if isinstance(error, RepositoryNotFoundError):
            signed_in = self.token if self.token is not None else get_token()
            return NoAdapterError(
                f"There is no repo {self.repo_id!r} on the Hub, or it is private and "
                + (
                    "this token may not read it. Check the name, or give a token that may read it."
                    if signed_in
                    else "no token was sent. Check the name, sign in with `hf auth login`, or give token=."
                )
            )
        if isinstance(error, RevisionNotFoundError):
            return NoAdapterError(f"{self.repo_id} has no revision {self.revision!r}. {self._revisions()}")
        if isinstance(error, LocalEntryNotFoundError):
            missing = f"The steering adapter {self.name!r}{at} is not in the cache, and "
            todo = "Load it once while online, or give a local folder."
            if local_files_only:
                return NoAdapterError(f"{missing}local_files_only=True makes no request. {todo}")
            if constants.HF_HUB_OFFLINE:
                return NoAdapterError(f"{missing}HF_HUB_OFFLINE is set. {todo}")
            return HubUnreachableError(f"{missing}the Hub cannot be reached. {todo} ({error.__cause__ or error})")
        if isinstance(error, EntryNotFoundError):
            files = f"{CONFIG_NAME} and {WEIGHTS_NAME}"
            return NoAdapterError(f"{self.name}{at} has no steering adapter ({files}). {self._contents()}")
        return HubUnreachableError(f"The steering adapter {self.name!r}{at} could not be downloaded: {error}")

    def _revisions(self) -> str:
        try:
            refs = HfApi(token=self.token).list_repo_refs(self.repo_id)
        except (HTTPError, OSError):
            return "See the repo's page for its tags and branches."
        tags, branches = (listed(ref.name for ref in kind) for kind in (refs.tags, refs.branches))
        return f"Tags: {tags}; branches: {branches}. Give a commit by its 40 digits."

    def _contents(self) -> str:
        try:
            files = HfApi(token=self.token).list_repo_files(self.repo_id, revision=self.revision)
        except (HTTPError, OSError):
            return "See the repo's page for its files."
        adapters = [path.rpartition("/")[0] or "the root" for path in files if path.endswith(CONFIG_NAME)]
        if adapters:
            return f"Steering adapters in it: {listed(adapters)}; give subfolder= for one that is not in the root."
        if "adapter_config.json" in files:
            return "It holds a PEFT adapter: load that with AutoModelForCausalLM, as the model, not as steering=."
        if "config.json" in files:
            return "It holds a model: give it as the model, not as steering=."
        return f"Files in it: {listed(files)}."
