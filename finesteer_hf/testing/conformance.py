"""Fit a method on a toy model and check what every method must guarantee.

The reference is the method itself in the plainest setting: one prompt at a time, no padding, greedy, dynamic cache.
Every other setting of `generate` must give the same tokens. A method that cannot support a feature lists it in
`refuses`, and the suite checks that it raises.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch

from finesteer_hf.adapters.adapter import SteeringAdapter, tensors_equal
from finesteer_hf.adapters.config import SteeringConfig
from finesteer_hf.adapters.registry import get_steering_method
from finesteer_hf.errors import UnsupportedModelError
from finesteer_hf.model.auto import SteeredModelForCausalLM
from finesteer_hf.serving.admission import not_served
from finesteer_hf.serving.contract import check_contract
from finesteer_hf.testing import checks
from finesteer_hf.testing.bench import Bench
from finesteer_hf.testing.toy import toy_general_prompts, toy_model, toy_preferences, toy_tokenizer


FEATURES: dict[str, Callable[[Bench], None]] = {
    name.removeprefix("check_"): function for name, function in vars(checks).items() if name.startswith("check_")
}

Prompts: TypeAlias = Sequence[Sequence[int] | torch.Tensor]


@dataclass(frozen=True)
class FeatureResult:
    """What a feature's check found: `passed`, `refused` with the error, or `differs` with the method's reason."""

    feature: str
    outcome: str
    reason: str = ""


def fit_on_toy(config: SteeringConfig, seed: int = 0, model: Any = None) -> tuple[Any, Any, SteeringAdapter]:
    """Fit a config on the toy data, by default for the toy model, and return model, tokenizer and adapter."""
    from finesteer_hf.fitting import fit_steering

    model, tokenizer = toy_model(seed) if model is None else model, toy_tokenizer()
    with warnings.catch_warnings():
        # A toy data set is small and its answers are similar; the data lint rightly warns.
        warnings.simplefilter("ignore")
        adapter = fit_steering(
            model,
            tokenizer,
            toy_preferences(),
            config,
            general_dataset=toy_general_prompts(),
            progress=False,
            seed=seed,
        )
    return model, tokenizer, adapter


def make_bench(adapter: SteeringAdapter, model: Any = None, prompts: Prompts | None = None) -> Bench:
    """A model steered by an adapter, with prompts whose answers it changes; raises as `Bench.of`."""
    model = toy_model() if model is None else model
    SteeredModelForCausalLM.from_model(model, steering={"a": adapter})
    return Bench.of(model, prompts)


def check_feature(
    feature: str, adapter: SteeringAdapter, model: Any = None, *, prompts: Prompts | None = None
) -> FeatureResult:
    """Check one feature of one adapter.

    Args:
        feature: a name from `FEATURES`.
        adapter: the adapter.
        model: None for the toy model.
        prompts: token ids of at least four prompts that the adapter steers, not all of one length; None for prompts of
            the toy data.

    Raises:
        AssertionError: if the feature is neither supported nor refused; before that, if the gate is shut on all
            prompts or steering changes nothing.
        ValueError: for an unknown feature, and for unusable prompts.
    """
    if feature not in FEATURES:
        raise ValueError(f"Unknown feature {feature!r}. The suite has: {sorted(FEATURES)}.")
    method_cls = get_steering_method(adapter.config.steering_type).method_cls
    if feature in method_cls.differs:
        return FeatureResult(feature, "differs", method_cls.differs[feature])
    if feature == "continuous_batching":
        try:
            check_contract()
        except UnsupportedModelError as error:
            return FeatureResult(feature, "refused", str(error))
    bench = make_bench(adapter, model, prompts)
    refuses = dict(method_cls.refused_by(adapter.config))
    if reason := not_served(bench.model._steering.get("a").processor):
        refuses["continuous_batching"] = reason
    if feature not in refuses:
        FEATURES[feature](bench)
        return FeatureResult(feature, "passed")
    try:
        FEATURES[feature](bench)
    except (ValueError, NotImplementedError, TypeError) as error:
        return FeatureResult(feature, "refused", str(error))
    raise AssertionError(
        f"{feature!r} is listed in `refuses` ({refuses[feature]}), but it works or is silently ignored."
    )


def check_steering_method(
    config: SteeringConfig,
    *,
    features: Iterable[str] | None = None,
    seed: int = 0,
    prompts: Prompts | None = None,
) -> list[FeatureResult]:
    """Run the suite on a steering method.

    Args:
        config: a config to fit; small settings (a fixed layer, few experts) keep it quick.
        features: names from `FEATURES`; None for all.
        seed: seed of the toy model and of the fit.
        prompts: as for `check_feature`; by default those of the toy data, which the config is fitted on.

    Returns:
        One result per feature.

    Raises:
        AssertionError: naming the first feature that fails; before that, if the gate is shut on all prompts or
            steering changes nothing.
        ValueError: for unusable prompts.
    """
    _, _, adapter = fit_on_toy(config, seed)
    check_files(adapter)
    try:
        make_bench(adapter, toy_model(seed), prompts)
    except AssertionError as error:
        raise AssertionError(f"{config.steering_type} cannot be checked: {error}") from error
    results = []
    for feature in FEATURES if features is None else features:
        try:
            results.append(check_feature(feature, adapter, toy_model(seed), prompts=prompts))
        except AssertionError as error:
            raise AssertionError(f"{config.steering_type} fails the feature {feature!r}: {error}") from error
    return results


def check_files(adapter: SteeringAdapter) -> None:
    """Check that saving and loading changes nothing."""
    with tempfile.TemporaryDirectory() as folder:
        adapter.save_pretrained(Path(folder) / "adapter")
        again = SteeringAdapter.from_pretrained(Path(folder) / "adapter")
    assert tensors_equal(adapter.tensors, again.tensors), "saving and loading changes the tensors"
    assert adapter.config == again.config, "saving and loading changes the config"
