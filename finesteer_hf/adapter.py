"""A steering adapter: a fitted method for one base model, as files."""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from finesteer_hf.config import WEIGHTS_NAME, SteeringConfig, get_steering_method
from finesteer_hf.errors import AdapterFileError, AdapterMismatchError
from finesteer_hf.methods.base import SteeringMethod
from finesteer_hf.sites import TextTower


@dataclass(frozen=True)
class LoadReport:
    """What a load found.

    Attributes:
        adapter_name: the name that the adapter got.
        missing_keys: parameters that the config calls for and the file lacks (only with `strict=False`).
        unexpected_keys: tensors of the file that the method does not use (only with `strict=False`).
        warnings: differences that do not prevent steering, such as another base of the same shape.
        revision: commit that the files came from, if they came from the Hub.
    """

    adapter_name: str
    missing_keys: tuple[str, ...] = ()
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
        source: Hub id or folder that it was loaded from.
    """

    config: SteeringConfig
    tensors: dict[str, torch.Tensor]
    revision: str | None = field(default=None, compare=False)
    source: str | None = field(default=None, compare=False)

    def build(self) -> SteeringMethod:
        """The processor that steers with this adapter."""
        return get_steering_method(self.config.steering_type).method_cls(self.config, self.tensors)

    def check_tensors(self, strict: bool = True) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Compare the tensors with what the config calls for.

        Args:
            strict: whether missing and unexpected tensors are errors.

        Returns:
            Names that are missing and names that are unexpected.

        Raises:
            AdapterFileError: for wrong shapes, wrong dtypes, NaN or infinity, and, if strict, for other names.
        """
        method_cls = get_steering_method(self.config.steering_type).method_cls
        expected = method_cls.tensor_shapes(self.config)
        missing = tuple(sorted(set(expected) - set(self.tensors)))
        unexpected = tuple(sorted(set(self.tensors) - set(expected)))
        if missing or (unexpected and strict):
            raise AdapterFileError(
                f"{WEIGHTS_NAME} does not match its config ({self.config.steering_type}): missing {list(missing)}, "
                f"unexpected {list(unexpected)}. Expected: {sorted(expected)}."
            )
        for name, shape in expected.items():
            tensor = self.tensors[name]
            if tensor.dtype not in (torch.float32, torch.int64):
                raise AdapterFileError(f"Tensor {name!r} has dtype {tensor.dtype}; adapters hold float32 (or int64).")
            if len(tensor.shape) != len(shape) or any(
                want is not None and want != got for want, got in zip(shape, tensor.shape, strict=True)
            ):
                raise AdapterFileError(
                    f"Tensor {name!r} has shape {tuple(tensor.shape)}, the config calls for {shape} (None is free)."
                )
            if not torch.isfinite(tensor).all():
                raise AdapterFileError(f"Tensor {name!r} holds NaN or infinity; the file is damaged.")
        return missing, unexpected

    def check_base(self, model: torch.nn.Module, tower: TextTower) -> tuple[str, ...]:
        """Compare the adapter with a model.

        Returns:
            Warnings: another base of the same shape, another LoRA than at fit.

        Raises:
            AdapterMismatchError: if the widths or the numbers of layers differ.
        """
        config = self.config
        here: Any = model.config
        name = getattr(here, "_name_or_path", "") or type(model).__name__
        for what, want, got in (
            ("hidden size", config.hidden_size, tower.hidden_size),
            ("number of layers", config.num_hidden_layers, tower.num_layers),
        ):
            if want is not None and want != got:
                raise AdapterMismatchError(
                    f"The adapter was fitted for {config.base_model_name_or_path!r} ({what} {want}), but the model "
                    f"{name!r} has {what} {got}. Load the base that the adapter names, or fit one for this model."
                )
        notes = []
        if config.base_model_type is not None and config.base_model_type != tower.config.model_type:
            notes.append(f"fitted on model_type {config.base_model_type!r}, loaded on {tower.config.model_type!r}")
        elif config.base_model_name_or_path and config.base_model_name_or_path != name:
            notes.append(f"fitted on {config.base_model_name_or_path!r}, loaded on {name!r}")
        active = active_lora_names(model)
        if active != config.lora:
            notes.append(f"fitted with LoRA {config.lora}, now active: {active}")
        return tuple(notes)

    def save_pretrained(self, save_directory: str | Path, *, push_to_hub: bool = False, **push_kwargs: Any) -> Path:
        """Write config, tensors and card into a folder.

        The tensors are written to a temporary file and moved into place, so a full disk leaves no half adapter.

        Args:
            save_directory: the folder; made if it is not there.
            push_to_hub: whether to upload it afterwards.
            **push_kwargs: as for `push_to_hub`; `repo_id` defaults to the folder's name.

        Returns:
            The folder.

        Raises:
            AdapterFileError: if the tensors do not match the config.
            FileExistsError: if the path is a file.
        """
        from finesteer_hf.cards import write_card

        self.check_tensors()
        directory = Path(save_directory)
        if directory.is_file():
            raise FileExistsError(f"{directory} is a file; give a folder to save the adapter in.")
        directory.mkdir(parents=True, exist_ok=True)
        contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in self.tensors.items()}
        handle, temporary = tempfile.mkstemp(dir=directory, prefix=".steering-", suffix=".safetensors")
        os.close(handle)
        try:
            save_file(contiguous, temporary, metadata={"format": "pt", "steering_type": self.config.steering_type})
            os.chmod(temporary, 0o644)
            os.replace(temporary, directory / WEIGHTS_NAME)
        finally:
            Path(temporary).unlink(missing_ok=True)
        self.config.save_pretrained(directory)
        write_card(self, directory)
        if push_to_hub:
            self.push_to_hub(push_kwargs.pop("repo_id", directory.name), **push_kwargs)
        return directory

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> Any:
        """Upload the adapter in one commit; see `finesteer_hf.hub.push_adapter`."""
        from finesteer_hf.hub import push_adapter

        return push_adapter(self, repo_id, **kwargs)

    @classmethod
    def from_pretrained(
        cls, name_or_path: str | Path, *, revision: str | None = None, strict: bool = True, **hub_kwargs: Any
    ) -> SteeringAdapter:
        """Load an adapter from a folder or the Hub.

        Args:
            name_or_path: a folder, `org/name` or `org/name@revision`.
            revision: branch, tag or commit of the adapter's repo.
            strict: whether tensors that the method does not use are an error.
            **hub_kwargs: `subfolder`, `token`, `cache_dir`, `local_files_only`, `force_download`.

        Raises:
            FileNotFoundError: if the folder or repo has no adapter.
            AdapterFileError: if a file is damaged or does not match.
            UnknownMethodError: if no installed package provides its `steering_type`.
        """
        from finesteer_hf.hub import resolve_adapter_files

        files = resolve_adapter_files(name_or_path, revision=revision, **hub_kwargs)
        config = SteeringConfig.from_json_file(files.config)
        assert files.weights is not None
        adapter = cls(config, read_tensors(files.weights, config), files.revision, str(name_or_path))
        adapter.check_tensors(strict)
        return adapter


def read_tensors(path: str | Path, config: SteeringConfig) -> dict[str, torch.Tensor]:
    """Read a safetensors file whose shapes were checked against the config before any is loaded.

    Raises:
        AdapterFileError: if the file is truncated or malformed, or a tensor is not what the config calls for.
    """
    expected = get_steering_method(config.steering_type).method_cls.tensor_shapes(config)
    try:
        with safe_open(str(path), framework="pt", device="cpu") as file:
            for name in file.keys():
                shape = file.get_slice(name).get_shape()
                want = expected.get(name)
                if want is not None and (
                    len(want) != len(shape) or any(w is not None and w != s for w, s in zip(want, shape, strict=True))
                ):
                    raise AdapterFileError(f"Tensor {name!r} has shape {tuple(shape)}, the config calls for {want}.")
            return {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError, ValueError) as error:
        if isinstance(error, AdapterFileError):
            raise
        raise AdapterFileError(f"{Path(path).name} is damaged or no safetensors file: {error}") from error


def active_lora_names(model: torch.nn.Module) -> list[str]:
    """Names of the PEFT adapters that are active in a model, sorted; empty without PEFT layers."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    names: set[str] = set()
    for module in model.modules():
        if isinstance(module, BaseTunerLayer) and not module.disable_adapters:
            names.update(module.active_adapters)
    return sorted(names)


def warn_about(report_warnings: tuple[str, ...], adapter_name: str) -> None:
    """Say once, at load, what may make the adapter steer otherwise than where it was fitted."""
    for note in report_warnings:
        warnings.warn(f"Steering adapter {adapter_name!r}: {note}.", stacklevel=3)


def tensors_equal(a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor]) -> bool:
    """Whether two sets of tensors have the same names and the same values."""
    return set(a) == set(b) and all(torch.equal(a[name], b[name]) for name in a)
