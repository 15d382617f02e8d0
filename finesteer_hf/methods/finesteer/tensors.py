"""The tensors of a FineSteer adapter besides its gate's, and the run-time functions that take them."""

from __future__ import annotations

from finesteer_hf.adapters.tensor_files import Shape
from finesteer_hf.errors import AdapterFileError
from finesteer_hf.methods.finesteer.config import FineSteerConfig
from finesteer_hf.methods.query_gate.tensors import gate_shapes, shapes_of, to_file


__all__ = ["EXPERT_TENSORS", "expected_shapes", "to_file"]

# Keyword of the run-time function -> name in the file.
_ROUTER = {"router_weight": "router.weight", "router_bias": "router.bias", "prototypes": "experts.prototypes"}
_LOW_RANK = {"mean": "residual.mean", "down": "residual.down", "up": "residual.up", "bias": "residual.bias"}
EXPERT_TENSORS: dict[str, dict[str, str]] = {
    "reduced_rank": _LOW_RANK,
    "mixture": {**_ROUTER, **_LOW_RANK},
    "paper": {
        **_ROUTER,
        "hidden_weight": "residual.hidden_weight",
        "hidden_bias": "residual.hidden_bias",
        "output_weight": "residual.output_weight",
        "output_bias": "residual.output_bias",
        "residual_basis": "residual.basis",
    },
}

# d: width, w: total width of the written sites, K: experts, r: residual rank, m: width of the residual network.
_AXES: dict[str, str] = {
    "router.weight": "Kd",
    "router.bias": "K",
    "experts.prototypes": "Kw",
    "residual.mean": "d",
    "residual.down": "dr",
    "residual.up": "rw",
    "residual.bias": "w",
    "residual.hidden_weight": "md",
    "residual.hidden_bias": "m",
    "residual.output_weight": "rm",
    "residual.output_bias": "r",
    "residual.basis": "wr",
}


def expected_shapes(config: FineSteerConfig) -> dict[str, Shape]:
    """Names and shapes that a fitted config declares.

    Raises:
        AdapterFileError: if a setting is open and no fit has chosen it.
    """
    unfitted = config.unfitted()
    if unfitted:
        raise AdapterFileError(
            f"The FINESTEER config leaves {unfitted} to the fit; only a fitted adapter can steer. Run `fit_steering`."
        )
    sizes = {
        "d": config.hidden_size,
        "w": None if config.hidden_size is None else config.hidden_size * len(config.write_sites),
        "K": config.num_experts,
        "r": config.residual_rank,
        "m": config.hidden_dim or config.hidden_size,
    }
    return gate_shapes(config) | shapes_of(EXPERT_TENSORS[config.experts].values(), _AXES, sizes)
