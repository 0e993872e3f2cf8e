"""Every method on one small member of each model family: it works, or says clearly why not."""

import json

import pytest

import lit_adapters as la
from benchmarks.breadth import METHODS, MODELS_PAGE, PAGE, check, models_page, page
from benchmarks.results_file import RESULTS
from tests.families import FAMILIES


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("key", FAMILIES)
def test_a_method_works_or_is_refused_for_the_known_reason(key, method):
    refused = FAMILIES[key].refused.get(method)
    if refused is None:
        assert check(key, method) > 0
    else:
        with pytest.raises(la.AdapterError, match=refused):
            check(key, method)


def test_the_pages_show_the_record():
    record = json.loads((RESULTS / "breadth.json").read_text(encoding="utf-8"))
    assert PAGE.read_text(encoding="utf-8") == page(record)
    assert MODELS_PAGE.read_text(encoding="utf-8") == models_page(record)
