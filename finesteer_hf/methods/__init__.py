"""The built-in steering methods; importing this package registers them."""

from finesteer_hf.methods import caa, constant, finesteer


__all__ = ["caa", "constant", "finesteer"]
