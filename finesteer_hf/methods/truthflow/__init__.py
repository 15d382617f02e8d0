"""TRUTHFLOW: a flow that maps a query's state to its shift (Wang et al., ICML 2025, arXiv 2502.04556)."""

from finesteer_hf.adapters.registry import register_steering_method
from finesteer_hf.methods.truthflow.method import TruthFlow, TruthFlowConfig


register_steering_method(TruthFlow)

__all__ = ["TruthFlow", "TruthFlowConfig"]
