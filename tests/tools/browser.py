"""Pages in a real browser: their widths, contrasts and messages."""

import json
import os
import re
import shutil
import subprocess
from functools import cache

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (Debian: apt-get install chromium)")

# Another page holds the pages in frames of the wanted widths and measures them: they themselves may run nothing.
MEASURE = """<!DOCTYPE html><html><body style="margin:0">FRAMES<pre id="found"></pre><script>
const parse = (colour) => (colour.match(/[\\d.]+/g) || []).map(Number);
const luminance = (rgb) => rgb.slice(0, 3).map((part) => part / 255)
  .map((part) => part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4)
  .reduce((sum, part, i) => sum + part * [0.2126, 0.7152, 0.0722][i], 0);
const contrast = (one, two) => {
  const [low, high] = [luminance(one), luminance(two)].sort((a, b) => a - b);
  return (high + 0.05) / (low + 0.05);
};
const behind = (element, view) => {
  for (let part = element; part; part = part.parentElement) {
    const colour = parse(view.getComputedStyle(part).backgroundColor);
    if (colour.length === 3 || colour[3] === 1) return colour;
  }
};
const texts = (page, view) => {  // every text that is seen, with its contrast
  const walker = page.createTreeWalker(page.body, NodeFilter.SHOW_TEXT), found = [];
  for (let node = walker.nextNode(); node; node = walker.nextNode()) {
    const element = node.parentElement;
    if (!node.data.trim() || !element.getClientRects().length || element.closest("style")) continue;
    const style = view.getComputedStyle(element), inPlot = element.closest("svg") !== null;
    found.push({
      text: node.data.trim().slice(0, 40), isSign: element.matches(".sign"), inPlot,
      height: element.getBoundingClientRect().height, size: parseFloat(style.fontSize),
      contrast: contrast(parse(inPlot ? style.fill : style.color), behind(element, view)),
    });
  }
  return found;
};
const measure = (frame) => {
  const page = frame.contentDocument, view = frame.contentWindow, root = page.documentElement;
  const details = [...page.querySelectorAll("details")], scroll = [root.scrollWidth];
  const found = {
    open: details.filter((part) => part.open).length, folded: details.map((part) => part.firstChild.textContent)};
  for (const part of details) part.open = true;
  scroll.push(root.scrollWidth);
  const width = root.clientWidth, plots = [...page.querySelectorAll("svg")];
  return {...found, scroll, width, texts: texts(page, view),
    headings: [...page.querySelectorAll("h2")].map((part) => [part.textContent, part.getBoundingClientRect().top]),
    plots: plots.map((plot) => plot.getBoundingClientRect().width),
    alts: plots.map((plot) => plot.getAttribute("role") === "img" && plot.getAttribute("aria-label")),
    cut: [...page.querySelectorAll("h1,h2,h3,p,pre,svg,.wide,dl,summary")].filter(
      (part) => part.getBoundingClientRect().right > width + 1).length,
    scrolled: [...page.querySelectorAll(".wide")].filter((part) => part.scrollWidth > part.clientWidth).length,
    background: view.getComputedStyle(page.body).backgroundColor,
    scripts: page.scripts.length, hacked: view.hacked === true};
};
window.onload = () => {
  const found = [...document.querySelectorAll("iframe")].map(measure);
  document.getElementById("found").textContent = JSON.stringify(found);
};</script></body></html>"""


def chromium(folder, *arguments):
    """Run Chromium without a window and return what it wrote."""
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--v=0"]
    command += [f"--user-data-dir={folder / 'profile'}", "--allow-file-access-from-files"]
    command += ["--virtual-time-budget=5000", *map(str, arguments)]
    environment = os.environ | {"HOME": str(folder)}
    finished = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert finished.returncode == 0, finished.stderr[-2000:]
    return finished


@cache
def measured(folder, pages, widths, dark=False):
    """Measure pages at widths: a mapping by `(page, width)`, with one start of the browser for all.

    Args:
        folder: Where the measuring page goes; `pages` are paths below it.
        pages: Paths of the pages, a tuple.
        widths: Widths in pixels, a tuple.
        dark: Whether the reader prefers dark pages.
    """
    frames = [(page, width) for page in pages for width in widths]
    style = "border:0;display:block;height:900px;width:{}px"
    tags = "".join(f'<iframe src="{page}" style="{style.format(width)}"></iframe>' for page, width in frames)
    path = folder / "measure.html"
    path.write_text(MEASURE.replace("FRAMES", tags))
    scheme = f"--blink-settings=preferredColorScheme={0 if dark else 1}"
    shown = chromium(folder, scheme, f"--window-size={max(widths) + 40},1000", "--dump-dom", path.as_uri())
    found = json.loads(re.search(r'<pre id="found">(.*?)</pre>', shown.stdout, re.DOTALL)[1].replace("&amp;", "&"))
    return dict(zip(frames, found, strict=True))


def check_page(found):
    """Assert what holds of every page at every width, in light and dark."""
    assert found["scroll"] == [found["width"]] * 2, "the page itself must not scroll sideways, folded or not"
    assert found["cut"] == 0
    assert found["plots"]
    assert all(250 < plot <= found["width"] for plot in found["plots"])
    assert all(isinstance(alt, str) and len(alt) > 20 for alt in found["alts"])
    assert found["open"] == 0
    assert found["scripts"] == 0
    assert not found["hacked"]
    plain = [text for text in found["texts"] if not text["isSign"]]
    assert len(plain) > 50
    assert [text for text in plain if text["contrast"] < 4.5] == []
    assert [text for text in plain if text["size"] < 13 and not text["inPlot"]] == []
    assert [text for text in plain if text["height"] < 9] == [], "height of letters in pixels"
    assert [text for text in found["texts"] if text["isSign"] and text["contrast"] < 2.9] == []
