"""Adapters of a workbench: names, sources, revisions, and how many visitors may keep."""

from __future__ import annotations

from typing import Any

import pytest
from hub_server import HubServer

from finesteer_hf import SteeringAdapter
from finesteer_hf.errors import NoAdapterError
from finesteer_hf.ui.workbench import GENERAL_QUESTION, MOST_OF_VISITORS, Workbench


def test_names_are_folder_names_and_each_once(bench: Workbench, cards: Any) -> None:
    folder = str(cards / "playground-truthful")
    assert [bench.load(folder).name for _ in range(2)] == ["playground-truthful", "playground-truthful-2"]
    assert bench.add(SteeringAdapter.from_pretrained(folder), "../my own @ v1").name == "my-own-v1"


def test_visitors_keep_the_newest(bench: Workbench, cards: Any) -> None:
    adapter = SteeringAdapter.from_pretrained(str(cards / "playground-safety"))
    names = [bench.add(adapter, "x").name for _ in range(MOST_OF_VISITORS + 2)]
    assert set(bench.model.steering_adapters) == {"truthful", "safety", *names[2:]}
    with pytest.raises(ValueError, match="no longer loaded"):
        bench.adapter(names[0])


def test_a_shared_page_opens_no_folders(bench: Workbench, cards: Any) -> None:
    bench.folders = False
    for source in (str(cards / "playground-truthful"), "hub_cards", "../x"):
        with pytest.raises(ValueError, match="loads no folders"):
            bench.load(source)


def test_what_is_missing_is_named(bench: Workbench) -> None:
    with pytest.raises(ValueError, match="or a folder"):
        bench.load(" ")
    with pytest.raises(NoAdapterError, match="no folder '/nowhere'"):
        bench.load("/nowhere")


def test_examples_come_from_the_cards(bench: Workbench) -> None:
    examples = bench.examples()
    shipped = [example["prompt"] for example in bench.adapter("truthful").config.fit["examples"]]
    assert shipped and set(shipped) < set(examples) and examples[-1] == GENERAL_QUESTION
    bench.own = ()
    assert bench.examples() == []


def test_the_hub_s_adapters_and_their_versions(bench: Workbench, hub_client: HubServer, cards: Any) -> None:
    adapter = SteeringAdapter.from_pretrained(str(cards / "playground-truthful"))
    adapter.push_to_hub("user/truth", tag="v1")
    adapter.config.strength = 1.0
    adapter.push_to_hub("user/truth", tag="v2")
    assert bench.found_on_hub() == ["user/truth"]
    assert set(bench.revisions("user/truth")) == {"v1", "v2", "main"}
    loaded = bench.load("user/truth", "v1")
    assert loaded.name == "truth-v1" and bench.adapter(loaded.name).config.strength != 1.0
    assert bench.adapter(bench.load("user/truth@v2").name).config.strength == 1.0
    with pytest.raises(ConnectionError, match="user/lies"):
        bench.revisions("user/lies")
    assert bench.revisions(str(cards)) == []
