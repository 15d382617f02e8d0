"""Steering vectors of other libraries as CONSTANT adapters, and adapters as GGUF, as plain tensors and for vLLM."""

from finesteer_hf.interop.gguf_files import save_gguf
from finesteer_hf.interop.load import FORMATS, load_vectors
from finesteer_hf.interop.plain_tensors import save_tensors
from finesteer_hf.interop.vllm import export_vllm


__all__ = ["FORMATS", "export_vllm", "load_vectors", "save_gguf", "save_tensors"]
