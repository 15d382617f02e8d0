"""FINESTEER: a gate decides when to steer, and a mixture of experts decides how.

Weng, Zhang, Cai, Li, Wang, Tian: FineSteer (ACL 2026, arXiv 2604.15488).
"""

from finesteer_hf.adapters.registry import register_steering_method
from finesteer_hf.methods.finesteer.config import FineSteerConfig
from finesteer_hf.methods.finesteer.method import FineSteer


register_steering_method(FineSteer)

__all__ = ["FineSteer", "FineSteerConfig"]
