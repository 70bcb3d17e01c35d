"""The built documentation: every link has a target, and pages fit phone and desktop, in light and dark."""

from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from browsing import WIDTHS, opened

SITE = Path(__file__).parents[1] / "docs" / "_build" / "html"


@pytest.fixture(scope="module")
def site() -> Path:
    if not (SITE / "index.html").is_file():
        pytest.skip("no built documentation: make docs builds it")
    return SITE


class Page(HTMLParser):
    """The targets of a page's links, and the names that others can link to."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.names: set[str] = set()
        self.feed(file.read_text())

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        for name, value in attributes:
            if name in ("href", "src") and value:
                self.links.append(value)
            if name in ("id", "name") and value:
                self.names.add(value)


def test_links_hold(site: Path) -> None:
    pages = {file: Page(file) for file in site.rglob("*.html") if "explorer" not in file.parts}
    assert len(pages) > 25
    broken = []
    checked = 0
    for file, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (file.parent / unquote(parts.path)).resolve() if parts.path else file
            checked += 1
            if not target.is_file():
                broken.append(f"{file.name}: {link}")
            elif parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].names:
                broken.append(f"{file.name}: {link}, no such place")
    assert not broken
    assert checked > 1000


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", ["index", "show", "api"])
def test_pages_in_the_browser(name: str, width: str, site: Path, chromium: Any) -> None:
    """Nothing is wider than the window; pictures are there; text and background differ in both schemes."""
    url = (site / f"{name}.html").as_uri()
    backgrounds = []
    for scheme in ("light", "dark"):
        with opened(chromium, url, width, color_scheme=scheme) as page:
            pictures = "[...document.querySelectorAll('article img')].filter((one) => !one.naturalWidth).length"
            page.evaluate("document.querySelectorAll('img[loading=lazy]').forEach((one) => one.loading = 'eager')")
            page.wait_for_function(f"{pictures} == 0")
            colours = page.evaluate(
                "['background-color', 'color'].map((one) => getComputedStyle(document.body).getPropertyValue(one))"
            )
            assert abs(brightness(colours[0]) - brightness(colours[1])) > 100
            backgrounds.append(brightness(colours[0]))
            assert page.locator("article h1").first.is_visible()
    assert backgrounds[0] > 200 > 60 > backgrounds[1]


def brightness(colour: str) -> float:
    """The mean of red, green and blue of rgb(R, G, B)."""
    values = [float(one) for one in colour.partition("(")[2].strip(")").split(",")[:3]]
    return sum(values) / 3
