"""Sums and multiples of constant adapters: those that add the same vectors for every query.

A method qualifies if its processor reads no states, maps none and leaves the logits alone: CAA, CONSTANT, a refusal
vector. The result is a CONSTANT adapter. Adapters that depend on the query cannot be summed into one vector, but
several can be active together.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from finesteer_hf.adapters.adapter import SteeringAdapter
from finesteer_hf.adapters.registry import get_steering_method
from finesteer_hf.adapters.tensor_files import vector_name
from finesteer_hf.processors import QueryStates
from finesteer_hf.sites import INNER_KINDS, Site


def constant_vectors(adapter: SteeringAdapter) -> dict[Site, torch.Tensor]:
    """What a constant adapter adds, strength included.

    Args:
        adapter: an adapter whose update does not depend on the query.

    Returns:
        A vector `[width]`, float32, for each site.

    Raises:
        ValueError: if the adapter is gated, depends on the query, maps the stream, or acts on logits.
    """
    processor = adapter.build()
    kind = adapter.config.steering_type
    if processor.reads:
        raise ValueError(
            f"This {kind} adapter reads the query at {', '.join(map(str, processor.reads))}: its vector depends on it, "
            "and a constant vector does not."
        )
    if processor.maps or processor.logits_processors(1.0) or not processor.writes:
        what = "maps the stream" if processor.maps else "acts on logits"
        raise ValueError(f"This {kind} adapter {what}; a constant vector is added to the stream.")
    decision = processor.decide(QueryStates({}, 1, torch.device("cpu")))
    if decision.gate is not None:
        raise ValueError(f"This {kind} adapter has a gate; a constant vector has none.")
    return {site: vector[0] * processor.strength for site, vector in decision.vectors.items()}


def constant_adapter(vectors: Mapping[Site, torch.Tensor], **settings: Any) -> SteeringAdapter:
    """Make a CONSTANT adapter from vectors.

    Args:
        vectors: `[width]` for each site, any float dtype.
        **settings: fields of the method's config; the hidden size is taken from the vectors of the residual stream.

    Raises:
        ValueError: if there is no vector, the sites are of different kinds, or the widths differ.
    """
    kinds = {site.kind for site in vectors}
    if len(kinds) != 1:
        raise ValueError(
            f"One CONSTANT adapter steers one kind of site, got {sorted(map(str, vectors))}. Make one for each kind and "
            "activate both."
            if kinds
            else "No vectors were given."
        )
    widths = {tuple(vector.shape) for vector in vectors.values()}
    if len(widths) != 1 or len(next(iter(widths))) != 1:
        raise ValueError(f"The vectors must be one-dimensional and equally wide, got the shapes {sorted(widths)}.")
    kind = next(iter(kinds))
    if kind not in INNER_KINDS:
        settings.setdefault("hidden_size", next(iter(widths))[0])
    ordered = sorted(vectors)
    constant: Any = get_steering_method("CONSTANT").config_cls
    config = constant(layers=[site.layer for site in ordered], site=kind, **settings)
    tensors = {vector_name(site): vectors[site].detach().to("cpu", torch.float32).clone() for site in ordered}
    adapter = SteeringAdapter(config, tensors)
    adapter.check_tensors()
    return adapter


def combine(adapters: Sequence[SteeringAdapter], weights: Sequence[float] | None = None) -> SteeringAdapter:
    """Sum constant adapters into one: `sum_i weight_i * adapter_i`.

    Args:
        adapters: one or more, for the same base; a layer that only some of them steer is kept.
        weights: one number each; 1 by default.

    Returns:
        A CONSTANT adapter of strength 1; `config.fit["combined"]` says what it was made of.

    Raises:
        ValueError: if one is not constant, or they differ in the tokens, kinds of sites or model widths that they
            steer.
    """
    weights = [1.0] * len(adapters) if weights is None else [float(weight) for weight in weights]
    if not adapters or len(adapters) != len(weights):
        raise ValueError(f"Give at least one adapter and one weight each, got {len(adapters)} and {len(weights)}.")
    if not all(map(math.isfinite, weights)):
        raise ValueError(f"Weights must be finite numbers, got {weights}.")
    for name in ("positions", "hidden_size", "num_hidden_layers", "lora"):
        values = [getattr(adapter.config, name) for adapter in adapters]
        given = [value for value in values if value is not None]
        if any(value != given[0] for value in given):
            raise ValueError(f"These adapters cannot be combined: they differ in {name}: {values}.")
    bases = list(dict.fromkeys(adapter.config.base_model_name_or_path for adapter in adapters))
    if len(bases) > 1:
        warnings.warn(f"Combining adapters that were fitted on different bases: {bases}.", stacklevel=2)
    total: dict[Site, torch.Tensor] = {}
    for adapter, weight in zip(adapters, weights, strict=True):
        try:
            vectors = constant_vectors(adapter)
        except ValueError as error:
            raise ValueError(
                f"{error} To have several adapters act together, call model.set_steering([...])."
            ) from error
        for site, vector in vectors.items():
            total[site] = total[site] + weight * vector if site in total else weight * vector
    parts = [
        {"steering_type": a.config.steering_type, "weight": weight, "commit": a.revision}
        for a, weight in zip(adapters, weights, strict=True)
    ]
    first = adapters[0].config
    prints = [adapter.config.base_model_fingerprint for adapter in adapters]
    return constant_adapter(
        total,
        positions=first.positions,
        num_hidden_layers=next((a.config.num_hidden_layers for a in adapters if a.config.num_hidden_layers), None),
        lora=list(first.lora),
        base_model_name_or_path=bases[0] if len(bases) == 1 else None,
        base_model_revision=first.base_model_revision if len(bases) == 1 else None,
        base_model_fingerprint=first.base_model_fingerprint if all(p == prints[0] for p in prints) else {},
        base_model_type=first.base_model_type,
        fit={"combined": parts},
    )
