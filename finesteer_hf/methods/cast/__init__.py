"""CAST: add a behaviour vector when conditions on the query are met (Lee et al., ICLR 2025, arXiv 2409.05907).

A condition at a layer is a direction c and a threshold: it is met if cos(h, tanh(P_c h)) with P_c = c c' / (c' c) is
on its side of the threshold. Rules map conditions to behaviours.

Differences from the published code. Its comparator `larger` means that the *threshold* is larger than the similarity;
here a condition is met `above` or `below` its threshold. It tests the first row of a batch for all rows; here each row
is tested. It fits vectors at block outputs and tests them at block inputs; here both use the output. Two rules for one
behaviour add it twice there, once here.
"""

from finesteer_hf.adapters.registry import register_steering_method
from finesteer_hf.methods.cast.conditions import best_threshold, first_direction, fit_condition, similarity
from finesteer_hf.methods.cast.config import CASTConfig
from finesteer_hf.methods.cast.method import CAST
from finesteer_hf.methods.cast.rules import Rule


register_steering_method(CAST)

__all__ = ["CAST", "CASTConfig", "Rule", "best_threshold", "first_direction", "fit_condition", "similarity"]
