"""finesteer_hf's steering adapters inside vLLM."""

from finesteer_vllm.adapters import AdapterError, ServedAdapter, read_adapter, read_config
from finesteer_vllm.decide import decide
from finesteer_vllm.requests import Asked, SteeringRequestError


__all__ = ["AdapterError", "Asked", "ServedAdapter", "SteeringRequestError", "decide", "read_adapter", "read_config"]
