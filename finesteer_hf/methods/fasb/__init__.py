"""FASB: steer when the state deviates, starting a few tokens earlier (Gan et al., NeurIPS 2025, arXiv 2508.17621)."""

from finesteer_hf.adapters.registry import register_steering_method
from finesteer_hf.methods.fasb.config import FASBConfig
from finesteer_hf.methods.fasb.method import FASB


register_steering_method(FASB)

__all__ = ["FASB", "FASBConfig"]
