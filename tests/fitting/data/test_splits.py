from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finesteer_hf.errors import DatasetError
from finesteer_hf.fitting.data.splits import PARTS, split_rows, split_units


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 30), min_size=1, max_size=80), st.integers(0, 5), st.integers(0, 7))
def test_parts_cover_the_rows_and_share_no_prompt(prompts: list[int], seed: int, extra: int) -> None:
    units = [f"p{number}" for number in prompts]
    split = split_units(units, seed, validation_rows=extra)
    if extra:
        assert split.rows["validation"].tolist() == list(range(len(units), len(units) + extra))
    if not split.held_out:
        assert len(set(units)) < 6
        return
    own = [part for part in PARTS if not (extra and part == "validation")]
    assert sorted(np.concatenate([split.rows[part] for part in own]).tolist()) == list(range(len(units)))
    seen = [{units[i] for i in split.rows[part]} for part in own]
    assert all(seen) and sum(map(len, seen)) == len(set(units))


def test_shares_seeds_and_order() -> None:
    units = [f"p{i}" for i in range(100)]
    split = split_units(units, 0)
    assert split.sizes() == {"fit": 60, "calibration": 20, "validation": 20}
    assert split_units(units, 0, validation_rows=9).sizes() == {"fit": 75, "calibration": 25, "validation": 9}
    assert split_units(units, 1).rows["fit"].tolist() != split.rows["fit"].tolist()
    backwards = split_units(units[::-1], 0)
    assert {units[i] for i in split.rows["fit"]} == {units[::-1][i] for i in backwards.rows["fit"]}


def test_groups_stay_together_and_groups_that_share_a_prompt_are_one() -> None:
    prompts = [f"p{i}" for i in range(40)]
    groups = [f"g{i % 8}" for i in range(40)]
    prompts[1] = prompts[0]
    split = split_rows(prompts, groups, 0, by="group")
    where = {
        groups[i]: {part for part in PARTS for j in split.rows[part] if groups[j] == groups[i]} for i in range(40)
    }
    assert all(len(parts) == 1 for parts in where.values())
    assert where["g0"] == where["g1"]


def test_groups_are_required() -> None:
    with pytest.raises(DatasetError, match="needs a column"):
        split_rows(["a", "b"], None, 0, by="group")
    with pytest.raises(DatasetError, match=r"at least 3 groups.*\['x', 'y'\]"):
        split_rows(["a", "b"], ["x", "y"], 0, by="group")
    with pytest.raises(ValueError, match="split must be"):
        split_rows(["a", "b"], None, 0, by="row")  # type: ignore[arg-type]
