"""Named places in a model where states are read and written.

A site is a name, never an index into `hidden_states`: that tuple is off by one against the layers, and its last entry
comes after the final norm.
"""

from __future__ import annotations

import contextlib
import re
from dataclasses import dataclass
from functools import total_ordering
from typing import Any, Literal

import torch
from torch import nn

from finesteer_hf.decoder_layout import find_blocks, find_decoder, refuse_layout
from finesteer_hf.errors import SiteError, UnsupportedModelError


SiteKind = Literal["resid_pre", "head_out", "attention", "mlp_act", "resid_post"]

# The order in which one forward passes the sites of a block.
_ORDER: dict[str, int] = {"resid_pre": 0, "head_out": 1, "attention": 2, "mlp_act": 3, "resid_post": 4}
_PATTERN = re.compile(rf"^({'|'.join(_ORDER)})\[(\d+)\]$")

# Where blocks keep the projection that mixes the heads of their attention.
_OUTPUT_PROJECTIONS = (
    *(
        f"{attention}.{projection}"
        for attention in ("self_attn", "attn", "attention", "self_attention", "self_attention_layer")
        for projection in ("o_proj", "out_proj", "dense", "c_proj", "wo", "attn_out")
    ),
    "attention.output.dense",
    "attn.attention.out_proj",
    "attn.Wo",
    "multi_head_attention.dense",
    "norm_attn_norm.attn.out_proj",
    # One name for blocks of several kinds, whose projections have different names.
    "mixer.o_proj",
    "temporal_block.o_proj",
)
# Where blocks keep the last projection, which mixes the neurons, of a feed-forward that all tokens pass. Experts,
# which only some tokens pass, are excluded.
_LAST_PROJECTIONS = (
    *(f"mlp.{projection}" for projection in ("down_proj", "c_proj", "fc2", "dense_4h_to_h", "fc_out", "Wo")),
    *("feed_forward.down_proj", "feed_forward.w2", "mlp_block.down_proj", "mixer.down_proj"),
    *("ffn.down_proj", "ffn.2", "output.dense", "fc2"),
)
# Sites at the input of a projection inside a block: where the projection is, and its name in errors.
_PROJECTIONS: dict[str, tuple[tuple[str, ...], str]] = {
    "head_out": (_OUTPUT_PROJECTIONS, "attention output projection"),
    "attention": (_OUTPUT_PROJECTIONS, "attention output projection"),
    "mlp_act": (_LAST_PROJECTIONS, "feed-forward that all tokens pass, with a last projection"),
}
# Kinds of sites outside the residual stream, with their own width.
INNER_KINDS = frozenset(_PROJECTIONS)
# Number of earlier tokens whose weights an `attention` site shows.
BACK = 10


@total_ordering
@dataclass(frozen=True)
class Site:
    """A place in the decoder: `resid_pre[l]`, `head_out[l]`, `attention[l]`, `mlp_act[l]` or `resid_post[l]`.

    Sites are in forward order, so `read <= write` means that one pass is enough.

    Attributes:
        kind: `resid_pre` is the input of block `layer`, `resid_post` its output, `head_out` the input of the attention
            output projection (width: heads x head size, before the heads are mixed), `mlp_act` the input of the last
            projection of the feed-forward (width: its neurons, after the activation and the gate's product).
            `attention` can be read but not written: for each head, the weights of a token to the `BACK` tokens before
            it, nearest first (width: heads x `BACK`); 0 where there is none.
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
        """Parse `"resid_post[12]"`.

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


def resid_post(layer: int | str) -> Site:
    """The output of a block, where most methods steer; `layer` is a number, although configs type it `int | str`."""
    return Site("resid_post", int(layer))


class TextTower:
    """The decoder stack of a causal LM: where its blocks are and how wide its streams are.

    Found with the model's own functions (`get_decoder`, `get_text_config`), so for a vision-language model it is the
    text tower, however deep the vision tower.

    Args:
        model: a `PreTrainedModel` with a causal language model head.

    Raises:
        UnsupportedModelError: for encoder-decoder models, for decoders whose blocks are not found, and for layouts
            other than one stream `[rows, tokens, width]` that passes each block once.
    """

    def __init__(self, model: nn.Module) -> None:
        config: Any = model.config
        if getattr(config, "is_encoder_decoder", False):
            raise UnsupportedModelError(
                f"{type(model).__name__} is an encoder-decoder; steering adapters work on decoder-only causal LMs."
            )
        text_config: Any = config.get_text_config(decoder=True)
        for known in (config, text_config):
            refuse_layout(type(model).__name__, known)
        self.config = text_config
        self.decoder = find_decoder(model)
        self.layers = find_blocks(self.decoder, text_config, type(model).__name__)
        self.num_layers = len(self.layers)
        self.hidden_size = int(text_config.hidden_size)

    def check(self, site: Site) -> None:
        """Raise if the model has no such site.

        Raises:
            SiteError: for a layer out of range, and for a block without the site's projection.
            UnsupportedModelError: for sites at a projection's input under tensor parallelism.
        """
        if site.layer >= self.num_layers:
            raise SiteError(
                f"Site {site} is out of range: the model has {self.num_layers} layers, 0 to {self.num_layers - 1}."
            )
        if site.kind == "attention" and not self.shows_attention:
            raise UnsupportedModelError(
                f"{site} needs attention weights, which attn_implementation="
                f"{getattr(self.config, '_attn_implementation', None)!r} does not return. Load the model with "
                "attn_implementation='eager', or call `model.set_attn_implementation('eager')` first."
            )
        if site.kind in INNER_KINDS and splits_its_input(self.projection(site)):
            raise UnsupportedModelError(
                f"{site} cannot be steered under tensor parallelism: each rank has its own heads or neurons there, not "
                "the whole state. Steer a resid_pre or resid_post site, which every rank has in full, or load the model "
                "unsharded."
            )

    @property
    def shows_attention(self) -> bool:
        """Whether the model's attention returns its weights; only the eager one does."""
        return getattr(self.config, "_attn_implementation", None) == "eager"

    def width(self, site: Site) -> int:
        """Width of the states at a site."""
        if site.kind == "attention":
            return self.num_heads * BACK
        if site.kind not in INNER_KINDS:
            return self.hidden_size
        projection: Any = self.projection(site)
        # Not heads x head size of the config: latent attention has value heads of another size, and in some models
        # head sizes differ between blocks.
        width = getattr(projection, "in_features", None)
        if width is None and isinstance(getattr(projection, "weight", None), torch.Tensor):
            width = projection.weight.shape[0]
        return int(width or self.num_heads * self._head_size_of_config)

    @property
    def num_heads(self) -> int:
        """Number of query heads (not of key-value heads, which differ under grouped-query attention)."""
        return int(self.config.num_attention_heads)

    @property
    def head_size(self) -> int:
        """Size of one head at the first block with a head site; not always width / heads."""
        for layer in range(self.num_layers):
            with contextlib.suppress(SiteError):
                return self.width(Site("head_out", layer)) // self.num_heads
        return self._head_size_of_config

    @property
    def _head_size_of_config(self) -> int:
        return int(getattr(self.config, "head_dim", None) or self.hidden_size // self.num_heads)

    def projection(self, site: Site) -> nn.Module:
        """The projection whose input is a `head_out` or `mlp_act` site, in its outermost form (a LoRA wrapper).

        Raises:
            SiteError: if the block has none, or its name is unknown.
        """
        return self._with_projection(site)[1]

    def _with_projection(self, site: Site) -> tuple[nn.Module, nn.Module]:
        """The projection of a site and its parent module."""
        block = self.layers[site.layer]
        paths, what = _PROJECTIONS[site.kind]
        for path in paths:
            owner: Any = None
            projection: Any = block
            for name in path.split("."):
                owner, projection = projection, getattr(projection, name, None)
            if isinstance(projection, nn.Module):
                return owner, projection
        raise SiteError(
            f"There is no {site}: block {site.layer} ({type(block).__name__}, of "
            f"{[name for name, _ in block.named_children()]}) has no {what} that is known. Steer a resid_pre or "
            "resid_post site instead."
        )

    def module(self, site: Site) -> nn.Module:
        """The module that gets the hook of this site."""
        self.check(site)
        if site.kind not in INNER_KINDS:
            return self.layers[site.layer]
        owner, projection = self._with_projection(site)
        return owner if site.kind == "attention" else projection


def splits_its_input(projection: nn.Module) -> bool:
    """Whether tensor parallelism splits a projection's input over ranks; FSDP shards another axis."""
    for parameter in projection.parameters():
        last_axis = parameter.ndim - 1
        for placement in getattr(parameter, "placements", ()):
            if last_axis > 0 and placement.is_shard(last_axis):
                return True
    return False


def stream_of(output: Any, site: Site, width: int) -> torch.Tensor:
    """Extract the state tensor `[rows, tokens, width]` from a block's input or output.

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


def attention_of(output: Any, site: Site, heads: int, past: int) -> torch.Tensor:
    """Extract an `attention` site's weights of each token to earlier ones from an attention module's output.

    Args:
        output: the module's output; the weights `[rows, heads, tokens, keys]` are its second part.
        site: the site, for errors.
        heads: number of heads of the block.
        past: absolute position of the first token.

    Returns:
        `[rows, tokens, heads * BACK]`, in the weights' dtype.

    Raises:
        UnsupportedModelError: if the module returns no such weights.
    """
    weights = output[1] if isinstance(output, (tuple, list)) and len(output) > 1 else None
    if not isinstance(weights, torch.Tensor) or weights.ndim != 4 or weights.shape[1] != heads:
        shape = tuple(weights.shape) if isinstance(weights, torch.Tensor) else type(weights).__name__
        raise UnsupportedModelError(
            f"{site}: the attention returns no weights [rows, {heads}, tokens, keys], but {shape}. Load the model with "
            "attn_implementation='eager'; some architectures return none even then."
        )
    tokens, keys = weights.shape[2:]
    # A static cache has room for future keys; a sliding window has dropped the first ones.
    own = past if keys > past + tokens else keys - tokens
    columns = torch.arange(own, own + tokens, device=weights.device)[:, None]
    behind = columns - torch.arange(1, BACK + 1, device=weights.device)
    found = weights.gather(3, behind.clamp(min=0).expand(*weights.shape[:3], BACK))
    return torch.where(behind >= 0, found, 0.0).transpose(1, 2).flatten(2)


def with_stream(output: Any, hidden: torch.Tensor) -> Any:
    """Put a state tensor back into a block's arguments or return value, keeping its type and its other parts."""
    if isinstance(output, tuple):
        return (hidden, *output[1:])
    if isinstance(output, list):
        return [hidden, *output[1:]]
    return hidden
