"""Fixtures for all tests. This file also puts its folder on the import path, for `hub_server` and `hub_fixtures`."""

pytest_plugins = ["hub_fixtures"]
