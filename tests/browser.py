"""A real browser for tests: headless Chromium by its WebDriver, spoken to over HTTP."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

KEYS = {"Left": "\ue012", "Up": "\ue013", "Right": "\ue014", "Down": "\ue015", "Escape": "\ue00c"}
_OPTIONS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"),
    *("--disable-dev-shm-usage", "--force-color-profile=srgb", "--force-device-scale-factor=1"),
)
_ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # the key of the WebDriver standard


def is_there() -> bool:
    """Tell whether Chromium and its driver are installed: ``make browser`` does it."""
    return shutil.which("chromedriver") is not None and any(
        shutil.which(name) for name in ("chromium", "chromium-browser", "google-chrome")
    )


class Browser:
    """One window."""

    def __init__(self, *, size: tuple[int, int] = (1280, 860), phone: bool = False) -> None:
        """Open it.

        Args:
            size: (width, height).
            phone: Whether to be one.
        """
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._port = free.getsockname()[1]
        self.process = subprocess.Popen(
            ["chromedriver", f"--port={self._port}"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        self._session = ""
        self._wait_for_driver()
        options: dict[str, Any] = {"args": [*_OPTIONS, f"--window-size={size[0]},{size[1]}"]}
        if phone:
            metrics = {"width": 390, "height": 844, "pixelRatio": 2}
            options["mobileEmulation"] = {"deviceMetrics": metrics}
        wanted = {
            "browserName": "chrome",
            "goog:chromeOptions": options,
            "goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"},
        }
        begun = self._call("POST", "/session", {"capabilities": {"alwaysMatch": wanted}})
        self._session = f"/session/{begun['sessionId']}"

    def open(self, page: Path) -> None:
        """Open a page from disk, and wait until it is loaded."""
        self._call("POST", "/url", {"url": page.absolute().as_uri()})

    def run(self, script: str, *arguments: Any) -> Any:
        """Run a function's body in the page, and return what it returns; promises are awaited."""
        return self._call("POST", "/execute/sync", {"script": script, "args": list(arguments)})

    def wait(self, condition: str, *arguments: Any, seconds: float = 10) -> None:
        """Wait until an expression is true."""
        end = time.monotonic() + seconds
        while not self.run(f"return Boolean({condition})", *arguments):
            assert time.monotonic() < end, f"never true: {condition}"
            time.sleep(0.02)

    def press(self, *keys: str) -> None:
        """Press keys one after the other, as a keyboard does."""
        typed = [KEYS.get(key, key) for key in keys]
        actions = [{"type": kind, "value": key} for key in typed for kind in ("keyDown", "keyUp")]
        self._act({"type": "key", "id": "keyboard", "actions": actions})

    def point(self, x: float, y: float, *, click: bool = False) -> None:
        """Move the pointer to a place in the window, and click there."""
        move = {"type": "pointerMove", "duration": 0, "x": round(x), "y": round(y)}
        button = [{"type": f"pointer{way}", "button": 0} for way in ("Down", "Up")] if click else []
        self._act({"type": "pointer", "id": "mouse", "actions": [move, *button]})

    def choose(self, name: str, value: str | float) -> None:
        """Set a control, as a user does."""
        self.run(
            "const it = find(arguments[0]); it.value = arguments[1];"
            "for (const each of ['input', 'change']) it.dispatchEvent(new Event(each))",
            *(name, value),
        )

    def pixels(self, canvas: str) -> NDArray[np.uint8]:
        """Return the pixels (height, width, 4) of a canvas, given as an expression."""
        shown = self.run(f"return {canvas}.toDataURL('image/png')")
        return _decoded(shown.partition(",")[2])

    def screenshot(self, selector: str | None = None) -> NDArray[np.uint8]:
        """Return the pixels (height, width, 4) of the window, or of one element."""
        if selector is None:
            return _decoded(self._call("GET", "/screenshot"))
        found = self._call("POST", "/element", {"using": "css selector", "value": selector})
        return _decoded(self._call("GET", f"/element/{found[_ELEMENT]}/screenshot"))

    def prefer(self, scheme: str) -> None:
        """Be a system whose users prefer ``light`` or ``dark``."""
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self._devtools("Emulation.setEmulatedMedia", features=features)

    def messages(self) -> list[str]:
        """Return what the console says, since it was last asked."""
        return [each["message"] for each in self._call("POST", "/se/log", {"type": "browser"})]

    def requests(self) -> list[str]:
        """Return the addresses that were asked for, since it was last asked."""
        logged = self._call("POST", "/se/log", {"type": "performance"})
        events = [json.loads(each["message"])["message"] for each in logged]
        sent = "Network.requestWillBeSent"
        return [each["params"]["request"]["url"] for each in events if each["method"] == sent]

    def memory(self) -> int:
        """Return the bytes that the page's process holds."""
        self._devtools("HeapProfiler.collectGarbage")
        return max(_resident(each) for each in _descendants(self.process.pid))

    def close(self) -> None:
        """Close it."""
        with contextlib.suppress(OSError, AssertionError):
            self._call("DELETE", "")
        self.process.terminate()
        self.process.wait()

    def _devtools(self, command: str, **parameters: Any) -> Any:
        body = {"cmd": command, "params": parameters}
        return self._call("POST", "/goog/cdp/execute", body)

    def _act(self, source: dict[str, Any]) -> None:
        self._call("POST", "/actions", {"actions": [source]})

    def _wait_for_driver(self) -> None:
        for _ in range(200):
            with contextlib.suppress(OSError):
                self._call("GET", "/status")
                return
            time.sleep(0.05)
        raise TimeoutError("chromedriver does not answer")

    def _call(self, verb: str, path: str, body: dict[str, Any] | None = None) -> Any:
        request = urllib.request.Request(
            f"http://127.0.0.1:{self._port}{self._session}{path}",
            method=verb,
            data=None if body is None else json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return json.load(answer)["value"]
        except urllib.error.HTTPError as error:
            raise AssertionError(error.read().decode()[:1000]) from None


def _decoded(encoded: str) -> NDArray[np.uint8]:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(encoded))).convert("RGBA"))


def _descendants(process: int) -> Iterator[int]:
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = path.read_text().rpartition(")")[2].split()
            if int(fields[1]) == process:
                yield (child := int(path.parent.name))
                yield from _descendants(child)


def _resident(process: int) -> int:
    """Return the bytes that a renderer holds by itself, 0 for another process."""
    try:
        words: Sequence[str] = Path(f"/proc/{process}/cmdline").read_text().split("\0")
        if "--type=renderer" not in words and "--type=renderer" not in words[0]:
            return 0
        rollup = Path(f"/proc/{process}/smaps_rollup").read_text()
    except OSError:
        return 0
    lines = dict(line.split(":", 1) for line in rollup.splitlines()[1:])
    return int(lines["Pss"].split()[0]) << 10
