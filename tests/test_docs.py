"""The documents say what the code says: pages that are made from it, names of passes, paths and links."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from support import errors_page

from attnres_fx.passes import pipeline

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FOLDERS = ("attnres_fx", "passes", "runtime", "tests", "examples", "benchmarks", "docs")


def test_the_page_of_errors_is_that_of_the_code() -> None:
    assert errors_page.PAGE.read_text(encoding="utf-8") == errors_page.page(), "run make docs"


def test_the_architecture_lists_the_passes_in_their_order() -> None:
    text = (ROOT / "docs" / "ARCHITECTURE.md").read_text(encoding="utf-8")
    section = text.partition("## The way of a graph")[2].partition("\n## ")[0]
    listed = re.findall(r"(?m)^\| `(\w+\.\w+)`", section)
    assert listed == [each.name for each in pipeline.ALL]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_paths_and_links_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    assert not [link for link in links if link and not (page.parent / link).exists()]
    paths = re.findall(r"`((?:" + "|".join(FOLDERS) + r")/[\w./-]*)`", text)
    assert not [path for path in paths if not (ROOT / path).exists()]
