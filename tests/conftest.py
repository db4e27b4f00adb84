"""What holds for all tests."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator

import pytest
import torch
from support import releases

from attnres_fx.passes.graph.context import CHECKS_VARIABLE

# Every pass is held to its contract wherever it runs, in processes that tests start too.
os.environ.setdefault(CHECKS_VARIABLE, "1")

# Compilers allocate millions of objects that live to the end of a test: to look through them each 700 allocations is a tenth
# of the time.
gc.set_threshold(100_000, 50, 100)


@pytest.fixture(scope="session", autouse=True)
def _few_calls_of_the_cpp_compiler() -> Iterator[None]:
    """Inductor's kernels in few translation units; what tests run in a process of its own is built as users have it."""
    from support.one_unit import one_unit

    with one_unit():
        yield


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What this torch is known to fail is expected to fail."""
    for version, known in releases.KNOWN.items():
        for item in items:
            if torch.__version__.startswith(version) and item.nodeid in known:
                item.add_marker(pytest.mark.xfail(reason=known[item.nodeid], strict=True))
