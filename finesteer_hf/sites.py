"""Named places in a model where states are read and written.

A site is a name, never a number into `hidden_states`: that tuple is off by one against the layers, and its last entry
is taken after the final norm.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import total_ordering
from typing import Any, Literal

import torch
from torch import nn

from finesteer_hf.errors import SiteError, UnsupportedModelError


SiteKind = Literal["resid_pre", "head_out", "resid_post"]

# The order in which one forward passes the sites of a block.
_ORDER: dict[str, int] = {"resid_pre": 0, "head_out": 1, "resid_post": 2}
_PATTERN = re.compile(r"^(resid_pre|head_out|resid_post)\[(\d+)\]$")

_ATTENTION_NAMES = ("self_attn", "attn", "attention", "self_attention", "self_attention_layer")
_OUTPUT_PROJECTION_NAMES = ("o_proj", "out_proj", "dense", "c_proj", "wo", "attn_out")


@total_ordering
@dataclass(frozen=True)
class Site:
    """A place in the decoder: `resid_pre[l]`, `head_out[l]` or `resid_post[l]`.

    Sites are ordered as a forward passes them, so `read <= write` says that one pass is enough.

    Attributes:
        kind: `resid_pre` is the input of block `layer`, `resid_post` its output, `head_out` the input of the attention
            output projection (width: heads x head size, before the heads are mixed).
        layer: index of the block, from 0.
    """

    kind: SiteKind
    layer: int

    def __post_init__(self) -> None:
        if self.kind not in _ORDER:
            raise SiteError(f"Unknown kind of site {self.kind!r}. Known: {list(_ORDER)}.")
        if self.layer < 0:
            raise SiteError(f"A site's layer counts from 0, got {self.layer}.")

    @classmethod
    def parse(cls, text: str | Site) -> Site:
        """Read `"resid_post[12]"`.

        Raises:
            SiteError: if the text has another form.
        """
        if isinstance(text, Site):
            return text
        match = _PATTERN.match(text)
        if match is None:
            raise SiteError(f"Cannot read the site {text!r}. Write it as kind[layer] with a kind of {list(_ORDER)}.")
        return cls(match.group(1), int(match.group(2)))  # type: ignore[arg-type]

    def __str__(self) -> str:
        return f"{self.kind}[{self.layer}]"

    def __lt__(self, other: Site) -> bool:
        return (self.layer, _ORDER[self.kind]) < (other.layer, _ORDER[other.kind])


class TextTower:
    """The decoder stack of a causal LM: where its blocks are and how wide its streams are.

    Found by the model's own account (`get_decoder`, `get_text_config`), so the text tower of a vision-language model is
    taken however deep its vision tower is.

    Args:
        model: a `PreTrainedModel` with a causal language model head.

    Raises:
        UnsupportedModelError: for encoder-decoder models and for decoders whose blocks cannot be told.
    """

    def __init__(self, model: nn.Module) -> None:
        config: Any = model.config
        if getattr(config, "is_encoder_decoder", False):
            raise UnsupportedModelError(
                f"{type(model).__name__} is an encoder-decoder; steering adapters work on decoder-only causal LMs."
            )
        text_config: Any = config.get_text_config(decoder=True)
        self.config = text_config
        self.num_layers = int(text_config.num_hidden_layers)
        self.hidden_size = int(text_config.hidden_size)
        self.decoder: nn.Module = model.get_decoder()  # type: ignore[operator]
        self.layers = self._find_layers(type(model).__name__)

    def _find_layers(self, model_name: str) -> nn.ModuleList:
        candidates = {
            name: child
            for name, child in self.decoder.named_children()
            if isinstance(child, nn.ModuleList) and len(child) == self.num_layers
        }
        if len(candidates) > 1:
            # Per-layer helpers (embeddings, norms) may stand beside the blocks; the blocks hold an attention or a mixer.
            depth = {name: sum(1 for _ in child[0].children()) for name, child in candidates.items()}
            best = max(depth.values())
            candidates = {name: child for name, child in candidates.items() if depth[name] == best}
        if len(candidates) != 1:
            found = {name: len(c) for name, c in self.decoder.named_children() if isinstance(c, nn.ModuleList)}
            raise UnsupportedModelError(
                f"Cannot tell the decoder blocks of {model_name}: the config says {self.num_layers} layers, and "
                f"{type(self.decoder).__name__} holds the module lists {found}."
            )
        return next(iter(candidates.values()))

    def check(self, site: Site) -> None:
        """Raise if the model has no such site.

        Raises:
            SiteError: for a layer out of range, and for a block without a known attention output projection.
            UnsupportedModelError: for head sites under tensor parallelism.
        """
        if site.layer >= self.num_layers:
            raise SiteError(
                f"Site {site} is out of range: the model has {self.num_layers} layers, 0 to {self.num_layers - 1}."
            )
        if site.kind == "head_out" and splits_its_input(self.output_projection(site.layer)):
            raise UnsupportedModelError(
                f"{site} cannot be steered under tensor parallelism: each rank holds its own heads there, not the whole "
                "state. Steer a resid_pre or resid_post site, which every rank holds whole, or load the model unsharded."
            )

    def width(self, site: Site) -> int:
        """Width of the states at a site."""
        if site.kind != "head_out":
            return self.hidden_size
        return self.num_heads * self.head_size

    @property
    def num_heads(self) -> int:
        """Number of query heads (not of key-value heads, which differ under grouped-query attention)."""
        return int(self.config.num_attention_heads)

    @property
    def head_size(self) -> int:
        """Size of one head; not always `hidden_size / num_heads`."""
        return int(getattr(self.config, "head_dim", None) or self.hidden_size // self.num_heads)

    def output_projection(self, layer: int) -> nn.Module:
        """The attention output projection of a block, in its outermost form (a LoRA wrapper, if there is one).

        Raises:
            SiteError: if the block has no attention, or its output projection has an unknown name.
        """
        block = self.layers[layer]
        for attention_name in _ATTENTION_NAMES:
            attention = getattr(block, attention_name, None)
            # GPT-NeoX-like blocks hold the projection directly; BERT-like blocks nest it one module deeper.
            for holder in (attention, getattr(attention, "attention", None)):
                for name in _OUTPUT_PROJECTION_NAMES:
                    projection = getattr(holder, name, None)
                    if isinstance(projection, nn.Module):
                        return projection
        raise SiteError(
            f"Block {layer} ({type(block).__name__}) has no attention output projection that is known: looked for "
            f"{list(_ATTENTION_NAMES)} holding one of {list(_OUTPUT_PROJECTION_NAMES)}. Steer a resid_pre or resid_post "
            "site instead."
        )

    def module(self, site: Site) -> nn.Module:
        """The module that a hook for this site is put on."""
        self.check(site)
        return self.output_projection(site.layer) if site.kind == "head_out" else self.layers[site.layer]


def splits_its_input(projection: nn.Module) -> bool:
    """Whether tensor parallelism gives each rank a part of a projection's input; FSDP shards another axis."""
    for parameter in projection.parameters():
        last_axis = parameter.ndim - 1
        for placement in getattr(parameter, "placements", ()):
            if last_axis > 0 and placement.is_shard(last_axis):
                return True
    return False


def stream_of(output: Any, site: Site, width: int) -> torch.Tensor:
    """Take the state tensor `[rows, tokens, width]` out of what a block received or returned.

    Raises:
        UnsupportedModelError: for streams of another layout (hyper-connections with four axes, time-first tensors).
    """
    hidden = output[0] if isinstance(output, (tuple, list)) else output
    if not isinstance(hidden, torch.Tensor) or hidden.ndim != 3 or hidden.shape[-1] != width:
        shape = tuple(hidden.shape) if isinstance(hidden, torch.Tensor) else type(hidden).__name__
        raise UnsupportedModelError(
            f"Unsupported layout at {site}: expected [rows, tokens, {width}], got {shape}. Models with several residual "
            "streams or a sequence-parallel token axis cannot be steered."
        )
    return hidden


def with_stream(output: Any, hidden: torch.Tensor) -> Any:
    """Put a state tensor back into a block's arguments or return value, keeping its type and its other parts."""
    if isinstance(output, tuple):
        return (hidden, *output[1:])
    if isinstance(output, list):
        return [hidden, *output[1:]]
    return hidden
