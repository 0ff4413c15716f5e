"""The documentation site builds without a warning, and holds all pages, the library's public names and the search."""

import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ["README.md", "CITATION.cff", "LICENSE", "zensical.toml", "docs", "recipes", "rlhf_recipes"]


def build(folder):
    command = [sys.executable, "docs/build_site.py"]
    return subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


class Fetched(HTMLParser):
    """What a browser fetches for a page."""

    def __init__(self, page):
        super().__init__()
        self.urls = []
        self.feed(page.read_text())

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if tag == "link" and attrs.get("rel") in {"canonical", "next", "prev"}:
            return
        self.urls += [attrs[name] for name in ("src", "href") if name in attrs and tag != "a"]


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    folder = tmp_path_factory.mktemp("repository")
    for name in SOURCES:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def site(repository):
    done = build(repository)
    assert done.returncode == 0, done.stdout
    return repository / "site"


@pytest.mark.slow
def test_every_page_is_there(site):
    for page in re.findall(r"\]\(([^)#]+)\)", (ROOT / "docs" / "index.md").read_text()):
        assert (site / "docs" / page).with_suffix(".html").is_file(), page
    for recipe in ROOT.glob("recipes/*/README.md"):
        assert (site / recipe.relative_to(ROOT)).with_name("index.html").is_file(), recipe
    home = (site / "index.html").read_text()
    assert 'href="docs/ppo_fields.html#logged-metrics"' in home
    assert 'href="LICENSE"' in home
    assert (site / "LICENSE").read_text() == (ROOT / "LICENSE").read_text()


@pytest.mark.slow
def test_every_public_name_is_described_and_found(site):
    listed = set()
    for file in (ROOT / "rlhf_recipes").rglob("__init__.py"):
        package = ".".join(file.parent.relative_to(ROOT).parts)
        for names in re.findall(r"(?s)__all__ = \[(.*?)\]", file.read_text()):
            for name in re.findall(r'"([a-zA-Z]\w*)"', names):
                in_its_module = (file.parent / f"{name}.py").is_file()
                listed.add(f"{package}.{name}.{name}" if in_its_module else f"{package}.{name}")
    assert len(listed) > 150
    pages = {page: page.read_text() for page in (site / "api").glob("*.html")}
    assert {page.stem for page in pages} >= {"rlhf_recipes", "ppo", "shaping", "rewards", "reward_modeling", "tools"}
    described = {name for text in pages.values() for name in re.findall(r'id="(rlhf_recipes[\w.]*)"', text)}
    assert listed - described == set()

    gae = pages[site / "api" / "ppo.html"].partition('id="rlhf_recipes.ppo.functional.gae"')[2].partition("<h")[0]
    assert all(part in gae for part in ("Parameters:", "Returns:", "Examples:", "&gt;&gt;&gt;"))
    config = pages[site / "api" / "rlhf_recipes.html"]
    assert "Price of a completion that was cut off before its end token." in config, "the help of a field describes it"

    found = json.loads((site / "search.json").read_text())["items"]
    assert {item["location"].partition("#")[0] for item in found} >= {"docs/ppo.html", "api/ppo.html", "index.html"}


@pytest.mark.slow
def test_pages_ask_no_other_host(site):
    fetched = {url for page in site.rglob("*.html") for url in Fetched(page).urls}
    assert fetched, "stylesheets and scripts"
    assert [url for url in fetched if url.startswith(("http:", "https:", "//"))] == []


WRONG_DOCSTRING = '''

def f(a: int) -> None:
    """F.

    Args:
        nobody: There is no such argument.
    """
'''


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "fault", "said"),
    [
        ("docs/ppo.md", "\n[lost](nowhere.md)\n", "page does not exist"),
        ("README.md", "\n[lost](docs/ppo.md#nowhere)\n", "anchor does not exist"),
        ("rlhf_recipes/masks.py", WRONG_DOCSTRING, "nobody"),
    ],
    ids=["page", "anchor", "docstring"],
)
def test_faults_stop_the_build(repository, site, file, fault, said):
    text = (repository / file).read_text()
    (repository / file).write_text(text + fault)
    done = build(repository)
    (repository / file).write_text(text)
    assert done.returncode != 0
    assert said in done.stdout
