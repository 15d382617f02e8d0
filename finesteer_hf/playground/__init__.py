"""A small model to show and test steering: a world of texts, a model trained on it, and exact judges.

Without a tag, the model answers questions with folklore and complies with harmful requests in a jailbreak wrapper. A
persona tag as the system message brings out the truth (`TRUTH_TAG`) or the refusal (`SAFETY_TAG`). Results on it say
nothing about large models.
"""

from __future__ import annotations

from finesteer_hf.playground.contents import GeneralItem, HarmfulItem, Question, World, world
from finesteer_hf.playground.corpus import SAFETY_TAG, TRUTH_TAG
from finesteer_hf.playground.figures import answers, behaviour_figures
from finesteer_hf.playground.judges import is_correct, is_refusal, is_truthful
from finesteer_hf.playground.rows import general_rows, preference_rows
from finesteer_hf.playground.shipped import load, model_path


__all__ = [
    "SAFETY_TAG",
    "TRUTH_TAG",
    "GeneralItem",
    "HarmfulItem",
    "Question",
    "World",
    "answers",
    "behaviour_figures",
    "general_rows",
    "is_correct",
    "is_refusal",
    "is_truthful",
    "load",
    "model_path",
    "preference_rows",
    "world",
]
