"""A real, headless Chromium, driven over --remote-debugging-pipe with the standard library alone.

    python tests/browser.py PAGE.html SHOT.png [WIDTH [dark]]     # a picture of the whole page

Owns: start, questions, answers, events, end. Refuses to know: what a page is for.
"""

import base64
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome")


def find() -> str | None:
    return next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    def __init__(self, timeout: float = 60):
        self.timeout, self.folder, self.count, self.rest = (
            timeout,
            tempfile.mkdtemp(prefix="browser-"),
            0,
            b"",
        )
        self.events: list[dict] = []
        theirs_in, self.out = os.pipe()
        self.inp, theirs_out = os.pipe()
        flags = "--headless=new --no-sandbox --disable-gpu --disable-dev-shm-usage --remote-debugging-pipe"
        # the browser reads descriptor 3 and writes 4; through high numbers, so that neither
        # overwrites the other
        plumb = f'exec 8<&{theirs_in} 9>&{theirs_out} 3<&8 4>&9 8<&- 9>&-; exec "$@"'
        command = [
            "bash",
            "-c",
            plumb,
            "bash",
            find(),
            *flags.split(),
            f"--user-data-dir={self.folder}",
            "about:blank",
        ]
        fds, quiet = (
            (theirs_in, theirs_out),
            {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL},
        )
        self.process = subprocess.Popen(command, pass_fds=fds, start_new_session=True, **quiet)
        os.close(theirs_in), os.close(theirs_out)
        self.session = None
        pages = [t for t in self.call("Target.getTargets")["targetInfos"] if t["type"] == "page"]
        self.session = self.call(
            "Target.attachToTarget", targetId=pages[0]["targetId"], flatten=True
        )["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def message(self, until: float) -> dict:
        while b"\0" not in self.rest:
            if not select.select([self.inp], [], [], max(0, until - time.monotonic()))[0]:
                raise TimeoutError("the browser does not answer")
            if not (more := os.read(self.inp, 1 << 20)):
                raise RuntimeError(f"the browser has ended: {self.process.wait(10)}")
            self.rest += more
        first, self.rest = self.rest.split(b"\0", 1)
        return json.loads(first)

    def call(self, method: str, **params) -> dict:
        self.count += 1
        question = {"id": self.count, "method": method, "params": params}
        question |= {"sessionId": self.session} if self.session else {}
        os.write(self.out, json.dumps(question).encode() + b"\0")
        until = time.monotonic() + self.timeout
        while (answer := self.message(until)).get("id") != self.count:
            self.events.append(answer)
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']}")
        return answer["result"]

    def js(self, text: str):
        result = self.call(
            "Runtime.evaluate", expression=text, returnByValue=True, awaitPromise=True
        )
        if "exceptionDetails" in result:
            raise RuntimeError(f"{text[:200]}: {result['exceptionDetails']}")
        return result["result"].get("value")

    def wait(self, text: str) -> None:
        """Until the expression is true."""
        until = time.monotonic() + self.timeout
        while not self.js(text):
            assert time.monotonic() < until, text
            time.sleep(0.05)

    def open(self, page: Path, width: int = 1280, height: int = 900, dark: bool = False) -> None:
        mode = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.call("Emulation.setEmulatedMedia", features=mode)
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )
        self.call("Page.navigate", url="about:blank")
        self.wait("location.href === 'about:blank'")
        self.events.clear()
        self.call("Page.navigate", url=page.resolve().as_uri())
        self.wait("location.href !== 'about:blank' && document.readyState === 'complete'")

    def complaints(self) -> list:
        """Exceptions, console messages, log entries and requests for anything but the page
        itself."""
        self.js("new Promise(done => requestAnimationFrame(() => setTimeout(done, 50)))")
        kinds = ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded")
        asked = [
            e["params"]["request"]["url"]
            for e in self.events
            if e.get("method") == "Network.requestWillBeSent"
        ]
        return [e["params"] for e in self.events if e.get("method") in kinds] + asked[1:]

    def shot(self, path: Path, full: bool = False) -> bytes:
        image = base64.b64decode(
            self.call("Page.captureScreenshot", captureBeyondViewport=full)["data"]
        )
        path.write_bytes(image)
        return image

    def close(self) -> None:
        os.close(self.out)  # the browser ends with its pipe
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, 9)
            self.process.wait(20)
        os.close(self.inp)
        shutil.rmtree(self.folder, ignore_errors=True)


if __name__ == "__main__":
    page, shot, width, *dark = *sys.argv[1:], *["1280"][len(sys.argv) - 3 :]
    browser = Browser()
    browser.open(Path(page), int(width), dark=bool(dark))
    browser.call(
        "Emulation.setDeviceMetricsOverride",
        width=int(width),
        mobile=False,
        deviceScaleFactor=1,
        height=browser.js("document.documentElement.scrollHeight"),
    )
    print(browser.complaints())
    browser.shot(Path(shot))
    browser.close()
