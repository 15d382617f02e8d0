"""FineSteer fitted on the planted world with the quickest settings that are left to a test."""

from __future__ import annotations

import warnings
from typing import Any

from planted import PlantedData

from finesteer_hf.method_api import FitResult
from finesteer_hf.methods.finesteer import FineSteer, FineSteerConfig
from finesteer_hf.sites import Site


SITE = Site("resid_post", 2)


def fit(data: PlantedData, **settings: Any) -> FitResult:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # the quickest settings that are left to a test's own choice
        quick = {
            "layer": 2,
            "strength": 1.0,
            "target": "difference",
            "refine": 0,
            "positions": "generated",
            "experts": "reduced_rank",
            "gate_score": "ser",
        }
        return FineSteer.fit(data, FineSteerConfig(**{**quick, **settings}))
