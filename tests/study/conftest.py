"""Fixtures of the tests of studies."""

import pytest


@pytest.fixture(autouse=True)
def _no_collection(monkeypatch):
    """statsmodels collects garbage at each correction, which takes half a second beside torch."""
    monkeypatch.setattr("gc.collect", lambda *_: 0)
