"""Fitting: contrast data, captured states, and `fit_steering`."""

from finesteer_hf.fitting.capture.reader import StateReader
from finesteer_hf.fitting.capture.store import ActivationStore
from finesteer_hf.fitting.data.general import default_general_prompts
from finesteer_hf.fitting.data.lint import DatasetWarning
from finesteer_hf.fitting.data.templating import format_query
from finesteer_hf.fitting.fit import fit_steering


__all__ = [
    "ActivationStore",
    "DatasetWarning",
    "StateReader",
    "default_general_prompts",
    "fit_steering",
    "format_query",
]
