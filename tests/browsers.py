"""A browser for tests of pages: Chromium without a window, or the reason why there is none."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
_QUIET = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync", "--disable-dev-shm-usage"),
)


def missing() -> str:
    """Why no browser can be started; ``""`` where one can."""
    if find_spec("playwright") is None:
        return "playwright is not installed"
    if _executable() is None:
        return "there is no Chromium: apt-get install chromium, or playwright install chromium"
    return ""


def _executable() -> str | None:
    found = next(filter(None, map(shutil.which, _NAMES)), None)
    if found is None:
        cache = Path.home() / ".cache" / "ms-playwright"
        found = next((str(path) for path in sorted(cache.glob("chromium*/chrome-linux*/*")) if path.name in _OWN), None)
    return found


_OWN = ("chrome", "headless_shell")


@contextmanager
def chromium() -> Iterator[Any]:
    """A running browser, of which :func:`opened` opens pages."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as started:
        browser = started.chromium.launch(executable_path=_executable(), args=list(_QUIET))
        try:
            yield browser
        finally:
            browser.close()


class Seen:
    """What a page did while it was open: ``requests`` (addresses), ``complaints`` (of its console, and errors)."""

    def __init__(self, page: Any) -> None:
        self.requests: list[str] = []
        self.complaints: list[str] = []
        page.on("request", lambda request: self.requests.append(request.url))
        page.on("console", lambda message: self.complaints.append(message.text))
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("dialog", lambda dialog: (self.complaints.append(dialog.message), dialog.dismiss()))


@contextmanager
def opened(browser: Any, path: Path, *, width: int = 1280, scheme: str = "light") -> Iterator[tuple[Any, Seen]]:
    """A file in a window of its own, and what it does. Nothing but the file itself is ever fetched."""
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    context.set_default_timeout(180_000)  # on a busy machine
    try:
        page = context.new_page()
        seen = Seen(page)
        page.route(
            lambda url: not url.startswith(("file:", "data:")), lambda route: route.abort()
        )  # it is counted all the same
        page.goto(path.as_uri())
        yield page, seen
    finally:
        context.close()
