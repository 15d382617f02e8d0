"""Figures of a model, steered or not: each with its n and interval, all computed offline."""
