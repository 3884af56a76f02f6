"""A real browser for pages: Chromium without a window, told what to do over a pipe (Chrome DevTools Protocol)."""

import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any


NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
PATIENCE = 60.0  # seconds for any answer, on a machine that has other work
# key → its code; digits and letters have that of their character
KEYS = {"ArrowLeft": 37, "ArrowRight": 39, "Backspace": 8, "Enter": 13, "Escape": 27}
CTRL = 2  # the protocol's number for the key that is held


def find_browser() -> str | None:
    """Path of a Chromium; None where there is none."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Browser:
    """
    A browser with one tab.

    Args:
        path: of the program.
        profile: folder in which it keeps what pages store.
        downloads: folder for what pages save.
    """

    def __init__(self, path: str, profile: Path, downloads: Path) -> None:
        self._downloads = downloads
        to_read, self._to = os.pipe()
        self._from, to_write = os.pipe()
        options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
        # The protocol has fixed numbers: 3 to read from and 4 to write to. `sh` puts the pipes there.
        script = f'exec "$@" 3<&{to_read} 4>&{to_write}'
        self._process = subprocess.Popen(
            ["bash", "-c", script, "bash", path, *options, f"--user-data-dir={profile}", "--remote-debugging-pipe"],
            pass_fds=(to_read, to_write),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_read)
        os.close(to_write)
        self._number, self._rest, self._session = 0, b"", ""
        target = self._call("Target.createTarget", {"url": "about:blank"})["targetId"]
        self._session = self._call("Target.attachToTarget", {"targetId": target, "flatten": True})["sessionId"]
        self._call("Page.enable", {})
        self._call("Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(downloads)}, session="")

    def open(self, page: Path | str) -> None:
        """Show a page of the disk or of an address, and wait until it has run."""
        address = page if isinstance(page, str) else page.as_uri()
        self._call("Page.navigate", {"url": address})
        self.wait_for(f"document.readyState === 'complete' && location.href === {json.dumps(address)}")

    def evaluate(self, script: str) -> Any:
        """The value of an expression on the page."""
        told = self._call("Runtime.evaluate", {"expression": script, "returnByValue": True})
        assert "exceptionDetails" not in told, told
        return told["result"].get("value")

    def wait_for(self, script: str) -> None:
        """Wait until an expression on the page is true."""
        end = time.monotonic() + PATIENCE
        while not self.evaluate(script):
            assert time.monotonic() < end, script
            time.sleep(0.02)

    def press(self, key: str, ctrl: bool = False) -> None:
        """Press a key, as a person does, while Ctrl is held or not."""
        code = {"key": key, "windowsVirtualKeyCode": KEYS.get(key, ord(key[0].upper())), "modifiers": CTRL * ctrl}
        text = {} if key in KEYS or ctrl else {"text": key}
        self._call("Input.dispatchKeyEvent", {"type": "keyDown", **code, **text})
        self._call("Input.dispatchKeyEvent", {"type": "keyUp", **code})

    def write(self, text: str) -> None:
        """Write a text where the cursor is, in the place of what is selected."""
        self._call("Input.insertText", {"text": text})

    def click(self, selector: str) -> None:
        """Click what a selector finds."""
        self.evaluate(f"document.querySelector({json.dumps(selector)}).click()")

    def choose_file(self, selector: str, path: Path) -> None:
        """Choose a file in what a selector finds, as a person does in the system's own window."""
        root = self._call("DOM.getDocument", {})["root"]["nodeId"]
        node = self._call("DOM.querySelector", {"nodeId": root, "selector": selector})["nodeId"]
        self._call("DOM.setFileInputFiles", {"nodeId": node, "files": [str(path)]})

    def downloaded(self, name: str) -> Path:
        """A file that the page has saved, once it is whole."""
        path = self._downloads / name
        end = time.monotonic() + PATIENCE
        while not path.is_file() or not path.stat().st_size or list(self._downloads.glob("*.crdownload")):
            assert time.monotonic() < end, f"{name} was not saved"
            time.sleep(0.02)
        return path

    def resize(self, width: int, height: int, dark: bool = False) -> None:
        """Give the page a size in pixels, and a bright or dark surrounding."""
        self._call(
            "Emulation.setDeviceMetricsOverride",
            {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False},
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._call("Emulation.setEmulatedMedia", {"features": [scheme]})

    def screenshot(self) -> str:
        """What is to be seen, as a PNG in base64."""
        data: str = self._call("Page.captureScreenshot", {"format": "png"})["data"]
        return data

    def close(self) -> None:
        """End the browser, which writes down what pages store."""
        try:
            self._call("Browser.close", {}, session="")
            self._process.wait(PATIENCE)
        finally:
            if self._process.poll() is None:
                self._process.kill()
                self._process.wait()
            os.close(self._to)
            os.close(self._from)

    def _call(self, method: str, params: Mapping[str, Any], session: str | None = None) -> dict[str, Any]:
        self._number += 1
        session = self._session if session is None else session
        order = {"id": self._number, "method": method, "params": params, **({"sessionId": session} if session else {})}
        os.write(self._to, json.dumps(order).encode() + b"\0")
        end = time.monotonic() + PATIENCE
        while True:
            message = self._message(end)
            if message.get("id") == self._number:
                assert "error" not in message, (method, message)
                return message["result"]

    def _message(self, end: float) -> dict[str, Any]:
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._from], [], [], max(0.0, end - time.monotonic()))
            content = os.read(self._from, 1 << 20) if ready else b""
            assert content, "the browser says nothing"
            self._rest += content
        message, _, self._rest = self._rest.partition(b"\0")
        return json.loads(message)
