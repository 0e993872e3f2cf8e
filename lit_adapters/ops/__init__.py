"""Numerics without modules: functions of tensors, each with a readable reference and a fast path."""

from lit_adapters.ops.rational import Denominator, fixed_rational, rational, rational_reference, set_rational_backend

__all__ = ["Denominator", "fixed_rational", "rational", "rational_reference", "set_rational_backend"]
