"""Measures: likelihoods, choices, generated answers, and their statistics."""
