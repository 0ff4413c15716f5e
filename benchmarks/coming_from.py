"""Install other PPO libraries, one after the other, and compare what they compute with docs/coming_from.md.

    python benchmarks/coming_from.py [TRL verl OpenRLHF torchtune Stable-Baselines3]

Each library is installed from PyPI at its pinned version into a temporary folder, without what it depends on: its code
for PPO needs only the torch and numpy of this environment. Ends with 1 if a number of the page is another one.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import coming_from_page as page
from coming_from_formulas import FORMULAS
from coming_from_theirs import BATCHES, masked, openrlhf_kl_coef, verl_kl_coef

COEFFICIENTS = {"verl": verl_kl_coef, "OpenRLHF": openrlhf_kl_coef}


def install(library: str, folder: Path) -> None:
    """Install the pinned version, without dependencies."""
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder)]
    subprocess.run([*pip, page.PINNED[library]], check=True)


def cell(formula) -> str:
    """A number as the page writes it, or the error that it raises."""
    try:
        return page.text(formula())
    except ValueError:
        return "ValueError"


def found_on_batches(library: str, folder: Path) -> dict[tuple[str, str], str]:
    """What a library makes of the page's batches: numbers by rows and name."""
    found = {}
    for rows in page.ROWS:
        batch = page.batch(rows)
        for name, value in masked(BATCHES[library](folder, batch), batch["mask"]).items():
            found[rows, name] = page.text(value)
    return found


def written_on_batches(library: str) -> dict[tuple[str, str], str]:
    """What the page says that it makes of them."""
    return {(rows, name): theirs for rows, name, theirs, _ in page.lines(library)}


def found_formulas(library: str, folder: Path) -> dict[str, str]:
    """What a library gives for the formulas that it has."""
    return {name: cell(formula) for name, formula in FORMULAS[library](folder).items()}


def written_formulas(library: str) -> dict[str, str]:
    """What the page says that it gives."""
    return {name: values[library] for name, values in page.formulas().items() if library in values}


def coefficients(folder: Path, library: str) -> dict[tuple[str, str], str]:
    """The KL coefficient after a rollout with an adaptive controller, by rows."""
    given = page.settings("## The adaptive KL coefficient")
    start, target, horizon = (given[name] for name in ("kl_coef", "kl_target", "kl_horizon"))
    after = COEFFICIENTS[library]
    return {(rows, library): page.text(after(folder, page.batch(rows), start, target, horizon)) for rows in page.ROWS}


def written_coefficients(library: str) -> dict[tuple[str, str], str]:
    """What the page says that it is."""
    column = {"verl": 1, "OpenRLHF": 2}[library]
    return {(row[0], library): row[column] for row in page.table("## The adaptive KL coefficient")}


def differences(found: dict, written: dict) -> list[str]:
    """Lines about what the page does not say, says of nothing, or says otherwise."""
    keys = [*found, *(key for key in written if key not in found)]
    return [
        f"  {key}: found {found.get(key)}, on the page {written.get(key)}"
        for key in keys
        if found.get(key) != written.get(key)
    ]


def main() -> int:
    """Check the libraries that are named, by default all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("libraries", nargs="*", default=list(page.PINNED), help=", ".join(page.PINNED))
    wrong = 0
    for library in parser.parse_args().libraries:
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place)
            install(library, folder)
            found, formulas = found_on_batches(library, folder), found_formulas(library, folder)
            lines = differences(found, written_on_batches(library)) + differences(formulas, written_formulas(library))
            if library in COEFFICIENTS:
                lines += differences(coefficients(folder, library), written_coefficients(library))
        print(f"{page.PINNED[library]}: {len(found) + len(formulas)} numbers, {len(lines)} other than on the page")
        print("\n".join(lines), end="\n" if lines else "")
        wrong += len(lines)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
