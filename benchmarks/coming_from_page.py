"""What docs/coming_from.md says: its batch, the fields for each library, and the numbers of its tables."""

import re
from pathlib import Path

import torch
import yaml

PAGE = Path(__file__).resolve().parents[1] / "docs" / "coming_from.md"
PINNED = {
    "TRL": "trl==1.12.0",
    "verl": "verl==0.9.1",
    "OpenRLHF": "openrlhf==0.11.2",
    "torchtune": "torchtune==0.6.1",
    "Stable-Baselines3": "stable-baselines3==2.9.2",
}
ROWS = ("whole", "cut")


def heading(library: str) -> str:
    """The heading of a library's section, which names the version."""
    return f"## {library} {PINNED[library].split('==')[1]}"


def section(title: str) -> str:
    """Text under a heading, up to the next one of the same level."""
    text = PAGE.read_text().split(f"\n{title}\n", 1)[1]
    return re.split(r"(?m)^## ", text, maxsplit=1)[0]


def settings(title: str) -> dict:
    """The YAML block of a section."""
    return yaml.safe_load(re.search(r"(?ms)^```yaml\n(.*?)^```", section(title))[1])


def batch(rows: str) -> dict[str, torch.Tensor]:
    """The page's batch: `whole`, or `cut`, whose last row has no third token."""
    found = {name: torch.tensor(numbers) for name, numbers in settings("## The batch").items()}
    found["mask"] = torch.ones(found["logps"].shape, dtype=torch.long)
    if rows == "cut":
        found["mask"][-1, -1] = 0
    return found


def table(title: str) -> list[list[str]]:
    """Cells of the first table of a section, without its head."""
    body = re.search(r"(?m)^\|[ |:-]+\|\n((?:\|.*\n)+)", section(title))
    assert body is not None, f"{title} has no table"
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in body[1].splitlines()]


def lines(library: str) -> list[tuple[str, str, str, str]]:
    """Rows, name, the library's number and ours for each number of a table, where ours follows if it differs."""
    found = []
    for name, *cells in table(heading(library)):
        for rows, cell in zip(ROWS, cells, strict=True):
            theirs, _, here = cell.partition(" / ")
            assert here != theirs, "ours follows where it differs"
            found.append((rows, name, theirs, here or theirs))
    return found


def formulas() -> dict[str, dict[str, str]]:
    """What each formula gives, by the name of the library, with ours under `here`."""
    found = {}
    for name, _, here, same, others in table("## Formulas"):
        found[name] = {"here": here, **{library: here for library in same.split(", ") if library}}
        for other in others.split("; ") if others else []:
            libraries, value = other.split(": ")
            found[name] |= dict.fromkeys(libraries.split(", "), value)
        assert set(found[name]) <= {"here", *PINNED}
    return found


def numbers(cell: str) -> list[float]:
    """The numbers that a cell gives, in their order."""
    return [float(text) for text in re.findall(r"(?<![\w.])-?(?:\d+\.\d+|\d+|\.\d+|nan)(?![\w.])", cell)]


def text(values: torch.Tensor | list[float] | float) -> str:
    """Write numbers as the page does: six digits after the point, no zeros at the end, rows divided by `;`."""
    rows = torch.as_tensor(values, dtype=torch.float64)
    if rows.dim() > 1:
        return "; ".join(text(row) for row in rows)
    rounded = [round(value, 6) + 0.0 for value in rows.reshape(-1).tolist()]  # without a sign of 0
    return " ".join(f"{value:.6f}".rstrip("0").rstrip(".") for value in rounded)
