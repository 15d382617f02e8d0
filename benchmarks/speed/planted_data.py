"""States with a known structure, for fits at a width that no model at hand has."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from finesteer_hf.method_api import ModelInfo
from finesteer_hf.methods._shared.objective import Limits
from finesteer_hf.sites import Site


class PlantedData:
    """`FitData` of low-rank structure: shifts follow the queries through 24 directions, under as much noise."""

    def __init__(self, width: int, rows: int, seed: int = 0) -> None:
        self.info, self.seed = ModelInfo(32, width, 32, width // 32, 128_256), seed
        self.limits = Limits()
        rng = np.random.default_rng(seed)
        directions, maps = rng.standard_normal((24, width)), rng.standard_normal((24, width))
        mean, away = rng.standard_normal(width), rng.standard_normal(width)
        parts = ("fit", "calibration", "validation", "test")
        sizes = dict(zip(parts, (rows * 6 // 10, rows * 2 // 10, rows * 2 // 10, rows), strict=True))
        self.queries, self.shifts, self.others = {}, {}, {}
        for part, size in sizes.items():
            latent = rng.standard_normal((size, 24))
            noise = rng.standard_normal((2, size, width))
            self.queries[part] = (mean + latent @ directions / 2 + noise[0]).astype(np.float32)
            self.shifts[part] = (mean / 2 + np.tanh(latent) @ maps / 5 + noise[1] * 0.5).astype(np.float32)
            others = mean + away / 4 + rng.standard_normal((40, 24)) @ directions / 2
            self.others[part] = (others + rng.standard_normal((40, width))).astype(np.float32)

    def query(self, site: Site, part: str) -> np.ndarray:
        return self.queries[part]

    def chosen(self, site: Site, part: str, pool: str = "answer_mean") -> np.ndarray:
        return self.shifts[part]

    def rejected(self, site: Site, part: str, pool: str = "answer_mean") -> np.ndarray:
        return np.zeros_like(self.shifts[part])

    def prompts(self, part: str) -> np.ndarray:
        return np.arange(len(self.queries[part]))

    groups = prompts

    def kinds(self, part: str) -> np.ndarray | None:
        return None

    def texts(self, text: str, part: str) -> list[str]:
        return [f"prompt {i}" for i in range(len((self.queries if text == "prompt" else self.others)[part]))]

    def general(self, site: Site, part: str) -> np.ndarray:
        return self.others[part]

    def chunks(self, side: str, site: Site, parts: Sequence[str], pool: str = "answer_mean") -> Iterator[np.ndarray]:
        for part in parts:
            pools = (pool,) if side in ("chosen", "rejected") else ()
            states = getattr(self, side)(site, part, *pools)
            if len(states):
                yield states

    def note(self, message: str) -> None:
        return None
