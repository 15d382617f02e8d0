"""Fitting: contrast data, captured states, and `fit_steering`."""

from finesteer_hf.fitting.capture import StateReader
from finesteer_hf.fitting.fit import fit_steering
from finesteer_hf.fitting.general import default_general_prompts
from finesteer_hf.fitting.lint import DatasetWarning
from finesteer_hf.fitting.store import ActivationStore
from finesteer_hf.fitting.templating import format_query


__all__ = [
    "ActivationStore",
    "DatasetWarning",
    "StateReader",
    "default_general_prompts",
    "fit_steering",
    "format_query",
]
