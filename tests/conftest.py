"""What holds for all tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session", autouse=True)
def _few_calls_of_the_cpp_compiler() -> Iterator[None]:
    """Inductor's kernels in few translation units; what tests run in a process of its own is built as users have it."""
    from one_unit import one_unit

    with one_unit():
        yield
