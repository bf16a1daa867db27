"""Opens a page in a real browser and prints, as JSON, what a visitor would see of it.

python report_browser.py PAGE light|dark [SCREENSHOT_PREFIX]

The browser is the Chromium of QtWebEngine (pip install PyQt6-WebEngine), without a window.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

SCHEMES = {"dark": 0, "light": 1}
if __name__ == "__main__":
    os.environ["QT_QPA_PLATFORM"] = "offscreen"
    flags = f"--no-sandbox --disable-gpu --blink-settings=preferredColorScheme={SCHEMES[sys.argv[2]]}"
    os.environ["QTWEBENGINE_CHROMIUM_FLAGS"] = flags

from PyQt6.QtCore import QEventLoop, QTimer, QUrl  # noqa: E402
from PyQt6.QtWebEngineCore import (  # noqa: E402
    QWebEnginePage,
    QWebEngineProfile,
    QWebEngineUrlRequestInterceptor,
)
from PyQt6.QtWebEngineWidgets import QWebEngineView  # noqa: E402
from PyQt6.QtWidgets import QApplication  # noqa: E402

WIDTHS = (400, 1600)
SCREEN = 1800

PROBE = """
(() => {
  const page = document.documentElement;
  const closed = [...document.querySelectorAll("details:not([open])")];
  closed.forEach(each => each.open = true);
  const outside = each => !each.closest(".scroll") && each.getBoundingClientRect().right > innerWidth + 1;
  const found = {
    viewport: innerWidth,
    width: page.scrollWidth,
    title: document.title,
    outside: [...document.querySelectorAll("body *")].filter(outside).map(each => each.outerHTML.slice(0, 120)),
    images: [...document.images].map(each => ({
      alt: each.alt, loaded: each.complete && each.naturalWidth > 0, shown: each.clientWidth
    })),
    scrolling: [...document.querySelectorAll(".scroll")].filter(each => each.scrollWidth > each.clientWidth).length,
    background: getComputedStyle(page).backgroundColor,
    dark: matchMedia("(prefers-color-scheme: dark)").matches,
    resources: performance.getEntriesByType("resource").map(each => each.name.slice(0, 80)),
  };
  closed.forEach(each => each.open = false);
  return found;
})()
"""


class Page(QWebEnginePage):
    """Keeps what the page says on its console."""

    messages: list[str]

    def javaScriptConsoleMessage(self, level, message, line, source) -> None:
        self.messages.append(f"{level.name}: {message} (line {line})")


class Requests(QWebEngineUrlRequestInterceptor):
    """Keeps what the page asks for."""

    urls: list[str]

    def interceptRequest(self, info) -> None:
        self.urls.append(info.requestUrl().toString()[:80])


def wait(signal, seconds: float = 60.0):
    """The first value of a Qt signal."""
    loop, found = QEventLoop(), []

    def got(*values) -> None:
        found.append(values)
        loop.quit()

    signal.connect(got)
    QTimer.singleShot(int(seconds * 1000), loop.quit)
    if not found:
        loop.exec()
    signal.disconnect(got)
    if not found:
        raise TimeoutError(f"nothing within {seconds} s")
    return found[0]


def evaluate(page: QWebEnginePage, script: str):
    """The value of an expression in the page."""
    loop, found = QEventLoop(), []

    def got(value) -> None:
        found.append(value)
        loop.quit()

    page.runJavaScript(script, got)
    if not found:
        QTimer.singleShot(60_000, loop.quit)
        loop.exec()
    return found[0]


def pause(milliseconds: int) -> None:
    loop = QEventLoop()
    QTimer.singleShot(milliseconds, loop.quit)
    loop.exec()


def main(file: Path, scheme: str, screenshots: str | None) -> None:
    application = QApplication(sys.argv[:1])  # noqa: F841 - must live
    seen = {}
    for width in WIDTHS:
        profile, requests = QWebEngineProfile(), Requests()
        requests.urls = []
        profile.setUrlRequestInterceptor(requests)
        view, page = QWebEngineView(), Page(profile)
        page.messages = []
        view.setPage(page)
        view.resize(width, 1000)
        view.show()
        view.load(QUrl.fromLocalFile(str(file.resolve())))
        (loaded,) = wait(view.loadFinished)
        found = evaluate(page, PROBE)
        if screenshots is not None:
            view.resize(width, SCREEN)
            height = evaluate(page, "document.documentElement.scrollHeight")
            for number, top in enumerate(range(0, int(height), SCREEN)):
                evaluate(page, f"scrollTo(0, {top})")
                pause(1000)
                view.grab().save(f"{screenshots}-{width}-{scheme}-{number:02}.png")
        seen[width] = {**found, "loaded": loaded, "messages": page.messages, "requests": requests.urls}
        view.setPage(None)
        page.deleteLater()
        pause(50)
    print(json.dumps(seen))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3] if len(sys.argv) > 3 else None)
