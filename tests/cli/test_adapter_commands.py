"""`finesteer list`, `push`, `pull` and `convert`, with the loopback Hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from evaluation_toys import half_plane_adapter
from hub_server import HubServer
from safetensors.torch import load_file
from small_adapters import small_adapter
from typer.testing import CliRunner

from finesteer_hf import SteeringAdapter
from finesteer_hf.adapters.adapter import tensors_equal
from finesteer_hf.cli.adapters.list import size
from finesteer_hf.cli.commands import app


def run(*arguments: str, code: int = 0) -> Any:
    result = CliRunner(env={"COLUMNS": "200"}).invoke(app, list(arguments))
    assert result.exit_code == code, result.output + repr(result.exception)
    return result


def listed(*arguments: str) -> list[Any]:
    found: list[Any] = json.loads(run("list", *arguments, "--json").stdout)
    return found


@pytest.fixture
def folder(tmp_path: Path) -> str:
    return str(small_adapter(1).save_pretrained(tmp_path / "here" / "one"))


def test_push_and_pull_keep_the_adapter(hub_client: HubServer, folder: str, tmp_path: Path) -> None:
    pushed = json.loads(run("push", folder, "org/a", "--tag", "v1", "--json").stdout)
    assert pushed["steering"] == "org/a@v1" and pushed["commit"] == hub_client.commits("org/a")[0].sha
    assert "org/b@v1" in run("push", folder, "org/b", "--tag", "v1", "--private").stdout
    assert "already has a tag" in run("push", folder, "org/a", "--tag", "v1", code=1).stderr
    pulled = json.loads(run("pull", "org/a@v1", "--json").stdout)
    assert (pulled["commit"], pulled["method"], pulled["base_model"]) == (pushed["commit"], "CONSTANT", "org/tiny")
    assert (Path(pulled["path"]) / "steering_config.json").is_file()
    shown = run("pull", "org/a", "-o", str(tmp_path / "copy"))
    assert "finesteer chat org/tiny" in shown.stderr and pushed["commit"] in shown.stdout
    copy, own = SteeringAdapter.from_pretrained(tmp_path / "copy"), SteeringAdapter.from_pretrained(folder)
    assert copy.config == own.config and tensors_equal(copy.tensors, own.tensors)
    assert "is a folder" in run("pull", folder, code=1).stderr
    missing = run("pull", "org/none", code=1).stderr
    assert "error:" in missing and "hint: finesteer list" in missing and len(missing.splitlines()) == 3


def test_pull_requests_and_folders_of_a_repo(hub_client: HubServer, folder: str) -> None:
    assert "org/c/inner" in run("push", folder, "org/c", "--subfolder", "inner").stdout
    opened = json.loads(run("push", folder, "org/c", "--create-pr", "--json").stdout)
    assert opened["steering"].startswith("org/c@refs/pr/") and "/discussions/" in opened["url"]
    assert json.loads(run("pull", "org/c/inner", "--json").stdout)["path"].endswith("/inner")


def test_list_finds_folders_and_the_cache(hub_client: HubServer, folder: str, tmp_path: Path) -> None:
    run("push", folder, "org/a", "--tag", "v1")
    run("pull", "org/a@v1")
    run("pull", "org/a")
    broken = tmp_path / "here" / "broken"
    broken.mkdir()
    (broken / "steering_config.json").write_text("{")
    found = {each["name"]: each for each in listed(str(tmp_path / "here"))}
    assert set(found) == {folder, str(broken)}
    assert (found[folder]["method"], found[folder]["base_model"]) == ("CONSTANT", "org/tiny")
    assert found[str(broken)]["method"] is None and "JSON" in found[str(broken)]["problem"]
    result = run("list", str(tmp_path / "here"))
    # Long paths go over several lines of their column.
    names = "".join(line.split("│")[1].strip() for line in result.stdout.splitlines() if line.startswith("│"))
    assert folder in names and "damaged" in result.stdout and "JSON" in result.stderr
    # What `list` names can be loaded by that name; the cache is listed where no folder is given.
    cached = [each for each in listed() if each["where"] == "cache"]
    assert [each["name"] for each in cached] == ["org/a"]
    assert SteeringAdapter.from_pretrained(cached[0]["name"], local_files_only=True).config.steering_type == "CONSTANT"
    assert listed(str(tmp_path / "here"), "--method", "caa") == []
    assert [each["name"] for each in listed(str(tmp_path / "here"), "--base-model", "org/tiny")] == [folder]
    assert "No such adapters" in run("list", str(tmp_path / "here"), "--method", "caa").stderr
    assert "There is no folder" in run("list", str(tmp_path / "nowhere"), code=1).stderr


def test_list_searches_the_hub(hub_client: HubServer, folder: str) -> None:
    for name in ("org/truthful", "org/safe", "user/truthful"):
        run("push", folder, name)
    assert {each["repo_id"] for each in listed("--hub")} == {"org/truthful", "org/safe", "user/truthful"}
    assert {each["repo_id"] for each in listed("truth", "--hub")} == {"org/truthful", "user/truthful"}
    assert [each["repo_id"] for each in listed("truth", "--hub", "--author", "org")] == ["org/truthful"]
    assert listed("--hub", "--method", "FINESTEER") == []
    output = run("list", "--hub", "--base-model", "org/tiny").stdout
    assert "CONSTANT" in output and "org/safe" in output
    assert "needs --hub" in run("list", "--author", "org", code=1).stderr


def test_vectors_go_out_and_come_back(folder: str, tmp_path: Path) -> None:
    layers = {f"resid_post[{layer}]": value for layer, value in enumerate(small_adapter(1).tensors.values())}
    plain = tmp_path / "v.safetensors"
    report = json.loads(run("convert", folder, str(plain), "--json").stdout)
    assert (report["format"], report["sites"]) == ("tensors", list(layers))
    saved = load_file(plain)
    assert all(torch.equal(saved[name], vector) for name, vector in layers.items())
    back = tmp_path / "back"
    run("convert", str(plain), str(back), "--base-model", "org/tiny")
    assert tensors_equal(SteeringAdapter.from_pretrained(back).tensors, small_adapter(1).tensors)
    assert SteeringAdapter.from_pretrained(back).config.base_model_name_or_path == "org/tiny"
    generated = tmp_path / "generated.safetensors"
    run("convert", folder, str(generated), "--positions", "generated")
    run("convert", str(generated), str(tmp_path / "g"))
    assert SteeringAdapter.from_pretrained(tmp_path / "g").config.positions == "generated"
    # Of one file into another, without an adapter between; llama.cpp has no vector for block 0.
    assert "from 1 on" in run("convert", str(plain), str(tmp_path / "v.gguf"), code=1).stderr


def test_files_of_others_become_adapters(tmp_path: Path) -> None:
    vector = torch.arange(4.0)
    svec, steer = tmp_path / "v.svec", tmp_path / "steer.pt"
    svec.write_text(json.dumps({"model_type": "llama", "directions": {"1": vector.tolist()}}))
    entry = {"action": "add", "steering_vector": vector[None], "steering_coefficient": 2.0}
    torch.save({"layers.1": entry}, steer)
    for path, site, factor in ((svec, "resid_pre", 1), (steer, "resid_post", 2)):
        out = tmp_path / path.suffix
        run("convert", str(path), str(out), "--positions", "generated", "--strength", "1.5")
        read = SteeringAdapter.from_pretrained(out)
        assert [str(s) for s in read.build().writes] == [f"{site}[1]"]
        assert torch.equal(read.tensors["vectors.1"], vector * factor) and read.config.strength == 1.5
    gguf = tmp_path / "v.gguf"
    run("convert", str(steer), str(gguf))
    run("convert", str(gguf), str(tmp_path / "from_gguf"))
    assert torch.equal(SteeringAdapter.from_pretrained(tmp_path / "from_gguf").tensors["vectors.1"], 2 * vector)


def test_vllm_takes_what_steers_generated_tokens(folder: str, tmp_path: Path) -> None:
    refused = run("convert", folder, str(tmp_path / "v"), "--to", "vllm", code=1).stderr
    assert "positions='all'" in refused
    run("convert", folder, str(tmp_path / "v"), "--to", "vllm", "--positions", "generated")
    assert json.loads((tmp_path / "v" / "steering_vllm.json").read_text())["write_layers"] == [0, 1]


def test_what_cannot_be_converted_says_so(folder: str, half_plane: None, tmp_path: Path) -> None:
    gated = half_plane_adapter(torch.ones(32), hidden_size=32).save_pretrained(tmp_path / "gated")
    assert "depends on it" in run("convert", str(gated), str(tmp_path / "g.gguf"), code=1).stderr
    assert "--to vllm" in run("convert", folder, str(tmp_path / "x"), code=1).stderr
    assert "for files of vectors" in run("convert", folder, "x.gguf", "--strength", "2", code=1).stderr
    (tmp_path / "odd.safetensors").write_bytes(b"no")
    assert "error:" in run("convert", str(tmp_path / "odd.safetensors"), str(tmp_path / "y"), code=1).stderr


def test_sizes_have_units() -> None:
    assert [size(n) for n in (0, 999, 1000, 2_500_000, 3 * 10**9)] == ["0 B", "999 B", "1.0 kB", "2.5 MB", "3.0 GB"]
