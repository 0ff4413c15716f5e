"""Where the recipes are: in the installed package, or beside it in a clone."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parents[2]


def recipes_folder() -> Path:
    """Find the folder of the recipes.

    Returns:
        `rlhf_recipes/recipes` of an installed wheel, or `recipes` beside the package in a clone.

    Raises:
        FileNotFoundError: If there is neither.

    Example:
        >>> (recipes_folder() / "ppo.py").is_file()
        True
    """
    for folder in (_PACKAGE / "recipes", _PACKAGE.parent / "recipes"):
        if (folder / "ppo.py").is_file():
            return folder
    raise FileNotFoundError(f"The recipes are neither in {_PACKAGE} nor beside it. Install rlhf-recipes again.")


def recipe_names() -> list[str]:
    """List the recipes: the folders with a `run.sh`.

    Example:
        >>> "quickstart" in recipe_names()
        True
    """
    return sorted(path.parent.name for path in recipes_folder().glob("*/run.sh"))
