"""The toys of `evaluation_toys`, and the benchmarks' folder on the import path, for they are scripts."""

import sys
from pathlib import Path

from evaluation_toys import half_plane, model, tokenizer


sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

__all__ = ["half_plane", "model", "tokenizer"]
