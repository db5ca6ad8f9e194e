"""Pages as a reader with a browser meets them: opened in Chromium, and used by a script."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
TOOLS = """
const errors = [], loaded = () => performance.getEntriesByType("resource").map(({ name }) => name);
addEventListener("error", ({ message }) => errors.push(message));
const all = (selector, from = document) => [...from.querySelectorAll(selector)];
const said = () => document.getElementById("tip").hidden ? null : all("#tip div").map((line) => line.textContent);
const told = (panel) => JSON.parse(panel.querySelector("script").textContent);
function point(panel, x, y, kind = "pointermove", more = {}) {  // in the coordinates of the drawing
  const svg = panel.querySelector("svg"), at = new DOMPoint(x, y).matrixTransform(svg.getScreenCTM());
  svg.dispatchEvent(new PointerEvent(kind, { clientX: at.x, clientY: at.y, pointerType: "mouse", ...more }));
  return said();
}
function press(panel, key) {
  panel.querySelector("svg").dispatchEvent(new KeyboardEvent("keydown", { key }));
  return said();
}
const shown = (element) => getComputedStyle(element).display !== "none";
const rows = (table) => [...table.tBodies[0].rows].map((row) => [...row.cells].map((cell) => cell.textContent));
"""


def explore(page: Path, script: str, width: int = 1400) -> Any:
    """What `script`, the body of a function that has TOOLS, returns in a page, which has no error and loads nothing."""
    if CHROMIUM is None:
        pytest.skip("needs Chromium")
    text = page.read_text(encoding="utf-8").replace("<head>", f"<head><script>{TOOLS}</script>")
    text += f"<pre id=result></pre><script>const result = (() => {{ {script} }})();"
    text += (
        "document.getElementById('result').textContent = JSON.stringify({ errors, loaded: loaded(), result })</script>"
    )
    options = f"--headless --no-sandbox --disable-gpu --disable-dev-shm-usage --window-size={width},2000".split()
    with TemporaryDirectory() as folder:
        file = Path(folder) / "page.html"
        file.write_text(text, encoding="utf-8")
        command = [CHROMIUM, *options, "--dump-dom", f"--user-data-dir={folder}/profile", file.as_uri()]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    found = re.search('<pre id="result">(.+?)</pre>', done.stdout, re.DOTALL)
    assert found, done.stdout[-500:] + done.stderr[-1500:]
    told = json.loads(html.unescape(found[1]))
    assert told["errors"] == [] and told["loaded"] == []
    return told["result"]
