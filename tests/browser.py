"""A local HTML file in headless Chromium, for the tests of tools that write pages.

    with Browser() as browser:
        browser.open(path, theme="dark", width=1280)
        assert browser.console_errors() == []
        assert not browser.overflows()
        assert browser.evaluate("document.title") == "..."
        browser.screenshot("dark.png")

It takes Debian's `chromium` and `chromium-driver`, and fetches nothing. If they or selenium are absent, tests are
skipped; in CI (`CI=true`) they fail.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from importlib.util import find_spec
from pathlib import Path

import pytest

# root has no sandbox; the others keep it from the network and from asking questions
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
FLAGS += ["--disable-background-networking", "--disable-component-update", "--hide-scrollbars"]


def require_chromium() -> None:
    """Skips the test if there is no Chromium to run; in CI fails it."""
    absent = [program for program in ("chromium", "chromedriver") if shutil.which(program) is None]
    if find_spec("selenium") is None:
        absent.append("selenium")
    if absent:
        stop = pytest.fail if os.environ.get("CI") == "true" else pytest.skip
        stop(f"not installed: {', '.join(absent)}")


class Browser:
    """One Chromium with one page. A context manager: leaving it ends the process."""

    def __enter__(self) -> Browser:
        require_chromium()
        from selenium.webdriver import Chrome, ChromeOptions
        from selenium.webdriver.chrome.service import Service

        self.profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)  # Chromium may still be writing
        options = ChromeOptions()
        options.binary_location = shutil.which("chromium")
        for flag in [*FLAGS, f"--user-data-dir={self.profile.name}"]:
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        self.driver = Chrome(options, Service(shutil.which("chromedriver")))
        return self

    def __exit__(self, *exception: object) -> None:
        self.driver.quit()
        self.profile.cleanup()

    def open(self, path: str | Path, theme: str = "light", width: int = 1280, height: int = 800) -> None:
        """Loads a file under `prefers-color-scheme: THEME`, in a viewport of CSS pixels."""
        media = {"features": [{"name": "prefers-color-scheme", "value": theme}]}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        self.driver.get_log("browser")  # of the page before
        self.driver.get(Path(path).resolve(strict=True).as_uri())
        # for a page that it has seen before, chromedriver may return too early
        self.evaluate("new Promise((done) => (document.readyState == 'complete' ? done(1) : (onload = () => done(1))))")

    def console_errors(self) -> list[str]:
        """Errors since the page was opened, or since the last call: exceptions, and files that do not load."""
        return [entry["message"] for entry in self.driver.get_log("browser") if entry["level"] == "SEVERE"]

    def overflows(self) -> bool:
        """Whether the page scrolls sideways."""
        return self.evaluate("document.scrollingElement.scrollWidth > document.scrollingElement.clientWidth")

    def evaluate(self, expression: str) -> object:
        """The value of a JavaScript expression, as Python's types; a promise is awaited."""
        return self.driver.execute_script(f"return {expression}")

    def screenshot(self, path: str | Path) -> None:
        """Writes what the viewport shows as a PNG."""
        assert self.driver.save_screenshot(str(path)), path
