"""The screenshot of the README: a report of the sample scenes; run by ``make screenshot``."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from tests.browser import Browser
from vitviz.cli.app import main

ROOT = Path(__file__).resolve().parents[1]
FIGURE = ROOT / ".github" / "readme" / "report.jpg"

_SCENE = "scenes/star-ring-moon.png"
_COMMANDS = (
    ("rollout",),
    ("grad-rollout", "--class", "star"),
    ("relevance", "--class", "star"),
    ("evidence", "--class", "star", "--class", "ring"),
)


def draw(page: Path) -> Image.Image:
    """Return the report with one scene enlarged."""
    browser = Browser(size=(1280, 880))
    try:
        browser.prefer("light")
        browser.open(page)
        browser.choose("map", "evidence · c0")
        browser.choose("opacity", 75)
        browser.run("openViewer(entries.find((each) => each.name === arguments[0]))", _SCENE)
        browser.wait("viewed.stored && [...document.querySelectorAll('.map canvas')].pop().width")
        browser.wait("find('original').complete")
        return Image.fromarray(browser.screenshot()).convert("RGB")
    finally:
        browser.close()


@contextlib.contextmanager
def _report() -> Iterator[Path]:
    """Write a report of the sample scenes."""
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(ROOT / "sample_images")
        try:
            for method, *classes in _COMMANDS:
                words = [method, "scenes", "-m", "demo", *classes, "-o", folder, "--report", "-q"]
                with contextlib.suppress(SystemExit):
                    main(words)
            yield Path(folder) / "report.html"
        finally:
            os.chdir(before)


if __name__ == "__main__":
    with _report() as found:
        draw(found).save(FIGURE, quality=86, optimize=True)
    sys.stdout.write(f"{FIGURE}\n")
