"""Reads steering vectors of other libraries as CONSTANT adapters, and writes constant adapters as GGUF."""

from finesteer_hf.interop.gguf_files import save_gguf
from finesteer_hf.interop.load import FORMATS, load_vectors


__all__ = ["FORMATS", "load_vectors", "save_gguf"]
