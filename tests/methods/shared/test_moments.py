"""Figures taken chunk by chunk are those of the whole array."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from planted import PlantedData

from finesteer_hf.method_api import Part, Pool, Side
from finesteer_hf.methods._shared.moments import mean_difference, median_query_norm
from finesteer_hf.sites import Site


SITE = Site("resid_post", 2)
PARTS: tuple[Part, ...] = ("fit", "calibration")


class InPieces(PlantedData):
    """The same states, seven rows at a time."""

    def chunks(
        self, side: Side, site: Site, parts: Sequence[Part], pool: Pool = "answer_mean"
    ) -> Iterator[np.ndarray]:
        for chunk in super().chunks(side, site, parts, pool):
            yield from np.array_split(chunk, -(-len(chunk) // 7))


def test_means_are_those_of_the_whole_in_float64() -> None:
    data, whole = InPieces(), PlantedData()
    # A mean far from zero, where sums in float32 would lose five digits.
    for source in (data, whole):
        source._chosen[2] += np.float32(3e4)
    chosen, rejected = (
        np.concatenate([side(SITE, part) for part in PARTS]).astype(np.float64)
        for side in (whole.chosen, whole.rejected)
    )
    expected = chosen.mean(axis=0) - rejected.mean(axis=0)
    found, counts = mean_difference(data, ("chosen", "rejected"), SITE, PARTS)
    assert counts == (len(chosen), len(rejected)) and found.dtype == np.float64
    np.testing.assert_allclose(found, expected, rtol=1e-13)
    at_once, _ = mean_difference(whole, ("chosen", "rejected"), SITE, PARTS)
    np.testing.assert_allclose(at_once, expected, rtol=1e-13)


def test_norms_are_those_of_the_whole() -> None:
    data = InPieces()
    norms = np.linalg.norm(data.query(SITE, "fit").astype(np.float64), axis=1)
    assert median_query_norm(data, SITE) == np.median(norms)


def test_a_side_without_rows_has_no_difference() -> None:
    data = InPieces(general=0)
    difference, counts = mean_difference(data, ("query", "general"), SITE, PARTS)
    assert counts[1] == 0 < counts[0] and not difference.any() and difference.shape == (24,)
