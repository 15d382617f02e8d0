"""What a page works on: one model, its tokenizer and the adapters loaded on it."""

from __future__ import annotations

import re
import shutil
import tempfile
import threading
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, scan_cache_dir
from huggingface_hub.errors import CacheNotFound

from finesteer_hf.adapters.adapter import SteeringAdapter
from finesteer_hf.adapters.base_models import base_of, names_a_repo
from finesteer_hf.hub.integrity import FAILURES
from finesteer_hf.hub.names import is_repo_name, split_name
from finesteer_hf.hub.search import list_adapters


# Most adapters that visitors have loaded or fitted; the oldest goes when one more comes.
MOST_OF_VISITORS = 16
GENERAL_QUESTION = "What is 3 plus 4?"
_NOT_A_NAME = re.compile(r"[^\w.+-]+")


@dataclass(frozen=True)
class Loaded:
    """An adapter that was loaded on the workbench.

    Attributes:
        name: its name on the model.
        remarks: warnings of loading it.
    """

    name: str
    remarks: tuple[str, ...] = ()


@dataclass
class Workbench:
    """A steered model and the adapters that a page offers.

    Attributes:
        model: a steered model.
        tokenizer: its tokenizer.
        name: the model's name for people.
        own: names of the adapters that were there from the start; every visitor sees them.
        folders: whether visitors may load adapters from folders of this machine.
        lock: held by whatever runs the model or changes its adapters: a fit must not read another call's states.
    """

    model: Any
    tokenizer: Any
    name: str
    own: tuple[str, ...] = ()
    folders: bool = True
    lock: threading.Lock = field(default_factory=threading.Lock)
    _given: list[str] = field(default_factory=list)
    _files: str | None = None

    def adapter(self, name: str) -> SteeringAdapter:
        """A loaded adapter.

        Raises:
            ValueError: if it is not loaded; lists those that are.
        """
        adapters = self.model.steering_adapters
        if name not in adapters:
            raise ValueError(f"The adapter {name!r} is no longer loaded. Loaded: {sorted(adapters)}. Load it again.")
        return adapters[name]

    def examples(self) -> list[str]:
        """Questions to start with: the examples of the adapters' cards, and one that they should leave alone."""
        shown = [
            example["prompt"] for name in self.own for example in self.adapter(name).config.fit.get("examples") or []
        ]
        return [*distinct(shown), GENERAL_QUESTION] if shown else []

    def load(self, source: str, revision: str | None = None) -> Loaded:
        """Load an adapter beside the others, under a name made from its source.

        Args:
            source: `org/name`, `org/name@revision`, or a folder where `folders` allows it.
            revision: branch, tag or commit of the repo.

        Raises:
            ValueError, OSError: if there is no such adapter, or it does not fit the model.
        """
        source, revision = source.strip(), (revision or "").strip() or None
        if not source:
            raise ValueError(
                "Give an adapter: a Hub id such as org/name" + (", or a folder." if self.folders else ".")
            )
        if not self.folders and (not is_repo_name(source) or Path(source).exists()):
            raise ValueError(
                f"{source!r} is not a Hub id (org/name or org/name@revision); this page loads no folders."
            )
        last = Path(source.partition("@")[0]).name
        version = revision or source.partition("@")[2]
        return self.add(source, f"{last}@{version}" if version else last, revision=revision)

    def add(self, source: str | SteeringAdapter, name: str, *, revision: str | None = None) -> Loaded:
        """Load an adapter of a visitor; a name that is taken gets a number.

        Args:
            source: a folder, a Hub id or the adapter itself.
            name: its name; characters that a folder's name cannot have become `-`.
            revision: branch, tag or commit of the repo.

        Raises:
            ValueError, OSError: as `load_steering` does.
        """
        name = _NOT_A_NAME.sub("-", name).strip("-.") or "adapter"
        with self.lock:
            # A name is never given twice: whoever chose an adapter that has gone must not get another visitor's.
            free, number = name, 2
            while free in self._given or free in self.own:
                free, number = f"{name}-{number}", number + 1
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                self.model.load_steering(source, free, revision=revision)
            self._given.append(free)
            if len(self._given) > MOST_OF_VISITORS:
                self.model.delete_steering(self._given[-MOST_OF_VISITORS - 1])
        return Loaded(free, distinct(str(warning.message) for warning in caught))

    def found_on_hub(self) -> list[str]:
        """Ids of the Hub's adapters for this model; of those in the cache where the Hub is not used.

        Raises:
            ConnectionError: if the Hub does not answer.
        """
        if constants.HF_HUB_OFFLINE:
            return sorted(repo.repo_id for repo in _cached() if _holds_adapter(repo))
        base, _ = base_of(self.model)
        try:
            found = list_adapters(base if base is not None and names_a_repo(base) else None, limit=100)
        except FAILURES as error:
            raise ConnectionError(f"The Hub does not answer: {error}. Type the adapter's id, or a folder.") from error
        return [adapter.repo_id for adapter in found]

    def revisions(self, source: str) -> list[str]:
        """Branches and tags of an adapter's repo, tags first; none for a folder.

        Where the Hub is not used, those of the cache.

        Raises:
            ConnectionError: if the Hub does not answer, or has no such repo.
        """
        source = source.strip()
        if not source or Path(source).exists() or not is_repo_name(source):
            return []
        repo_id = split_name(source, None, None)[0]
        if constants.HF_HUB_OFFLINE:
            return sorted(ref for repo in _cached() if repo.repo_id == repo_id for ref in repo.refs)
        try:
            refs = HfApi().list_repo_refs(repo_id)
        except FAILURES as error:
            raise ConnectionError(f"The Hub has no branches of {repo_id!r} to show: {error}") from error
        return [ref.name for ref in (*refs.tags, *refs.branches)]

    def zipped(self, name: str) -> str:
        """Save a loaded adapter as a zip file and return its path; its folder holds what `save_pretrained` writes.

        Raises:
            ValueError: if it is not loaded.
        """
        adapter = self.adapter(name)
        self._files = self._files or tempfile.mkdtemp(prefix="finesteer-ui-")
        folder = Path(self._files) / "folders" / name
        adapter.save_pretrained(folder)
        return shutil.make_archive(str(Path(self._files) / name), "zip", folder.parent, name)

    def close(self) -> None:
        """Delete the zip files."""
        if self._files is not None:
            shutil.rmtree(self._files, ignore_errors=True)
            self._files = None


def distinct(texts: Any) -> tuple[str, ...]:
    """Texts in their order, each once."""
    return tuple(dict.fromkeys(texts))


def _cached() -> Sequence[Any]:
    """The model repos in the Hub's cache."""
    try:
        return [repo for repo in scan_cache_dir().repos if repo.repo_type == "model"]
    except CacheNotFound:
        return []


def _holds_adapter(repo: Any) -> bool:
    from finesteer_hf.adapters.config import CONFIG_NAME

    return any(file.file_name == CONFIG_NAME for revision in repo.revisions for file in revision.files)
