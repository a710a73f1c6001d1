"""Links between the pages of the documentation lead somewhere."""

import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "experiments").rglob("*.md"))]
LINK = re.compile(r"\]\((?!https?://)([^)#\s]*)(?:#([^)\s]*))?\)")


def prose(page):
  """The page without its code."""
  return re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)


def anchors(page):
  """Of its headings, as GitHub makes them."""
  titles = re.findall(r"^#+ (.+)$", prose(page), flags=re.MULTILINE)
  titles = [re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", title) for title in titles]
  return {re.sub(r"[^\w\- ]", "", title.strip().lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links(page):
  for path, anchor in LINK.findall(prose(page)):
    target = page.parent / path if path else page
    assert target.exists(), f"{path} is not there"
    if anchor:
      assert anchor in anchors(target), f"{path}#{anchor}: {target.name} has no such heading"


def test_there_are_links():
  assert sum(len(LINK.findall(prose(page))) for page in PAGES) > 100
