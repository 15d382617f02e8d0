"""Whether an adapter fits a model: its sizes, and the widths of what it writes inside blocks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from finesteer_hf.adapters.base_models import base_of
from finesteer_hf.adapters.config import CONFIG_NAME, SteeringConfig
from finesteer_hf.adapters.tensor_files import HEAD_SIZE, NEURONS, Free
from finesteer_hf.errors import AdapterMismatchError
from finesteer_hf.processors import QueryStates
from finesteer_hf.sites import Site, TextTower


if TYPE_CHECKING:
    from finesteer_hf.adapters.adapter import SteeringAdapter
    from finesteer_hf.method_api import SteeringMethod


def check_sizes(config: SteeringConfig, model: torch.nn.Module, tower: TextTower) -> None:
    """Raise `AdapterMismatchError` if a config is for a model of other sizes. Needs no tensors."""
    heads = getattr(config, "attention_heads", None)
    for what, want, got in (
        ("hidden size", config.hidden_size, tower.hidden_size),
        ("number of layers", config.num_hidden_layers, tower.num_layers),
        ("number of attention heads", heads, tower.num_heads if heads is not None else None),
    ):
        if want is not None and want != got:
            raise AdapterMismatchError(
                f"The adapter was fitted for {config.base_model_name_or_path!r} ({what} {want}), but the model "
                f"{base_of(model)[0] or type(model).__name__!r} has {what} {got}. Load the adapter's base, or "
                "fit an adapter for this model."
            )


def refuse_other_base(config: SteeringConfig, differences: list[str]) -> None:
    """Raise `AdapterMismatchError` for differences that `strict=True` refuses."""
    if differences:
        raise AdapterMismatchError(
            f"strict=True refuses the adapter: {'; '.join(differences)}. Load it on its own base, or fit an adapter for "
            "this model. The shapes agree, so without strict=True it loads with a warning and steers a model that it was "
            "not fitted on."
        )
    if config.base_model_name_or_path is None and not config.base_model_fingerprint:
        raise AdapterMismatchError(
            f"strict=True refuses the adapter: its {CONFIG_NAME} has neither `base_model_name_or_path` nor "
            "`base_model_fingerprint`, so this model cannot be checked against its base. Without strict=True it loads."
        )


def check_widths(adapter: SteeringAdapter, processor: SteeringMethod, tower: TextTower) -> None:
    """Raise `AdapterMismatchError` if an adapter's heads or neurons have another width than the model's.

    No config has these sizes, and they may differ between blocks.
    """
    heads = getattr(adapter.config, "attention_heads", None) or 0
    own = {
        "head_out": {size * heads for size in _sizes(adapter, HEAD_SIZE) if heads},
        "mlp_act": _sizes(adapter, NEURONS),
    }
    written: Mapping[Site, torch.Tensor] = {}
    if processor.writes and not processor.reads:
        written = processor.decide(QueryStates({}, 1, torch.device("cpu"))).vectors
    for site in processor.sites:
        if site.kind not in own:
            continue
        got = own[site.kind] if site not in written else {written[site].shape[-1]}
        if any(width != tower.width(site) for width in got):
            what = "heads" if site.kind == "head_out" else "neurons"
            raise AdapterMismatchError(
                f"The adapter was fitted for {adapter.config.base_model_name_or_path!r}, whose {what} are together "
                f"{sorted(got)} wide at {site}; this model's are {tower.width(site)}. Load the adapter's base."
            )


def _sizes(adapter: SteeringAdapter, axis: Free) -> set[int]:
    """The sizes that an axis has in an adapter's tensors."""
    return {
        size
        for name, shape in adapter.tensor_shapes().items()
        for own, size in zip(shape, adapter.tensors[name].shape, strict=True)
        if own == axis
    }
