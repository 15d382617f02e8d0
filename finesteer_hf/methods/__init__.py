"""The built-in steering methods; importing this package registers them."""

from finesteer_hf.methods import angular, caa, constant, finesteer


__all__ = ["angular", "caa", "constant", "finesteer"]
