"""A method of a few lines, and rows that it is fitted on."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch

from finesteer_hf import Decision, QueryStates, Site, SteeringConfig
from finesteer_hf.fitting import fit_steering
from finesteer_hf.method_api import CaptureRequest, FitData, FitResult, ModelInfo, SteeringMethod
from finesteer_hf.testing.toy import toy_model, toy_tokenizer


SITE = Site("resid_post", 1)


@dataclass(kw_only=True)
class MeanConfig(SteeringConfig):
    steering_type: ClassVar[str] = "TEST_MEAN"
    head: bool = field(default=False)


class MeanMethod(SteeringMethod):
    """The mean difference of answers; remembers the data that it was fitted on."""

    config_cls = MeanConfig
    writes = (SITE,)
    data: ClassVar[FitData]

    def decide(self, queries: QueryStates) -> Decision:
        return Decision({SITE: self.parameters_on(queries.device)["vector"][None]})

    @classmethod
    def tensor_shapes(cls, config: SteeringConfig) -> dict[str, tuple[int | None, ...]]:
        return {"vector": (config.hidden_size,)}

    @classmethod
    def needs(cls, config: Any, info: ModelInfo) -> CaptureRequest:
        sites = (SITE, Site("head_out", 0)) if config.head else (SITE,)
        return CaptureRequest(sites, ("query", "answer_mean", "answer_last"))

    @classmethod
    def fit(cls, data: FitData, config: Any) -> FitResult:
        MeanMethod.data = data
        vector = torch.from_numpy((data.chosen(SITE, "fit") - data.rejected(SITE, "fit")).mean(0))
        fitted = replace(config, strength=1.0, hidden_size=data.info.hidden_size)
        points = data.dose_response(lambda s: cls(replace(fitted, strength=s), {"vector": vector}), [0.0, 1.0])
        return FitResult(fitted, {"vector": vector}, {"bottlenecks": [point.bottleneck for point in points]})


def chat_rows(count: int = 40, **extra: Any) -> list[dict[str, Any]]:
    def words(kind: str, row: int) -> str:
        return f"{kind}{row % 12} {kind}{row // 12 % 12}"

    return [
        {
            "prompt": [{"role": "user", "content": words("sun", row)}],
            "chosen": [{"role": "assistant", "content": words("oak", row)}],
            "rejected": [{"role": "assistant", "content": words("fox", row)}],
            **extra,
        }
        for row in range(count)
    ]


GENERAL = [f"sea{i % 12} sea{i // 12}" for i in range(30)]


def fit(rows: Any = None, **settings: Any) -> Any:
    settings = {"general_dataset": GENERAL, "progress": False, "config": MeanConfig(), **settings}
    model = settings.pop("model", None) or toy_model()
    return fit_steering(model, settings.pop("tokenizer", toy_tokenizer()), rows or chat_rows(), **settings)
