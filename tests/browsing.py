"""Pages in a browser, for the tests of several pages."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

WIDTHS = {"desktop": (1280, 900), "phone": (390, 844)}
WAIT = 60_000  # milliseconds: other processes may use the cores


@contextmanager
def opened(browser: Any, url: str, width: str, **options: Any) -> Iterator[Any]:
    """A page, which must not raise an error, ask another server for anything or be wider than the window."""
    size = dict(zip(("width", "height"), WIDTHS[width], strict=True))
    context = browser.new_context(viewport=size, **options)
    page = context.new_page()
    page.set_default_timeout(WAIT)
    asked: list[str] = []
    errors: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(url)
    yield page
    assert not errors
    assert {urlsplit(one).netloc for one in asked if not one.startswith(("data:", "blob:"))} == {urlsplit(url).netloc}
    assert page.evaluate("document.documentElement.scrollWidth") <= size["width"]
    context.close()


def is_shown(page: Any, selector: str) -> bool:
    """Whether an element is visible and has a size."""
    box = page.locator(selector).bounding_box()
    return bool(box and box["width"] > 20 and box["height"] > 20)
