"""Numerics without modules: functions of tensors, each with a readable reference and a fast path."""

from lit_adapters.ops.rational import Denominator, rational, rational_reference, set_rational_backend

__all__ = ["Denominator", "rational", "rational_reference", "set_rational_backend"]
