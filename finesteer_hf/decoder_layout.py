"""Where a causal LM keeps its decoder and its blocks, and which layouts are refused."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel

from finesteer_hf.errors import UnsupportedModelError


# Names of a decoder's list of blocks, where other lists of that length stand beside it.
_BLOCK_LIST_NAMES = ("layers", "h", "blocks", "layer")
# Decoders whose blocks, or whose forwards, do not have the layout that sites are defined by.
_REFUSED_TYPES = {
    "blt": "its blocks run on patches of bytes, not on tokens",
    "cpmant": "it puts columns of its own before the tokens of a prompt",
    "diffusion_gemma": "it denoises blocks of tokens instead of appending them one by one",
    "hrm_text": "it runs its blocks several times in one forward, so a site has no single state",
    "musicgen_decoder": "it generates several codebooks of audio a step, each in a row of its own",
    "musicgen_melody_decoder": "it generates several codebooks of audio a step, each in a row of its own",
    "prophetnet": "its blocks carry a stream for each predicted token beside the main one",
    "reformer": "its reversible blocks carry two streams, of a length of their own",
    "rwkv": "it decodes with a state that is no cache of transformers', so positions cannot be told",
    "xlm": "it keeps attentions and feed-forward layers in lists of their own, so it has no blocks",
    "xlnet": "its blocks take states as [tokens, rows, width]",
}


def refuse_layout(model_name: str, config: Any) -> None:
    """Raise `UnsupportedModelError` for a config whose model is known to have another layout."""
    reason = _REFUSED_TYPES.get(getattr(config, "model_type", ""))
    streams = max(int(getattr(config, name, None) or 1) for name in ("hc_mult", "hc_count", "altup_num_inputs"))
    if reason is None and streams > 1:
        reason = f"its blocks carry {streams} residual streams instead of one"
    if reason is not None:
        raise UnsupportedModelError(f"{model_name} cannot be steered: {reason}.")


def find_decoder(model: nn.Module) -> nn.Module:
    """The module that takes a causal LM's tokens through its blocks, the head left out."""
    decoder = model.get_decoder()  # type: ignore[operator]
    if decoder is not model and isinstance(decoder, PreTrainedModel):
        return decoder
    # Some classes answer with themselves, or with a head that they happen to call `decoder`.
    inner = [child for child in model.children() if isinstance(child, PreTrainedModel)]
    if len(inner) != 1:
        raise UnsupportedModelError(
            f"Cannot tell the decoder of {type(model).__name__}: get_decoder() gives a {type(decoder).__name__}, and the "
            f"models inside it are {[type(child).__name__ for child in inner]}."
        )
    return inner[0]


def find_blocks(decoder: nn.Module, config: Any, model_name: str) -> nn.ModuleList:
    """The list of a decoder's blocks: the outermost one that is as long as the config says.

    Raises:
        UnsupportedModelError: if there is none, or several that cannot be told apart.
    """
    # LongCat counts each block twice in `num_hidden_layers`: a block holds two attentions.
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
            f"Cannot tell the decoder blocks of {model_name}: the config says {config.num_hidden_layers} layers, and "
            f"{type(decoder).__name__} holds the module lists {outer}."
        )
    return next(iter(candidates.values()))
