"""Evaluation: statistics, and the comparison of a policy with its reference."""
