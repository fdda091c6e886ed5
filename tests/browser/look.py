"""What a real browser finds wrong with a page, at the width of a desk and of a telephone; the page is not changed.

    python tests/browser/look.py PAGE.html...

Headless Chromium is spoken to over a pipe, by the DevTools protocol: no driver, no port, no network.
"""

from __future__ import annotations

import fcntl
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome")
WIDTHS_PX = (1400, 400)
HEIGHT_PX, ANSWER_S = 900, 60
OPTIONS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--host-resolver-rules=MAP * ~NOTFOUND",
    "--remote-debugging-pipe",
)  # fmt: skip

MEASURE = """(async () => {
  const faults = [], page = document.documentElement, edge = page.clientWidth;
  const name = e => e.tagName.toLowerCase() + [...e.classList].map(c => '.' + c).join('')
    + ` '${(e.getAttribute('alt') || e.textContent).trim().replace(/\\s+/g, ' ').slice(0, 40)}'`;
  await document.fonts.ready;
  if (page.scrollWidth > edge) {
    const isCut = e => { while ((e = e.parentElement)) if (getComputedStyle(e).overflowX !== 'visible') return true; };
    // With its words: a long one stands out of a box that is narrow enough itself.
    const reach = e => Math.max(e.getBoundingClientRect().right, ...[...e.childNodes].map(node => {
      const range = document.createRange();
      range.selectNode(node);
      return node.nodeType === Node.TEXT_NODE ? range.getBoundingClientRect().right : 0;
    }));
    const wide = [...document.body.querySelectorAll('*')].filter(e => reach(e) > edge + 1 && !isCut(e)).map(name);
    faults.push(`the page is ${page.scrollWidth} px wide in ${edge}: ${wide.slice(-3).join(', ')}`);
  }
  // How many colours a picture has once it is drawn, -1 where it does not load.
  const count = async address => {
    const picture = new Image();
    picture.src = address;
    try { await picture.decode(); } catch { return -1; }
    const canvas = document.createElement('canvas');
    [canvas.width, canvas.height] = [picture.naturalWidth, picture.naturalHeight];
    return colours(canvas, picture);
  };
  const colours = (canvas, picture) => {
    if (!canvas.width || !canvas.height) return 0;
    const brush = canvas.getContext('2d');
    if (picture) brush.drawImage(picture, 0, 0);
    const {data} = brush.getImageData(0, 0, canvas.width, canvas.height);
    return new Set(new Uint32Array(data.buffer)).size;
  };
  for (const e of document.querySelectorAll('img, svg image, svg, canvas')) {
    const kind = e.tagName.toLowerCase(), box = e.getBoundingClientRect();
    // The icon of a control that this width, or the page, does not show.
    if (kind === 'svg' && e.closest('label, button, a') && !e.getClientRects().length) continue;
    const found = kind === 'canvas' ? colours(e) : kind === 'svg' ? (e.getBBox().width && e.getBBox().height ? 2 : 0)
      : await count(e.href ? e.href.baseVal : e.currentSrc || e.src);
    if (found < 0) faults.push(`a picture did not load: ${name(e)}`);
    else if (found < 2) faults.push(`a picture is empty: ${name(e)}`);
    else if (!box.width || !box.height) faults.push(`a picture is not shown: ${name(e)}`);
  }
  return faults;
})()"""


class Browser:
    """A tab of a running Chromium, by the ends of two pipes. Final."""

    def __init__(self, commands: int, answers: int):
        self.commands, self.answers = commands, answers
        self.rest, self.count, self.session = b"", 0, ""
        self.events: list[dict[str, Any]] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """The answer to one command; what happens meanwhile goes to `events`."""
        self.count += 1
        message: dict[str, Any] = {"id": self.count, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.commands, json.dumps(message).encode() + b"\0")
        while (answer := self._read()).get("id") != self.count:
            self.events.append(answer)
        if "error" in answer:
            raise RuntimeError(f"Chromium refuses {method}: {answer['error']['message']}")
        return answer["result"]

    def look(self, page: Path, width_px: int) -> list[str]:
        """What is wrong with a page at a width, a line each."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width_px, height=HEIGHT_PX, deviceScaleFactor=1, mobile=False
        )
        self.events.clear()
        failed = self.call("Page.navigate", url=page.resolve().as_uri()).get("errorText")
        if failed:
            return [f"it does not open: {failed}"]
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self._read())
        done = self.call("Runtime.evaluate", expression=MEASURE, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in done:
            raise RuntimeError(f"{page} could not be measured: {done['exceptionDetails']}")
        return [*(f"console: {said}" for said in _list_errors(self.events)), *done["result"]["value"]]

    def _read(self) -> dict[str, Any]:
        until = time.monotonic() + ANSWER_S
        while b"\0" not in self.rest:
            ready = select.select([self.answers], [], [], max(0.0, until - time.monotonic()))[0]
            more = os.read(self.answers, 1 << 20) if ready else b""
            if not more:
                raise RuntimeError(f"Chromium {'ended' if ready else f'said nothing for {ANSWER_S} s'}")
            self.rest += more
        message, self.rest = self.rest.split(b"\0", 1)
        return json.loads(message)


def _list_errors(events: list[dict[str, Any]]) -> Iterator[str]:
    for event in events:
        params = event.get("params", {})
        if event.get("method") == "Log.entryAdded" and params["entry"]["level"] == "error":
            yield params["entry"]["text"]
        elif event.get("method") == "Runtime.exceptionThrown":
            details = params["exceptionDetails"]
            yield details.get("exception", {}).get("description", details["text"]).splitlines()[0]
        elif event.get("method") == "Runtime.consoleAPICalled" and params["type"] in ("error", "assert"):
            yield " ".join(str(value.get("value", value.get("description"))) for value in params["args"])


def find_chromium() -> str:
    """Path of the browser. Raises FileNotFoundError where there is none."""
    found = next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        raise FileNotFoundError(f"no browser: none of {', '.join(NAMES)} is installed; apt-get install chromium")
    return found


@contextmanager
def open_browser() -> Iterator[Browser]:
    """A browser that ends with the context. Raises FileNotFoundError where there is none."""
    program = find_chromium()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, open(f"{folder}/log", "wb") as log:
        # Chromium reads commands from its file 3 and answers in its file 4, whatever the numbers are here.
        (low_in, commands), (answers, low_out) = os.pipe(), os.pipe()
        theirs = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in (low_in, low_out)]
        shell = ["bash", "-c", f'exec "$@" 3<&{theirs[0]} 4>&{theirs[1]}', "bash"]
        words = [program, *OPTIONS, f"--user-data-dir={folder}/profile", "about:blank"]
        process = subprocess.Popen([*shell, *words], pass_fds=theirs, stdout=log, stderr=log)
        for end in (low_in, low_out, *theirs):
            os.close(end)
        try:
            yield Browser(commands, answers)
        except (RuntimeError, BrokenPipeError) as error:
            error.add_note(f"It said: {Path(log.name).read_text(errors='replace')[-2000:]}")
            raise
        finally:
            process.terminate()
            process.wait()
            os.close(commands)
            os.close(answers)


def look_at(pages: list[Path]) -> list[str]:
    """What is wrong with the pages at any of `WIDTHS_PX`, a line each. Raises FileNotFoundError: no browser."""
    with open_browser() as browser:
        return [
            f"{page} at {width} px: {fault}"
            for page in pages
            for width in WIDTHS_PX
            for fault in browser.look(page, width)
        ]


if __name__ == "__main__":
    if not sys.argv[1:]:
        sys.exit("give one or more HTML files")
    try:
        found = look_at([Path(word) for word in sys.argv[1:]])
    except FileNotFoundError as error:
        sys.exit(str(error))
    print("\n".join(found) or "nothing is wrong")
    sys.exit(bool(found))
