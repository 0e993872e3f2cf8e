"""Finds parents that multiply by `layer.weight` themselves and never call the layer, as BEiT and two more families do.

The adapter in such a parent must give it the adapted weight when it reads `weight`. Other parents read a weight only to
ask for its dtype or device, and do call the layer (T5). Running a parent would tell, but needs an input that fits it,
which `attach` does not have. So the source code of the parent's class decides, here and nowhere else. If this misses a
parent, `lit_adapters.verify` raises, as it does for every adapter that did not run.
"""

from __future__ import annotations

import functools
import inspect
import re

from torch import nn


def reads_weight(parent: nn.Module, attribute: str) -> bool:
    """Whether `parent` multiplies by the weight of its layer `attribute` itself.

    Args:
        parent: The module that holds the layer.
        attribute: The name of the layer in it.
    """
    expression = re.compile(rf"linear\(\s*\w+\s*,\s*(weight\s*=\s*)?self\.{re.escape(attribute)}\.weight\s*[,)]")
    for kind in type(parent).__mro__:
        if kind is nn.Module:
            break
        if expression.search(_source(kind)):
            return True
    return False


@functools.lru_cache(maxsize=1024)  # finding it parses the whole file
def _source(kind: type) -> str:
    try:
        return inspect.getsource(kind)
    except (OSError, TypeError):
        return ""
