"""Benchmarks, by what they are about; each runs from the root of the repo as `python -m benchmarks.<folder>.<name>`."""
