"""FineSteer at run time: score, gate, vector."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import cast

import torch

from finesteer_hf.adapters.tensor_files import Shape
from finesteer_hf.errors import AdapterFileError
from finesteer_hf.estimators import VECTOR_FUNCTIONS, expert_weights
from finesteer_hf.method_api import CaptureRequest, FitData, FitResult, ModelInfo, Pool, SteeringMethod
from finesteer_hf.methods.finesteer.config import FineSteerConfig
from finesteer_hf.methods.finesteer.fit import fit_finesteer
from finesteer_hf.methods.finesteer.layers import candidate_sites, wants_gradients
from finesteer_hf.methods.finesteer.tensors import EXPERT_TENSORS, expected_shapes
from finesteer_hf.methods.query_gate import QueryGate, check_values, from_file
from finesteer_hf.processors import Decision, DecisionFormula, QueryStates
from finesteer_hf.sites import Site


Formula = Callable[..., torch.Tensor]


class FineSteer(SteeringMethod[FineSteerConfig]):
    """`H <- H + strength * g(h_q) * v(h_q)`, with g and v from the unsteered state h_q of the query (Eq. 6-15).

    Everything is float32 on the device of the query's state, without branches on values.

    Args:
        config: a fitted `FineSteerConfig`.
        tensors: the tensors of `tensor_shapes`.

    Raises:
        AdapterFileError: if the config is not fitted, or a tensor is missing or has values that no fit writes.
    """

    def __init__(self, config: FineSteerConfig, tensors: Mapping[str, torch.Tensor]) -> None:
        super().__init__(config, tensors)
        missing = sorted(set(expected_shapes(config)) - set(tensors))
        if missing:
            raise AdapterFileError(f"The FINESTEER adapter lacks the tensors {missing}, which its config needs.")
        check_values(tensors)
        self.read_site = Site.parse(str(config.read_site))
        self.reads, self.writes = (self.read_site,), config.write_sites
        self._gate: QueryGate | None = None
        if config.gate != "always":
            self._gate = QueryGate(config)
            self.tensors |= self._gate.lay_out(self.tensors)
        self._vector = cast("Formula", VECTOR_FUNCTIONS[config.experts])
        self._expert_names = EXPERT_TENSORS[config.experts]

    def decide(self, queries: QueryStates) -> Decision:
        """Score each query, compute its gate from the score, and mix its vector.

        Args:
            queries: `[rows, hidden_size]` float32 at the read site.

        Returns:
            The vectors `[rows, hidden_size]` of each write site, the gate `[rows]` (None if it is always open), and the
            record: `score` `[rows]` and, with experts, their routing weights `experts` `[rows, K]`.
        """
        h = queries[self.read_site]
        tensors = self.parameters_on(h.device)
        record: dict[str, torch.Tensor] = {}
        arguments = from_file(self._expert_names, tensors)
        gate = None
        if self._gate is not None:
            gate, record["score"] = self._gate(h, tensors)
        if "router.weight" in tensors:
            record["experts"] = expert_weights(h, tensors["router.weight"], tensors["router.bias"])
            arguments["weights"] = record["experts"]
        together = self._vector(h, **arguments)
        # A single site's vector is not sliced: that would be one more kernel per prompt.
        vectors = (together,) if len(self.writes) == 1 else together.chunk(len(self.writes), dim=-1)
        return Decision(vectors=dict(zip(self.writes, vectors, strict=True)), gate=gate, record=record)

    def formula(self) -> DecisionFormula:
        """Score, gate and vector by name, with the tensors that they take."""
        gate = self._gate
        names = [*self._expert_names.values(), *(() if gate is None else gate.used())]
        return DecisionFormula(
            read=self.read_site,
            vector=self.config.experts,
            score=None if gate is None else gate.score,
            gate=None if gate is None else gate.form,
            tensors={name: self.tensors[name] for name in names},
        )

    @classmethod
    def tensor_shapes(cls, config: FineSteerConfig) -> dict[str, Shape]:
        """Names and shapes of the tensors of a fitted config.

        Raises:
            AdapterFileError: if the config is not fitted.
        """
        return expected_shapes(config)

    @classmethod
    def needs(cls, config: FineSteerConfig, info: ModelInfo) -> CaptureRequest:
        """The read and write sites of every candidate layer, at the query and over the answers, and gradients there.

        Raises:
            ValueError: if the layer is out of the model's range.
        """
        sites = {site for read, writes in candidate_sites(config, info).values() for site in (read, *writes)}
        pools: list[Pool] = ["query"]
        pools += ["answer_mean"] if config.target != "gradient" else []
        pools += ["gradient"] if wants_gradients(config) else []
        return CaptureRequest(sites=tuple(sorted(sites)), pools=tuple(pools))

    @classmethod
    def fit(cls, data: FitData, config: FineSteerConfig) -> FitResult:
        """Choose the layer, fit the gate and the experts, choose the strength.

        Raises:
            DatasetError: if there are too few rows, or no general prompts if the gate needs them.
        """
        return fit_finesteer(data, config, cls)
