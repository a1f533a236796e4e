"""For all tests."""

import gc

import pytest


@pytest.fixture(scope="module", autouse=True)
def packages_are_not_searched_for_garbage() -> None:
    """What is alive before the tests of a file, above all imported packages, stays. Each run of training collects
    garbage at its end, and would look through millions of these objects."""
    gc.collect()
    gc.freeze()
