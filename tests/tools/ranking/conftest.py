"""Rows in files."""

from tests.tools.certificate.conftest import write_rows

__all__ = ["write_rows"]
