"""The adapters that a server offers, by name and version."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from finesteer_hf.adapters.adapter import SteeringAdapter
from finesteer_hf.errors import AdapterNotFoundError, SteeringError


_LABEL = re.compile(r"[A-Za-z0-9][\w.-]{0,63}", re.ASCII)


class AdapterExistsError(SteeringError, ValueError):
    """A name and version that is taken."""


class AdapterLabelError(SteeringError, ValueError):
    """A name or version that an adapter cannot have."""


@dataclass(frozen=True)
class Offered:
    """An adapter of the catalogue.

    Attributes:
        name: what requests call it by.
        version: `name@version` is this one, whatever `name` alone means now.
        source: where it came from: a folder or a Hub id.
        method: its steering method.
        notes: what loading it found, such as a base of another name.
    """

    name: str
    version: str
    source: str
    method: str
    notes: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """The adapter's name on the model."""
        return f"{self.name}@{self.version}"


class Catalogue:
    """Loads adapters onto a model under `name@version`, and says which one a request means.

    Safe to use from several threads; what a request was given stays its own, whatever is loaded or dropped afterwards.

    Args:
        model: a steered model.
        check: raises if an adapter, which it gets with its name, cannot be served.

    Attributes:
        lock: held by who looks an adapter up and then uses it, so that it is not dropped in between; never while files
            are fetched or read.
    """

    def __init__(self, model: Any, check: Callable[[str, SteeringAdapter], None]) -> None:
        self._model = model
        self._check = check
        self._loading = threading.Lock()
        self.lock = threading.RLock()
        # In the order of loading.
        self._offered: dict[str, Offered] = {}
        self._current: dict[str, str] = {}

    def offered(self) -> list[Offered]:
        """All that is offered, by name, in the order of loading."""
        with self.lock:
            return sorted(self._offered.values(), key=lambda each: each.name)

    def resolve(self, reference: str) -> Offered:
        """The adapter of `name`, the version that it means now, or of `name@version`.

        Raises:
            AdapterNotFoundError: if there is none; it lists those that there are.
        """
        with self.lock:
            found = self._offered.get(self._current.get(reference, reference))
            if found is None:
                raise AdapterNotFoundError(reference, [*self._current, *self._offered])
            return found

    def add(self, name: str, source: str, version: str | None = None, *, replace: bool = False) -> Offered:
        """Load an adapter, which is what its name means from now on; takes as long as its files need to come.

        Args:
            name: letters, digits, `_`, `.`, `-`.
            source: a folder or a Hub id, `org/name` or `org/name@revision`.
            version: None: the revision that `source` names, else the first of v1, v2, ... that is free.
            replace: whether what the name meant before is dropped; a version of the same label is replaced then.

        Raises:
            AdapterExistsError: if the name has this version and `replace` is not set.
            AdapterNotFoundError: if there is nothing to replace.
            AdapterLabelError: for a name or version that cannot be one.
            SteeringError: if it cannot be loaded or served; nothing has changed then.
        """
        with self._loading:
            before = self.resolve(name) if replace else None
            version = self._version(name, source, version)
            offered_key = f"{name}@{version}"
            if offered_key in self._offered and not replace:
                raise AdapterExistsError(f"{offered_key} is loaded already; replace it, or give another version.")
            adapter = SteeringAdapter.from_pretrained(source)
            self._check(name, adapter)
            with self.lock:
                report = self._model.load_steering(adapter, offered_key)
                # Requests say what they are steered with; nothing is active for those that do not.
                self._model.set_steering(None)
                offered = Offered(name, version, source, adapter.config.steering_type, report.warnings)
                self._offered[offered.key] = offered
                self._current[name] = offered.key
                if before is not None and before.key != offered.key:
                    self._forget(before)
        return offered

    def drop(self, reference: str) -> list[Offered]:
        """Forget `name`, all of its versions, or `name@version`; the newest that is left is what the name means then.

        Returns:
            What was dropped.

        Raises:
            AdapterNotFoundError: if there is none.
        """
        with self._loading, self.lock:
            name = self.resolve(reference).name
            gone = [each for each in self._offered.values() if reference in (each.key, each.name)]
            for each in gone:
                self._forget(each)
            if self._current[name] not in self._offered:
                del self._current[name]
                left = [each.key for each in self._offered.values() if each.name == name]
                if left:
                    self._current[name] = left[-1]
        return gone

    def _forget(self, offered: Offered) -> None:
        del self._offered[offered.key]
        self._model.delete_steering(offered.key)

    def _version(self, name: str, source: str, version: str | None) -> str:
        if version is None:
            revision = source.rpartition("@")[2] if "@" in source else ""
            number = 1
            while f"{name}@v{number}" in self._offered:
                number += 1
            version = revision if _LABEL.fullmatch(revision) else f"v{number}"
        for label in (name, version):
            if not _LABEL.fullmatch(label):
                raise AdapterLabelError(
                    f"{label!r} cannot be an adapter's name or version: letters, digits, '_', '.' and '-', 64 at most."
                )
        return version
