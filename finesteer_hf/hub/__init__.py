"""Steering adapters on the Hub: push, pull, search; and those on this machine."""

from finesteer_hf.hub.at_hand import AdapterAtHand, adapters_in, cached_adapters
from finesteer_hf.hub.pull import AdapterFiles, resolve_adapter_files
from finesteer_hf.hub.push import push_adapter, with_public_base
from finesteer_hf.hub.search import HubAdapter, list_adapters


__all__ = [
    "AdapterAtHand",
    "AdapterFiles",
    "HubAdapter",
    "adapters_in",
    "cached_adapters",
    "list_adapters",
    "push_adapter",
    "resolve_adapter_files",
    "with_public_base",
]
