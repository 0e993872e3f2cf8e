"""Parents that multiply by `layer.weight` themselves and never call the layer: three families of vision models (BEiT).

Their adapter must put the adapted weight where they read it. Other parents read a weight too, but only to ask for its
dtype or device (T5), and still call the layer. Running a parent to see which it does needs an input that fits it, which
`attach` does not have. So the source of the parent's class decides, here and nowhere else; a parent that this misses is
found by `lit_adapters.verify`, which raises for every adapter that did not run.
"""

from __future__ import annotations

import functools
import inspect
import re

from torch import nn


def reads_weight(parent: nn.Module, attribute: str) -> bool:
    """Whether the code of `parent` multiplies by `attribute.weight` itself.

    Args:
        parent: the module that holds the layer.
        attribute: name of the layer in it.
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
