"""A linear world in which the query determines the shift, so the right answer of a fit is known."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch

from finesteer_hf.method_api import DosePoint, ModelInfo, Part, Pool, Side
from finesteer_hf.methods._shared.objective import Limits
from finesteer_hf.processors import QueryStates, SteeringProcessor
from finesteer_hf.sites import Site


SHARES: dict[Part, float] = {"fit": 0.6, "calibration": 0.2, "validation": 0.2}


class PlantedData:
    """`FitData` of a world with clusters and a linear part.

    A query is a cluster and four hidden numbers; the shift of its answers is the cluster's plus a linear map of the
    numbers plus noise. How clearly a layer shows them is given. Answers are Gaussian around the state that all write
    sites' vectors together reach, so likelihoods, preferences, their gradients and divergences have a closed form: in
    units of its shift's square an answer is as unlikely as it is far.

    Args:
        rows: preference rows.
        general: general prompts, displaced in one direction.
        width: of the residual stream.
        clarity: for each layer how much of the query's numbers its states show.
        clusters: number of clusters of shifts.
        noise: standard deviation of the shifts' noise.
        repeats: rows that share each prompt.
        kinds: whether each cluster is a category.
    """

    def __init__(
        self,
        rows: int = 240,
        general: int = 120,
        width: int = 24,
        clarity: Sequence[float] = (0.1, 0.4, 1.0, 0.3),
        clusters: int = 3,
        noise: float = 0.4,
        repeats: int = 1,
        kinds: bool = False,
        seed: int = 0,
    ) -> None:
        rng = np.random.default_rng(seed)
        self.info = ModelInfo(len(clarity), width, 4, width // 4, 50)
        self.seed = seed
        self.limits = Limits()
        prompts = rows // repeats
        cluster = rng.integers(clusters, size=prompts)
        numbers = rng.standard_normal((prompts, 4))
        signal = np.concatenate([3.0 * np.eye(clusters)[cluster], numbers], axis=1)
        of_row = np.repeat(np.arange(prompts), repeats)
        shift_map = rng.standard_normal((clusters + 4, width)) * 0.5
        shifts = 0.7 + signal[of_row] @ shift_map + noise * rng.standard_normal((len(of_row), width))
        self._query, self._general, self._rejected, self._chosen = {}, {}, {}, {}
        away = 4.0 * rng.standard_normal(width) / np.sqrt(width) * np.sqrt(width / 4)
        for layer, clear in enumerate(clarity):
            view = rng.standard_normal((clusters + 4, width)) * clear
            noisy = rng.standard_normal((prompts, width)) * 0.5
            self._query[layer] = (5.0 + signal @ view + noisy)[of_row].astype(np.float32)
            others = np.concatenate([np.full((general, clusters), 1.0), rng.standard_normal((general, 4))], axis=1)
            self._general[layer] = (5.0 + away + others @ view + 0.5 * rng.standard_normal((general, width))).astype(
                np.float32
            )
            base = rng.standard_normal((len(of_row), width))
            self._rejected[layer] = base.astype(np.float32)
            self._chosen[layer] = (base + shifts).astype(np.float32)
        self._prompts = of_row
        self._kinds = np.array([f"kind {i}" for i in cluster])[of_row] if kinds else None
        self._parts = _split(prompts, of_row, rng)
        self._general_parts = _split(general, np.arange(general), rng)
        self.notes: list[str] = []
        self.doses = 0

    @staticmethod
    def layer_of(site: Site) -> int:
        """Index of the states at a site; the input of a block is the output of the one before."""
        return site.layer if site.kind == "resid_post" else max(site.layer - 1, 0)

    def query(self, site: Site, part: Part) -> np.ndarray:
        return self._query[self.layer_of(site)][self._parts[part]]

    def chosen(self, site: Site, part: Part, pool: Pool = "answer_mean") -> np.ndarray:
        if pool == "gradient":
            shifts = self.shifts(site, part)
            return 2 * shifts / np.square(shifts).sum(1, keepdims=True)
        return self._chosen[self.layer_of(site)][self._parts[part]]

    def rejected(self, site: Site, part: Part, pool: Pool = "answer_mean") -> np.ndarray:
        if pool == "gradient":
            return np.zeros_like(self.shifts(site, part))
        return self._rejected[self.layer_of(site)][self._parts[part]]

    def shifts(self, site: Site, *parts: Part) -> np.ndarray:
        """Shifts of some parts."""
        return np.concatenate([self.chosen(site, part) - self.rejected(site, part) for part in parts])

    def prompts(self, part: Part) -> np.ndarray:
        return self._prompts[self._parts[part]]

    def groups(self, part: Part) -> np.ndarray:
        return self.prompts(part)

    def kinds(self, part: Part) -> np.ndarray | None:
        return None if self._kinds is None else self._kinds[self._parts[part]]

    def texts(self, text: str, part: Part) -> list[str]:
        """Texts that all have one form."""
        numbers = self.prompts(part) if text == "prompt" else self._general_parts[part]
        return [f"say {number + 1000}" for number in numbers]

    def general(self, site: Site, part: Part) -> np.ndarray:
        return self._general[self.layer_of(site)][self._general_parts[part]]

    def dose_response(
        self, build: Callable[[float], SteeringProcessor], strengths: Sequence[float], share: float = 1.0
    ) -> list[DosePoint]:
        """Divergences of unit Gaussians, and answers that are likelier the nearer the vectors come to their shift."""
        self.doses += len(strengths)
        return [self._point(build(float(strength)), float(strength), share) for strength in strengths]

    def _point(self, processor: SteeringProcessor, strength: float, share: float) -> DosePoint:
        own, other = (self._steering(processor, side) for side in (self.query, self.general))
        rows = max(1, round(share * len(own)))
        own, shifts = own[:rows], self.shifts(processor.writes[0], "validation")[:rows].astype(np.float64)
        size = np.square(shifts).sum(1)
        chosen, rejected = -np.square(own - shifts).sum(1) / size, -np.square(own).sum(1) / size
        likelihood, unsteered = np.exp(chosen), np.exp(-1.0)
        preference = 1 / (1 + np.exp(rejected - chosen))

        def error(values: np.ndarray) -> float:
            return float(values.std(ddof=1) / np.sqrt(len(values)))

        return DosePoint(
            strength,
            bottleneck=float(likelihood.mean()),
            bottleneck_se=error(likelihood),
            kl=float(np.percentile((other**2).sum(1) / 2, 95)) if len(other) else 0.0,
            bottleneck_rise=float(likelihood.mean() - unsteered),
            bottleneck_rise_se=error(likelihood),
            preference=float(preference.mean()),
            preference_se=error(preference),
            preference_rise_se=error(preference),
            preference_summed=float(preference.mean()),
            likelihood=float(chosen.mean()),
        )

    @staticmethod
    def _steering(processor: SteeringProcessor, of_side: Callable[[Site, Part], np.ndarray]) -> np.ndarray:
        """The sum of all write sites' vectors for the validation queries of a side, `[rows, width]` float64."""
        reads = {site: torch.from_numpy(of_side(site, "validation")) for site in processor.reads}
        rows = torch.from_numpy(of_side(processor.writes[0], "validation"))
        decision = processor.decide(QueryStates(reads, len(rows), rows.device))
        gate = torch.ones(len(rows)) if decision.gate is None else decision.gate
        together = torch.stack([decision.vectors[site] for site in processor.writes]).sum(0)
        return (processor.strength * gate[:, None] * together).numpy().astype(np.float64)

    def chunks(
        self, side: Side, site: Site, parts: Sequence[Part], pool: Pool = "answer_mean"
    ) -> Iterator[np.ndarray]:
        for part in parts:
            pools = (pool,) if side in ("chosen", "rejected") else ()
            states = getattr(self, side)(site, part, *pools)
            if len(states):
                yield states

    def note(self, message: str) -> None:
        self.notes.append(message)


def _split(units: int, of_row: np.ndarray, rng: np.random.Generator) -> dict[Part, np.ndarray]:
    order = rng.permutation(units)
    ends = np.cumsum([round(share * units) for share in SHARES.values()])
    ends[-1] = units
    starts = [0, *ends[:-1]]
    return {
        part: np.flatnonzero(np.isin(of_row, order[start:end]))
        for part, start, end in zip(SHARES, starts, ends, strict=True)
    }


def states(site: Site, rows: np.ndarray) -> QueryStates:
    """Queries at one site, as `decide` takes them."""
    tensor = torch.from_numpy(np.asarray(rows, dtype=np.float32))
    return QueryStates({site: tensor}, len(tensor), tensor.device)
