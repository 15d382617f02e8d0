"""The page on the Hub: its code runs against a Hub, and its statements about repos are true."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import pytest
from hub_fixtures import client_of
from hub_server import HubServer
from small_adapters import small_adapter, tiny_llama, tokens_of

from finesteer_hf import SteeredModelForCausalLM, SteeringAdapter
from finesteer_hf.adapters.adapter import tensors_equal
from finesteer_hf.adapters.config import MAX_CONFIG_BYTES
from finesteer_hf.hub.readme import MOST_README_BYTES
from finesteer_hf.methods.caa import CAAConfig
from finesteer_hf.testing.conformance import fit_on_toy
from finesteer_hf.testing.toy import toy_preferences


PAGE = (Path(__file__).parents[2] / "docs" / "hub.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
REPO = "org/llama3-truthful"


def made_for(base: str, seed: int) -> SteeringAdapter:
    return small_adapter(seed, base_model_name_or_path=base)


@pytest.fixture
def names(hub_client: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Names for the page's code: adapters of a model that is on the Hub."""
    monkeypatch.chdir(tmp_path)
    tiny_llama().push_to_hub("org/llama3")
    return {
        "SteeredModelForCausalLM": SteeredModelForCausalLM,
        "SteeringAdapter": SteeringAdapter,
        "adapter": made_for("org/llama3", 1),
        "another": made_for("org/llama3", 2),
        "improved": made_for("org/llama3", 4),
        "fitted_on_a_folder": made_for("local:llama3", 3),
    }


def run(names: dict[str, Any], *numbers: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for number in numbers:
            exec(compile(BLOCKS[number], f"docs/hub.md, block {number}", "exec"), names)


def test_the_page_from_top_to_bottom(
    names: dict[str, Any], hub_client: HubServer, capsys: pytest.CaptureFixture[str]
) -> None:
    run(names, 0, 1)
    assert names["commit"].oid in capsys.readouterr().out
    assert SteeringAdapter.from_pretrained("org/llama3-safe").config.base_model_name_or_path == "org/llama3"
    before = hub_client.commits(REPO)
    run(names, 2)
    assert hub_client.commits(REPO) == before and names["proposed"].revision not in {c.sha for c in before}
    run(names, 3, 4)
    head = hub_client.commits("org/llama3-steering")[0].sha
    assert f"org/llama3-steering/safe (commit {head[:12]})" in capsys.readouterr().out
    assert "Each folder has one" in hub_client.files("org/llama3-steering")["README.md"].decode()
    own = SteeredModelForCausalLM.from_pretrained("org/llama3", steering=names["adapter"])
    assert tokens_of(names["model"]) == tokens_of(own) != tokens_of(own, steering=None)
    run(names, 5)
    assert set(re.findall(r"^org/[\w-]+", capsys.readouterr().out, flags=re.MULTILINE)) == {
        REPO,
        "org/llama3-safe",
        "org/llama3-steering",
    }
    run(names, 6)
    tags = hub_client.repo(REPO).tags
    assert capsys.readouterr().out.split() == [tags["v1"].sha, tags["v2"].sha]
    assert len(BLOCKS) == 7


def test_every_form_of_a_name(names: dict[str, Any], tmp_path: Path) -> None:
    run(names, 0, 3)
    names["another"].push_to_hub("org/llama3-steering", subfolder="safe", tag="v1")
    one, two = names["adapter"], names["another"]
    expected = {"org/name": one, "org/name@v1": one, "org/name/folder": two, "org/name/folder@v1": two}
    table = re.search(r"\| name \| what.*?\n\n", PAGE, flags=re.DOTALL)
    assert table is not None
    shown = re.findall(r"`([^`]+)`", table[0])
    assert set(expected) < set(shown)
    for form, adapter in expected.items():
        name = form.replace("org/name/folder", "org/llama3-steering/safe").replace("org/name", REPO)
        assert tensors_equal(SteeringAdapter.from_pretrained(name).tensors, adapter.tensors), form
    # A folder that is there comes first.
    small_adapter(9).save_pretrained(tmp_path / REPO)
    for form in (REPO, f"./{REPO}", str(tmp_path / REPO)):
        assert tensors_equal(SteeringAdapter.from_pretrained(form).tensors, small_adapter(9).tensors)


def test_the_limits_are_those_of_the_code() -> None:
    assert (MAX_CONFIG_BYTES, MOST_README_BYTES) == (16 << 20, 1 << 20)
    assert "may have 16 MiB" in PAGE and "more than 1 MiB" in PAGE


def test_a_repo_holds_what_the_page_says_and_no_rows(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, _, adapter = fit_on_toy(CAAConfig(layer=1, strength="auto"))
    with client_of(hub, tmp_path / "secret-home"):
        adapter.push_to_hub("org/a", base_model="org/llama3", custom_generate=True)
        files = hub.files("org/a")
    table = PAGE.split("## What a repo holds")[1]
    said = set(re.findall(r"`([\w./]+\.\w+)`", table.split("With `custom_generate")[0]))
    assert {*files} - {".gitattributes"} <= said
    assert {"steering_config.json", "steering_model.safetensors", "README.md", "custom_generate/generate.py"} <= {
        *files
    }
    content = b"\n".join(files.values())
    texts = {str(row[key]) for row in toy_preferences() for key in ("prompt", "chosen", "rejected")}
    whole = [text for text in texts if len(text.split()) > 1 and text.encode() in content]
    assert whole == []
    assert hub.token.encode() not in content and str(tmp_path).encode() not in content
