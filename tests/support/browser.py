"""A headless Chromium, spoken to over a pipe in the DevTools protocol: JSON messages that end in a zero byte."""

import base64
import json
import os
import select
import subprocess
import time
from pathlib import Path
from typing import Any

# As root in a container, and without the requests that a browser makes of its own.
FLAGS = """--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking
--disable-component-update --disable-sync --disable-dev-shm-usage --hide-scrollbars --remote-debugging-pipe""".split()
PATIENCE = 120.0  # seconds; a loaded machine is slow
# the middle of an element that has not moved for a while and is covered by no other
PLACE = """(async () => {
    const place = () => {
        const e = document.querySelector(%s);
        e?.scrollIntoView({block: 'center'});
        const r = e?.getBoundingClientRect(), spot = r && [r.x + r.width / 2, r.y + r.height / 2];
        return spot && e.contains(document.elementFromPoint(...spot)) && spot;
    };
    const before = place();
    await new Promise(done => setTimeout(done, 200));
    return before && String(before) === String(place()) && before;
})()"""


class Browser:
    """One tab. `events` are all that came, such as `Network.requestWillBeSent`."""

    def __init__(self, program: str, profile: Path) -> None:
        here, there = os.pipe(), os.pipe()  # to it, from it: its descriptors 3 and 4
        os.set_inheritable(here[0], True)
        os.set_inheritable(there[1], True)
        ends = {"IN": str(here[0]), "OUT": str(there[1])}
        self.log = (profile.parent / "chromium.log").open("wb")
        self.process = subprocess.Popen(
            ["bash", "-c", 'exec 3<&$IN 4>&$OUT; exec "$@"', "bash", program, *FLAGS, f"--user-data-dir={profile}"],
            pass_fds=(here[0], there[1]),
            env=os.environ | ends,
            stdout=self.log,
            stderr=self.log,
        )
        os.close(here[0])
        os.close(there[1])
        self._to, self._from, self._rest, self._last = here[1], there[0], b"", 0
        self.events: list[dict[str, Any]] = []
        self.session = ""
        self.open()

    def open(self) -> None:
        """Another tab, which is spoken to from now on."""
        tab = self.call("Target.createTarget", browser=True, url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", browser=True, targetId=tab, flatten=True)
        self.tab, self.session = tab, attached["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def close_tab(self) -> None:
        self.call("Target.closeTarget", browser=True, targetId=self.tab)

    def call(self, method: str, browser: bool = False, **params: Any) -> dict[str, Any]:
        self._last += 1
        message = {"id": self._last, "method": method, "params": params}
        if not browser:
            message["sessionId"] = self.session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._last:
                assert "error" not in answer, (method, answer["error"])
                return answer["result"]

    def _next(self) -> dict[str, Any]:
        end = time.monotonic() + PATIENCE
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._from], [], [], max(0.0, end - time.monotonic()))
            assert ready, "the browser is silent"
            read = os.read(self._from, 1 << 20)
            assert read, "the browser has ended"
            self._rest += read
        line, _, self._rest = self._rest.partition(b"\0")
        message: dict[str, Any] = json.loads(line)
        if "method" in message:
            self.events.append(message)
        return message

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression, promises waited for."""
        done = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in done, done
        return done["result"].get("value")

    def wait(self, script: str) -> Any:
        """The value of an expression as soon as it is true."""
        end = time.monotonic() + PATIENCE
        while not (value := self.run(script)):
            assert time.monotonic() < end, f"never true: {script}"
            time.sleep(0.1)
        return value

    def go(self, url: str) -> None:
        self.call("Page.navigate", url=url)

    def click(self, selector: str) -> None:
        """With the mouse, where the element is as soon as it stays there."""
        spot = self.wait(PLACE % json.dumps(selector))
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=spot[0], y=spot[1], button="left", clickCount=1)

    def type(self, selector: str, text: str) -> None:
        """Replace what is in a field, as if pasted."""
        self.click(selector)
        self.run(f"document.querySelector({json.dumps(selector)}).select()")
        self.call("Input.insertText", text=text)

    def size(self, width: int, height: int, dark: bool = False) -> None:
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))

    def close(self) -> None:
        try:
            self.call("Browser.close", browser=True)
            self.process.wait(30)
        finally:
            self.process.kill()
            self.process.wait()
            os.close(self._to)
            os.close(self._from)
            self.log.close()
