"""The toys of `evaluation_toys`, and the root of the repo on the import path, for `benchmarks`."""

import sys
from pathlib import Path

from evaluation_toys import half_plane, model, tokenizer


sys.path.insert(0, str(Path(__file__).parents[2]))

__all__ = ["half_plane", "model", "tokenizer"]
