"""The suite on methods that learn: shifts by the task loss, vectors by a preference, a controller, a gate on tokens."""

import functools

import pytest

from finesteer_hf.methods.bipo import BIPOConfig
from finesteer_hf.methods.reps import REPSConfig
from finesteer_hf.methods.tad import TADConfig
from finesteer_hf.methods.task_driven import TaskDrivenConfig
from finesteer_hf.methods.was import WASConfig
from finesteer_hf.testing import FEATURES, check_feature, toy_model
from finesteer_hf.testing.conformance import check_files, fit_on_toy


CONFIGS = {
    "task-driven": TaskDrivenConfig(layer=1, strength=2.0, iterations=4),
    "bipo": BIPOConfig(layer=1, strength=2.0, epochs=2),
    "reps": REPSConfig(layer=1, strength=2.0, epochs=2, positions="generated"),
    "tad": TADConfig(layer=1, strength=8.0),
    "tad-soft": TADConfig(layer=1, strength=8.0, gate="soft", uncertainty="entropy"),
    "tad-recurrent": TADConfig(layer=1, strength=8.0, recurrence=3),
    "tad-attention": TADConfig(layer=1, strength=8.0, gate="soft", recurrence=3, attention=True),
    "was": WASConfig(strength=20.0, epochs=100),
    "was-official": WASConfig(strength=20.0, epochs=100, compat="official", direction="answers"),
}
# The settings that a method can get wrong by itself; what is the run time's work is under `slow`.
QUICK = {"left_padding", "mixed_rows"}


def model_for(name):
    """The toy model, with attention weights if a method uses them."""
    model = toy_model()
    if getattr(CONFIGS[name], "attention", False):
        model.set_attn_implementation("eager")
    return model


@functools.cache
def fitted(name):
    return fit_on_toy(CONFIGS[name], model=model_for(name))[2]


@pytest.mark.parametrize("name", CONFIGS)
def test_files(name):
    check_files(fitted(name))


@pytest.mark.parametrize(
    ("name", "feature"),
    [
        pytest.param(name, feature, marks=[] if feature in QUICK else pytest.mark.slow)
        for name in CONFIGS
        for feature in sorted(FEATURES)
    ],
)
def test_feature(name, feature):
    check_feature(feature, fitted(name), model_for(name))
