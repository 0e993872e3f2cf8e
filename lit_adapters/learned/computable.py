"""Says which layer of a file holds values with which nothing can be computed, such as factors that overflow."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from lit_adapters.errors import AdapterError


@contextmanager
def computable(what: str) -> Iterator[None]:
    """Raise an error that names the layer where linear algebra fails.

    Args:
        what: The layer or layers, for the message.

    Raises:
        AdapterError: Values inside the block overflow or are not numbers.
    """
    try:
        yield
    except torch.linalg.LinAlgError as error:
        raise AdapterError(
            f"{what}: the values are too large, or of a wrong sign, to describe what was learned; the file was "
            "damaged, or training diverged"
        ) from error
