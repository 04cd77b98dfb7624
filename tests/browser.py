"""A headless Chromium, driven through a pipe in its own protocol (Chrome DevTools Protocol)."""

import json
import os
import select
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"]
FLAGS += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
# Pages behind others are as quick as the one in front.
FLAGS += ["--disable-background-timer-throttling", "--disable-renderer-backgrounding"]
# Becomes the browser, which reads its protocol from the file 3 and writes to the file 4.
START = """
import os, sys
for file, its in zip(map(int, sys.argv[1:3]), (3, 4)):
    os.dup2(file, its)
os.execv(sys.argv[3], sys.argv[3:])
"""
PATIENCE = 60.0  # seconds for one answer


class Browser:
    """A running browser; ``to`` and ``back`` are the ends of the pipes to it."""

    def __init__(self, to: int, back: int) -> None:
        self.to, self.back = to, back
        self.calls = 0
        self.received = b""
        self.events: list[dict[str, Any]] = []

    def call(self, method: str, session: str = "", **parameters: Any) -> dict[str, Any]:
        """Do something and return what the browser answers."""
        self.calls += 1
        call: dict[str, Any] = {"id": self.calls, "method": method, "params": parameters}
        if session:
            call["sessionId"] = session
        os.write(self.to, json.dumps(call).encode() + b"\0")
        while (answer := self.receive()).get("id") != self.calls:
            self.events.append(answer)
        assert "error" not in answer, answer["error"]
        return answer["result"]

    def receive(self) -> dict[str, Any]:
        """Return the next message: an answer or an event."""
        while b"\0" not in self.received:
            ready, _, _ = select.select([self.back], [], [], PATIENCE)
            assert ready, "the browser does not answer"
            piece = os.read(self.back, 1 << 20)
            assert piece, "the browser has ended"
            self.received += piece
        message, _, self.received = self.received.partition(b"\0")
        return json.loads(message)

    def open(self, address: str, size: tuple[int, int] = (1300, 900), first: str = "") -> "Tab":
        """Open a page whose window has this width and height; ``first`` runs before its script."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        tab = Tab(self, session)
        for part in ("Page", "Runtime", "Network"):
            tab.call(f"{part}.enable")
        width, height = size
        screen = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        tab.call("Emulation.setDeviceMetricsOverride", **screen)
        tab.call("Page.addScriptToEvaluateOnNewDocument", source=first)
        tab.call("Page.navigate", url=address)
        while not tab.events("Page.loadEventFired"):
            self.events.append(self.receive())
        return tab


class Tab:
    """An open page."""

    def __init__(self, browser: Browser, session: str) -> None:
        self.browser, self.session = browser, session

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        return self.browser.call(method, self.session, **parameters)

    def events(self, method: str) -> list[dict[str, Any]]:
        """Return what the browser has told of this page by itself."""
        events = [each for each in self.browser.events if each.get("sessionId") == self.session]
        return [each["params"] for each in events if each["method"] == method]

    def evaluate(self, expression: str) -> Any:
        """Return a JavaScript expression's value, or what its promise comes to."""
        how = {"awaitPromise": True, "returnByValue": True}
        answer = self.call("Runtime.evaluate", expression=expression, **how)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def errors(self) -> list[str]:
        """Return what went wrong in the page's own script."""
        thrown = self.events("Runtime.exceptionThrown")
        return [each["exceptionDetails"]["exception"]["description"] for each in thrown]

    def choose(self, selector: str, path: Path) -> None:
        """Choose a file where the page asks for one."""
        document = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=document, selector=selector)["nodeId"]
        self.call("DOM.setFileInputFiles", nodeId=node, files=[str(path)])

    def drop(self, path: Path, x: int, y: int) -> None:
        """Drop a file onto a place of the page."""
        data = {"items": [], "files": [str(path)], "dragOperationsMask": 1}
        for kind in ("dragEnter", "dragOver", "drop"):
            self.call("Input.dispatchDragEvent", type=kind, x=x, y=y, data=data)

    def press(self, key: str) -> None:
        """Press a key of the keyboard: Tab, ArrowRight ..."""
        code = {"Tab": 9, "End": 35, "Home": 36, "ArrowLeft": 37, "ArrowRight": 39}[key]
        for kind in ("rawKeyDown", "keyUp"):
            parameters = {"key": key, "code": key, "windowsVirtualKeyCode": code}
            self.call("Input.dispatchKeyEvent", type=kind, **parameters)


@contextmanager
def chromium(profile: Path) -> Iterator[Browser]:
    """Start a browser with its profile in a folder; the test is skipped where there is none."""
    if CHROMIUM is None:
        pytest.skip("no Chromium: install the package chromium to test the page in a browser")
    if os.name == "nt":
        pytest.skip("on Windows a browser's pipes are others")
    its_in, to = os.pipe()
    back, its_out = os.pipe()
    start = [sys.executable, "-c", START, str(its_in), str(its_out)]
    flags = [*FLAGS, f"--user-data-dir={profile}", "--remote-debugging-pipe"]
    command = [*start, CHROMIUM, *flags]
    process = subprocess.Popen(command, pass_fds=(its_in, its_out), stderr=subprocess.DEVNULL)
    os.close(its_in)
    os.close(its_out)
    browser = Browser(to, back)
    try:
        yield browser
        browser.call("Browser.close")
        process.wait(PATIENCE)
    finally:
        process.kill()
        process.wait()
        os.close(to)
        os.close(back)
