"""The content of `steering_config.json`.

Each method has a config dataclass; its fields are the file's keys. A file lists the features that a reader must
understand (`requires`). A reader that does not know one refuses the file: ignoring an unknown key could change what
the adapter does.
"""

from __future__ import annotations

import dataclasses
import json
import math
import reprlib
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from types import UnionType
from typing import (
    Any,
    ClassVar,
    Literal,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

from finesteer_hf.adapters.json_files import read_json_object
from finesteer_hf.adapters.registry import get_steering_method
from finesteer_hf.adapters.staging import replacing
from finesteer_hf.adapters.wiring import above
from finesteer_hf.errors import AdapterFileError
from finesteer_hf.processors import POSITIONS, Positions


CONFIG_NAME = "steering_config.json"
WEIGHTS_NAME = "steering_model.safetensors"
CUSTOM_GENERATE_NAME = "custom_generate/generate.py"
FORMAT_VERSION = 1
# A config is a page of settings and figures; anything larger is something else.
MAX_CONFIG_BYTES = 16 * 1024 * 1024
# Far above any model, and small enough to cost no memory or time before the model is checked.
MOST_WIDTH = 1 << 20
MOST_LAYERS = 10_000
MOST_HEADS = 4096
# Keys of the file that are not fields of the method.
FILE_KEYS = frozenset({"format_version", "steering_type", "weights_sha256"})

ConfigT = TypeVar("ConfigT", bound="SteeringConfig")


def setting(text: str, **more: Any) -> dict[str, Any]:
    """Metadata of a config field that a user sets: `finesteer fit --set` accepts it, and `fit_steering` honours it.

    Args:
        text: what it means, a few words.
        **more: bounds of the value: `least`, `most`.
    """
    return {"help": text, **more}


def written_by_fit(text: str, **more: Any) -> dict[str, Any]:
    """Metadata of a config field that the fit writes and no user chooses; arguments as for `setting`."""
    return setting(text, written_by_fit=True, **more)


@dataclass(kw_only=True)
class SteeringConfig:
    """Fields that every steering adapter has.

    Attributes:
        base_model_name_or_path: model that the adapter was fitted on: a Hub id, the id of a packaged model
            (`playground`), or `local:` and the name of a folder.
        base_model_revision: commit of that model, if known.
        base_model_fingerprint: hashes of its sizes and of a few weights; see `finesteer_hf.adapters.fingerprint`.
        base_model_type: its `config.model_type`.
        hidden_size: width of its residual stream.
        num_hidden_layers: number of its decoder blocks.
        lora: names of the LoRA adapters that were active when it was fitted.
        positions: tokens that are steered: `all`, `prompt` or `generated`.
        strength: lambda of the update; a number once fitted.
        limits: limits on what steering may cost, used where a fit chooses; names as in `Limits` in
            `methods/_shared/objective.py`, the others keep their defaults.
        requires: features that a reader must understand; it refuses the file otherwise.
        fit: how it was fitted: data, seed, versions, held-out figures. Not needed to steer.
    """

    steering_type: ClassVar[str] = ""
    understands: ClassVar[frozenset[str]] = frozenset()

    base_model_name_or_path: str | None = field(
        default=None, metadata=written_by_fit("Hub id of the base model.", may_be_path=True)
    )
    base_model_revision: str | None = field(default=None, metadata=written_by_fit("Commit of the base model."))
    base_model_fingerprint: dict[str, str] = field(
        default_factory=dict, metadata=written_by_fit("Hashes of the base model's sizes and of a few weights.")
    )
    base_model_type: str | None = field(default=None, metadata=written_by_fit("config.model_type of the base model."))
    hidden_size: int | None = field(
        default=None, metadata=written_by_fit("Width of the residual stream.", least=1, most=MOST_WIDTH)
    )
    num_hidden_layers: int | None = field(
        default=None, metadata=written_by_fit("Number of decoder blocks.", least=1, most=MOST_LAYERS)
    )
    lora: list[str] = field(default_factory=list, metadata=written_by_fit("LoRA adapters active at fit."))
    positions: Positions = field(default="all", metadata=setting("Steered tokens: all, prompt or generated."))
    strength: float | str = field(default=1.0, metadata=setting("Lambda of the update."))
    limits: dict[str, float] = field(default_factory=dict, metadata=setting("What steering may cost, by name."))
    requires: list[str] = field(
        default_factory=list, metadata=written_by_fit("Features that a reader must understand.")
    )
    fit: dict[str, Any] = field(default_factory=dict, metadata=written_by_fit("Provenance and held-out figures."))

    #: Allowed values of `positions`; methods that choose them also allow `auto`.
    allowed_positions: ClassVar[tuple[str, ...]] = POSITIONS

    def __post_init__(self) -> None:
        check_bounds(self)
        if self.positions not in self.allowed_positions:
            raise ValueError(f"positions must be one of {list(self.allowed_positions)}, got {self.positions!r}.")
        if isinstance(self.strength, (int, float)) and not math.isfinite(self.strength):
            raise ValueError(f"strength must be finite, got {self.strength}.")

    @classmethod
    def setting_fields(cls) -> dict[str, dataclasses.Field[Any]]:
        """The fields that a user may set, by name; a fit writes the others."""
        return {f.name: f for f in dataclasses.fields(cls) if not f.metadata.get("written_by_fit")}

    def settings(self) -> dict[str, Any]:
        """The user's settings, without what a fit wrote: `type(config)(**config.settings())` can be fitted again."""
        return {name: getattr(self, name) for name in self.setting_fields()}

    @classmethod
    def check_kind(cls, name: str, value: Any) -> None:
        """Compare a field's JSON value with the field's declared type.

        Raises:
            TypeError: if they do not match.
        """
        kind = _field_kinds(cls).get(name, Any)
        if not fits(value, kind):
            raise TypeError(f"`{name}` must be {_kind_text(kind)}, got {reprlib.repr(value)}.")

    def to_dict(self) -> dict[str, Any]:
        """The content of `steering_config.json`."""
        return {
            "format_version": FORMAT_VERSION,
            "steering_type": self.steering_type,
            **{f.name: getattr(self, f.name) for f in dataclasses.fields(self)},
        }

    @classmethod
    def from_dict(cls: type[ConfigT], data: dict[str, Any]) -> ConfigT:
        """Build a config from a file's content; `steering_type` gives the class.

        Raises:
            AdapterFileError: for a format or a required feature that this version does not understand, and for fields
                of a wrong type.
            UnknownMethodError: if no installed package provides the `steering_type`.
        """
        if not isinstance(data, dict) or not isinstance(data.get("steering_type"), str):
            raise AdapterFileError(f"{CONFIG_NAME} must hold a JSON object with a string `steering_type`.")
        version = data.get("format_version", FORMAT_VERSION)
        if isinstance(version, bool) or not isinstance(version, int) or not 1 <= version <= FORMAT_VERSION:
            raise AdapterFileError(
                f"{CONFIG_NAME} has format_version {version!r}; this finesteer_hf reads 1 to {FORMAT_VERSION}. Upgrade it."
            )
        config_cls = get_steering_method(data["steering_type"]).config_cls
        if not issubclass(config_cls, cls):
            raise AdapterFileError(
                f"The adapter has steering_type {data['steering_type']!r}, which {cls.__name__} does not read. Use "
                "`SteeringConfig.from_pretrained` or `SteeringAdapter.from_pretrained`, which read every type."
            )
        requires = data.get("requires", [])
        if not isinstance(requires, list) or not all(isinstance(name, str) for name in requires):
            raise AdapterFileError(f"`requires` in {CONFIG_NAME} must be a list of feature names, got {requires!r}.")
        missing = sorted(name for name in requires if name not in config_cls.understands)
        if missing:
            raise AdapterFileError(
                f"The adapter requires features that this finesteer_hf does not understand: {missing}. "
                f"Understood for {data['steering_type']}: {sorted(config_cls.understands)}. Upgrade finesteer_hf."
            )
        names = {f.name for f in dataclasses.fields(config_cls)}
        unknown = sorted(set(data) - names - FILE_KEYS)
        if unknown:
            warnings.warn(
                f"{CONFIG_NAME} has keys that this version does not know and does not need: {unknown}.", stacklevel=3
            )
        for name in sorted(names & set(data)):
            try:
                config_cls.check_kind(name, data[name])
            except TypeError as error:
                raise AdapterFileError(f"In {CONFIG_NAME}, {error}") from error
        try:
            return config_cls(**{name: value for name, value in data.items() if name in names})
        except (TypeError, ValueError, OverflowError) as error:
            raise AdapterFileError(f"{CONFIG_NAME} cannot be read as {config_cls.__name__}: {error}") from error

    def save_pretrained(self, save_directory: str | Path, *, weights_sha256: str | None = None) -> Path:
        """Write `steering_config.json` into a folder.

        Args:
            save_directory: the folder; created if missing.
            weights_sha256: SHA-256 of its `steering_model.safetensors`; loading checks it.

        Returns:
            Path of the file.
        """
        path = Path(save_directory) / CONFIG_NAME
        text = self.to_json(weights_sha256)
        with replacing(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
        return path

    def to_json(self, weights_sha256: str | None = None) -> str:
        """The text of `steering_config.json`; argument as for `save_pretrained`.

        Raises:
            AdapterFileError: if a value has no JSON form, such as NaN or an array.
        """
        data = self.to_dict()
        if weights_sha256 is not None:
            data["weights_sha256"] = weights_sha256
        try:
            text = json.dumps(data, indent=2, sort_keys=True, allow_nan=False) + "\n"
            _check_json(data)
        except (TypeError, ValueError, RecursionError) as error:
            odd = [name for name, value in data.items() if not _is_json(value)]
            raise AdapterFileError(
                f"{odd} of the {self.steering_type} config cannot be written as JSON ({error}). Use strings, numbers, "
                "lists and dicts with string keys."
            ) from error
        return text

    @classmethod
    def from_pretrained(cls: type[ConfigT], name_or_path: str | Path, **hub_kwargs: Any) -> ConfigT:
        """Read the config of a folder or a Hub repo, without its weights.

        Args:
            name_or_path: a folder, `org/name` or `org/name@revision`.
            **hub_kwargs: as for `SteeringAdapter.from_pretrained`.
        """
        return cls.from_json_file(above("resolve_adapter_files")(name_or_path, **hub_kwargs).config)

    @classmethod
    def from_json_file(cls: type[ConfigT], path: str | Path) -> ConfigT:
        """Read a `steering_config.json`.

        Raises:
            AdapterFileError: if it is too large, not JSON, or not a config.
        """
        return cls.from_dict(read_config_file(path))


def _is_json(value: Any) -> bool:
    try:
        _check_json(value)
    except (TypeError, ValueError, RecursionError):
        return False
    return True


def _check_json(value: Any) -> None:
    # JSON can escape half of a surrogate pair, but Python cannot write or print it.
    json.dumps(value, sort_keys=True, allow_nan=False, ensure_ascii=False).encode("utf-8")


def check_bounds(config: SteeringConfig) -> None:
    """Check a config's numbers against `least` and `most` of their fields' metadata; of a list, each number.

    Raises:
        ValueError: naming the field, its bounds and its value.
    """
    for entry in dataclasses.fields(config):
        least, most = entry.metadata.get("least", -math.inf), entry.metadata.get("most", math.inf)
        value = getattr(config, entry.name)
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, (int, float)) and not isinstance(number, bool) and not least <= number <= most:
                raise ValueError(f"{entry.name} must be from {least} to {most}, got {reprlib.repr(number)}.")


def read_config_file(path: str | Path) -> dict[str, Any]:
    """Read the JSON of a `steering_config.json`, without building a config.

    Raises:
        AdapterFileError: as for `read_json_object`.
    """
    return read_json_object(path, MAX_CONFIG_BYTES)


def fits(value: Any, kind: Any) -> bool:
    """Whether a JSON value matches a config field's declared type. An integer is a float; true is not."""
    origin, args = get_origin(kind), get_args(kind)
    if kind is Any:
        return True
    if origin in (Union, UnionType):
        return any(fits(value, arg) for arg in args)
    if origin is Literal:
        return any(type(value) is type(arg) and value == arg for arg in args)
    if origin is dict or kind is dict:
        return isinstance(value, dict) and all(fits(item, args[1] if args else Any) for item in value.values())
    if origin in (list, tuple) or kind in (list, tuple):
        return isinstance(value, list) and all(fits(item, args[0] if args else Any) for item in value)
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return value is None if kind is type(None) else isinstance(value, kind)


def _field_kinds(config_cls: type) -> dict[str, Any]:
    """Declared types of a config's fields; empty if one uses a name that is not defined in the class's module."""
    try:
        return get_type_hints(config_cls)
    except NameError:
        return {}


def _kind_text(kind: Any) -> str:
    return kind.__name__ if isinstance(kind, type) else str(kind).replace("typing.", "")
