"""Steering adapters on the Hub: push, pull, search."""

from finesteer_hf.hub.pull import AdapterFiles, resolve_adapter_files
from finesteer_hf.hub.push import push_adapter, with_public_base
from finesteer_hf.hub.search import HubAdapter, list_adapters


__all__ = ["AdapterFiles", "HubAdapter", "list_adapters", "push_adapter", "resolve_adapter_files", "with_public_base"]
