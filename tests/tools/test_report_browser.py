"""The report in a real browser: no message on its console, and readable on a wide screen and on a phone."""

import json
import os
import re
import shutil
import subprocess

import pytest

from rlhf_recipes.tools.report import write_report

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (Debian: apt-get install chromium)")

# Another page holds the report in a frame of the wanted width and measures it: the report itself may run nothing.
MEASURE = """<!DOCTYPE html><html><body style="margin:0"><iframe id="frame" src="report/report.html"
 style="border:0;width:{width}px;height:900px"></iframe><pre id="found"></pre><script>
document.getElementById("frame").onload = (event) => {{
  const page = event.target.contentDocument, root = page.documentElement;
  const boxes = [...page.querySelectorAll("svg")].map((plot) => plot.getBoundingClientRect());
  const letters = [...page.querySelectorAll("svg text")].map((text) => text.getBoundingClientRect().height);
  const cut = [...page.querySelectorAll("h1,h2,h3,p,pre,svg,.wide")].filter(
    (part) => part.getBoundingClientRect().right > {width} + 1);
  document.getElementById("found").textContent = JSON.stringify({{
    scroll: root.scrollWidth, plots: boxes.length, widths: boxes.map((box) => box.width), cut: cut.length,
    smallest: Math.min(...letters), font: parseFloat(page.defaultView.getComputedStyle(page.body).fontSize),
    background: page.defaultView.getComputedStyle(page.body).backgroundColor,
    scripts: page.scripts.length, hacked: page.defaultView.hacked === true}});
}};</script></body></html>"""
HOSTILE = "<script>window.hacked = true</script><img src=x onerror='window.hacked = true'>" + "longword" * 60


def chromium(folder, *arguments):
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--v=0"]
    command += [
        f"--user-data-dir={folder / 'profile'}",
        "--allow-file-access-from-files",
        "--virtual-time-budget=3000",
    ]
    environment = os.environ | {"HOME": str(folder)}
    finished = subprocess.run(
        [*command, *map(str, arguments)], capture_output=True, text=True, timeout=120, env=environment
    )
    assert finished.returncode == 0, finished.stderr[-2000:]
    return finished


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("browser")
    for name in ("one", "two"):
        ppo = folder / name / "ppo"
        ppo.mkdir(parents=True)
        keys = ("reward", "rewards/gold_score/mean", "rewards/reward/mean", "kl", "kl_per_token", "entropy")
        history = [{"step": step, **dict.fromkeys(keys, step / 7)} for step in range(1, 20)]
        (ppo / "trainer_state.json").write_text(json.dumps({"log_history": history}))
        samples = [{"prompt": HOSTILE, "policy": HOSTILE, "reference": HOSTILE}]
        (ppo / "evaluation.json").write_text(json.dumps({"policy": {"kl": 1.0}, "samples": samples}))
        run = {"stage": "ppo", "command": f"recipes/ppo.py {HOSTILE}", "git_commit": "a" * 40}
        (ppo / "run.json").write_text(json.dumps(run))
    write_report([folder / "one", folder / "two"], folder / "report")
    return folder


def measured(folder, width, *arguments):
    (folder / f"measure{width}.html").write_text(MEASURE.format(width=width))
    page = (folder / f"measure{width}.html").as_uri()
    found = chromium(folder, *arguments, f"--window-size={width + 40},1000", "--dump-dom", page)
    return json.loads(re.search(r'<pre id="found">(.*?)</pre>', found.stdout, re.DOTALL)[1])


@pytest.mark.parametrize("width", [1280, 400])
def test_the_page_is_readable(folder, width):
    found = measured(folder, width)
    assert found["plots"] == len(list((folder / "report").glob("*.png"))) >= 4
    assert found["scroll"] <= width, "the page itself must not scroll sideways"
    assert found["cut"] == 0
    assert all(250 < plot < width for plot in found["widths"])
    assert found["font"] >= 14
    assert found["smallest"] >= 9, "height of the letters in the plots, in pixels"
    assert found["scripts"] == 0
    assert not found["hacked"]


def test_the_page_follows_the_dark_scheme(folder):
    assert measured(folder, 400)["background"] == "rgb(255, 255, 255)"
    dark = measured(folder, 400, "--blink-settings=preferredColorScheme=0")
    assert dark["background"] == "rgb(21, 22, 23)"


def test_the_console_is_empty(folder):
    page = (folder / "report/report.html").as_uri()
    assert "CONSOLE" not in chromium(folder, "--dump-dom", page).stderr
    # The check can fail: a page with a script that its policy forbids does say so.
    bad = folder / "bad.html"
    bad.write_text((folder / "report/report.html").read_text().replace("</body>", "<script>1</script></body>"))
    assert "CONSOLE" in chromium(folder, "--dump-dom", bad.as_uri()).stderr
