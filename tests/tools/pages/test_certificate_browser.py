"""The certificate in a real browser: readable on a wide screen and on a phone, in light and in dark."""

import pytest

from rlhf_recipes.tools.certificate import certify, write_certificate
from tests.tools.browser import check_page, chromium, measured, needs_chromium

pytestmark = [needs_chromium, pytest.mark.slow]

PAGES, WIDTHS = ("certificate/certificate.html",), (1280, 400)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, rule_scorer, pairs, train_pairs, samples):
    folder = tmp_path_factory.mktemp("browser")
    measures = certify(rule_scorer(), pairs, train=train_pairs, samples=samples, category_column="kind")
    write_certificate(measures, folder / "certificate", "Reward model outputs/a/quite/long/path/" + "longword" * 20)
    return folder


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
def test_the_page_is_readable(folder, width, dark):
    found = measured(folder, PAGES, WIDTHS, dark)[PAGES[0], width]
    check_page(found)
    assert len(found["plots"]) == 5
    assert found["background"] == ("rgb(21, 22, 23)" if dark else "rgb(255, 255, 255)")


def test_the_console_is_empty(folder):
    assert "CONSOLE" not in chromium(folder, "--dump-dom", (folder / PAGES[0]).as_uri()).stderr
