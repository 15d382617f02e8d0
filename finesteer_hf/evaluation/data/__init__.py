"""Data sets and benchmarks."""
