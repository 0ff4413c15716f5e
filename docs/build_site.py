"""Build the documentation site into site/, with warnings as errors: `make docs`.

Its pages lie in build/pages/ as they do in the repository, together with the files that they link to: a link that
works on GitHub works on the site, and zensical finds those that do not. Added are pages made from docstrings and
notebooks, and the navigation, which is that of docs/index.md. Nothing of the library is imported.
"""

from __future__ import annotations

import ast
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGES = ROOT / "build" / "pages"
LIBRARY = ROOT / "rlhf_recipes"
LINK = re.compile(r"\[([^]]*)\]\(([^)#\s]+)[^)]*\)")


def main() -> None:
    """Lay out the pages anew and build the site from them."""
    shutil.rmtree(PAGES, ignore_errors=True)
    for page in [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md")), *recipe_pages()]:
        write(page.relative_to(ROOT), page.read_text())
        for file in linked_files(page):
            write(file.relative_to(ROOT), file.read_bytes())
    for notebook in sorted(ROOT.glob("docs/**/*.ipynb")):
        write(notebook.relative_to(ROOT).with_suffix(".md"), notebook_page(notebook))
    for room, parts in rooms().items():
        write(Path("api", f"{room}.md"), "\n".join(section(part, level=1 + (i > 0)) for i, part in enumerate(parts)))
    write(Path(".nav.md"), navigation())
    build()


def build() -> None:
    """Run zensical, and fail where a link or a docstring is wrong."""
    command = [sys.executable, "-m", "zensical", "build", "--clean", "--strict"]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    sys.stdout.write(done.stdout)
    if (
        done.returncode or "griffe: " in done.stdout
    ):  # griffe reads the docstrings, and zensical lets its warnings pass
        sys.exit("The site is not right: see the warnings above.")


def write(path: Path, content: str | bytes) -> None:
    """Write a page or another file to its place; where a page leads to a notebook, it leads to the notebook's page."""
    target = PAGES / path
    target.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, str):
        content = content.replace(".ipynb)", ".md)").encode()
    target.write_bytes(content)


def recipe_pages() -> list[Path]:
    """Return the pages of the recipes, the list of them first."""
    return sorted(ROOT.glob("recipes/**/*.md"))


def linked_files(page: Path) -> list[Path]:
    """Return what a page links to and is no page: images, YAMLs, the licence."""
    targets = [(page.parent / target).resolve() for _, target in LINK.findall(page.read_text())]
    return [file for file in targets if file.is_file() and file.suffix not in {".md", ".ipynb"}]


def notebook_page(notebook: Path) -> str:
    """Return a notebook as Markdown: its texts, and its code in blocks."""
    cells = [(cell["cell_type"], "".join(cell["source"])) for cell in json.loads(notebook.read_text())["cells"]]
    return "\n\n".join(f"```python\n{text}\n```" if kind == "code" else text for kind, text in cells) + "\n"


def rooms() -> dict[str, list[Path]]:
    """Return what the page of each room of the library describes: packages and modules."""
    packages = sorted(path.parent for path in LIBRARY.glob("*/__init__.py"))
    top = {LIBRARY.name: [LIBRARY, *sorted(LIBRARY.glob("[!_]*.py"))]}
    return top | {package.name: list(documented(package)) for package in packages}


def documented(package: Path) -> Iterator[Path]:
    """Yield a package, its modules where it exports no names itself, and the packages in it with theirs."""
    yield package
    if not exported(package):
        yield from sorted(package.glob("[!_]*.py"))
    for inner in sorted(package.glob("*/__init__.py")):
        yield from documented(inner.parent)


def exported(package: Path) -> list[str]:
    """Return the public names in a package's `__all__`; none where it has no such list."""
    for node in ast.parse((package / "__init__.py").read_text()).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", None) == "__all__":
            return [name for name in ast.literal_eval(node.value) if not name.startswith("_")]
    return []


def section(part: Path, level: int) -> str:
    """Return the blocks that mkdocstrings fills with the public names of a package or module."""
    name = ".".join(part.relative_to(ROOT).with_suffix("").parts)
    if not part.is_dir():
        return block(name, heading_level=level)
    # griffe finds the module where a function is called as its module is.
    hidden = [each for each in exported(part) if (part / f"{each}.py").is_file()]
    blocks = [block(f"{name}.{each}.{each}", heading_level=level + 1) for each in hidden]
    return "\n".join([block(name, heading_level=level, members=exported(part)), *blocks])


def block(name: str, **options: Any) -> str:
    """Return the Markdown that mkdocstrings replaces by what a docstring says."""
    return f"::: {name}\n    options: {json.dumps(options)}\n"


def navigation() -> str:
    """Return the tree of pages: the groups of docs/index.md, the recipes, and the rooms of the library."""
    lines = ["* [rlhf-recipes](README.md)", "* [All pages](docs/index.md)"]
    for group in re.split(r"(?m)^## ", (ROOT / "docs" / "index.md").read_text())[1:]:
        name, _, table = group.partition("\n")
        lines += [f"* {name}", *(entry(t[0].upper() + t[1:], f"docs/{to}") for t, to in LINK.findall(table))]
    lines += ["* Recipes", *(entry(heading(page), page.relative_to(ROOT)) for page in recipe_pages())]
    lines += ["* Library", *(entry(room, f"api/{room}.md") for room in rooms())]
    return "\n".join(lines) + "\n"


def entry(title: str, target: str | Path) -> str:
    """Return a line of the navigation within a group."""
    return f"    * [{title}]({target})"


def heading(page: Path) -> str:
    """Return the title of a page, its first line."""
    return page.read_text().partition("\n")[0].removeprefix("# ")


if __name__ == "__main__":
    main()
