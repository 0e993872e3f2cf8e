"""What can be done to a model: attach adapters, report on them, run it in particular ways, merge, shard."""

from __future__ import annotations
