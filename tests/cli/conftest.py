"""The fixtures of `evaluation_toys`."""

from evaluation_toys import half_plane, model, tokenizer


__all__ = ["half_plane", "model", "tokenizer"]
