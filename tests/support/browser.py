"""Pages in headless Chromium: what their scripts have made of them."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

import pytest

from support.pictures import overlapping

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
_FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--hide-scrollbars", "--virtual-time-budget=20000", "--window-size=1600,1000"),
)
_SECONDS = 120


def chromium() -> str:
    """The browser; a test that needs it is skipped where there is none."""
    found = next(filter(None, map(shutil.which, _NAMES)), None)
    if found is None:
        pytest.skip("Chromium is not installed")
    return found


@dataclass(frozen=True)
class Element:
    """An element of a page: its tag, its attributes, the text in it."""

    tag: str
    attributes: dict[str, str]
    texts: list[str]

    @property
    def classes(self) -> list[str]:
        return self.attributes.get("class", "").split()

    @property
    def text(self) -> str:
        return "".join(self.texts)

    @property
    def box(self) -> tuple[float, float, float, float]:
        """Where it is: x, y, width, height."""
        x, y, w, h = map(float, self.attributes["data-box"].split())
        return x, y, w, h


class _Reader(HTMLParser):
    def __init__(self):
        super().__init__()
        self.found: list[Element] = []
        self._open: list[Element] = []

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.found.append(Element(tag, {k: v or "" for k, v in attrs}, []))
        if tag not in ("meta", "input", "br"):
            self._open.append(self.found[-1])

    def handle_endtag(self, tag: str) -> None:
        while self._open and self._open.pop().tag != tag:
            pass

    def handle_data(self, data: str) -> None:
        for element in self._open[-4:]:
            element.texts.append(data)


def opened(page: Path, script: str = "", fragment: str = "") -> list[Element]:
    """The elements of a page after its scripts and one more have run, all without an error."""
    if script:
        text = page.read_text("utf-8").replace("</body>", f"<script>{script}</script></body>")
        page = page.with_suffix(".scripted.html")
        page.write_text(text, "utf-8")
    with tempfile.TemporaryDirectory() as profile:
        address = f"{page.resolve().as_uri()}{fragment}"
        command = [chromium(), *_FLAGS, f"--user-data-dir={profile}", "--dump-dom", address]
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS)
    assert done.returncode == 0 and done.stdout, done.stderr[-2000:]
    reader = _Reader()
    reader.feed(done.stdout)
    (body,) = (e for e in reader.found if e.tag == "body")
    assert "data-error" not in body.attributes, body.attributes["data-error"]
    assert body.attributes.get("data-ready") == "1"
    return reader.found


def screenshot(page: Path, path: Path) -> None:
    """A picture of a page as a PNG file."""
    with tempfile.TemporaryDirectory() as profile:
        shot = f"--screenshot={path.resolve()}"
        command = [chromium(), *_FLAGS, f"--user-data-dir={profile}", shot, page.resolve().as_uri()]
        subprocess.run(command, capture_output=True, timeout=_SECONDS, check=True)


def of_class(elements: list[Element], *names: str) -> list[Element]:
    return [e for e in elements if "data-box" in e.attributes and {*names} & {*e.classes}]


def check_drawing(elements: list[Element]) -> list[Element]:
    """Boxes and labels lie apart, boxes in one another's frames or apart from them."""
    boxes, frames = of_class(elements, "node", "folded"), of_class(elements, "frame")
    assert boxes and not overlapping([e.box for e in boxes])
    for frame in frames:
        x, y, w, h = frame.box
        for other in (*boxes, *frames):
            a, b, c, d = other.box
            inside = x <= a and y <= b and a + c <= x + w + 0.2 and b + d <= y + h + 0.2
            around = a <= x and b <= y and x + w <= a + c + 0.2 and y + h <= b + d + 0.2
            assert inside or around or not overlapping([frame.box, other.box])
    labels = [e for e in of_class(elements, "edge") if "more" not in e.classes]
    found = overlapping([*(e.box for e in boxes), *(e.box for e in labels)])
    assert not found, found[:3]
    return boxes
