"""The wheel carries the folder `recipes` as `rlhf_recipes/recipes`. All else is in pyproject.toml."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["rlhf_recipes*"]), "rlhf_recipes.recipes"],
    package_dir={"rlhf_recipes.recipes": "recipes"},
)
