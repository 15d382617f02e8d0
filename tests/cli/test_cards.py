"""The card of an adapter: its content, and that it never overwrites a user's text."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import yaml
from huggingface_hub import ModelCard

from finesteer_hf import SteeringAdapter, SteeringConfig
from finesteer_hf.adapters.base_models import is_hub_id
from finesteer_hf.evaluation.measures.statistics import proportion
from finesteer_hf.hub.card import DOSE_PLOT, GATE_PLOT, template_text, write_card
from finesteer_hf.hub.card_facts import adapter_facts, flatten
from finesteer_hf.method_api import DosePoint


@dataclass(kw_only=True)
class PlainConfig(SteeringConfig):
    steering_type: ClassVar[str] = "CAA"
    layer: int = 3


def adapter(base: str | None = "org/base-model", **fit: Any) -> SteeringAdapter:
    config = PlainConfig(base_model_name_or_path=base, base_model_revision="a" * 40, strength=2.5, fit=fit)
    return SteeringAdapter(config, {"vector": torch.zeros(8)})


EVALUATION = [
    {
        "dataset": "TruthfulQA",
        "metric": "MC1",
        "unsteered": proportion(20, 100).to_dict(),
        "steered": proportion(45, 100).to_dict(),
        "p_value": 0.00012,
    },
    {"dataset": "TruthfulQA", "metric": "gate fires", "unsteered": None, "steered": proportion(97, 100).to_dict()},
]


def test_a_new_card_has_valid_metadata_and_says_how_to_use_it(tmp_path: Path) -> None:
    path = write_card(adapter(evaluation=EVALUATION), tmp_path, repo_id="me/adapter")
    card = ModelCard.load(path)
    assert card.data.library_name == "finesteer_hf" and card.data.base_model == "org/base-model"
    assert card.data.pipeline_tag == "text-generation"
    assert card.data.to_dict()["base_model_relation"] == "adapter"
    assert card.data.tags == ["steering", "activation-steering", "caa"]
    assert [(r.dataset_name, r.metric_name, r.metric_value) for r in card.data.eval_results] == [
        ("TruthfulQA", "MC1", 0.45),
        ("TruthfulQA", "gate fires", 0.97),
    ]
    for expected in (
        'from_pretrained("org/base-model", steering="me/adapter")',
        "| 20.0% [13.3, 28.9] n=100 | 45.0% [35.6, 54.8] n=100 | 0.00012 |",
        "| layer | 3 |",
        "8 numbers, 32 bytes",
    ):
        assert expected in card.text


def test_a_local_base_is_not_metadata_and_no_local_path_is_published(tmp_path: Path) -> None:
    folder = tmp_path / "secret-home" / "my-model"
    folder.mkdir(parents=True)
    text = write_card(adapter(str(folder)), tmp_path).read_text()
    assert "base_model:" not in text and "base_model_relation" not in text
    assert "secret-home" not in text and "my-model" in text
    assert is_hub_id("gpt2") and is_hub_id("org/name") and not is_hub_id("/a/b") and not is_hub_id("./a")


def test_user_text_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    path.write_text(
        "---\nlicense: mit\ntags: [mine]\npipeline_tag: chat\n---\n# Mine\n\nMy words.\n", encoding="utf-8"
    )
    write_card(adapter(), tmp_path)
    first = path.read_text(encoding="utf-8")
    write_card(adapter(), tmp_path)
    assert path.read_text(encoding="utf-8") == first
    card = ModelCard(first)
    assert card.data.license == "mit" and card.data.pipeline_tag == "chat"
    assert card.data.tags == ["mine", "steering", "activation-steering", "caa"]
    assert card.text.strip().startswith("# Mine\n\nMy words.")
    path.write_text(first + "\nAfterwards.\n", encoding="utf-8")
    other = adapter("org/other")
    other.config.strength = 7.0
    write_card(other, tmp_path)
    text = path.read_text(encoding="utf-8")
    assert text.rstrip().endswith("Afterwards.") and text.count("# CAA steering adapter") == 1
    assert "| strength | 7 |" in text and "2.5" not in text


def test_metadata_follows_the_adapter_until_a_user_changes_it(tmp_path: Path) -> None:
    path = write_card(adapter(), tmp_path)
    write_card(adapter("org/other"), tmp_path)
    assert ModelCard.load(path).data.base_model == "org/other"
    path.write_text(path.read_text().replace("base_model: org/other", "base_model: org/by-hand", 1))
    write_card(adapter("org/third"), tmp_path)
    assert ModelCard.load(path).data.base_model == "org/by-hand"


@pytest.mark.parametrize("block", ["- a\n- b", "a: [unclosed"])
def test_a_card_that_cannot_be_read_is_left_unchanged(tmp_path: Path, block: str) -> None:
    path = tmp_path / "README.md"
    text = f"---\n{block}\n---\n# Mine\n"
    path.write_text(text)
    with pytest.warns(UserWarning, match="left unchanged"):
        write_card(adapter(), tmp_path)
    assert path.read_text() == text and [p.name for p in tmp_path.iterdir()] == ["README.md"]


def test_plots_appear_with_their_data_and_go_with_it(tmp_path: Path) -> None:
    curve = [asdict(DosePoint(float(s), s - 0.1 * s * s, 0.1, 0.01 * s)) for s in range(4)]
    generator = np.random.default_rng(0)
    scores = {
        "ir": generator.normal(1, 1, 20).tolist(),
        "general": generator.normal(0, 1, 20).tolist(),
        "threshold": 0.5,
    }
    report = {"dose_response": curve, "gate_scores": scores, "r2": 0.25, "note": "a | b <i>"}
    path = write_card(adapter(report=report, seed=0, rows={"fit": 100}), tmp_path)
    text = path.read_text()
    for name in (DOSE_PLOT, GATE_PLOT):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG") and f"]({name})" in text
    assert "| r2 | 0.25 |" in text and "| rows: fit | 100 |" in text and "a \\| b &lt;i>" in text
    write_card(adapter(), tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["README.md"]


def test_facts_leave_out_what_is_not_text() -> None:
    rows = flatten(
        {
            "a": {"b": 1.23456, "c": [1, 2, 3], "d": ["x", "y"]},
            "sha256": "f" * 64,
            "none": None,
            "share": EVALUATION[0]["steered"],
        }
    )
    assert rows == [("a: b", "1.235"), ("a: d", "x, y"), ("sha256", "f" * 12), ("share", "45.0% [35.6, 54.8] n=100")]
    facts = adapter_facts(adapter())
    assert ("base model", "org/base-model at aaaaaaaaaaaa") in facts.settings and facts.evaluation == []


def test_the_template_is_found_in_a_checkout() -> None:
    assert "How to use" in template_text("adapter_card.md")
    with pytest.raises(FileNotFoundError, match="reinstall"):
        template_text("missing.md")


def test_line_ends_and_comments_of_a_user_survive_a_second_save(tmp_path: Path) -> None:
    path = write_card(adapter(), tmp_path)
    ours = path.read_text()
    path.write_bytes(ours.replace("---\n", "---\n# mine\n", 1).replace("\n", "\r\n").encode())
    before = path.read_bytes()
    write_card(adapter(), tmp_path)
    assert path.read_bytes() == before


def test_the_card_of_a_folder_says_how_to_load_from_it(tmp_path: Path) -> None:
    (tmp_path / "c").mkdir()
    own = write_card(adapter(), tmp_path / "c", repo_id="me/many", subfolder="c").read_text()
    assert 'steering="me/many", steering_kwargs={"subfolder": "c"}' in own


def test_our_metadata_is_plain_yaml(tmp_path: Path) -> None:
    text = write_card(adapter(evaluation=EVALUATION), tmp_path).read_text()
    block = yaml.safe_load(text.split("---")[1])
    assert list(block) == [key for key in block if isinstance(key, str)] and block["model-index"][0]["results"]
