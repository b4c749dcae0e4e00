"""A headless Chromium, driven over two pipes by its own DevTools protocol: nothing is downloaded, no port is opened.

    with Chromium(profile) as browser:
        page = browser.open(path)                 # a file of this machine
        page.value("document.title")
        page.requests, page.messages              # every request begun, every line in the console

The profile is a new empty folder. Every call has a time limit.
"""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--remote-debugging-pipe",
)
_LIMIT_S = 60.0
_KEYS = {"Tab": 9, "Enter": 13, " ": 32, "ArrowRight": 39, "ArrowLeft": 37, "Home": 36, "End": 35}


def find() -> str | None:
    """The program, or None."""
    return shutil.which("chromium")


class Chromium:
    """The browser, as a process; ended on the way out with everything that it started."""

    def __init__(self, profile: Path) -> None:
        self._profile = profile
        self._id = 0
        self._rest = b""
        self.events: list[dict[str, Any]] = []

    def __enter__(self) -> Chromium:
        from_us, self._to = os.pipe()
        self._from, to_us = os.pipe()
        program = find()
        assert program is not None

        # The protocol wants these two at descriptors 3 and 4 of the browser.
        command = f'exec "$@" 3<&{from_us} 4>&{to_us}'
        self._process = subprocess.Popen(
            ["bash", "-c", command, "bash", program, *FLAGS, f"--user-data-dir={self._profile}", "about:blank"],
            pass_fds=(from_us, to_us),
            env={"PATH": os.defpath, "HOME": str(self._profile), "LANG": "C.UTF-8"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        os.close(from_us)
        os.close(to_us)
        return self

    def __exit__(self, *_: object) -> None:
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self._process.wait()
        os.close(self._to)
        os.close(self._from)

    def call(self, method: str, session: str | None = None, **params: Any) -> dict[str, Any]:
        """Call a method of the protocol; its result. Events that come meanwhile are kept in `events`."""
        self._id += 1
        message: dict[str, Any] = {"id": self._id, "method": method, "params": params}
        if session is not None:
            message["sessionId"] = session
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self._to, data) :]
        deadline = time.monotonic() + _LIMIT_S
        while True:
            answer = self._read(deadline, method)
            if answer.get("id") == self._id:
                assert "error" not in answer, (method, answer)
                result: dict[str, Any] = answer["result"]
                return result

    def wait_for(self, event: str, session: str) -> dict[str, Any]:
        """The parameters of the first event of this name that came or comes."""
        deadline, seen = time.monotonic() + _LIMIT_S, 0
        while True:
            for message in self.events[seen:]:
                if message["method"] == event and message.get("sessionId") == session:
                    params: dict[str, Any] = message["params"]
                    return params
            seen = len(self.events)
            self._read(deadline, event)

    def _read(self, deadline: float, what: str) -> dict[str, Any]:
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._from], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, f"no answer of Chromium to {what}"
            data = os.read(self._from, 2**20)
            assert data, "Chromium has ended"
            self._rest += data
        line, _, self._rest = self._rest.partition(b"\0")
        message: dict[str, Any] = json.loads(line)
        if "method" in message:
            self.events.append(message)
        return message

    def open(self, path: Path, *, width: int = 1280, height: int = 900, dark: bool = False) -> Page:
        """A page of its own, loaded and drawn, without a network."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        page = Page(self, session)
        for domain in ("Page", "Network", "Runtime", "Log", "DOM", "Accessibility"):
            page.call(f"{domain}.enable")
        none = {"latency": 0, "downloadThroughput": 0, "uploadThroughput": 0}
        page.call("Network.emulateNetworkConditions", offline=True, **none)
        page.size(width, height)
        page.dark(dark)
        page.call("Page.navigate", url=path.resolve().as_uri())
        self.wait_for("Page.loadEventFired", session)
        return page


class Page:
    """One tab."""

    def __init__(self, browser: Chromium, session: str) -> None:
        self._browser, self._session = browser, session

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Call a method of the protocol in this tab."""
        return self._browser.call(method, self._session, **params)

    def value(self, expression: str) -> Any:
        """The value of a JavaScript expression; a promise is awaited."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def size(self, width: int, height: int) -> None:
        """Give the tab a size in CSS pixels."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def dark(self, on: bool) -> None:
        """Say what the user prefers."""
        feature = {"name": "prefers-color-scheme", "value": "dark" if on else "light"}
        self.call("Emulation.setEmulatedMedia", features=[feature])

    def key(self, name: str, *, shift: bool = False) -> None:
        """Press and release a key."""
        text = {"Enter": "\r", " ": " "}.get(name)
        for kind in ("keyDown", "keyUp"):
            params: dict[str, Any] = {"type": kind, "key": name, "windowsVirtualKeyCode": _KEYS[name]}
            params |= {"modifiers": 8} if shift else {}
            params |= {"text": text} if text and kind == "keyDown" else {}
            self.call("Input.dispatchKeyEvent", **params)

    def mouse(self, kind: str, x: float, y: float, *, pressed: bool = False, clicks: int = 1) -> None:
        """`kind`: mouseMoved, mousePressed or mouseReleased, in CSS pixels of the window."""
        button = "left" if pressed or kind != "mouseMoved" else "none"
        clicks = 0 if kind == "mouseMoved" else clicks
        buttons = 1 if button == "left" else 0
        self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button=button, buttons=buttons, clickCount=clicks)

    def screenshot(self, path: Path, *, whole: bool = True) -> None:
        """A PNG of the page."""
        data = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)["data"]
        path.write_bytes(base64.b64decode(data))

    def pdf(self) -> bytes:
        """The page as it is printed."""
        printed = self.call("Page.printToPDF", paperWidth=8.27, paperHeight=11.69, preferCSSPageSize=True)
        return base64.b64decode(printed["data"])

    def _events(self, *methods: str) -> list[dict[str, Any]]:
        self.value("new Promise(done => setTimeout(done, 50))")  # what is on its way
        mine = [event for event in self._browser.events if event.get("sessionId") == self._session]
        return [event for event in mine if event["method"] in methods]

    @property
    def requests(self) -> list[str]:
        """The URL of every request that was begun."""
        return [event["params"]["request"]["url"] for event in self._events("Network.requestWillBeSent")]

    @property
    def messages(self) -> list[dict[str, Any]]:
        """What the console holds: errors, warnings, refusals."""
        return self._events("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded")
