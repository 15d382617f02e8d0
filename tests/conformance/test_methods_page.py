"""The page of methods: complete, its code runs, and the tests it names exist."""

import re
from pathlib import Path

import pytest

from finesteer_hf import SteeringConfig, steering_methods
from finesteer_hf.adapters.registry import get_steering_method
from finesteer_hf.testing import FEATURES


ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "methods.md").read_text()
SECTIONS = dict(re.findall(r"^## ([A-Z]+)\n(.*?)(?=^## |\Z)", PAGE, flags=re.DOTALL | re.MULTILINE))
HOME = "finesteer_hf.methods."
BUILT_IN = [n for n in steering_methods() if get_steering_method(n).method_cls.__module__.startswith(HOME)]


def test_every_method_has_a_section():
    assert sorted(SECTIONS) == sorted(BUILT_IN)


@pytest.mark.parametrize("name", sorted({*SECTIONS} - {"CONSTANT"}))
def test_its_code_makes_a_config_of_the_method(name):
    names: dict = {}
    (block,) = re.findall(r"```python\n(.*?)```", SECTIONS[name], flags=re.DOTALL)
    exec(compile(block, "docs/methods.md", "exec"), names)
    assert isinstance(names["config"], SteeringConfig)
    assert names["config"].steering_type == name


def test_the_tests_it_names_exist():
    known = {
        found
        for file in (ROOT / "tests").rglob("test_*.py")
        for found in re.findall(r"def (test_\w+)", file.read_text())
    }
    named = set(re.findall(r"`(test_\w+)`", PAGE))
    assert named
    assert named <= known


@pytest.mark.parametrize("name", sorted(SECTIONS))
def test_it_says_what_is_refused(name):
    method = get_steering_method(name).method_cls
    said = {word for word in re.findall(r"`(\w+)`", SECTIONS[name]) if word in FEATURES}
    assert said == {*method.refuses, *method.differs}
