"""Reports in a real browser: readable on a wide screen and on a phone, in light and in dark, and silent."""

import json
import shutil

import pytest

from rlhf_recipes.tools.report import write_report
from rlhf_recipes.tracking.settings import write_settings
from tests.tools.browser import check_page, chromium, measured, needs_chromium
from tests.tools.runs import comparison, write_json, write_run

pytestmark = [needs_chromium, pytest.mark.slow]

HOSTILE = "<script>window.hacked = true</script><img src=x onerror='window.hacked = true'>" + "longword" * 60
PAGES = ("full/report.html", "several/report.html", "damaged/report.html")
WIDTHS = (1280, 400)
SECTIONS = ["Result", "Samples", "Policy", "Over-optimisation frontier", "Alarms", "Reward", "SFT"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("browser")
    runs = [write_run(folder / name, HOSTILE) for name in ("one", "two", "a_name_that_is_quite_long_" * 3)]
    for number, run in enumerate(runs):
        write_settings(run / "ppo", {"kl_coef": number / 10, "dataset_name": HOSTILE})
    write_report(runs[:1], folder / "full")
    write_json(runs[1] / "ppo/evaluation.json", comparison(HOSTILE, gold=(-1.0, 0.0)))
    write_report(runs, folder / "several")
    damaged = shutil.copytree(runs[0], folder / "cut")
    for name in ("run.json", "evaluation.json", "alarms.json", "policy_evaluation.jsonl"):
        content = (damaged / "ppo" / name).read_text()
        (damaged / "ppo" / name).write_text(content[: len(content) // 2])
    (damaged / "sft/trainer_state.json").write_text(json.dumps({"log_history": [HOSTILE]}))
    write_report([damaged], folder / "damaged")
    return folder


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("page", PAGES)
def test_the_page_is_readable(folder, page, width, dark):
    found = measured(folder, PAGES, WIDTHS, dark)[page, width]
    check_page(found)
    assert len(found["plots"]) == len(list((folder / page).parent.glob("*.png"))) > 10
    assert found["background"] == ("rgb(21, 22, 23)" if dark else "rgb(255, 255, 255)")
    # On a phone the result's table is wider than the page, and scrolls in its box.
    assert found["scrolled"] > 0 or width > 400


@pytest.mark.parametrize("page", PAGES)
def test_the_result_comes_first_and_what_is_long_is_folded(folder, page):
    found = measured(folder, PAGES, WIDTHS, False)[page, 1280]
    names, places = zip(*found["headings"], strict=True)
    assert list(names) == [*SECTIONS, "Settings", "What was run", "What is missing"]
    assert list(places) == sorted(places)
    assert places[0] < 200
    assert "Commands" in found["folded"]
    assert "Versions" in found["folded"]
    assert any(summary.endswith("more curves") for summary in found["folded"])


def test_the_console_is_empty(folder):
    page = folder / "several/report.html"
    assert "CONSOLE" not in chromium(folder, "--dump-dom", page.as_uri()).stderr
    # The check can fail: a page with a script that its policy forbids does say so.
    bad = folder / "bad.html"
    bad.write_text(page.read_text().replace("</body>", "<script>1</script></body>"))
    assert "CONSOLE" in chromium(folder, "--dump-dom", bad.as_uri()).stderr
