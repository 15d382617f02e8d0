"""TAD: a constant vector at tokens that are uncertain."""

from finesteer_hf.adapters.registry import register_steering_method
from finesteer_hf.methods.tad.config import TADConfig
from finesteer_hf.methods.tad.method import TAD


register_steering_method(TAD)

__all__ = ["TAD", "TADConfig"]
