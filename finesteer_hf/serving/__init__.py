"""Steering inside continuous batching: many requests in one packed batch, each with its own adapters, gate and scale."""
