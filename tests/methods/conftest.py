"""Puts its folder on the import path, for the helpers beside it."""
