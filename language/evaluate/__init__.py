"""Tasks and metrics for language models."""

from __future__ import annotations
