"""A method declares its name and its config class once."""

from importlib.resources import files
from typing import TypeVar

import pytest
from toy_method import ToyConfig, ToyMethod

from finesteer_hf import SteeringConfig, register_steering_method, steering_methods
from finesteer_hf.adapters import registry as known
from finesteer_hf.adapters.registry import get_steering_method
from finesteer_hf.method_api import SteeringMethod


OtherConfigT = TypeVar("OtherConfigT", bound="OtherConfig")


class OtherConfig(SteeringConfig):
    steering_type = "OTHER"


class Family(SteeringMethod[OtherConfigT]):
    pass


class Other(Family[OtherConfig]):
    pass


@pytest.fixture
def registry(monkeypatch):
    """A registry that is restored afterwards."""
    # What is built in registers once, so it must be there before the registry is copied.
    steering_methods()
    monkeypatch.setattr(known, "_REGISTRY", {name: spec for name, spec in known._REGISTRY.items() if name != "TOY"})


def test_the_brackets_declare_the_config_class():
    assert ToyMethod.config_cls is ToyConfig
    assert Other.config_cls is OtherConfig
    assert not hasattr(Family, "config_cls")
    assert type("Heir", (Other,), {}).config_cls is OtherConfig

    class Chosen(SteeringMethod[OtherConfig]):
        config_cls = ToyConfig

    assert Chosen.config_cls is ToyConfig


def test_the_config_names_the_method(registry):
    spec = register_steering_method(ToyMethod)
    assert (spec.name, spec.config_cls, spec.method_cls) == ("TOY", ToyConfig, ToyMethod)
    assert get_steering_method("TOY") is spec


def test_packages_for_earlier_versions_still_register(registry):
    class Old(SteeringMethod):
        config_cls = OtherConfig

    class Bare(SteeringMethod):
        pass

    spec = register_steering_method(name="OTHER", config_cls=OtherConfig, method_cls=Old)
    assert get_steering_method("OTHER") is spec
    assert register_steering_method("TOY", config_cls=ToyConfig, method_cls=Bare).config_cls is ToyConfig
    with pytest.raises(ValueError, match="expected 'ELSE'"):
        register_steering_method("ELSE", config_cls=OtherConfig, method_cls=Old)
    with pytest.raises(ValueError, match="already registered"):
        register_steering_method(Other)


def test_what_is_missing_is_named(registry):

    class Nameless(SteeringMethod[SteeringConfig]):
        pass

    with pytest.raises(TypeError, match="Family has no config"):
        register_steering_method(Family)
    with pytest.raises(TypeError, match="TOY has no config"):
        register_steering_method("TOY")
    with pytest.raises(ValueError, match="SteeringConfig has no steering_type"):
        register_steering_method(Nameless)


def test_the_package_is_marked_as_typed():
    assert files("finesteer_hf").joinpath("py.typed").is_file()
