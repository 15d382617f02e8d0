"""Steering adapters on the Hub: push, pull, find."""

from finesteer_hf.hub.pull import AdapterFiles, resolve_adapter_files
from finesteer_hf.hub.push import push_adapter


__all__ = ["AdapterFiles", "push_adapter", "resolve_adapter_files"]
