"""One suite for all steering methods, including third-party ones, like scikit-learn's `check_estimator`.

Example:
    >>> from finesteer_hf.testing import check_steering_method
    >>> check_steering_method(MyConfig(layer=1))
"""

from finesteer_hf.testing.conformance import FEATURES, check_feature, check_steering_method
from finesteer_hf.testing.toy import toy_general_prompts, toy_model, toy_preferences, toy_tokenizer


__all__ = [
    "FEATURES",
    "check_feature",
    "check_steering_method",
    "toy_general_prompts",
    "toy_model",
    "toy_preferences",
    "toy_tokenizer",
]
