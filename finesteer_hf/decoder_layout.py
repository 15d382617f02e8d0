"""Where a causal LM keeps its decoder and its blocks, and which layouts are refused."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel

from finesteer_hf.errors import UnsupportedModelError


# Names of a decoder's list of blocks, for decoders with other lists of the same length.
_BLOCK_LIST_NAMES = ("layers", "h", "blocks", "layer")
# Decoders whose blocks or forwards do not have the layout that sites need.
_REFUSED_TYPES = {
    "blt": "its blocks run on patches of bytes, not on tokens",
    "cpmant": "it puts its own columns before the tokens of a prompt",
    "diffusion_gemma": "it denoises blocks of tokens instead of appending them one by one",
    "hrm_text": "it runs its blocks several times in one forward, so a site has no single state",
    "musicgen_decoder": "it generates several codebooks of audio per step, each in its own row",
    "musicgen_melody_decoder": "it generates several codebooks of audio per step, each in its own row",
    "prophetnet": "its blocks carry a stream for each predicted token beside the main one",
    "reformer": "its reversible blocks carry two streams, with their own length",
    "rwkv": "it decodes with a state that is not a transformers cache, so positions are unknown",
    "xlm": "it keeps attentions and feed-forward layers in separate lists, so it has no blocks",
    "xlnet": "its blocks take states as [tokens, rows, width]",
}


def refuse_layout(model_name: str, config: Any) -> None:
    """Raise `UnsupportedModelError` for a config whose model has a known unsupported layout."""
    reason = _REFUSED_TYPES.get(getattr(config, "model_type", ""))
    streams = max(int(getattr(config, name, None) or 1) for name in ("hc_mult", "hc_count", "altup_num_inputs"))
    if reason is None and streams > 1:
        reason = f"its blocks carry {streams} residual streams instead of one"
    if reason is not None:
        raise UnsupportedModelError(f"{model_name} cannot be steered: {reason}.")


def find_decoder(model: nn.Module) -> nn.Module:
    """The module that runs a causal LM's tokens through its blocks, without the head."""
    decoder = model.get_decoder()  # type: ignore[operator]
    if decoder is not model and isinstance(decoder, PreTrainedModel):
        return decoder
    # Some classes return themselves, or a head that they call `decoder`.
    inner = [child for child in model.children() if isinstance(child, PreTrainedModel)]
    if len(inner) != 1:
        raise UnsupportedModelError(
            f"Cannot find the decoder of {type(model).__name__}: get_decoder() returns a {type(decoder).__name__}, and the "
            f"models inside it are {[type(child).__name__ for child in inner]}."
        )
    return inner[0]


def find_blocks(decoder: nn.Module, config: Any, model_name: str) -> nn.ModuleList:
    """The list of a decoder's blocks: the outermost one that is as long as the config says.

    Raises:
        UnsupportedModelError: if there is none, or more than one candidate.
    """
    # LongCat counts each block twice in `num_hidden_layers`: a block has two attentions.
    sizes = {int(n) for n in (config.num_hidden_layers, getattr(config, "num_layers", None)) if n}
    lists = {name: child for name, child in decoder.named_modules() if isinstance(child, nn.ModuleList)}
    candidates = {name: child for name, child in lists.items() if len(child) in sizes}
    depth = min((name.count(".") for name in candidates), default=0)
    candidates = {name: child for name, child in candidates.items() if name.count(".") == depth}
    if len(candidates) > 1:
        candidates = {n: child for n, child in candidates.items() if n.rpartition(".")[2] in _BLOCK_LIST_NAMES}
    if len(candidates) != 1:
        outer = {name: len(child) for name, child in lists.items() if name.count(".") <= 1}
        raise UnsupportedModelError(
            f"Cannot find the decoder blocks of {model_name}: the config says {config.num_hidden_layers} layers, but "
            f"{type(decoder).__name__} has the module lists {outer}."
        )
    return next(iter(candidates.values()))


def context_length(model: Any) -> int | None:
    """Most positions of a causal LM's text; None if its config names no limit."""
    return getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
