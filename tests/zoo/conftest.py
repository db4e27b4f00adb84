"""The option that writes the support table of docs/architectures.md."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--support-table", metavar="FILE", help="write what was found into a Markdown file")
