"""The pages show what the certificate measures: both have the same pairs."""

from tests.tools.certificate.conftest import pairs, rule_scorer, samples, train_pairs, write_rows

__all__ = ["pairs", "rule_scorer", "samples", "train_pairs", "write_rows"]
