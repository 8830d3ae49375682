"""Headless Chromium, driven through a pipe by its DevTools protocol.

https://chromedevtools.github.io/devtools-protocol/; messages are JSON that ends in a zero byte.
"""

import base64
import contextlib
import json
import os
import select
import shutil
import tempfile
import time

PROGRAM = shutil.which("chromium")

# The slowest step, on a busy machine, is the start.
_PATIENCE = 60

# Chromium reads commands from file 3 and writes to file 4.
_ARGUMENTS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--hide-scrollbars",
    "--remote-debugging-pipe",
)


_LOWEST_CONTRAST = r"""(() => {
  const channels = (color) => {
    const [red, green, blue, alpha = 1] = color.match(/[\d.]+/g).map(Number);
    return [red, green, blue, alpha];
  };
  const over = (top, ground) => ground.map((value, k) => top[k] * top[3] + value * (1 - top[3]));
  const luminance = (color) => {
    const [red, green, blue] = color.map((value) =>
      value / 255 <= 0.04045 ? value / 3294.6 : ((value / 255 + 0.055) / 1.055) ** 2.4);
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue;
  };
  const ground = (element) => element === null ? [255, 255, 255] :
    over(channels(getComputedStyle(element).backgroundColor), ground(element.parentElement));
  const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  let lowest = 21;
  while (texts.nextNode()) {
    const element = texts.currentNode.parentElement;
    if (!texts.currentNode.data.trim() || !element.checkVisibility()) continue;
    const style = getComputedStyle(element);
    const below = ground(element);
    const color = channels(element instanceof SVGElement ? style.fill : style.color);
    const [dark, light] = [below, over(color, below)].map(luminance).sort((a, b) => a - b);
    lowest = Math.min(lowest, (light + 0.05) / (dark + 0.05));
  }
  return lowest;
})()"""


class Chromium:
    """A browser with a profile of its own; use it as a context manager."""

    def __enter__(self):
        self._profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        theirs_in, self._commands = os.pipe()
        self._answers, theirs_out = os.pipe()
        # Numbers from 10 on, so that none is overwritten when they become 3 and 4.
        high = [os.dup(file) for file in (theirs_in, theirs_out) for _ in range(8)]
        self._process = os.posix_spawn(
            PROGRAM,
            [PROGRAM, *_ARGUMENTS, f"--user-data-dir={self._profile.name}", "about:blank"],
            os.environ,
            file_actions=[
                (os.POSIX_SPAWN_DUP2, high[7], 3),
                (os.POSIX_SPAWN_DUP2, high[15], 4),
                (os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0),
                (os.POSIX_SPAWN_OPEN, 2, os.devnull, os.O_WRONLY, 0),
            ],
        )
        for file in (*high, theirs_in, theirs_out):
            os.close(file)
        self._buffer, self._count, self.events = b"", 0, []
        return self

    def __exit__(self, *_):
        with contextlib.suppress(OSError, TimeoutError):
            self.call("Browser.close")
        os.close(self._commands)
        os.close(self._answers)
        os.waitpid(self._process, 0)
        self._profile.cleanup()

    def call(self, method, session=None, **parameters):
        """Runs a command and returns its result; what happens meanwhile goes to ``events``."""
        self._count += 1
        message = {"id": self._count, "method": method, "params": parameters}
        if session is not None:
            message["sessionId"] = session
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read(_PATIENCE)
            if answer is None:
                raise TimeoutError(f"no answer to {method}")
            if answer.get("id") == self._count:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']['message']}")
                return answer["result"]
            self.events.append(answer)

    def _read(self, patience):
        end = time.monotonic() + patience
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._answers], [], [], max(0, end - time.monotonic()))
            if not ready:
                return None
            piece = os.read(self._answers, 1 << 16)
            if not piece:
                raise OSError("Chromium has ended")
            self._buffer += piece
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)

    def open(self, address, *, width=1280, height=900, dark=False):
        """Opens an address in a new tab."""
        return Tab(self, address, width, height, dark)


class Tab:
    """A page in the browser."""

    def __init__(self, browser, address, width, height, dark):
        self._browser = browser
        target = browser.call("Target.createTarget", url="about:blank")["targetId"]
        self._target = target
        attached = browser.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.resize(width, height)
        self.call("Page.navigate", url=address)
        self.wait_for("location.href !== 'about:blank' && document.readyState === 'complete'")

    def call(self, method, **parameters):
        return self._browser.call(method, self._session, **parameters)

    def resize(self, width, height):
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width, height=height, deviceScaleFactor=1, mobile=False,
        )  # fmt: skip

    def run(self, expression):
        """The value of a JavaScript expression, or of the promise that it is."""
        answer = self.call(
            "Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True
        )
        if "exceptionDetails" in answer:
            raise RuntimeError(answer["exceptionDetails"]["exception"]["description"])
        return answer["result"].get("value")

    def wait_for(self, condition):
        """Waits until a JavaScript expression is true."""
        end = time.monotonic() + _PATIENCE
        while not self.run(f"Boolean({condition})"):
            if time.monotonic() > end:
                raise TimeoutError(f"never true: {condition}")
            time.sleep(0.02)

    def point(self, x, y, kind="mouseMoved", **options):
        self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, **options)

    def press(self, key, **options):
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, **options)

    def lowest_contrast(self):
        """The lowest contrast of a text and its ground, as WCAG 2 defines it."""
        return self.run(_LOWEST_CONTRAST)

    def screenshot(self, *, whole=True):
        """The page as a PNG."""
        answer = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        return base64.b64decode(answer["data"])

    def events(self, method):
        """The parameters of all events of a name so far."""
        self.run("0")  # what has happened before is read by now
        return [
            event["params"]
            for event in self._browser.events
            if event.get("sessionId") == self._session and event.get("method") == method
        ]

    def close(self):
        self._browser.call("Target.closeTarget", targetId=self._target)
