"""Functions of tensors, without modules: a readable reference and a fast path for each."""

from __future__ import annotations

from lit_adapters.ops.rational import Denominator, fixed_rational, rational, rational_reference, set_rational_backend

__all__ = ["Denominator", "fixed_rational", "rational", "rational_reference", "set_rational_backend"]
