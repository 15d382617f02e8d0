"""The guide to adding a method: its code runs, and a published method is found and loaded."""

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_toy_method import toy_adapter

from finesteer_hf import SteeredModelForCausalLM, SteeringAdapter, steering_methods
from finesteer_hf.adapters import config, registry
from finesteer_hf.errors import UnknownMethodError
from finesteer_hf.testing import toy_model


HERE = Path(__file__).parent
ROOT = HERE.parents[1]
GUIDE = (ROOT / "docs" / "add_a_method.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", GUIDE, flags=re.DOTALL)


def test_the_guide_shows_the_toy_method_as_it_is():
    assert blocks("python")[0] == (HERE / "toy_method.py").read_text()


def test_the_guide_s_code_runs(tmp_path, monkeypatch, capsys, recwarn):
    monkeypatch.chdir(tmp_path)
    names = dict(vars(importlib.import_module("toy_method")))
    for block in blocks("python")[1:]:
        exec(compile(block, "docs/add_a_method.md", "exec"), names)
    said = capsys.readouterr().out
    assert "('left_padding', 'passed')" in said
    assert "tensor([" in said
    assert (tmp_path / "toy-adapter" / "steering_config.json").exists()
    strength, report = names["choose"](None, names["ToyConfig"](strength=2.0), None, 1.0, 1.0)
    assert (strength, report["strength"]) == (2.0, "given")


def test_the_guide_s_entry_point_is_the_one_that_is_read():
    (block,) = blocks("toml")
    assert block == f'[project.entry-points."{registry.ENTRY_POINT_GROUP}"]\nTOY = "toy_method"\n'


@pytest.fixture
def stranger(tmp_path, monkeypatch):
    """An installed package with a method, and a folder with one of its adapters; the registry is restored."""
    # What is built in registers once, so it must be there before the registry is copied.
    steering_methods()
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))
    site = tmp_path / "site-packages"
    info = site / "strangers_method-0.1.dist-info"
    info.mkdir(parents=True)
    source = (HERE / "toy_method.py").read_text()
    (site / "strangers_method.py").write_text(source.replace('"TOY"', '"STRANGERS"'))
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: strangers-method\nVersion: 0.1\n")
    (info / "entry_points.txt").write_text(f"[{registry.ENTRY_POINT_GROUP}]\nSTRANGERS = strangers_method\n")
    adapter = tmp_path / "adapter"
    toy_adapter().save_pretrained(adapter)
    file = adapter / config.CONFIG_NAME
    file.write_text(json.dumps(json.loads(file.read_text()) | {"steering_type": "STRANGERS"}))
    yield site, adapter
    sys.modules.pop("strangers_method", None)


def test_a_published_method_is_found_without_an_import_and_its_adapters_load(stranger, monkeypatch):
    site, folder = stranger
    assert "STRANGERS" not in steering_methods()
    monkeypatch.syspath_prepend(str(site))
    assert "STRANGERS" in steering_methods()
    assert "strangers_method" not in sys.modules

    ids = torch.randint(6, 54, (2, 6), generator=torch.Generator().manual_seed(0))
    model = SteeredModelForCausalLM.from_model(toy_model(), steering=str(folder))
    assert "strangers_method" in sys.modules
    assert SteeringAdapter.from_pretrained(folder).config.steering_type == "STRANGERS"
    expected = SteeredModelForCausalLM.from_model(toy_model(), steering=toy_adapter())
    with torch.no_grad():
        logits = model(ids).logits
        assert torch.equal(logits, expected(ids).logits)
        assert not torch.equal(logits, toy_model()(ids).logits)


def test_without_the_package_the_error_says_what_is_missing(stranger):
    site, folder = stranger
    shutil.rmtree(site)
    with pytest.raises(UnknownMethodError, match="install the package that provides the method"):
        SteeringAdapter.from_pretrained(folder)


IN_THE_TREE = """
import sys
import finesteer_hf.method_api, finesteer_hf.adapters.adapter
from finesteer_hf.methods import BUILT_IN
assert "toy_method" in BUILT_IN
assert not [name for name in BUILT_IN if f"finesteer_hf.methods.{name}" in sys.modules]
from finesteer_hf import ToyConfig, steering_methods
from finesteer_hf.testing import check_steering_method
assert "TOY" in steering_methods()
assert ToyConfig.__module__ == "finesteer_hf.methods.toy_method"
print(check_steering_method(ToyConfig(layer=1), features=["left_padding"])[0].outcome)
"""


def test_in_the_tree_a_method_is_one_file_and_one_line(tmp_path):
    package = tmp_path / "finesteer_hf"
    package.mkdir()
    for entry in (ROOT / "finesteer_hf").iterdir():
        if entry.name not in ("methods", "__pycache__"):
            (package / entry.name).symlink_to(entry)
    shutil.copytree(
        ROOT / "finesteer_hf" / "methods", package / "methods", ignore=shutil.ignore_patterns("__pycache__")
    )
    # What a method may want of the layers above must not run in a circle.
    source = "from finesteer_hf import SteeringAdapter, fit_steering\n" + (HERE / "toy_method.py").read_text()
    future = "from __future__ import annotations\n"
    (package / "methods" / "toy_method.py").write_text(future + source.replace(future, ""))
    (block,) = blocks("diff")
    (added,) = re.findall(r"^\+(.*\n)", block, flags=re.MULTILINE)
    (before,) = re.findall(r"^ (.*\n)\+", block, flags=re.MULTILINE)
    listed = package / "methods" / "__init__.py"
    assert listed.read_text().count(before) == 1
    listed.write_text(listed.read_text().replace(before, before + added))
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", IN_THE_TREE], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (0, "passed\n"), done.stderr


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_guide_s_method_is_clean_under_mypy_strict(tmp_path):
    """As with an installed package: imports give their types and no errors."""
    (tmp_path / "toy_method.py").write_text(blocks("python")[0])
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file=", "--follow-imports=silent", "toy_method.py"]
    environment = {**os.environ, "MYPYPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
