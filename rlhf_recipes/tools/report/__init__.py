"""A report of runs from what is on disk: one HTML file without scripts or network, and its plots as PNGs."""

from rlhf_recipes.tools.report.writing import write_report

__all__ = ["write_report"]
