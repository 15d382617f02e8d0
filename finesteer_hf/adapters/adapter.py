"""A steering adapter: a fitted method for one base model, as files."""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from finesteer_hf.adapters.base_checks import check_sizes, refuse_other_base
from finesteer_hf.adapters.base_models import base_of, public_name, without_paths
from finesteer_hf.adapters.config import (
    CONFIG_NAME,
    CUSTOM_GENERATE_NAME,
    WEIGHTS_NAME,
    SteeringConfig,
    read_config_file,
)
from finesteer_hf.adapters.fingerprint import compare
from finesteer_hf.adapters.registry import get_steering_method
from finesteer_hf.adapters.staging import Staging
from finesteer_hf.adapters.tensor_files import (
    DTYPES,
    Shape,
    check_finite,
    check_layout,
    hashed_name,
    most_bytes,
    read_tensors,
    write_tensors,
)
from finesteer_hf.adapters.wiring import above
from finesteer_hf.errors import AdapterFileError
from finesteer_hf.method_api import SteeringMethod
from finesteer_hf.sites import TextTower


@dataclass(frozen=True)
class LoadReport:
    """What a load found.

    It has no missing keys: a method needs all of its tensors, so an adapter that lacks one is refused.

    Attributes:
        adapter_name: name of the adapter on the model.
        unexpected_keys: tensors that the method does not use and that were left out, sorted (only with `strict=False`).
        warnings: differences that do not prevent steering: another base of the same shape, a LoRA that differs from
            the one at fit.
        revision: commit that the files came from, if they came from the Hub.
    """

    adapter_name: str
    unexpected_keys: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    revision: str | None = None


@dataclass
class SteeringAdapter:
    """A config and its tensors.

    Attributes:
        config: the method's config.
        tensors: parameters by name; fp32, or int64 for indices.
        revision: commit that it was loaded from, if it came from the Hub.
        source: where it was loaded from: a folder, or `org/name` with the folder in the repo and the revision asked for.
        unexpected_keys: tensors of its file that the method does not use and that were not read (only with `strict=False`).
    """

    config: SteeringConfig
    tensors: dict[str, torch.Tensor]
    revision: str | None = field(default=None, compare=False)
    source: str | None = field(default=None, compare=False)
    unexpected_keys: tuple[str, ...] = field(default=(), compare=False)

    def build(self) -> SteeringMethod:
        """The processor that steers with this adapter."""
        return get_steering_method(self.config.steering_type).method_cls(self.config, self.tensors)

    def check_tensors(self, strict: bool = True) -> tuple[str, ...]:
        """Compare the tensors with those that the config declares.

        Args:
            strict: whether undeclared tensors are an error.

        Returns:
            Names of the undeclared tensors, sorted; empty if strict.

        Raises:
            AdapterFileError: for missing tensors, wrong shapes or dtypes, NaN or infinity and, if strict, undeclared
                tensors.
        """
        expected = self.tensor_shapes()
        found = {name: (_dtype_name(tensor), tuple(tensor.shape)) for name, tensor in self.tensors.items()}
        unexpected = check_layout(f"The {self.config.steering_type} adapter", found, expected, strict)
        check_finite({name: self.tensors[name] for name in expected})
        return unexpected

    def tensor_shapes(self) -> Mapping[str, Shape]:
        """Names and shapes of the tensors that the config declares."""
        return get_steering_method(self.config.steering_type).method_cls.tensor_shapes(self.config)

    def check_base(self, model: torch.nn.Module, tower: TextTower, strict: bool = False) -> tuple[str, ...]:
        """Compare the adapter with a model.

        If the adapter has a fingerprint of its base, the weights decide, whatever the model's name. Without one, or if
        no weight can be compared, the names decide.

        Args:
            model: a causal LM of transformers.
            tower: its text tower.
            strict: whether another base of the same shape is an error.

        Returns:
            Warnings: another base of the same shape (not if strict), a LoRA that differs from the one at fit.

        Raises:
            AdapterMismatchError: if the widths or the numbers of layers differ; if strict, also for another base of
                the same shape, and for an adapter that does not name its base.
        """
        config = self.config
        check_sizes(config, model, tower)
        notes = self._other_base(model, tower)
        if strict:
            refuse_other_base(config, notes)
        active = active_lora_names(model)
        if active != config.lora:
            notes.append(f"fitted with LoRA {config.lora}, now active: {active}")
        return tuple(notes)

    def _other_base(self, model: torch.nn.Module, tower: TextTower) -> list[str]:
        config = self.config
        loaded, commit = base_of(model)
        name = loaded or type(model).__name__
        fitted_on = f"fitted on {config.base_model_name_or_path or 'an unnamed base'!r}"
        if config.base_model_type is not None and config.base_model_type != tower.config.model_type:
            of, at = config.base_model_type, tower.config.model_type
            return [f"{fitted_on} (model_type {of!r}), loaded on {name!r} (model_type {at!r})"]
        weights = compare(model, config.base_model_fingerprint)
        if weights.same:
            return []
        if weights.differing:
            commits = (config.base_model_revision, commit)
            at, of = (f" at {commit[:12]}" if commit and commits[0] != commits[1] else "" for commit in commits)
            return [
                f"{fitted_on}{at}, loaded on {name!r}{of}, which has other weights: of {len(weights.compared)} hashes "
                f"{len(weights.differing)} differ ({', '.join(weights.differing[:3])})"
            ]
        if config.base_model_name_or_path and public_name(config.base_model_name_or_path) != name:
            return [f"{fitted_on}, loaded on {name!r}"]
        return []

    def save_pretrained(
        self,
        save_directory: str | Path,
        *,
        push_to_hub: bool = False,
        custom_generate: bool = False,
        **push_kwargs: Any,
    ) -> Path:
        """Write config, tensors and card into a folder, all of them or none.

        If the save is interrupted, by a full disk or a kill, the folder holds either the old adapter or the new one.

        Args:
            save_directory: the folder; created if missing.
            push_to_hub: whether to upload it afterwards.
            custom_generate: whether to add code that lets plain transformers steer; see `push_adapter`.
            **push_kwargs: as for `push_to_hub`; `repo_id` defaults to the folder's name.

        Returns:
            The folder.

        Raises:
            AdapterFileError: if the tensors do not match the config, or the config is not JSON.
            FileExistsError: if the path is a file.
            OSError: if the disk is full or not writable.
            ValueError: if `push_to_hub` is set and the adapter names no base that others can load; nothing is written
                then.
        """
        if push_to_hub:
            above("with_public_base")(self, push_kwargs.get("base_model"))
        directory, published = Path(save_directory), self.published()
        published.config.to_json()
        card: dict[str, bytes | None] = above("render_card")(published, directory)
        if custom_generate:
            card[CUSTOM_GENERATE_NAME] = above("generate_code")(None)
        self._write(directory, card)
        if push_to_hub:
            repo_id = push_kwargs.pop("repo_id", directory.name)
            self.push_to_hub(repo_id, custom_generate=custom_generate, **push_kwargs)
        return directory

    def write_files(self, directory: str | Path) -> Path:
        """Write config and tensors, without a card, into a folder, created if missing.

        Raises what `save_pretrained` raises.
        """
        self._write(Path(directory), {})
        return Path(directory)

    def _write(self, directory: Path, others: Mapping[str, bytes | None]) -> None:
        """Write everything or nothing. Replacing the config is what switches from the old adapter to the new one.
        Until then the new tensors are stored under the name of their hash, where loading finds them.

        Args:
            directory: the folder.
            others: more files by name; None deletes the file.
        """
        self.check_tensors()
        config = self.published().config
        config.to_json()
        with Staging(directory) as stage:
            with stage.writing(WEIGHTS_NAME) as path:
                digest = write_tensors(path, self.tensors)
            stage.write(CONFIG_NAME, config.to_json(digest).encode())
            for name, content in others.items():
                if content is not None:
                    stage.write(name, content)
            for name, content in others.items():
                if content is not None:
                    stage.publish(name)
            hashed = hashed_name(digest)
            stage.publish(hashed, WEIGHTS_NAME)
            stage.publish(CONFIG_NAME)
            os.replace(directory / hashed, directory / WEIGHTS_NAME)
            gone = [directory / name for name, content in others.items() if content is None]
            for left in [*gone, *(directory.glob(hashed_name("?" * 64)) if stage.alone else ())]:
                left.unlink(missing_ok=True)

    def published(self) -> SteeringAdapter:
        """This adapter without local paths in the names of its base, its data and other adapters."""
        names = [entry.name for entry in dataclasses.fields(self.config) if entry.metadata.get("may_be_path")]
        public: dict[str, Any] = {name: public_name(getattr(self.config, name)) for name in names}
        config = dataclasses.replace(self.config, fit=without_paths(self.config.fit), **public)
        return dataclasses.replace(self, config=config)

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> Any:
        """Upload the adapter in one commit; see `finesteer_hf.hub.push_adapter`."""
        return above("push_adapter")(self, repo_id, **kwargs)

    def __add__(self, other: SteeringAdapter) -> SteeringAdapter:
        return self._combined([self, other], [1.0, 1.0]) if isinstance(other, SteeringAdapter) else NotImplemented

    def __sub__(self, other: SteeringAdapter) -> SteeringAdapter:
        return self._combined([self, other], [1.0, -1.0]) if isinstance(other, SteeringAdapter) else NotImplemented

    def __mul__(self, factor: float) -> SteeringAdapter:
        return self._combined([self], [factor]) if isinstance(factor, (int, float)) else NotImplemented

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> SteeringAdapter:
        return self * (1 / divisor) if isinstance(divisor, (int, float)) else NotImplemented

    def __neg__(self) -> SteeringAdapter:
        return self * -1.0

    @staticmethod
    def _combined(adapters: list[SteeringAdapter], weights: list[float]) -> SteeringAdapter:
        """Sum constant adapters; for others `finesteer_hf.adapters.algebra.combine` raises and says why."""
        combined: SteeringAdapter = above("combine")(adapters, weights)
        return combined

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        *,
        revision: str | None = None,
        strict: bool = True,
        accept: Callable[[SteeringConfig], object] | None = None,
        **hub_kwargs: Any,
    ) -> SteeringAdapter:
        """Load an adapter from a folder or the Hub.

        Args:
            name_or_path: a folder, `org/name` or `org/name@revision`; `org/name/folder` names a folder of the repo.
            revision: branch, tag or commit of the adapter's repo.
            strict: whether tensors that the method does not use are an error. If not, they are not read, and
                `unexpected_keys` names them; missing ones are always an error. The base is compared when the adapter
                is loaded on a model: `load_steering(strict=True)`.
            accept: called with the config before the tensors are read; what it raises ends the load.
            **hub_kwargs: `subfolder`, `token`, `cache_dir`, `local_files_only`, `force_download`.

        Raises:
            NoAdapterError: (a `FileNotFoundError`) if there is no such folder, repo or revision, or no adapter in it.
            HubUnreachableError: (a `ConnectionError`) if the Hub does not answer and the cache is incomplete.
            AdapterFileError: if a file is damaged or does not match.
            UnknownMethodError: if no installed package provides its `steering_type`.
        """
        files = above("resolve_adapter_files")(name_or_path, revision=revision, **hub_kwargs)
        data = read_config_file(files.config)
        digest = data.get("weights_sha256")
        if digest is not None and not isinstance(digest, str):
            raise AdapterFileError(f"`weights_sha256` in {CONFIG_NAME} must be a string, got {type(digest).__name__}.")
        adapter = cls(SteeringConfig.from_dict(data), {}, files.revision, files.name)
        if accept is not None:
            accept(adapter.config)
        shapes = adapter.tensor_shapes()
        weights = files.weights(digest, most_bytes(shapes))
        adapter.tensors, adapter.unexpected_keys = read_tensors(weights, shapes, strict=strict, sha256=digest)
        return adapter


def _dtype_name(tensor: torch.Tensor) -> str:
    return next((name for name, dtype in DTYPES.items() if dtype is tensor.dtype), str(tensor.dtype))


def active_lora_names(model: torch.nn.Module) -> list[str]:
    """Names of a model's active PEFT adapters, sorted; empty without PEFT layers."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    names: set[str] = set()
    for module in model.modules():
        if isinstance(module, BaseTunerLayer) and not module.disable_adapters:
            names.update(module.active_adapters)
    return sorted(names)


def warn_about(report_warnings: tuple[str, ...], adapter_name: str) -> None:
    """Warn once, at load, of what may make the adapter steer differently from where it was fitted."""
    for note in report_warnings:
        warnings.warn(f"Steering adapter {adapter_name!r}: {note}.", stacklevel=3)


def tensors_equal(a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor]) -> bool:
    """Whether two sets of tensors have the same names and the same values."""
    return set(a) == set(b) and all(torch.equal(a[name], b[name]) for name in a)
