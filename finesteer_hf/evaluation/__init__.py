"""Figures of a model, steered or not: each with its n and its interval, and none needs a network."""
