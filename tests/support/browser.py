"""A headless Chromium for tests, driven by the DevTools protocol over a pipe: JSON messages that end in a zero byte.

Protocol: https://chromedevtools.github.io/devtools-protocol
"""

import base64
import json
import os
import select
import subprocess
import time
from pathlib import Path
from typing import Any

# These flags allow root in a container, and disable the requests that a browser makes by itself.
FLAGS = """--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking
--disable-component-update --disable-sync --disable-dev-shm-usage --hide-scrollbars --remote-debugging-pipe""".split()
TIMEOUT_S = 120.0  # a loaded machine is slow
# JavaScript: the centre of an element, if it has not moved for 0.2 seconds and no other element covers it
ELEMENT_CENTRE = """(async () => {
    const centre = () => {
        const element = document.querySelector(%s);
        if (!element) return null;
        element.scrollIntoView({block: 'center'});
        const box = element.getBoundingClientRect(), point = [box.x + box.width / 2, box.y + box.height / 2];
        return element.contains(document.elementFromPoint(...point)) ? point : null;
    };
    const before = centre();
    await new Promise(done => setTimeout(done, 200));
    return before && String(before) === String(centre()) ? before : null;
})()"""


class Browser:
    """A browser with one tab. `events` are all events so far, such as `Network.requestWillBeSent`."""

    def __init__(self, program: str, profile: Path) -> None:
        # Chromium reads commands from its descriptor 3, and writes answers and events to its descriptor 4.
        commands_read, commands_write = os.pipe()
        answers_read, answers_write = os.pipe()
        os.set_inheritable(commands_read, True)
        os.set_inheritable(answers_write, True)
        environment = os.environ | {"IN": str(commands_read), "OUT": str(answers_write)}
        self.log = (profile.parent / "chromium.log").open("wb")
        self.process = subprocess.Popen(
            ["bash", "-c", 'exec 3<&$IN 4>&$OUT; exec "$@"', "bash", program, *FLAGS, f"--user-data-dir={profile}"],
            pass_fds=(commands_read, answers_write),
            env=environment,
            stdout=self.log,
            stderr=self.log,
        )
        os.close(commands_read)
        os.close(answers_write)
        self._commands, self._answers = commands_write, answers_read
        self._unread = b""
        self._last_id = 0
        self.events: list[dict[str, Any]] = []
        self.session = ""
        self.open()

    def open(self) -> None:
        """Open a tab; all later calls are about it."""
        tab = self.call("Target.createTarget", browser=True, url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", browser=True, targetId=tab, flatten=True)
        self.tab, self.session = tab, attached["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def close_tab(self) -> None:
        self.call("Target.closeTarget", browser=True, targetId=self.tab)

    def call(self, method: str, browser: bool = False, **params: Any) -> dict[str, Any]:
        """The result of a command to the tab, or to the whole browser."""
        self._last_id += 1
        message = {"id": self._last_id, "method": method, "params": params}
        if not browser:
            message["sessionId"] = self.session
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next_message()
            if answer.get("id") == self._last_id:
                assert "error" not in answer, (method, answer["error"])
                return answer["result"]

    def _next_message(self) -> dict[str, Any]:
        deadline = time.monotonic() + TIMEOUT_S
        while b"\0" not in self._unread:
            ready, _, _ = select.select([self._answers], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, f"the browser sent nothing for {TIMEOUT_S:.0f} seconds"
            content = os.read(self._answers, 1 << 20)
            assert content, "the browser has ended"
            self._unread += content
        line, _, self._unread = self._unread.partition(b"\0")
        message: dict[str, Any] = json.loads(line)
        if "method" in message:
            self.events.append(message)
        return message

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression; if that is a promise, its result."""
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def wait(self, script: str) -> Any:
        """Evaluate a JavaScript expression until it is true. Returns its value."""
        deadline = time.monotonic() + TIMEOUT_S
        while not (value := self.run(script)):
            assert time.monotonic() < deadline, f"not true after {TIMEOUT_S:.0f} seconds: {script}"
            time.sleep(0.1)
        return value

    def navigate(self, url: str) -> None:
        self.call("Page.navigate", url=url)

    def click(self, selector: str) -> None:
        """Click on an element with the mouse, as soon as it has stopped moving."""
        x, y = self.wait(ELEMENT_CENTRE % json.dumps(selector))
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def type(self, selector: str, text: str) -> None:
        """Replace the text of a field, as if pasted."""
        self.click(selector)
        self.run(f"document.querySelector({json.dumps(selector)}).select()")
        self.call("Input.insertText", text=text)

    def set_size(self, width: int, height: int, dark: bool = False) -> None:
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
            os.close(self._commands)
            os.close(self._answers)
            self.log.close()
